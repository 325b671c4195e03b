"""The k highest of many scores, with what is left of the distribution as one class."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import exactly

__all__ = ["merge_rest", "top_k"]


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k highest logits of each row, and behind them that of all other classes taken as one.

    Args:
        logits: `[..., K]`.
        k: How many classes are kept.
        temperature: That the scores are softened with; see `merge_rest`.

    Returns:
        Logits `[..., k + 1]` (`[..., K]` where k is K), and the classes `[..., k]` of the first k.

    >>> scores, classes = top_k(torch.tensor([[1.0, 3.0, 2.0, 1.0]]), 2)
    >>> scores, classes
    (tensor([[3.0000, 2.0000, 1.6931]]), tensor([[1, 2]]))
    """
    classes = logits.topk(k).indices
    return merge_rest(logits, classes, temperature), classes


def merge_rest(logits: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """The logits of some classes of each row, and behind them that of all others taken as one class.

    `T * logsumexp(z_rest / T)`, so that the softmax at temperature T has the probability of each of the classes, and in
    the last place the sum of what the others have. `kd` of two networks that are read so is the divergence between
    these k + 1 probabilities, which is at most that between all K (data processing), and equal to it where k is K. It
    asks nothing of how the student divides the rest, where k renormalised probabilities would take the rest for 0.
    This is how language models are distilled from a teacher's top k with a tail, or ghost, token: Anshumann et al.,
    "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv 2503.16870.

    Args:
        logits: `[..., K]`.
        classes: Class numbers `[..., k]`, each once in its row.
        temperature: The T at which the rest is summed; the result is for a loss with this temperature.

    Returns:
        `[..., k + 1]`, or `[..., K]` where k is K and nothing is left; float32 (float64 stays float64).

    >>> merge_rest(torch.zeros(1, 4), torch.tensor([[2]])).softmax(-1)
    tensor([[0.2500, 0.7500]])
    """
    with exactly(logits) as (scores,):
        kept = scores.gather(-1, classes)
        if classes.shape[-1] == scores.shape[-1]:
            return kept
        rest = (scores / temperature).scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([kept, temperature * rest], -1)
