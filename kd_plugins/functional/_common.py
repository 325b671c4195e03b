"""What the losses share: precision, reduction, and the KL divergence between two softmaxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Literal["mean", "sum", "none"]


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or all in float64 if one of them is.

    >>> [x.dtype for x in exact(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1))]
    [torch.float32, torch.float32]
    """
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on the device of `x` keep the precision of their inputs."""
    return torch.autocast(x.device.type, enabled=False)


@contextmanager
def exactly(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A context in which operations keep the precision of their inputs, and the tensors as `exact` gives them."""
    with no_autocast(tensors[0]):
        yield exact(*tensors)


def check_reduction(reduction: str) -> None:
    """Refuses a reduction that does not exist."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"Expected reduction 'mean', 'sum' or 'none', got {reduction!r}.")


def expect(fits: bool, what: str, *given: Tensor, remedy: str = "") -> None:
    """Refuses tensors that do not fit: says what was expected, their shapes, and what to do."""
    if not fits:
        *first, last = (str(list(x.shape)) for x in given)
        got = f"{', '.join(first)} and {last}" if first else last
        raise ValueError(f"Expected {what}, got {got}{f': {remedy}' if remedy else ''}.")


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that softens nothing."""
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0, got {temperature}.")


def check_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, classes: int = 1) -> None:
    """Refuses logits of different shapes, or without an axis for examples and that many classes at least."""
    fits = student.shape == teacher.shape and student.dim() >= 2 and student.shape[-1] >= classes
    several = " with two classes or more" if classes > 1 else ""
    what = f"student and teacher logits of one shape, [B, K] or [B, N, K]{several}"
    remedy = "both networks need the same classes, in the same order, and the same tokens"
    expect(fits, what, student, teacher, remedy=remedy)
    check_temperature(temperature)


def rows_of_batch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The examples of one batch as rows `[B, everything else]`, the teacher's without a gradient."""
    fits = min(student.dim(), teacher.dim()) >= 2 and len(student) == len(teacher)
    expect(fits, "features [B, D] or [B, ...] of one batch", student, teacher)
    return student.flatten(1), teacher.detach().flatten(1)


def unit(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """The vectors along an axis divided by their norms; those up to `eps` become 0 and get no gradient.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    norms = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    # So that what is no number stays none.
    return torch.where(norms <= eps, 0, x / norms.clamp_min(eps))


def centred(x: Tensor, dim: int = -1) -> Tensor:
    """The vectors along an axis less their means; 0, without gradient, where that leaves nothing but rounding.

    >>> centred(torch.tensor([[1.0, 3.0], [0.1, 0.1]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    rest = x - x.mean(dim, keepdim=True)
    left = torch.linalg.vector_norm(rest, dim=dim, keepdim=True)
    # 6e-6 in float32 and 2e-12 in float64.
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=True) * torch.finfo(x.dtype).eps ** 0.75
    return torch.where(left <= size, 0, rest)


def per_example(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the positions of each example that count, 0 for an example with none.

    Args:
        values: `[B]` or `[B, ...]`, one value for each position.
        mask: Boolean or integer, of the shape of `values`: which positions count; all of them by default.

    >>> per_example(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 0], [0, 0]]))
    tensor([1., 0.])
    """
    if mask is None:
        return values.unsqueeze(1).flatten(1).mean(1)
    valid = _valid(mask, values.shape).unsqueeze(1).flatten(1)
    return torch.where(valid, values.unsqueeze(1).flatten(1), 0).sum(1) / valid.sum(1).clamp_min(1)


def counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `[..., K]`, with zeros for those that the mask `[...]` leaves out: they get no gradient, not even of a nan.

    >>> counted(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.tensor([1, 0]))
    tensor([[1., 2.],
            [0., 0.]])
    """
    return rows if mask is None else rows.masked_fill(~_valid(mask, rows.shape[:-1]).unsqueeze(-1), 0)


def _valid(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.shape != shape or mask.is_floating_point():
        raise ValueError(
            f"Expected a boolean or integer mask {list(shape)}, 1 where a position counts, got {mask.dtype}"
            f" {list(mask.shape)}."
        )
    return mask.bool()


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """The values of the examples `[B]` as the caller wants them."""
    check_reduction(reduction)
    return values.mean() if reduction == "mean" else values.sum() if reduction == "sum" else values


class _SoftmaxKL(torch.autograd.Function):
    """Keeps one map for the backward pass, `P_s - P_t`, where autograd would keep the log-probabilities and more."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, student_probs: Tensor | None, teacher_probs: Tensor | None
    ) -> Tensor:
        p_s = student.softmax(-1) if student_probs is None else student_probs
        p_t = teacher.softmax(-1) if teacher_probs is None else teacher_probs
        top_s, top_t = student.amax(-1), teacher.amax(-1)
        # The log of the sum of exponentials is max(S) - log P[argmax S]: no second pass of exponentials.
        lse_s, lse_t = top_s - p_s.amax(-1).log(), top_t - p_t.amax(-1).log()
        # Two scores of -inf give a nan here, which counts as nothing; a nan among the scores is in the maxima as well.
        rows = (teacher - student).mul_(p_t).nansum(-1).add_(lse_s).sub_(lse_t)
        nothing = top_t == -torch.inf
        # Not in place: torch 2.11 compiles what writes to its own result without a gradient.
        rows = rows.masked_fill(nothing, 0)
        if ctx.needs_input_grad[0]:
            gradient = p_s.sub_(p_t) if student_probs is None else p_s - p_t
            ctx.save_for_backward(gradient.masked_fill_(nothing.unsqueeze(-1), 0))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        # A row that does not count has no gradient, whatever the teacher holds there.
        return (grad * gradient).masked_fill_(grad == 0, 0), None, None, None


def softmax_kl(
    student: Tensor, teacher: Tensor, student_probs: Tensor | None = None, teacher_probs: Tensor | None = None
) -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` of each row, with a gradient for the student's scores only.

    Scores of -inf (in both) add nothing, nor does a row that has no other. Once differentiable.

    Args:
        student: Scores `[..., K]`.
        teacher: Scores of the same shape and type.
        student_probs: `softmax(student)`, if it has been computed.
        teacher_probs: `softmax(teacher)`, if it has been computed.

    Returns:
        `[...]`.

    >>> softmax_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.6931])
    """
    return _SoftmaxKL.apply(student, teacher.detach(), student_probs, teacher_probs)
