"""Soft labels over a vocabulary at every token: in chunks, and all at once.

    python -m benchmarks vocabulary --batch 4 --length 512 --vocabulary 32000 --dtype bfloat16

One forward and backward of the term alone, on logits that are there already. Reported are seconds, and the memory that
is allocated at most, the gradient included, in units of one float32 copy of the logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kd_plugins import functional as KF

__all__ = ["main"]


def _peak(step: Callable[[], Any], cuda: bool) -> int:
    """The bytes that a step allocates at most beyond what there was."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main(argv: Sequence[str]) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(prog="benchmarks vocabulary")
    for name, value in (("batch", 4), ("length", 512), ("vocabulary", 32000), ("repeats", 5), ("chunk", 2**23)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    module: Any = sys.modules["kd_plugins.functional.kd"]
    shape, dtype = (args.batch, args.length, args.vocabulary), getattr(torch, args.dtype)
    torch.manual_seed(0)
    student, teacher = (torch.empty(shape, dtype=dtype, device=args.device).normal_() for _ in range(2))
    student.requires_grad_()

    def step() -> tuple[float, float]:
        loss = KF.kd(student, teacher, 2.0)
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.item(), gradient.flatten()[0].item()

    for way, chunk in (("at once", sys.maxsize), ("chunks", args.chunk)):
        module._CHUNK, seconds, found = chunk, [], step()
        for _ in range(args.repeats):
            start = time.perf_counter()
            step()  # Ends with a number on the host, which waits for the device.
            seconds.append(time.perf_counter() - start)
        copies = _peak(step, args.device == "cuda") / (4 * student.numel())
        print(json.dumps({"way": way, "seconds": statistics.median(seconds), "copies": copies, "found": found}))
    return 0
