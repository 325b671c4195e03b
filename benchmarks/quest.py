"""QuEST's loss in pieces, against all scores at once as the released code has them: time and peak memory, by shape."""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import machine, measured, peak_mib, print_table, write
from kd_plugins import functional as KF

# Batch, channels of the student and of the teacher, height and width, words.
SHAPES = {
    "CIFAR, 64 x 64 x 8 x 8, K = 4096": (64, 64, 64, 8, 8, 4096),
    "CIFAR, 64 x 256 x 8 x 8, K = 4096": (64, 256, 256, 8, 8, 4096),
    "CIFAR, 64 x 64 x 8 x 8, K = 256": (64, 64, 64, 8, 8, 256),
    "ImageNet, 256 x 512 x 7 x 7, K = 4096": (256, 512, 512, 7, 7, 4096),
}


def at_once(student: Tensor, teacher: Tensor, weight: Tensor, scale: Tensor, words: Tensor) -> Tensor:
    """As the released code computes it: distances, targets and scores as maps of K channels, in autograd's hands."""
    with torch.no_grad():
        f_t = teacher.permute(0, 2, 3, 1).flatten(0, 2)
        distances = f_t.square().sum(1, keepdim=True) - 2 * f_t @ words.mT + words.square().sum(1)
        targets = (-5 * distances).softmax(1)
    kernel = (scale * F.normalize(weight, dim=1))[:, :, None, None]
    scores = F.conv2d(F.normalize(student, dim=1), kernel).permute(0, 2, 3, 1).flatten(0, 2)
    return F.kl_div(scores.log_softmax(1), targets, reduction="batchmean")


def measure(form: str, shape: str, repeats: int) -> dict[str, float]:
    """Seconds (median of CPU time) and peak memory of forward and backward, in a process of its own."""
    batch, c_s, c_t, height, width, words = SHAPES[shape]
    torch.manual_seed(0)
    student, weight, scale = torch.randn(batch, c_s, height, width), torch.randn(words, c_s), torch.tensor(3.0)
    teacher, codebook = torch.randn(batch, c_t, height, width).relu(), torch.randn(words, c_t).relu()
    learned = [x.requires_grad_() for x in (student, weight, scale)]
    before, seconds = peak_mib(), []
    for _ in range(repeats):
        start = time.process_time()
        loss = (at_once if form == "at once" else KF.quest)(student, teacher, weight, scale, codebook)
        loss.backward()
        seconds.append(time.process_time() - start)
        for x in learned:
            x.grad = None
    whole = peak_mib()
    return {
        "ms": sorted(seconds)[len(seconds) // 2] * 1e3,
        "mib": whole - before,
        "process_mib": whole,
        "loss": loss.item(),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quest", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="forward and backward passes for each figure")
    parser.add_argument("--output", default="benchmarks/results/quest.json", help="where the JSON goes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.repeats)))
        return 0
    rows, results = [], {}
    for shape in SHAPES:
        found: dict[str, dict[str, float]] = {}
        for form in ("ours", "at once"):
            found[form] = measured("quest", "--repeats", str(args.repeats), "--measure", form, shape)
        ours, theirs = found["ours"], found["at once"]
        rows.append([shape, ours["ms"], ours["mib"], ours["process_mib"], theirs["ms"], theirs["mib"]])
        results[shape] = found
    columns = ["maps", "ours, CPU ms", "ours, MiB", "whole process, MiB", "at once, CPU ms", "at once, MiB"]
    print_table("QuEST, forward and backward, one thread", columns, rows)
    write(args.output, {"machine": machine(), "shapes": results})
    return 0
