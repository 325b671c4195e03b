"""The distance of Knowledge Review: maps compared at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, per_example, reduce

__all__ = ["hcl"]


def hcl(
    student_map: Tensor, teacher_map: Tensor, levels: Sequence[int] = (4, 2, 1), *, reduction: Reduction = "mean"
) -> Tensor:
    """Hierarchical context loss: the mean squared difference of two maps and of their averages over coarser grids.

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, the HCL: spatial
    pyramid pooling to `levels`, an L2 distance at each. With weight 1 for the maps themselves and `1 / 2^i` for the
    i-th grid: `sum_i w_i mean (pool_i(f_s) - pool_i(f_t))^2 / sum_i w_i`.

    Grids that are not smaller than the map are left out, and the next one takes their weight.

    Departures: weights and their sum in the denominator are the released code's (read there).

    Args:
        student_map: `[B, C, H, W]`, of the fused student's features.
        teacher_map: The same shape; gets no gradient.
        levels: Sides of the grids, the finest first.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> import torch
    >>> student = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).reshape(1, 1, 2, 2)
    >>> hcl(student, torch.zeros(1, 1, 2, 2))
    tensor(0.6667)
    """
    fits = student_map.dim() == 4 and student_map.shape == teacher_map.shape
    expect(fits, "maps of one shape [B, C, H, W]", student_map, teacher_map)
    with exactly(student_map, teacher_map.detach()) as (student, teacher):
        # Pooling is linear: the average of the difference is the difference of the averages.
        difference = student - teacher
        grids = [side for side in levels if side < min(difference.shape[2:])]
        pooled = [difference, *(F.adaptive_avg_pool2d(difference, side) for side in grids)]
        weights = [0.5**i for i in range(len(pooled))]
        values = [w * per_example(x.square()) for w, x in zip(weights, pooled, strict=True)]
        return reduce(sum(values[1:], values[0]) / sum(weights), reduction)
