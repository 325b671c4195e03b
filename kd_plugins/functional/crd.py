"""The objective of Contrastive Representation Distillation."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import Reduction, check_temperature, exactly, expect, reduce

__all__ = ["crd", "crd_log_z"]


def crd(
    anchor: Tensor,
    positive: Tensor,
    bank: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    log_z: Tensor | float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Noise-contrastive loss: tells the other network's view of the same input from its views of N other inputs.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, section 3: with M
    rows in the bank and the critic `h(a, b) = e / (e + N / M)`, `e = exp(a.b / temperature)`,
    `-log h(anchor, positive) - sum_j log(1 - h(anchor, negative_j))`.

    In logarithms: `h` is the sigmoid of `a.b / temperature - log(N / M)`, and neither term overflows. The scores of all
    rows are computed, `[B, M]`, and the negatives taken from them: no `[B, N, D]` is made.

    Departures: `log_z` divides e by a constant Z, as the released code does with its estimate (see `crd_log_z`); 0 is
    the paper's critic. Only the anchor gets a gradient; the objective is computed once from each side.

    Args:
        anchor: Embeddings of one network `[B, D]`, of length 1.
        positive: The other network's of the same inputs `[B, D]`; gets no gradient.
        bank: The other network's of all M rows of the training set `[M, D]`; gets no gradient.
        negatives: Rows of the bank `[B, N]`.
        temperature: tau, above 0.
        log_z: The logarithm of Z.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> import torch
    >>> a, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> crd(a, a, bank, torch.tensor([[1, 1]]), temperature=1.0)
    tensor(1.6996)
    """
    expect(positive.shape == anchor.shape, "one positive for each anchor [B, D]", anchor, positive)
    with exactly(anchor, positive.detach(), bank.detach()) as (anchor, positive, bank):
        odds = math.log(negatives.shape[1] / len(bank)) + log_z
        same = (anchor * positive).sum(1) / temperature - odds
        others = _scores(anchor, bank, negatives, temperature) - odds
        return reduce(-F.logsigmoid(same) - F.logsigmoid(-others).sum(1), reduction)


def crd_log_z(anchor: Tensor, bank: Tensor, negatives: Tensor, *, temperature: float = 0.07) -> Tensor:
    """The logarithm of the released code's normalising constant of `crd`: `Z = M mean exp(a.b / temperature)`.

    Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699, after Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", CVPR 2018, arXiv 1805.01978, where it is estimated on the first batch.

    Departures: the mean over the negatives; the released code has the anchors' own rows in it too (read there).

    Args:
        anchor: `[B, D]`.
        bank: `[M, D]`.
        negatives: Rows of the bank `[B, N]`.
        temperature: tau, above 0.

    Returns:
        A scalar without gradient.

    >>> import torch
    >>> crd_log_z(torch.zeros(2, 3), torch.zeros(10, 3), torch.zeros(2, 4, dtype=torch.long)).exp()
    tensor(10.)
    """
    with exactly(anchor.detach(), bank.detach()) as (anchor, bank):
        scores = _scores(anchor, bank, negatives, temperature)
        return scores.flatten().logsumexp(0) + math.log(len(bank) / scores.numel())


def _scores(anchor: Tensor, bank: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """The anchors' products with their negatives `[B, N]`, over the temperature."""
    fits = anchor.dim() == bank.dim() == 2 and anchor.shape[1] == bank.shape[1] and len(negatives) == len(anchor)
    expect(fits, "anchors [B, D], a bank [M, D] and rows of it [B, N]", anchor, bank, negatives)
    check_temperature(temperature)
    return (anchor @ bank.mT).gather(1, negatives) / temperature
