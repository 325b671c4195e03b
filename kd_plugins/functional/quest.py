"""The loss of QuEST: Quantized Embedding Space for Transferring Knowledge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugins.functional._common import Reduction, check_reduction, exact, expect, no_autocast, unit

__all__ = ["match_sharpness", "quest", "soft_assignment"]

# Scores that live at a time, 4 MiB in float32, which a cache holds; larger batches go in pieces.
_SCORES = 2**20
_DOUBLINGS, _LEAST = 60, -80.0


def quest(
    student_map: Tensor,
    teacher_map: Tensor,
    weight: Tensor,
    scale: Tensor | float,
    codebook: Tensor,
    temperature: Tensor | float = 5.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the words that the student predicts at each position from those that the teacher's feature is.

    Jain, Gidaris, Komodakis, Perez, Cord, "QuEST: Quantized Embedding Space for Transferring Knowledge", ECCV 2020,
    arXiv 1912.01540. With the words v_k, and f_t, f_s the features at one position:

    - target `p_t = softmax_k(-temperature * |f_t - v_k|^2)`: the temperature multiplies, as in the released code, so a
      larger one makes harder targets;
    - prediction `q_s = softmax_k(scale * cos(w_k, f_s))`;
    - `KL(p_t || q_s)`, averaged over the positions.

    The gradient of the scores is taken together with the value, in pieces, so that nothing of size
    `B * H * W * K` is made or kept. Once differentiable.

    Args:
        student_map: `[B, C_s, H, W]`, or `[B, C_s, N]`.
        teacher_map: `[B, C_t, H, W]` of the same positions, or `[B, C_t, N]`; gets no gradient.
        weight: The predictor's `[K, C_s]`.
        scale: Factor of the cosines, one number.
        codebook: The words `[K, C_t]`; get no gradient.
        temperature: Multiplies the squared distances.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> words = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> near_the_second = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> quest(torch.ones(1, 1, 1, 1), near_the_second, torch.tensor([[-1.0], [1.0]]), 3.0, words)
    tensor(0.0025)
    """
    check_reduction(reduction)
    _check(student_map, teacher_map, weight, codebook)
    with no_autocast(student_map):
        maps = student_map, teacher_map.detach(), weight, codebook.detach()
        f_s, f_t, w, words = exact(*(x.flatten(2).mT if x.dim() > 2 else x for x in maps))
        f_t, words = _centred(f_t, words)
        cosines, w = scale * unit(f_s), unit(w)
        examples = (
            zip(cosines, f_t, strict=True) if reduction == "none" else [(cosines.flatten(0, 1), f_t.flatten(0, 1))]
        )
        gradient = torch.is_grad_enabled()
        sums = [_WordKL.apply(x, w, y, words, temperature, gradient) for x, y in examples]
        values = torch.stack(sums) / f_s.shape[1]
        return values if reduction == "none" else values[0] / (len(f_s) if reduction == "mean" else 1)


def soft_assignment(vectors: Tensor, codebook: Tensor, temperature: Tensor | float = 5.0) -> Tensor:
    """The targets `softmax_k(-temperature * |x - v_k|^2)` of the same paper, all at once.

    Args:
        vectors: The teacher's features x `[N, C_t]`.
        codebook: The words `[K, C_t]`.
        temperature: Multiplies the squared distances.

    Returns:
        `[N, K]`.

    >>> soft_assignment(torch.tensor([[0.1]]), torch.tensor([[0.0], [1.0]]))
    tensor([[0.9820, 0.0180]])
    """
    with no_autocast(vectors):
        return _target_scores(*_centred(vectors, codebook), temperature).softmax(1)


def match_sharpness(vectors: Tensor, codebook: Tensor, sharpness: float) -> float:
    """The temperature for which the targets' largest probability is, in the mean, a given number.

    Found by bisection: every vector's largest probability grows with the temperature, from 1 / K.

    Args:
        vectors: The teacher's features `[N, C_t]`; a few thousand tell enough.
        codebook: The words `[K, C_t]`.
        sharpness: Between 1 / K and 1.

    >>> round(match_sharpness(torch.tensor([[0.1]]), torch.tensor([[0.0], [1.0]]), 0.982), 2)
    5.0
    """
    if not 1 / len(codebook) < sharpness < 1:
        raise ValueError(f"Expected a sharpness between 1 / K = {1 / len(codebook):.2g} and 1, got {sharpness}.")
    with no_autocast(vectors):
        scores = _target_scores(*_centred(vectors, codebook), 1.0)
        behind = scores.sub_(scores.amax(1, keepdim=True))
        typical = -behind.mean().item()

        def sharp(temperature: float) -> float:
            return float((1 / (behind * temperature).clamp_min_(_LEAST).exp_().sum(1)).mean())

        low = high = 1 / typical if typical > 0 else 1.0
        while sharp(low) > sharpness:
            low /= 2
        for _ in range(_DOUBLINGS):
            if sharp(high) >= sharpness:
                break
            high *= 2
        else:
            raise ValueError(
                f"No temperature makes these targets as sharp as {sharpness}: at most {sharp(high):.3f}, because"
                " vectors lie between words that are as near."
            )
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if sharp(middle) < sharpness else (low, middle)
        return (low + high) / 2


def _centred(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of the words: distances do not change when everything moves, and near 0 are rounded less."""
    x, words = exact(vectors.detach(), codebook.detach())
    centre = words.mean(0)
    return x - centre, words - centre


def _target_scores(x: Tensor, words: Tensor, temperature: Tensor | float) -> Tensor:
    """`-temperature * |x - v_k|^2` up to a number for each row, which no softmax sees: `[N, K]`."""
    return torch.addmm(-temperature * words.square().sum(1), x, (2 * temperature * words).mT)


class _WordKL(torch.autograd.Function):
    """Sum of `KL(softmax(targets) || softmax(x w))` over the rows; its gradients are made along with it, in pieces."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, y: Tensor, words: Tensor, temperature: Tensor | float, gradient: bool
    ) -> Tensor:
        total = x.new_zeros(())
        grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(w)) if gradient else (None, None)
        step = max(1, _SCORES // len(w))
        for start in range(0, len(x), step):
            piece = slice(start, start + step)
            # exp() of what underflows takes ten times as long as of what is as good as 0.
            t = _target_scores(y[piece], words, temperature)
            t = t.sub_(t.amax(1, keepdim=True)).clamp_min_(_LEAST)
            s = x[piece] @ w.mT
            s -= s.amax(1, keepdim=True)
            apart = t - s
            sum_t, sum_s = t.exp_().sum(1, keepdim=True), s.exp_().sum(1, keepdim=True)
            p_t = t.div_(sum_t)
            total += apart.mul_(p_t).sum() + (sum_s / sum_t).log_().sum()
            if grad_x is not None and grad_w is not None:
                slope = s.div_(sum_s).sub_(p_t)
                torch.mm(slope, w, out=grad_x[piece])
                grad_w.addmm_(slope.mT, x[piece])
        if gradient:
            ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        return grad * grad_x, grad * grad_w, None, None, None, None


def _check(student: Tensor, teacher: Tensor, weight: Tensor, codebook: Tensor) -> None:
    fits = student.dim() in (3, 4) and len(student) == len(teacher) and student.shape[2:] == teacher.shape[2:]
    what = "maps [B, C, H, W] or [B, C, N] of one batch and the same positions"
    expect(fits, what, student, teacher, remedy="bring them together with match_spatial")
    expected = [len(codebook), student.shape[1]], [len(codebook), teacher.shape[1]]
    fits = [list(weight.shape), list(codebook.shape)] == [*expected]
    expect(fits, f"a predictor {expected[0]} and a codebook {expected[1]} for these maps", weight, codebook)
