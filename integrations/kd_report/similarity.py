"""Similarity of the layers of networks, from minibatches of their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Similarity"]


class Similarity:
    """Linear CKA of all pairs of layers, summed over minibatches of any size above 3.

    The unbiased HSIC (Song et al., "Feature Selection via Dependence Maximization", JMLR 2012) of two Gram matrices K
    and L with zero diagonal: `(tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n(n-3))`.

    Args:
        layers: Number of layers of each network.

    >>> x = torch.arange(24.0).view(8, 3).sin()
    >>> similarity = Similarity([1, 1])
    >>> similarity.add([x, 5 * x[:, [2, 0, 1]]])
    >>> [[round(float(similarity.matrices()[i, j]), 3) for j in (0, 1)] for i in (0, 1)]
    [[1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self.sum: Tensor | None = None

    def add(self, features: Sequence[Tensor]) -> None:
        """Adds one minibatch: the features `[n, D]` of every layer of every network."""
        if not features or len(features[0]) < 4:
            return
        n = len(features[0])
        grams = torch.stack([_gram(x) for x in features])
        rows = grams.sum(-1)
        total = rows.sum(-1)
        flat = grams.flatten(1)
        hsic = flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)
        hsic /= n * (n - 3)
        self.sum = hsic if self.sum is None else self.sum + hsic

    def matrices(self) -> _Pairs | None:
        """CKA `[layers of i, layers of j]` for every pair of networks; None when nothing could be compared."""
        if self.sum is None:
            return None
        own = self.sum.diagonal().clamp_min(0).sqrt()
        cka = self.sum / (own[:, None] * own).clamp_min(torch.finfo(own.dtype).tiny)
        return _Pairs(cka.clamp(-1, 1).float().cpu(), self.layers)


class _Pairs:
    def __init__(self, cka: Tensor, layers: list[int]) -> None:
        self.cka, self.layers = cka, layers

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        rows, columns = (slice(sum(self.layers[:i]), sum(self.layers[: i + 1])) for i in pair)
        return self.cka[rows, columns].contiguous()


def _gram(x: Tensor) -> Tensor:
    # The estimator does not care where the origin is, but float32 does.
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        return (x @ x.T).double().fill_diagonal_(0)
