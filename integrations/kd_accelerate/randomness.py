"""The random streams of a process: those of Python, NumPy and torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(*, gpu: bool = False) -> dict[str, Any]:
    """The state of all random streams, as `torch.load` reads it without code; that of the GPU where asked for."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if gpu and torch.cuda.is_available() else None,
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Sets all random streams to a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def undisturbed(*, gpu: bool = False) -> Iterator[None]:
    """Runs a block whose draws of random numbers leave no trace outside it; a worker must not touch a GPU."""
    state = random_state(gpu=gpu)
    try:
        yield
    finally:
        load_random_state(state)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers follow from a key, and go on afterwards as if nothing had been."""
    first, second = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    with undisturbed():
        random.seed(first << 32 | second)
        np.random.seed(first)  # noqa: NPY002
        # The generator of the CPU alone: a worker must not touch a GPU.
        torch.default_generator.manual_seed(first << 32 | second)
        yield
