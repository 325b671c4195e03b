"""Dirichlet distributions over class probabilities: their concentrations, and the uncertainty that they tell."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugins.functional._common import exact, no_autocast

__all__ = ["Uncertainty", "uncertainty"]

# Largest sum of concentrations. A member alone, or members that agree, would draw it to infinity.
_LARGEST = 1e9


class Uncertainty(NamedTuple):
    """Uncertainty of each prediction in nats, `[...]`.

    Attributes:
        total: Entropy of the expected probabilities; the sum of the other two.
        data: Expected entropy: what more training data would not remove.
        knowledge: Mutual information of the class and the distribution over it: how far the predictions disagree.
    """

    total: Tensor
    data: Tensor
    knowledge: Tensor


def uncertainty(logits: Tensor, *, members: bool = False, offset: float = 0.0) -> Uncertainty:
    """How uncertain each prediction is, and why: for want of knowledge, or because the data are ambiguous.

    Malinin et al., arXiv 1905.00076, section 2. A student of distribution distillation has a Dirichlet distribution of
    concentrations `alpha = exp(z) + offset` and expected probabilities `p = alpha / alpha_0`:
    `total = H[p]`, `data = -sum_k p_k (digamma(alpha_k + 1) - digamma(alpha_0 + 1))`, `knowledge = total - data`. An
    ensemble has `p = mean_m p_m` and `data = mean_m H[p_m]`.

    Of a network that was trained with a softmax, `total` is the entropy of its prediction; the other two mean nothing,
    since adding a number to all of its logits changes them.

    Args:
        logits: `[..., K]` of a student, `[B, M, ..., K]` of an ensemble.
        members: Whether axis 1 are the members of an ensemble.
        offset: What the student's concentrations have beside `exp(z)`: 1 after training with `endd_proxy`.

    Returns:
        Tensors `[...]` (`[B, ...]` of an ensemble), float32 (float64 stays float64).

    Raises:
        ValueError: Less than two classes, members without an axis of their own, or an offset below 0.

    >>> [round(float(x), 4) for x in uncertainty(torch.tensor([0.0, 0.0]))]
    [0.6931, 0.5, 0.1931]
    >>> [round(float(x), 4) for x in uncertainty(torch.tensor([[[99.0, 0.0], [0.0, 99.0]]]), members=True)]
    [0.6931, 0.0, 0.6931]
    """
    if logits.shape[-1] < 2 or (members and logits.dim() < 3) or not offset >= 0:
        raise ValueError(
            f"Expected logits {'[B, M, K]' if members else '[B, K]'} of two classes or more and an offset from 0, got"
            f" {list(logits.shape)} and {offset}."
        )
    with no_autocast(logits):
        if members:
            probs = logits.double().softmax(-1)
            mean, data = probs.mean(1), _entropy(probs).mean(1)
        else:
            alpha, alpha0 = concentrations(logits, 1.0, offset)
            mean = log_expected(logits, offset).exp()
            data = -(mean * (torch.digamma(alpha + 1) - torch.digamma(alpha0 + 1).unsqueeze(-1))).sum(-1)
        total = _entropy(mean)
        parts = (total, data, (total - data).clamp_min(0))
        return Uncertainty(*(x.to(exact(logits)[0].dtype) for x in parts))


def log_expected(logits: Tensor, offset: float = 0.0) -> Tensor:
    """Logarithms of the expected probabilities `[..., K]`, in float64."""
    z = logits.double()
    return (torch.logaddexp(z, z.new_tensor(offset).log()) if offset else z).log_softmax(-1)


def concentrations(logits: Tensor, temperature: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The concentrations `[..., K]` and their sum `[...]`."""
    z = logits.double() / temperature
    z = z - (z.logsumexp(-1, keepdim=True) - math.log(_LARGEST)).clamp_min(0)
    alpha = z.exp() + offset
    return alpha, alpha.sum(-1)


def _entropy(probs: Tensor) -> Tensor:
    return -torch.xlogy(probs, probs).sum(-1)
