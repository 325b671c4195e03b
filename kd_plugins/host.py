"""What a host gives a method: random streams that resume, and means over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Host:
    """Random streams and means over processes, as `self.host` of every method.

    The streams are saved in checkpoints. Their seed is torch's own where no host has set one.

    Attributes:
        task: What the scores are, as `Batch.task` has it, where that is known before there is a batch.
    """

    def __init__(self) -> None:
        self.task = ""
        self._seed: int | None = None
        self._generators: dict[str, torch.Generator] = {}

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all processes, through which gradients flow."""
        return x if world()[1] == 1 else _MeanOverProcesses.apply(x)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """This process's own random stream."""
        return self._stream("own", device)

    def randn(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal noise `[rows, *shape]` that is the same however many processes share the batch.

        Every process draws the rows of all processes from one common stream and keeps its own.
        """
        rank, processes = world()
        noise = torch.randn(rows * processes, *shape, generator=self._stream("common", device), device=device)
        return noise[rank * rows : (rank + 1) * rows]

    def seed(self, seed: int) -> None:
        """Starts the streams anew from a seed that all processes share; hosts seed torch differently on each."""
        self._seed = seed
        self.load({})

    def state(self) -> dict[str, Tensor]:
        """States of the streams, for a checkpoint of this process."""
        return {key: generator.get_state() for key, generator in self._generators.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the streams of a checkpoint; those that it does not have start anew."""
        for key, generator in self._generators.items():
            generator.manual_seed(self._seed_of(key.partition(":")[0]))
        for key, value in state.items():
            kind, _, device = key.partition(":")
            self._stream(kind, device).set_state(value)

    def _stream(self, kind: str, device: torch.device | str) -> torch.Generator:
        key = f"{kind}:{torch.device(device).type}"
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed_of(kind))
        return self._generators[key]

    def _seed_of(self, kind: str) -> int:
        seed = torch.initial_seed() if self._seed is None else self._seed
        return (seed + (world()[0] if kind == "own" else 0)) % 2**63


class _MeanOverProcesses(torch.autograd.Function):
    """Mean over processes whose gradient, averaged over processes as gradients are, is that of the global mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _MeanOverProcesses.apply(grads[0])  # It has a gradient too: optimizers of second order ask for it.


def _mean(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
