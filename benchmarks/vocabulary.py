"""Soft labels over a vocabulary at every token: in chunks, and all at once.

    python -m benchmarks vocabulary --batch 4 --length 512 --vocabulary 32000 --dtype bfloat16

One forward and backward of the term alone, on logits that are there already. Reported are seconds, and the memory that
is allocated at most, the gradient included, in units of one float32 copy of the logits.

    python -m benchmarks vocabulary --batch 1 --vocabulary 32000 --dtype float32 --hidden 256

With `--hidden` the logits are made in each step, of hidden vectors and the weights of a head, whose gradients it takes,
and a third way is TRL's kernel, which never has all of them, in pieces of as many numbers.
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
from torch import Tensor

from benchmarks.timing import peak_bytes
from kd_plugins import functional as KF

__all__ = ["main"]


def _trl(heads: Sequence[Sequence[Tensor]], chunk: int) -> Tensor:
    """The term of vectors `[N, H]` and heads `[V, H]` of student and teacher, by TRL."""
    from trl.kernels import chunked_divergence as kernel  # type: ignore[import-not-found]

    kernel.TOKEN_CHUNK_SIZE, kernel.VOCAB_CHUNK_SIZE = 256, max(chunk // 256, 1)
    (x, head), (y, other) = heads
    scale = x.shape[1] ** -0.5
    apart, _ = kernel.ChunkedDivergenceFunction.apply(x, head, None, y, other, None, 0.0, 1.0, scale, None, scale, None)
    return apart.mean()


def main(argv: Sequence[str]) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(prog="benchmarks vocabulary")
    for name, value in (
        ("batch", 4),
        ("length", 512),
        ("vocabulary", 32000),
        ("repeats", 5),
        ("chunk", 2**23),
        ("hidden", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    module: Any = sys.modules["kd_plugins.functional.kd"]
    shape, dtype = (args.batch, args.length, args.vocabulary), getattr(torch, args.dtype)
    torch.manual_seed(0)
    ways: list[tuple[str, int, Callable[[], Tensor]]]
    if args.hidden:
        of = [torch.randn(n, args.hidden, dtype=dtype, device=args.device) for n in (shape[0] * shape[1], shape[2]) * 2]
        trained, heads = of[:2], (of[:2], of[2:])
        for one in trained:
            one.requires_grad_()

        def term() -> Tensor:
            student, teacher = ((x @ head.T * args.hidden**-0.5).view(shape) for x, head in heads)
            return KF.kd(student, teacher, 1.0)

        ways = [
            ("at once", sys.maxsize, term),
            ("chunks", args.chunk, term),
            ("TRL", args.chunk, lambda: _trl(heads, args.chunk)),
        ]
    else:
        student, teacher = (torch.empty(shape, dtype=dtype, device=args.device).normal_() for _ in range(2))
        trained = [student.requires_grad_()]
        ways = [
            (way, chunk, lambda: KF.kd(student, teacher, 2.0))
            for way, chunk in (("at once", sys.maxsize), ("chunks", args.chunk))
        ]
    numbers = shape[0] * shape[1] * shape[2]

    for way, chunk, loss_of in ways:

        def step(loss_of: Callable[[], Tensor] = loss_of) -> tuple[float, float]:
            loss = loss_of()
            gradient = torch.autograd.grad(loss, trained)[0]
            return loss.item(), gradient.flatten()[0].item()

        module._CHUNK, seconds, found = chunk, [], step()
        for _ in range(args.repeats):
            start = time.perf_counter()
            step()  # Ends with a number on the host, which waits for the device.
            seconds.append(time.perf_counter() - start)
        copies = peak_bytes(step, cuda=args.device == "cuda") / (4 * numbers)
        print(json.dumps({"way": way, "seconds": statistics.median(seconds), "copies": copies, "found": found}))
    return 0
