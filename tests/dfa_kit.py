"""Networks with blocks in stages, and batches with held-out ones, for the tests of DFA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch

LR, MOMENTUM = 0.05, 0.9


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + F.gelu(self.conv(x))


class Net(nn.Module):
    """`[B, 3, 8, 8] -> [B, 4]` through maps of 8 x 8 and 4 x 4."""

    def __init__(self, width: int, depth: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, 1, 1)
            self.layer1 = nn.Sequential(*(Block(width, width) for _ in range(depth)))
            self.layer2 = nn.Sequential(
                Block(width, 2 * width, 2), *(Block(2 * width, 2 * width) for _ in range(depth - 1))
            )
            self.head = nn.Linear(2 * width, 4)

    def above(self, x: Tensor) -> Tensor:
        """From the map of layer2 to the scores."""
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.layer2(self.layer1(self.stem(x))))

    def blocks(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of all blocks, by layer."""
        found = []
        x = self.stem(x)
        for layer in (self.layer1, self.layer2):
            maps = []
            for block in layer:
                x = block(x)
                maps.append(x)
            found.append(maps)
        return found[0], found[1]


def pair(depth: int = 3) -> tuple[Net, Net]:
    return Net(4, 1, 0), Net(6, depth, 1).eval().requires_grad_(False)


def batches(count: int = 4, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)

    def one(**streams: Any) -> Batch:
        images = torch.randn(size, 3, 8, 8, generator=generator)
        return Batch.of(images, torch.randint(4, (size,), generator=generator), **streams)

    return [one(streams={"search": one()}) for _ in range(count)]
