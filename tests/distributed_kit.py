"""Starts a program on two processes, and keeps what each of them ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def on_two_processes(*words: str, timeout: int = 300) -> str:
    """Runs `python WORDS` on two processes of one thread each, and gives what they printed."""
    paths = os.pathsep.join([str(HERE), str(HERE / "timm"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def keep(result: Any, folder: str | Path) -> None:
    """Saves what this process ended with, and ends it."""
    torch.save(result, Path(folder) / f"{torch.distributed.get_rank()}.pt")
    leave()


def leave() -> None:
    """Ends this process at once, when both have come here: a thread of gloo may abort a process at its exit."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def kept(folder: Path) -> list[Any]:
    """What the two processes ended with."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
