"""The loss of Decoupled Knowledge Distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import Reduction, check_logits, exactly, per_example, reduce, softmax_kl

__all__ = ["dkd"]


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence in the probability of the labelled class, and in those of the other classes among themselves.

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679:
    `T^2 * (alpha * TCKD + beta * NCKD)`. With p the softmax of `z / T`, y the label and q the softmax over the classes
    other than y: `TCKD = KL(Bernoulli(p_t[y]) || Bernoulli(p_s[y]))` and `NCKD = KL(q_t || q_s)`. The paper takes the
    soft labels apart so: `KL(p_t || p_s) = TCKD + (1 - p_t[y]) * NCKD`.

    Per token as in `kd`: the mean over an example's own tokens, then over the examples.

    Args:
        student_logits: `[B, K]`, or `[B, N, K]` (any number of position axes), K from 2.
        teacher_logits: The same shape; gets no gradient.
        labels: Class numbers `[B]`, or `[B, N]`; what stands where the mask leaves out does not count.
        alpha: Weight of the target class' part.
        beta: Weight of the other classes' part.
        temperature: Softens both sides.
        mask: Of the shape of the labels, boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> student, teacher = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> dkd(student, teacher, torch.tensor([2]), alpha=0.0, beta=1.0, temperature=2.0)  # kd of the first two classes
    tensor(0.4438)
    """
    check_logits(student_logits, teacher_logits, temperature, classes=2)
    rows = student_logits.shape[:-1]
    if labels.shape != rows or labels.is_floating_point() or (mask is not None and mask.shape != rows):
        raise ValueError(
            f"Expected class numbers {list(rows)}, one for each row of logits, and a mask like them or none, got"
            f" {labels.dtype} {list(labels.shape)} and {None if mask is None else list(mask.shape)}."
        )
    target = (labels if mask is None else labels.where(mask.bool(), 0)).long().unsqueeze(-1)
    with exactly(student_logits, teacher_logits.detach()) as both:
        logits = [z / temperature for z in both]
        others = [z.scatter(-1, target, -torch.inf) for z in logits]
        # A sum of nothing but -inf has no gradient.
        rest = [o.clamp_min(torch.finfo(o.dtype).min).logsumexp(-1, keepdim=True) for o in others]
        tckd = softmax_kl(*(torch.cat([z.gather(-1, target), r], -1) for z, r in zip(logits, rest, strict=True)))
        values = alpha * tckd + beta * softmax_kl(*others)
        return temperature**2 * reduce(per_example(values, mask), reduction)
