"""Starts a program on two processes, and keeps what each of them ends with."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
# Importing takes longer than what most of the programs do: a server has done it, and every process is a fork of that.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kd_timm.train", "kd_transformers.train"])


def torchrun(*words: str, timeout: float = 300) -> str:
    """Runs `torchrun WORDS` on two processes of one thread each, and gives what they printed.

    They are programs of their own: only the one that starts them is a fork.
    """
    return on_processes(
        1, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words, timeout=timeout
    )


def on_processes(count: int, *words: str, timeout: float = 300) -> str:
    """Runs `python WORDS` on processes of one thread each with torchrun's environment, and gives what they printed.

    They have the same order of sets and the environment of the first call, unlike those of `torchrun`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{rank}.txt" for rank in range(count)]
        runs = [SERVER.Process(target=_one, args=(i, count, port, words, str(f))) for i, f in enumerate(files)]
        for run in runs:
            run.start()
        end = time.monotonic() + timeout
        try:
            # The others wait for one that has failed. One that ends meanwhile is in the list: an empty one never comes.
            while (left := [run for run in runs if run.exitcode is None]) and not any(run.exitcode for run in runs):
                if not wait([run.sentinel for run in left], max(end - time.monotonic(), 0)):
                    break
            codes = [run.exitcode for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.join()
        said = "".join(file.read_text(errors="replace")[-100_000:] for file in files if file.exists())
    assert codes == [0] * count, f"{codes}: {said[-6000:]}"
    return said


def on_two_processes(*words: str, timeout: float = 300) -> str:
    """`on_processes` with two."""
    return on_processes(2, *words, timeout=timeout)


def _one(rank: int, count: int, port: int, words: tuple[str, ...], file: str) -> None:
    said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    environment = {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= environment | ({key: str(value) for key, value in place.items()} if count > 1 else {})
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # as in conftest.py
    # Every process has random streams of its own, as where each is started; Python sees to its own after a fork.
    np.random.seed()
    torch.seed()
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path[:0] = [str(HERE), str(HERE / "timm")]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[:0] = [str(Path(words[0]).parent), str(HERE), str(HERE / "timm")]
        runpy.run_path(words[0], run_name="__main__")


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
