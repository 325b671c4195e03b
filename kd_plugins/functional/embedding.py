"""One vector for each example, of whatever a layer gives."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import exactly, expect

__all__ = ["embedding"]


def embedding(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a layer says of each example as one vector: vectors as they are, maps and tokens by their mean.

    In float32 (float64 stays float64).

    Args:
        features: `[B, D]`, maps `[B, D, H, W]`, or tokens `[B, L, D]`.
        mask: `[B, L]`, boolean or integer: the tokens that count, whatever the others hold; all of them by default. Has
            no meaning for vectors and maps.

    Returns:
        `[B, D]`.

    >>> tokens = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> embedding(tokens), embedding(tokens, torch.tensor([[1, 1, 0]]))
    (tensor([[4.3333]]), tensor([[2.]]))
    """
    expect(features.dim() in (2, 3, 4), "features [B, D], [B, D, H, W] or [B, L, D]", features)
    if features.dim() == 3 and mask is not None:
        fits = mask.shape == features.shape[:2]
        expect(fits, f"a mask {list(features.shape[:2])} for these tokens", mask)
    with exactly(features) as (x,):
        if x.dim() == 3 and mask is not None:
            valid = mask.bool().unsqueeze(-1)
            return torch.where(valid, x, 0).sum(1) / valid.sum(1).clamp_min(1)
        return x if x.dim() == 2 else x.mean(1) if x.dim() == 3 else x.mean((2, 3))
