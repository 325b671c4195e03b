"""The loss of Similarity-Preserving Knowledge Distillation."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.functional._common import exactly, rows_of_batch, unit

__all__ = ["sp"]


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the matrices that say how alike the examples of a batch are to each network.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682:
    `|G_t - G_s|_F^2 / B^2`, where G is `A A^T` with rows of length 1, for activations A `[B, everything else]`. Only
    the batch must agree, so widths and sizes may differ.

    A batch of one has no pairs: 0.

    Args:
        student: `[B, ...]`.
        teacher: `[B, ...]`; gets no gradient.

    Returns:
        A scalar.

    >>> import torch
    >>> sp(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor(0.3000)
    """
    with exactly(*rows_of_batch(student, teacher)) as (a_s, a_t):
        return (unit(a_t @ a_t.mT) - unit(a_s @ a_s.mT)).square().mean()
