"""Fusion of a network's maps, from deep to shallow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionFusion(nn.Module):
    """Mixes one layer's map with what comes from the deeper layers, each weighted at every position.

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, the ABF module: the map
    `[B, C_s, H, W]` to M channels by a 1x1 convolution, the deeper one resized to it, both weighted by two attention
    maps that a 1x1 convolution and a sigmoid make of them, and added; a 3x3 convolution gives the teacher's channels.

    Departures: batch norm after both convolutions, nearest-neighbour resizing and the initial weights are the released
    code's (read there).

    Args:
        student: C_s.
        middle: M, the same for all layers.
        teacher: C_t.
        deepest: Whether there is nothing deeper.
    """

    def __init__(self, student: int, middle: int, teacher: int, *, deepest: bool = False) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's `[B, C_t, *size]`, and what the next layer gets `[B, M, *size]`.

        Args:
            x: The student's map.
            deeper: What the deeper layer has passed on; None for the deepest.
            size: Height and width of the teacher's map.
        """
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            ours, theirs = self.attention(torch.cat([x, deeper], 1)).split(1, 1)
            x = ours * x + theirs * deeper
        if x.shape[2:] != size:
            x = F.interpolate(x, size)
        return self.expand(x), x
