"""The soft labels of Distilling the Knowledge in a Neural Network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugins.functional._common import (
    Reduction,
    centred,
    check_logits,
    counted,
    exact,
    exactly,
    no_autocast,
    per_example,
    reduce,
    softmax_kl,
    unit,
)

__all__ = ["kd", "kd_multilabel", "kd_regression", "standardize"]


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the student's softened class probabilities from the teacher's.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014, arXiv
    1503.02531, section 2: `T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, summed over the classes. The factor `T^2`
    is in: the gradient keeps its size when the temperature changes.

    Per token, the value of an example is the mean over its own tokens, and every example counts the same however long
    it is; so batches may be split over processes in any way. An example without any token that counts is 0.

    Logits beyond 8 million numbers (a vocabulary at every token) are taken chunk by chunk, forward and backward, so
    that no copy of them all in float32 is made; the values are the same.

    Args:
        student_logits: `[B, K]`, or `[B, L, K]` per token (any number of position axes).
        teacher_logits: The same shape; gets no gradient.
        temperature: Softens both sides. 4 is our default, that of the field's benchmarks.
        mask: `[B, L]` (`[B]` for logits `[B, K]`), boolean or integer: the positions that count, such as
            `labels != -100`.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> kd(student, teacher, temperature=2.0)
    tensor(0.4438)
    >>> tokens = torch.stack([student, teacher], 1)
    >>> kd(tokens, teacher.expand(1, 2, 2), temperature=2.0, mask=torch.tensor([[0, 1]]))
    tensor(0.)
    """
    check_logits(student_logits, teacher_logits, temperature)
    with no_autocast(student_logits):
        if student_logits.numel() > _CHUNK:
            rows = _ChunkedKL.apply(student_logits, teacher_logits.detach(), temperature)
        else:
            rows = _softened_kl(student_logits, teacher_logits, temperature)
        return temperature**2 * reduce(per_example(rows, mask), reduction)


_CHUNK = 2**23


def _softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each row."""
    student, teacher = exact(student, teacher)
    return softmax_kl(student / temperature, teacher / temperature)


class _ChunkedKL(torch.autograd.Function):
    """The divergence of each row, of which nothing is kept for the backward pass: that asks every chunk again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        rows = [_softened_kl(student[at], teacher[at], temperature) for at in _chunks(student)]
        return torch.cat([chunk.flatten() for chunk in rows]).view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for at in _chunks(student):
            s, t = (x.div(ctx.temperature) for x in exact(student[at], teacher[at]))
            given = grad[at].unsqueeze(-1)
            # A row that does not count has no gradient, whatever the teacher holds there.
            nothing = (t.amax(-1, keepdim=True) == -torch.inf) | (given == 0)
            chunk = s.softmax(-1).sub_(t.softmax(-1)).masked_fill_(nothing, 0)
            gradient[at] = chunk.mul_(given / ctx.temperature)
        return gradient, None, None


def _chunks(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Parts of logits `[B, ..., K]` in their order, of `_CHUNK` numbers or less: examples, or positions of one."""
    axis = next((i for i in range(logits.dim() - 1) if logits.shape[i + 1 :].numel() <= _CHUNK), logits.dim() - 2)
    step = max(_CHUNK // logits.shape[axis + 1 :].numel(), 1)
    for outer in itertools.product(*map(range, logits.shape[:axis])):
        for start in range(0, logits.shape[axis], step):
            yield (*outer, slice(start, start + step))


def kd_multilabel(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the student's softened label probabilities from the teacher's, each label on its own.

    Hinton, Vinyals, Dean, 2014, arXiv 1503.02531, section 2, with a distribution over two classes for each label:
    `T^2 * sum_k KL(Bernoulli(sigmoid(z_t_k / T)) || Bernoulli(sigmoid(z_s_k / T)))`. The paper has one softmax over
    exclusive classes; a label's sigmoid is the softmax of `(z, 0)`.

    Args:
        student_logits: `[B, K]`, one logit for each label, or `[B, L, K]` per token.
        teacher_logits: The same shape; gets no gradient.
        temperature: Softens both sides; our default, as for `kd`.
        mask: `[B, L]` (`[B]` for logits `[B, K]`), boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> kd_multilabel(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]), temperature=2.0)
    tensor(0.4438)
    """
    check_logits(student_logits, teacher_logits, temperature)
    with exactly(counted(student_logits, mask), teacher_logits.detach()) as (student, teacher):
        student, teacher = student / temperature, teacher / temperature
        log_not = torch.nn.functional.logsigmoid
        probs = teacher.sigmoid()
        # A label that the teacher has not at all leaves the second term; 0 times an infinite difference is no 0.
        labels = torch.where(probs == 0, 0, probs * (teacher - student)) + log_not(-teacher) - log_not(-student)
        return temperature**2 * reduce(per_example(labels.sum(-1), mask), reduction)


def kd_regression(
    student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Squared distance of the student's predictions from the teacher's, the soft target of a regression.

    `mean_k (z_s_k - z_t_k)^2`, as the loss of the labels in transformers. A number has no distribution that a
    temperature could soften: this is what the divergence of `kd` is, up to a factor, between two Gaussians of one
    variance, and between softmaxes at high temperatures (Hinton, Vinyals, Dean, 2014, arXiv 1503.02531, section 2.1).

    Args:
        student_scores: `[B, K]`, K numbers for each example, or `[B, N, K]`.
        teacher_scores: The same shape; gets no gradient.
        mask: `[B, N]` (`[B]` for scores `[B, K]`), boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> kd_regression(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
    tensor(2.)
    """
    check_logits(student_scores, teacher_scores)
    with exactly(counted(student_scores, mask), teacher_scores.detach()) as (student, teacher):
        return reduce(per_example((student - teacher).square().mean(-1), mask), reduction)


def standardize(logits: Tensor) -> Tensor:
    """Logits of mean 0 and standard deviation 1 over the classes, to be softened by a temperature.

    Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427: the Z-score
    `(z - mean(z)) / std(z)` of the student's and of the teacher's logits, each network's own. The student then need not
    match the teacher's range of logits, only their relations. No logit leaves `[-sqrt(K - 1), sqrt(K - 1)]`, but -inf,
    which stays: K, mean and deviation are those of the others.

    Departures: the released code takes the unbiased standard deviation, so its scores are smaller by
    `sqrt((K - 1) / K)`, 0.5 % with 100 classes. Logits that are all equal become 0 and get no gradient.

    Args:
        logits: `[..., K]`.

    Returns:
        The same shape, in float32 (float64 stays float64).

    >>> standardize(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    tensor([[-1.2247,  0.0000,  1.2247],
            [ 0.0000,  0.0000,  0.0000]])
    """
    with exactly(logits) as (scores,):
        left_out = scores == -torch.inf
        classes = (~left_out).sum(-1, keepdim=True, dtype=scores.dtype)
        mean = scores.masked_fill(left_out, 0).sum(-1, keepdim=True) / classes
        rest = unit(centred(scores.where(~left_out, mean)))
        return (classes.sqrt() * rest).masked_fill(left_out, -torch.inf)
