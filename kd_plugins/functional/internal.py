"""The losses of Knowledge Distillation from Internal Representations."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, per_example, reduce, softmax_kl, unit

__all__ = ["attention_kl", "cls_cosine"]


def attention_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor | None = None,
    *,
    student_probs: Tensor | None = None,
    teacher_probs: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the student's attention distributions from the teacher's, over heads and the queries that count.

    Aguilar, Ling, Zhang, Yao, Fan, Guo, "Knowledge Distillation from Internal Representations", AAAI 2020, arXiv
    1910.03723: `KL(A_t || A_s)` with `A = softmax(scores)` over the keys.

    The value of an example is the mean over its heads and its own queries, so padding changes nothing. Masked keys hold
    a very negative number, or -inf, in both scores: they add exactly 0, as does a query whose keys are all -inf.
    Scores, not probabilities, are compared because attention modules return probabilities after dropout. For the
    backward pass one map `A_s - A_t` is kept; where the layers have computed their probabilities anyway, handing them
    in saves the two softmaxes.

    Args:
        student_scores: Scaled and masked scores before the softmax `[B, heads, Lq, Lk]`.
        teacher_scores: The same shape; gets no gradient.
        mask: `[B, Lq]`, boolean or integer: the queries that count, such as the attention mask; all by default.
        student_probs: `softmax(student_scores)` before dropout `[B, heads, Lq, Lk]`; gets no gradient, the scores do.
        teacher_probs: `softmax(teacher_scores)`.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> import torch
    >>> student = torch.tensor([0.0, 0.0, -1e4]).expand(1, 2, 3, 3)
    >>> teacher = torch.tensor([0.0, 1.0, -1e4]).expand(1, 2, 3, 3)
    >>> attention_kl(student, teacher, mask=torch.tensor([[1, 1, 0]]))
    tensor(0.1109)
    """
    fits = student_scores.dim() == 4 and student_scores.shape == teacher_scores.shape
    what = "student and teacher scores of one shape [B, heads, Lq, Lk]"
    expect(fits, what, student_scores, teacher_scores, remedy="the layers need as many heads and the same tokens")
    for probs in (student_probs, teacher_probs):
        if probs is not None:
            fits = probs.shape == student_scores.shape
            expect(fits, f"probabilities of the scores' shape {list(student_scores.shape)}", probs)
    with exactly(student_scores, teacher_scores) as (student, teacher):
        p_s, p_t = (None if p is None else p.detach().to(student.dtype) for p in (student_probs, teacher_probs))
        rows = softmax_kl(student, teacher, p_s, p_t).mean(1)
        return reduce(per_example(rows, mask), reduction)


def cls_cosine(
    student_hidden: Tensor, teacher_hidden: Tensor, index: int = 0, *, reduction: Reduction = "mean"
) -> Tensor:
    """Cosine distance of the hidden vectors of one token, the [CLS] token by default.

    Aguilar, Ling, Zhang, Yao, Fan, Guo, "Knowledge Distillation from Internal Representations", AAAI 2020, arXiv
    1910.03723: `1 - cos(h_t, h_s)`.

    Args:
        student_hidden: Outputs of a layer `[B, L, H]`.
        teacher_hidden: `[B, L, H]`; gets no gradient.
        index: The position of the token.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar from 0 to 2, or `[B]` for `"none"`; 1 for a vector of zeros, which gets no gradient.

    >>> import torch
    >>> cls_cosine(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]))
    tensor(0.2000)
    """
    fits = student_hidden.dim() == teacher_hidden.dim() == 3 and student_hidden.shape[::2] == teacher_hidden.shape[::2]
    what = "student and teacher hidden states [B, L, H] of one batch and one hidden size"
    expect(fits, what, student_hidden, teacher_hidden, remedy="project the student's to the teacher's hidden size")
    with exactly(student_hidden[:, index], teacher_hidden[:, index].detach()) as (student, teacher):
        return reduce(1 - (unit(student) * unit(teacher)).sum(-1), reduction)
