"""Draws the filters of the first convolution of trained networks side by side.

python -m benchmarks filters filters.png --in-chans 1 teacher=lenet5:RUN/last.safetensors student=...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

import kd_timm.models  # noqa: F401  (registers the networks)


def first_filters(name: str, path: str, options: dict[str, int]) -> Tensor:
    """The first convolution's weights `[N, C, k, k]`, each filter in [0, 1], the one of the largest norm first."""
    model = timm.create_model(name, checkpoint_path=path, **options)
    weights = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.detach()
    weights = weights[weights.flatten(1).norm(dim=1).argsort(descending=True)]
    low, high = weights.amin((1, 2, 3), keepdim=True), weights.amax((1, 2, 3), keepdim=True)
    return (weights - low) / (high - low)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks filters", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the picture")
    parser.add_argument("networks", nargs="+", metavar="TITLE=MODEL:FILE", help="a trained network")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--in-chans", type=int, default=3)
    args = parser.parse_args(argv)
    options = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    figure = Figure(figsize=(2.2 * len(args.networks), 2.4), layout="constrained")
    for axes, given in zip(figure.subplots(1, len(args.networks), squeeze=False)[0], args.networks, strict=True):
        title, _, network = given.partition("=")
        grid = make_grid(first_filters(*network.split(":", 1), options), nrow=3, padding=1, pad_value=1.0)
        axes.imshow(grid.movedim(0, 2), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    return 0
