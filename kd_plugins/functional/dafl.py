"""What a generator of training images is taught by a teacher: DAFL's three losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import exactly, expect

__all__ = ["dafl_activation", "dafl_information", "dafl_one_hot"]


def dafl_one_hot(logits: Tensor) -> Tensor:
    """How far the teacher is from being sure of its own choice: the cross entropy of its logits and their maximum.

    Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, arXiv 1904.01186: `L_oh = mean_b H(y_b, t_b)` with
    `t_b = argmax_k y_b[k]`.

    Args:
        logits: The teacher's, of generated images `[B, K]`.

    >>> dafl_one_hot(torch.tensor([[0.0, 0.0]]))
    tensor(0.6931)
    """
    expect(logits.dim() == 2 and logits.numel() > 0, "logits [B, K] of at least one image", logits)
    with exactly(logits) as (z,):
        return F.cross_entropy(z, z.argmax(1))


def dafl_activation(features: Tensor) -> Tensor:
    """The mean size of the teacher's features, negative: real images excite it.

    Chen et al., ICCV 2019: `L_a = -mean |f|`. Departures: the paper sums over the units; the mean over examples and
    units is what the released code takes, and what its weights belong to (read there).

    Args:
        features: The teacher's, before its classifier, `[B, D]` or maps `[B, D, H, W]`.

    >>> dafl_activation(torch.tensor([[1.0, -3.0]]))
    tensor(-2.)
    """
    expect(features.dim() >= 2 and features.numel() > 0, "features [B, D] of at least one image", features)
    with exactly(features) as (f,):
        return -f.abs().mean()


def dafl_information(logits: Tensor, base: float = 10, *, mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How unevenly a batch is spread over the classes: the negative entropy of its mean probabilities.

    Chen et al., ICCV 2019: `L_ie = sum_k p_k log p_k` with `p = mean_b softmax(y_b)`, between `-log K` and 0. The base
    of the logarithm is a factor of the weight: 10 in the released code; with e the loss is 2.303 times as large. A
    class that is never predicted adds 0, and its gradient is finite.

    Args:
        logits: The teacher's, of generated images `[B, K]`; B several times K.
        base: Of the logarithm.
        mean: Takes the mean of `[K]` over the processes that share the batch (`Host.mean`).

    >>> dafl_information(torch.eye(2) * 1000)
    tensor(-0.3010)
    """
    expect(logits.dim() == 2 and logits.numel() > 0, "logits [B, K] of at least one image", logits)
    if not base > 1:
        raise ValueError(f"Expected the base of a logarithm, above 1, got {base}.")
    with exactly(logits) as (z,):
        p = z.softmax(1).mean(0)
        p = p if mean is None else mean(p)
        return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum() / math.log(base)
