"""Tiny networks and data for the shapes: no batch statistics, no dropout, smooth everywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

SEED = 7
ROWS, CLASSES, SIZE = 32, 3, 8
BATCH = 8
EPOCH = ROWS // BATCH
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Gives a module weights that depend on the seed alone, not on what was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return module


class Block(nn.Sequential):
    """Convolution and GELU; counts how often it is called."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GELU())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class TinyNet(nn.Module):
    """Three blocks and a linear classifier: `[B, 3, 8, 8] -> [B, 3]`; layer2 and layer3 give maps of one shape."""

    def __init__(self, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.layer1 = Block(3, width, 1)
        self.layer2 = Block(width, width, 2)
        self.layer3 = Block(width, width, 1)
        self.head = nn.Linear(width, CLASSES)
        fill(self, seed)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class TinyHFNet(TinyNet):
    """The same network as Trainer calls it."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def networks(kind: type[TinyNet], teachers: int, peers: bool) -> tuple[TinyNet, list[TinyNet], list[TinyNet]]:
    """Student, teachers and further peers, always with the same weights."""
    return kind(4, 100), [kind(6, 200 + i) for i in range(teachers)], [kind(4, 300)] if peers else []


class Images(Dataset):
    """Noise around one pattern for each class, in 8 bits; normalised with MEAN and STD."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        patterns = torch.rand(CLASSES, 3, SIZE, SIZE, generator=generator)
        pixels = (patterns[self.labels] + 0.3 * torch.randn(ROWS, 3, SIZE, SIZE, generator=generator)).clamp(0, 1)
        self.pixels = (255 * pixels).to(torch.uint8)
        mean, std = (255 * torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        self.images = ((self.pixels - mean) / std).float()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": self.labels[row]}
