"""NST on a detector: Faster R-CNN with maps of stride 16 (38 x 50) in a bare loop, on one and on two photographs."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet101
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import kd_plugins
from benchmarks.timing import machine, measured, peak_mib, print_table, write
from kd_plugins.reading.view import Batch, Reads, View

# Of the two photographs that scikit-learn carries, (x, y, x, y) in pixels of the crop below: the pagoda, the flower.
BOXES = ((10.0, 60.0, 560.0, 330.0), (150.0, 20.0, 480.0, 420.0))
HEIGHT, WIDTH = 427, 569


def detector(resnet: Callable[..., Any], channels: int, weights: str | None) -> FasterRCNN:
    """Faster R-CNN on the output of layer3, as in the paper's experiment: one map of stride 16, no pyramid."""
    backbone = nn.Sequential(*list(resnet(weights=weights).children())[:-3])
    backbone.out_channels = channels
    return FasterRCNN(
        backbone,
        num_classes=21,
        min_size=600,
        max_size=800,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2),
    )


def photographs(count: int) -> Batch:
    """The first photographs, 3:4, so that the network resizes them to 600 x 800."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(x[:HEIGHT, :WIDTH]).permute(2, 0, 1) / 255 for x in load_sample_images().images[:count]]
    targets = [{"boxes": torch.tensor([box]), "labels": torch.tensor([1])} for box in BOXES[:count]]
    return Batch(pictures, targets, {"targets": targets}, task="detection", criterion=losses, size=count)  # type: ignore[arg-type]


def losses(view: View, targets: Any) -> Tensor:
    """The detector's own loss: what it returns in training."""
    return sum(view.output.values())  # type: ignore[no-any-return]


def measure(case: str, images: int, repeats: int, weights: str | None) -> dict[str, Any]:
    """CPU seconds of a step and peak memory, of the student alone or with NST."""
    torch.manual_seed(0)
    batch = photographs(images)
    student = detector(resnet18, 256, weights).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    shape: list[int] = []
    if case == "alone":

        def step() -> dict[str, float]:
            loss = sum(student(batch.inputs, batch.kwargs["targets"]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"task": loss.item()}
    else:
        distiller = kd_plugins.create_distiller("nst", layers=("backbone",))
        nets = kd_plugins.bind(distiller, student, detector(resnet101, 1024, weights))
        optimizers = kd_plugins.make_optimizers(distiller, optimizer)

        def step() -> dict[str, float]:
            terms: dict[str, float] = {}
            for turn in distiller.turns(nets, batch):
                terms |= {name: float(value.detach()) for of_group in turn.values() for name, value in of_group.items()}
                kd_plugins.play(turn, optimizers)
            return terms

    terms, seconds = [], []
    for _ in range(repeats + 1):
        start = time.process_time()
        terms.append(step())
        seconds.append(time.process_time() - start)
    if case != "alone":
        with torch.no_grad():
            seen = nets.student(batch, reads=Reads(logits=False, features=("backbone",)))
        shape = list(seen.features["backbone"].shape)
    found = {"seconds": statistics.median(seconds[1:]), "mib": peak_mib(), "map": shape}
    return {**found, "first": terms[0], "last": terms[-1]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks detector", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="steps for each figure, after one that is not counted")
    parser.add_argument("--weights", help="of torchvision's backbones, such as IMAGENET1K_V1; random by default")
    parser.add_argument("--output", default="benchmarks/results/detector.json", help="where the JSON goes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        case, images = args.measure
        print(json.dumps(measure(case, int(images), args.repeats, args.weights)))
        return 0
    rows, results = [], {}
    command = ["detector", "--repeats", str(args.repeats), *(["--weights", args.weights] if args.weights else [])]
    for images in (1, 2):
        found = {}
        for case in ("alone", "nst"):
            found[case] = measured(*command, "--measure", case, str(images))
        alone, nst = found["alone"], found["nst"]
        size = " x ".join(str(n) for n in nst["map"])
        rows.append([images, size, alone["seconds"], nst["seconds"], alone["mib"], nst["mib"]])
        results[f"{images} image{'s' * (images > 1)}"] = found
    columns = ["images", "student's map", "alone, CPU s", "nst, CPU s", "alone, MiB", "nst, MiB"]
    print_table(
        "Faster R-CNN, ResNet-101 teaches ResNet-18: a training step, peak memory of the process", columns, rows
    )
    write(args.output, {"machine": machine(), "steps": results})
    return 0
