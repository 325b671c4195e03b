"""Accuracy of the students of a list of runs on corrupted and on adversarial test images.

    python -m benchmarks quality benchmarks/lists/cifar10_noisy.yaml
    python -m benchmarks robustness benchmarks/lists/cifar10_noisy.yaml --data $DATA/cifar10

Corruptions are the 15 of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261), by imagecorruptions-imaug; the attack
is projected gradient descent by the Adversarial Robustness Toolbox, within 0.031 of each pixel (images in [0, 1]), 20
steps of 0.003 from the clean image. Every student gets the same images, drawn from the test file by a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from datasets import load_dataset
from torch import nn

import kd_timm.models  # noqa: F401  (registers the networks)
from benchmarks.quality import folder_name
from benchmarks.timing import machine, print_table, write

EPSILON, STEP, STEPS = 0.031, 0.003, 20


class Normalized(nn.Module):
    """A network that takes images in [0, 1]."""

    def __init__(self, model: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mean) / self.std)


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Percent of images `[N, 3, H, W]` in [0, 1] that are classified right."""
    with torch.inference_mode():
        found = torch.cat([model(torch.from_numpy(part)).argmax(1) for part in np.array_split(images, 10)])
    return 100 * float((found.numpy() == labels).mean())


def planes(images: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, 3]` of bytes as planes in [0, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / 255


def measure(run: Path, clean: np.ndarray, corrupted: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """One student's accuracy on the test images, clean, corrupted and attacked."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    config = json.loads((run / "config.json").read_text())
    name = json.loads((run / "results.json").read_text())["model"]
    student = timm.create_model(name, num_classes=10, checkpoint_path=str(run / "last.safetensors"))
    model = Normalized(student, config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]).eval()
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), clean.shape[1:], 10, clip_values=(0.0, 1.0))
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPSILON, eps_step=STEP, max_iter=STEPS, batch_size=250, verbose=False
    )
    return {
        "clean": accuracy(model, clean, labels),
        "corrupted": statistics.mean(accuracy(model, x, labels) for x in corrupted.values()),
        "attacked": accuracy(model, attack.generate(clean, labels), labels),
    }


def main(argv: list[str]) -> int:
    from imagecorruptions import corrupt, get_corruption_names

    parser = argparse.ArgumentParser(prog="python -m benchmarks robustness", description=__doc__.splitlines()[0])
    parser.add_argument("list", help="the YAML list whose runs are done")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 as `datasets` reads it")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--severity", type=int, default=3, help="of the corruptions, 1 to 5")
    parser.add_argument("--output", default="output/quality", help="where the runs are")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (what the corruptions draw from)
    test = load_dataset(args.data, split="test").shuffle(seed=0).select(range(args.images))
    images, labels = np.stack([np.asarray(row) for row in test["img"]]), np.asarray(test["label"])
    corrupted = {
        name: planes(np.stack([corrupt(x, severity=args.severity, corruption_name=name) for x in images]))
        for name in get_corruption_names()
    }
    spec, root, rows = yaml.safe_load(Path(args.list).read_text()), Path(args.output) / Path(args.list).stem, {}
    for row in spec["rows"]:
        found = {
            seed: measure(run, planes(images), corrupted, labels)
            for seed in spec["seeds"]
            for run in sorted(root.glob(f"{folder_name(row)}/seed{seed}/*/"))
            if (run / "results.json").is_file()
        }
        if found:
            rows[row] = {key: {str(s): v[key] for s, v in found.items()} for key in next(iter(found.values()))}
            print(row, rows[row], flush=True)
    stem = f"benchmarks/results/{Path(args.list).stem}_robustness.json"
    about = {"images": args.images, "severity": args.severity, "corruptions": list(corrupted)}
    write(
        stem, {"machine": machine(), **about, "rows": {k: {"flags": "", **v, "seconds": {}} for k, v in rows.items()}}
    )
    table = [[row, *(f"{statistics.mean(v.values()):.1f}" for v in values.values())] for row, values in rows.items()]
    print_table("Accuracy in percent", ["", *next(iter(rows.values()), {})], table)
    return 0
