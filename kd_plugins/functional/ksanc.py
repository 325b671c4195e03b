"""The squeezed descriptors of Knowledge Squeezed Adversarial Network Compression."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import exactly, expect

__all__ = ["squeeze"]


def squeeze(features: Tensor, scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """One vector of a layer's vectors: their sum, weighted by the softmax of their attention scores.

    Shu et al., "Knowledge Squeezed Adversarial Network Compression", 2019, arXiv 1904.05100, after Jetley, Lord, Lee,
    Torr, "Learn to Pay Attention", ICLR 2018, arXiv 1804.02391: `V = sum_n softmax(M)_n F_n` over the positions n.

    Args:
        features: `[B, N, D]`, N positions of a map or tokens of a text.
        scores: `[B, N]`.
        mask: `[B, N]`, boolean or integer: the positions that count; the others get no attention, whatever is there.

    Returns:
        `[B, D]`; 0 for an example without any position that counts.

    >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    >>> squeeze(features, torch.zeros(1, 3), mask=torch.tensor([[1, 1, 0]]))
    tensor([[0.5000, 0.5000]])
    """
    masks = () if mask is None else (mask,)
    fits = features.dim() == 3 and all(x.shape == features.shape[:2] for x in (scores, *masks))
    expect(fits, "features [B, N, D], scores [B, N] and a mask of that shape", features, scores, *masks)
    with exactly(features, scores) as (features, scores):
        if mask is not None:
            left_out = ~mask.bool()
            features = features.masked_fill(left_out.unsqueeze(-1), 0)
            scores = scores.masked_fill(left_out, torch.finfo(scores.dtype).min)
        return (scores.softmax(1).unsqueeze(1) @ features).squeeze(1)
