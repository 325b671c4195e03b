"""The loss of Learning Deep Representations with Probabilistic Knowledge Transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import exactly, rows_of_batch, unit

__all__ = ["pkt"]


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the probabilities with which the examples of a batch choose one another as neighbours.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837:
    `sum_i sum_{j != i} p_ij log(p_ij / q_ij)` with `p_ij = K(x_i, x_j) / sum_{k != i} K(x_i, x_k)` of the teacher's
    features, q of the student's, and the cosine kernel `K(a, b) = (cos(a, b) + 1) / 2`.

    Departures: divided by `B * B`, as in the authors' and the field's code, whose weights mean the same here. Those let
    an example be its own neighbour; here it is not, as in the paper. `eps` is theirs.

    Args:
        student: Features `[B, D_s]`; more axes are flattened.
        teacher: Features `[B, D_t]`; get no gradient.
        eps: Added to each probability within the logarithm.

    Returns:
        A scalar, 0 for a batch of up to two.

    >>> square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> pkt(square.flip(1), 2 * square)
    tensor(0.)
    """
    with exactly(*rows_of_batch(student, teacher)) as rows:
        q, p = (_neighbours(x) for x in rows)
        return (p * ((p + eps) / (q + eps)).log()).mean()


def _neighbours(x: Tensor) -> Tensor:
    """The probabilities `[B, B]` of the others as an example's neighbour; rows sum to 1."""
    directions = unit(x)
    kernel = ((directions @ directions.mT).clamp(-1, 1) + 1) / 2
    kernel = kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    return kernel / kernel.sum(1, keepdim=True).clamp_min(1e-12)
