"""The losses of Ensemble Distribution Distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kd_plugins.functional._common import (
    Reduction,
    check_temperature,
    counted,
    exact,
    expect,
    no_autocast,
    per_example,
    reduce,
    softmax_kl,
)
from kd_plugins.functional.dirichlet import concentrations

__all__ = ["end", "endd", "endd_proxy"]

# Of the released code: what keeps a logarithm and a log-gamma finite.
_EPS = 1e-8


def endd(
    student_logits: Tensor,
    member_logits: Tensor,
    temperature: float = 1.0,
    smoothing: float = 1e-3,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of the members' class probabilities under the student's Dirichlet distribution.

    Malinin, Mlodozeniec, Gales, "Ensemble Distribution Distillation", ICLR 2020, arXiv 1905.00076: with concentrations
    `alpha = exp(z / T)` and the members' probabilities `pi_m = softmax(z_m / T)`, drawn to uniform ones by smoothing,
    `T^2 * (sum_k lgamma(alpha_k) - lgamma(sum_k alpha_k) - mean_m sum_k (alpha_k - 1) log pi_mk)`.

    It is a density's: it falls below 0, and its size depends on the number of classes. The order of the members does
    not matter. Computed in float64 whatever comes in.

    **Departures**: the sum of the concentrations ends at 1e9, the expected probabilities stay as they are; the released
    code has no bound, so that a single member draws it to infinity.

    Args:
        student_logits: `[B, K]`, or `[B, N, K]` (any number of position axes), K from 2.
        member_logits: `[B, M, K]`, or `[B, M, N, K]`; get no gradient.
        temperature: Softens the student's concentrations and the members.
        smoothing: How far the members' probabilities are drawn to uniform ones, 0 to 1.
        mask: Of the student's shape without K, boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; float32 (float64 where the student's logits are).

    >>> endd(torch.zeros(1, 3), torch.zeros(1, 5, 3), smoothing=0.0)  # the density of a uniform Dirichlet is 2
    tensor(-0.6931)
    """
    _check(student_logits, member_logits, temperature, smoothing)
    with no_autocast(student_logits):
        probs = _probs(member_logits, temperature, smoothing)
        alpha, alpha0 = concentrations(counted(student_logits, mask), temperature)
        terms = (alpha - 1) * (probs + _EPS).log().mean(1)
        rows = (torch.lgamma(alpha + _EPS) - terms).sum(-1) - torch.lgamma(alpha0 + _EPS)
        return _reduced(rows, student_logits, temperature, mask, reduction)


def endd_proxy(
    student_logits: Tensor,
    member_logits: Tensor,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    direction: Literal["reverse", "forward"] = "reverse",
    *,
    max_precision: float = 1e5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the student's Dirichlet distribution from one that is fitted to the members.

    Ryabinin, Malinin, Gales, "Scaling Ensemble Distribution Distillation to Many Classes with Proxy Targets", NeurIPS
    2021, arXiv 2105.06987. The student has `alpha = exp(z) + 1`, the target `beta = beta0 * p + 1` with the members'
    mean `p` and `beta0 = (K - 1) / (2 * mean_m KL(p || p_m))`. Forward is `KL(Dir(beta) || Dir(alpha))`; reverse is
    `-sum_k p_k (digamma(alpha_k) - digamma(alpha_0)) - H(Dir(alpha)) / (beta0 + K)`, which is `KL(Dir(alpha) ||
    Dir(beta))` in units of the target's precision and without a constant. With many classes `endd` draws the
    improbable ones harder than the probable; these do not.

    **Departures**: the paper divides by `beta0`, the released code by `beta0 + K`, as here. It has no bound on `beta0`,
    which agreeing members draw to infinity, and knows neither temperature nor smoothing; both are off by default. The
    released code's README runs the forward loss; the paper recommends the reverse one.

    Args:
        student_logits: `[B, K]`, or `[B, N, K]` (any number of position axes), K from 2.
        member_logits: `[B, M, K]`, or `[B, M, N, K]`; get no gradient.
        temperature: Softens the student's concentrations and the members; the value is multiplied by its square.
        smoothing: How far the members' probabilities are drawn to uniform ones, 0 to 1.
        direction: Which divergence.
        max_precision: Largest `beta0`; our default.
        mask: Of the student's shape without K, boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; float32 (float64 where the student's logits are).

    >>> members = torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])
    >>> student = torch.tensor([[0.0, 2.0]])
    >>> endd_proxy(student, members, direction="forward") > 0
    tensor(True)
    """
    _check(student_logits, member_logits, temperature, smoothing)
    if direction not in ("reverse", "forward"):
        raise ValueError(f"Expected direction 'reverse' or 'forward', got {direction!r}.")
    if not max_precision > 0:
        raise ValueError(f"Expected a max_precision above 0, got {max_precision}.")
    with no_autocast(student_logits):
        members = _probs(member_logits, temperature, smoothing)
        classes = members.shape[-1]
        mean = members.mean(1)
        apart = (torch.xlogy(mean, mean) - mean * (members + torch.finfo(members.dtype).tiny).log().mean(1)).sum(-1)
        precision = ((classes - 1) / (2 * apart.clamp_min(0))).clamp_max(max_precision)
        alpha, alpha0 = concentrations(counted(student_logits, mask), temperature, 1)
        student = torch.digamma(alpha) - torch.digamma(alpha0).unsqueeze(-1)
        normaliser = torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha0)
        if direction == "reverse":
            entropy = normaliser - ((alpha - 1) * student).sum(-1)
            rows = -(mean * student).sum(-1) - entropy / (precision + classes)
        else:
            beta, beta0 = mean * precision.unsqueeze(-1) + 1, precision + classes
            target = torch.digamma(beta) - torch.digamma(beta0).unsqueeze(-1)
            rows = torch.lgamma(beta0) - torch.lgamma(beta).sum(-1) + normaliser + ((beta - alpha) * target).sum(-1)
        return _reduced(rows, student_logits, temperature, mask, reduction)


def end(
    student_logits: Tensor,
    member_logits: Tensor,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Plain ensemble distillation: divergence of the student's probabilities from the mean of the members'.

    The baseline of Malinin et al., arXiv 1905.00076: `T^2 * KL(mean_m softmax(z_m / T) || softmax(z / T))`, summed over
    the classes.

    **Departures**: the released code takes the cross-entropy, which differs by a constant, and its mean over batch and
    classes, K times less.

    Args:
        student_logits: `[B, K]`, or `[B, N, K]` (any number of position axes), K from 2.
        member_logits: `[B, M, K]`, or `[B, M, N, K]`; get no gradient.
        temperature: Softens both.
        smoothing: How far the members' probabilities are drawn to uniform ones, 0 to 1.
        mask: Of the student's shape without K, boolean or integer: the positions that count.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; float32 (float64 where the student's logits are).

    >>> end(torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), temperature=0.5)
    tensor(0.0820)
    """
    _check(student_logits, member_logits, temperature, smoothing)
    with no_autocast(student_logits):
        mean = _probs(member_logits, temperature, smoothing).mean(1)
        rows = softmax_kl(student_logits.double() / temperature, mean.log())
        return _reduced(rows, student_logits, temperature, mask, reduction)


def _probs(member_logits: Tensor, temperature: float, smoothing: float) -> Tensor:
    probs = (member_logits.detach().double() / temperature).softmax(-1)
    uniform = 1 / probs.shape[-1]
    return (1 - smoothing) * (probs - uniform) + uniform if smoothing else probs


def _reduced(rows: Tensor, student: Tensor, temperature: float, mask: Tensor | None, reduction: Reduction) -> Tensor:
    return (temperature**2 * reduce(per_example(rows, mask), reduction)).to(exact(student)[0].dtype)


def _check(student: Tensor, members: Tensor, temperature: float, smoothing: float) -> None:
    fits = members.dim() == student.dim() + 1 and student.dim() >= 2 and members.shape[1] > 0
    fits = fits and members[:, 0].shape == student.shape and student.shape[-1] >= 2
    what = "student logits [B, K] with two classes or more and the members' [B, M, K] (positions between M and K)"
    expect(fits, what, student, members)
    check_temperature(temperature)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"Expected smoothing from 0 to 1, got {smoothing}.")
