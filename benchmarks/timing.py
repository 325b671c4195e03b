"""Comparing callables in one process: interleaved in random order, medians and ratios."""

from __future__ import annotations

import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

__all__ = ["compare", "machine", "measured", "peak_bytes", "peak_mib", "print_table", "ratios", "write"]


def compare(cases: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Process CPU seconds of every case, one list each, the cases taken in random order in every round.

    CPU time and not wall time: the machines are shared.
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name in random.sample(list(cases), len(cases)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                start = time.perf_counter()
            else:
                start = time.process_time()
            cases[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            else:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median of the paired ratios to one case."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True))
        for name, values in seconds.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def measured(*words: str) -> dict[str, Any]:
    """What `python -m benchmarks WORDS` prints last, as JSON: peak memory is that of a process, so each has its own."""
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_bytes(step: Callable[[], Any], *, cuda: bool = False) -> int:
    """The bytes that a step allocates at most beyond what there was: of the CPU's memory, or of the GPU's."""
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


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table; the first column is text."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row])
    Console(width=None if Console().is_terminal else 160).print(table)


def write(path: str | Path, data: Any) -> None:
    """Writes results as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(data, indent=2) + "\n")
