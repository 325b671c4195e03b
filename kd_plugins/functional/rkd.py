"""The losses of Relational Knowledge Distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import exactly, rows_of_batch, unit

__all__ = ["rkd_angle", "rkd_distance"]


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """How much the distances between the examples of a batch differ, each network's in units of its own mean distance.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068: `huber(psi_t, psi_s)` with
    `psi_ij = |x_i - x_j| / mu`, mu being the mean distance of the pairs of different examples, and the Huber loss
    quadratic up to 1.

    Departures: the mean over all `B * B` pairs, as in the released code, where the paper writes a sum. Embeddings that
    are equal get no gradient from their distance.

    Args:
        student: Embeddings `[B, D_s]`; more axes are flattened.
        teacher: Embeddings `[B, D_t]`; get no gradient.

    Returns:
        A scalar, 0 for a batch of one.

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
    tensor(0.0139)
    """
    with exactly(*rows_of_batch(student, teacher)) as rows:
        psi_s, psi_t = (_distances(x) for x in rows)
        return F.smooth_l1_loss(psi_s, psi_t)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """How much the angles of the triangles between the examples of a batch differ.

    Park, Kim, Lu, Cho, 2019, arXiv 1904.05068: `huber(psi_t, psi_s)` with `psi_ijk` the cosine of the angle at `x_j`
    between the directions to `x_i` and `x_k`, and the Huber loss quadratic up to 1.

    Takes memory for `B * B * D` and `B * B * B` numbers.

    Departures: the mean over all `B * B * B` triples, as in the released code, where the paper writes a sum. Embeddings
    that are equal have no direction: a cosine of 0, without gradient.

    Args:
        student: Embeddings `[B, D_s]`; more axes are flattened.
        teacher: Embeddings `[B, D_t]`; get no gradient.

    Returns:
        A scalar, 0 for a batch of up to two.

    >>> triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> rkd_angle(2 * triangle.flip(1) + 1, triangle)
    tensor(0.)
    """
    with exactly(*rows_of_batch(student, teacher)) as rows:
        psi_s, psi_t = (_angles(x) for x in rows)
        return F.smooth_l1_loss(psi_s, psi_t)


def _distances(x: Tensor) -> Tensor:
    """`[B, B]`, in units of the mean of those between different examples."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(1, len(x) * (len(x) - 1))
    return distances / mean.clamp_min(1e-12)


def _angles(x: Tensor) -> Tensor:
    """The cosines `[B, B, B]` of the angles at the example of the first axis."""
    directions = unit(x.unsqueeze(1) - x)
    return directions @ directions.mT
