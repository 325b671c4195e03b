"""NST's loss in the form it is computed in, against the broadcast of public code: time and peak memory, by shape."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import machine, measured, peak_mib, print_table, write
from kd_plugins import functional as KF

SHAPES = {
    "resnet32x4 stage 3, 256 x 8 x 8": (64, 256, 256, 8, 8),
    "resnet32x4 stage 1, 64 x 32 x 32": (64, 64, 64, 32, 32),
    "CIFAR ResNet-50 stage 3, 2048 x 4 x 4": (64, 2048, 2048, 4, 4),
    "CIFAR ResNet-50 stage 1, 256 x 32 x 32": (64, 256, 256, 32, 32),
    "ImageNet ResNet-101 last, 2048 x 7 x 7": (64, 2048, 2048, 7, 7),
    "detector, 512 x 38 x 50, one image": (1, 512, 1024, 38, 50),
}
KERNELS = ("poly", "linear", "gaussian")


def broadcast(student: Tensor, teacher: Tensor) -> Tensor:
    """The polynomial kernel as public code computes it: every product of two channels' maps is materialised."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean(dim=(1, 2))

    return (kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)).mean()


def measure(form: str, shape: str, repeats: int) -> dict[str, float]:
    """Seconds (median of CPU time) and growth of peak memory of forward and backward, in a process of its own."""
    batch, c_s, c_t, height, width = SHAPES[shape]
    student, teacher = (
        torch.randn(batch, c_s, height, width, requires_grad=True),
        torch.randn(batch, c_t, height, width),
    )
    loss = broadcast if form == "broadcast" else partial(KF.nst, kernel=form)
    before, seconds = peak_mib(), []
    for _ in range(repeats):
        start = time.process_time()
        loss(student, teacher).backward()
        seconds.append(time.process_time() - start)
        student.grad = None
    return {"ms": sorted(seconds)[len(seconds) // 2] * 1e3, "mib": peak_mib() - before}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks nst", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="forward and backward passes for each figure")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="leave out the broadcast where it would take more")
    parser.add_argument("--output", default="benchmarks/results/nst.json", help="where the JSON goes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.repeats)))
        return 0
    rows, results = [], {}
    for shape, (batch, c_s, c_t, height, width) in SHAPES.items():
        found: dict[str, dict[str, float]] = {}
        # The broadcast keeps the products of student and student, and of student and teacher, for its backward pass.
        needed = 4 * batch * height * width * (c_s * c_s + c_s * c_t + c_t * c_t) / 2**30
        for form in (*KERNELS, *(["broadcast"] if needed <= args.limit_gib else [])):
            found[form] = measured("nst", "--repeats", str(args.repeats), "--measure", form, shape)
        ours, theirs = found["poly"], found.get("broadcast")
        ratio = [theirs["ms"] / ours["ms"], theirs["mib"]] if theirs else ["-", f"> {needed:.0f} GiB needed"]
        rows.append(
            [
                shape,
                ours["ms"],
                ours["mib"],
                theirs["ms"] if theirs else "-",
                *reversed(ratio),
                *(found[kernel]["ms"] for kernel in KERNELS[1:]),
            ]
        )
        results[shape] = found
    columns = ["maps (batch 64 or 1)", "ours, CPU ms", "ours, MiB", "broadcast, CPU ms", "broadcast, MiB", "x faster"]
    columns += [f"{kernel}, CPU ms" for kernel in KERNELS[1:]]
    print_table("NST, polynomial kernel but for the last columns, forward and backward, one thread", columns, rows)
    write(args.output, {"machine": machine(), "shapes": results})
    return 0
