"""The distance of Attention Transfer: where in the image two networks respond."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, reduce, unit
from kd_plugins.functional.nst import match_spatial

__all__ = ["at"]


def at(student_map: Tensor, teacher_map: Tensor, p: int = 2, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference of normalised spatial attention maps.

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928, section 3.1, eq. 2: the
    attention map is `Q = sum_c |A_c|^p`, flattened and divided by its L2 norm; compared is
    `mean_hw (Q_s / |Q_s| - Q_t / |Q_t|)^2`.

    The numbers of channels may differ. The larger of two attention maps is averaged down to the other's size.

    Departures: eq. 2 has the norm of the difference, the released code its mean square, as here (read in the code). The
    factor beta / 2 is the caller's. Averaging down is ours: the paper's pairs have one size.

    Args:
        student_map: Activations `[B, C_s, H_s, W_s]`.
        teacher_map: Activations `[B, C_t, H_t, W_t]`; gets no gradient.
        p: Exponent of the activations, from 1.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> student = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> at(student, torch.tensor([[0.0, 3.0], [0.0, 4.0]]).reshape(1, 2, 1, 2))
    tensor(1.)
    """
    fits = student_map.dim() == teacher_map.dim() == 4 and len(student_map) == len(teacher_map)
    expect(fits, "maps [B, C, H, W] of one batch", student_map, teacher_map)
    if p < 1:
        raise ValueError(f"Expected an exponent p from 1, got {p}.")
    with exactly(student_map, teacher_map.detach()) as maps:
        q_s, q_t = (_bounded(x).abs().pow(p).mean(1, keepdim=True) for x in maps)
        u_s, u_t = (unit(q.flatten(1)) for q in match_spatial(q_s, q_t, "pool"))
        return reduce((u_s - u_t).square().mean(1), reduction)


def _bounded(x: Tensor) -> Tensor:
    """Maps over their largest numbers, which their normalised attention does not see; powers of others overflow."""
    return x / x.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
