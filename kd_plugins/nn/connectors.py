"""Trained parts between a student's map and a teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins.functional._common import no_autocast


def as_weights(part: nn.Module | None, x: Tensor) -> Tensor:
    """A tensor in the precision of a part's weights, which networks in bfloat16 do not share with parts of ours.

    >>> as_weights(nn.Linear(2, 2), torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    weight = None if part is None else next(part.parameters(), None)
    return x if weight is None else x.to(weight.dtype)


def hint_regressor(student: Tensor, teacher: Tensor) -> nn.Conv2d:
    """The convolution without padding that brings a student's map to the teacher's channels and size.

    Romero et al., ICLR 2015, arXiv 1412.6550, section 2.2: its kernel is as large as the sizes differ, plus one, which
    is a 1x1 convolution for maps of one size. A height or width that is the smaller one already is kept.

    Args:
        student: `[B, C_s, H_s, W_s]`.
        teacher: `[B, C_t, H_t, W_t]`.

    >>> hint_regressor(torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 6, 8))
    Conv2d(4, 6, kernel_size=(3, 1), stride=(1, 1))
    """
    kernel = [max(ours - theirs, 0) + 1 for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return nn.Conv2d(student.shape[1], teacher.shape[1], (kernel[0], kernel[1]))


class GaussianRegressor(nn.Module):
    """Predicts a map as a Gaussian: the mean at every position, and one variance for each channel.

    Ahn et al., CVPR 2019, arXiv 1904.05835: the mean by 1x1 convolutions `[B, C_s, H, W]` to `[B, C_t, H, W]`, the
    variance `softplus(alpha) + eps`, both trained.

    Departures: three convolutions with ReLU between them and no bias, the first variance and eps are the public code's
    (read there).

    Args:
        student: C_s.
        teacher: C_t, also the hidden width.
        variance: The variance at first, without eps.
        eps: The least variance.

    >>> mean, variance = GaussianRegressor(4, 6)(torch.zeros(2, 4, 3, 3))
    >>> mean.shape, variance.detach().round()
    (torch.Size([2, 6, 3, 3]), tensor([5., 5., 5., 5., 5., 5.]))
    """

    def __init__(self, student: int, teacher: int, variance: float = 5.0, eps: float = 1e-5) -> None:
        super().__init__()
        widths = (student, teacher, teacher), (teacher, teacher, teacher)
        first, second, last = (nn.Conv2d(a, b, 1, bias=False) for a, b in zip(*widths, strict=True))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        self.alpha = nn.Parameter(torch.full((teacher,), variance + math.log(-math.expm1(-variance))))
        self.eps = eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean `[B, C_t, H, W]` and the variance `[C_t]`."""
        return self.mean(x), F.softplus(self.alpha) + self.eps


class UnitHead(nn.Linear):
    """A linear embedding of length 1, of vectors `[B, C]` to `[B, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        """The embedding, in float32."""
        with no_autocast(x):
            return F.normalize(super().forward(x.float()), dim=1)


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
