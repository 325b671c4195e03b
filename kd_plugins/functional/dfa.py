"""The loss of DFA: a weighted sum of a teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kd_plugins.functional._common import exactly

__all__ = ["aggregate"]


def aggregate(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of feature maps, in float32.

    Guan, Zhao, Wang, Zhang, Yao, Bian, Tang, "Differentiable Feature Aggregation Search for Knowledge Distillation",
    ECCV 2020, arXiv 2008.00506: `A = sum_j alpha_j T_j` over the layers of one group.

    Args:
        maps: One or more tensors of one shape `[B, ...]`.
        weights: `[N]`, one for each map; they get a gradient, and so do the maps.

    Returns:
        `[B, ...]`.

    >>> import torch
    >>> aggregate([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], torch.tensor([0.5, 0.5]))
    tensor([2., 4.])
    """
    shapes = [list(m.shape) for m in maps]
    if not maps or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"Expected one or more maps of one shape [B, ...], got {shapes}: resize or leave some out.")
    if list(weights.shape) != [len(maps)]:
        raise ValueError(f"Expected {len(maps)} weights, one for each map, got the shape {list(weights.shape)}.")
    with exactly(weights, *maps) as (weights, *maps):
        total = weights[0] * maps[0]
        for weight, m in zip(weights[1:], maps[1:], strict=True):
            total = total + weight * m
        return total
