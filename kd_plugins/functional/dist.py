"""The loss of Knowledge Distillation from A Stronger Teacher."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.functional._common import centred, check_logits, counted, exactly, per_example, unit

__all__ = ["dist"]


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """One less the correlation of the two networks' probabilities, along each row and along each class.

    Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536:
    `beta * mean_i (1 - pearson(y_s[i, :], y_t[i, :])) + gamma * mean_k (1 - pearson(y_s[:, k], y_t[:, k]))` for
    `y = softmax(z / T)`, times `T^2` as in public copies: relations between the classes of one row, and between the
    rows for one class.

    Per token, the first part is averaged over an example's own tokens, then over the examples; the second is over all
    positions of the batch that count, whichever example they are of. It is a relation within the batch, so there is no
    reduction to choose, and batches may not be split without changing it.

    Departures: the correlation is exact, where the released code adds 1e-8 to the product of the norms; where one side
    is constant up to rounding it counts as 0 and gets no gradient.

    Args:
        student_logits: `[B, K]`, or `[B, N, K]` (any number of position axes).
        teacher_logits: The same shape; gets no gradient.
        beta: Weight of the relation between classes.
        gamma: Weight of the relation between rows.
        temperature: Softens both sides.
        mask: `[B, N]` (`[B]` for logits `[B, K]`), boolean or integer: the positions that count.

    Returns:
        A scalar, from 0 to `2 T^2 (beta + gamma)`; 0 where no position counts.

    >>> import torch
    >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> dist(-teacher, teacher)
    tensor(4.)
    """
    check_logits(student_logits, teacher_logits, temperature)
    with exactly(counted(student_logits, mask), teacher_logits.detach()) as logits:
        y_s, y_t = ((z / temperature).softmax(-1) for z in logits)
        between_classes = per_example(1 - _pearson(y_s, y_t, -1), mask).mean()
        s, t = (y.flatten(0, -2) if mask is None else y[mask.bool()] for y in (y_s, y_t))
        between_rows = (1 - _pearson(s, t, 0)).mean() if len(s) else s.sum()
        return temperature**2 * (beta * between_classes + gamma * between_rows)


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """The correlation of two tensors of one shape along an axis."""
    # Of a class that is improbable in every row too; squares below 1e-36 would be lost in float32.
    s, t = (unit(centred(z, dim), dim, 1e-18) for z in (x, y))
    return (s * t).sum(dim)
