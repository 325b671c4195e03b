"""The distance of Like What You Like: Knowledge Distill via Neuron Selectivity Transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_plugins.functional._common import Reduction, exact, exactly, expect, reduce, unit

__all__ = ["match_spatial", "nst"]

Kernel = Literal["linear", "poly", "gaussian"]

# Entries of the Gram matrices that live at a time, 256 MiB in float32; larger batches go in pieces.
_ENTRIES = 2**26


def nst(
    student_map: Tensor,
    teacher_map: Tensor,
    kernel: Kernel = "poly",
    *,
    c: float = 0.0,
    d: int = 2,
    sigma2: float | None = None,
    eps: float = 1e-12,
    teacher_term: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, each channel's normalised map one sample.

    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219,
    section 4. With f the channels `[H * W]`, divided by their L2 norms:
    `mean_ij k(f_t_i, f_t_j) + mean_ij k(f_s_i, f_s_j) - 2 mean_ij k(f_s_i, f_t_j)`, for every example on its own. The
    paper's factor `lambda / 2` is left to the caller. The kernels are `x.y` (linear), `(x.y + c)^d` (poly), and
    `exp(-|x - y|^2 / (2 sigma^2))` (gaussian).

    The numbers of channels may differ, the spatial sizes must agree (see `match_spatial`). Nothing of size
    `B * C * C * H * W` is made: linear needs channel means only; poly with d = 2 and c = 0 is
    `|F_s^T F_s / C_s - F_t^T F_t / C_t|^2`, and takes this spatial form (`[B, HW, HW]`) or the inner products of the
    channels (`[B, C, C]`), whichever is smaller; the rest takes the inner products. Large batches go in pieces.

    Departures: the released code leaves out the teacher-teacher term, a constant, and so may be negative; here
    `teacher_term=False` does that. Channels of norm 0 (up to `eps`) are zero samples and get no gradient. The paper
    sets sigma^2 to a mean squared distance of pairs: we take all pairs among the student's and the teacher's channels
    of the example, as a constant for the gradient.

    Args:
        student_map: `[B, C_s, H, W]`, or `[B, C_s, N]`.
        teacher_map: `[B, C_t, H, W]`, or `[B, C_t, N]`; gets no gradient.
        kernel: `"linear"`, `"poly"` or `"gaussian"`.
        c: Offset of the polynomial kernel.
        d: Degree of the polynomial kernel.
        sigma2: sigma^2 of the Gaussian kernel; by default the mean squared distance of all pairs.
        eps: Norm up to which a channel counts as zero.
        teacher_term: Whether the constant first term is added.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> teacher = torch.tensor([[[3.0, 4.0]]])
    >>> nst(student, teacher)
    tensor(0.5000)
    >>> nst(student, 5 * student.flip(1))
    tensor(0.)
    """
    _check(student_map, teacher_map, kernel, d, sigma2)
    with exactly(student_map.flatten(2), teacher_map.detach().flatten(2)) as (student, teacher):
        (c_s, n), c_t = student.shape[1:], teacher.shape[1]
        channel_entries, spatial_entries = c_s**2 + c_t**2 + c_s * c_t, n**2
        if kernel == "poly" and not (d == 2 and c == 0 and spatial_entries < channel_entries):
            return reduce(_in_pieces(_poly(c, d, eps), student, teacher, teacher_term, channel_entries), reduction)
        student, teacher = unit(student, eps=eps), unit(teacher, eps=eps)
        if kernel == "linear":
            values = _linear(student, teacher, teacher_term)
        elif kernel == "poly":
            values = _in_pieces(_spatial, student, teacher, teacher_term, 2 * spatial_entries)
        else:
            values = _in_pieces(_gaussian(sigma2), student, teacher, teacher_term, channel_entries)
        return reduce(values, reduction)


def match_spatial(
    student_map: Tensor, teacher_map: Tensor, mode: Literal["interpolate", "pool"] = "interpolate"
) -> tuple[Tensor, Tensor]:
    """Brings two maps to one spatial size, as `nst` needs them.

    Huang, Wang, 2017, arXiv 1707.01219: a map that is smaller than the other is interpolated.

    `"interpolate"` resizes the student's map bilinearly to the teacher's size (with antialiasing where it shrinks, so
    that every position counts) and leaves the teacher's alone. `"pool"`, the choice of the field's benchmarks,
    averages the larger map down to the smaller one's size, height and width each on their own. Maps of one size come
    back as they are.

    Args:
        student_map: `[B, C_s, H_s, W_s]`.
        teacher_map: `[B, C_t, H_t, W_t]`.
        mode: `"interpolate"` or `"pool"`.

    Returns:
        The student's and the teacher's map, `[B, C_s, H, W]` and `[B, C_t, H, W]`.

    >>> student, teacher = match_spatial(torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 8, 6))
    >>> student.shape, teacher.shape
    (torch.Size([2, 3, 8, 6]), torch.Size([2, 5, 8, 6]))
    >>> student, teacher = match_spatial(torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 8, 6), mode="pool")
    >>> student.shape, teacher.shape
    (torch.Size([2, 3, 4, 6]), torch.Size([2, 5, 4, 6]))
    """
    if mode not in ("interpolate", "pool"):
        raise ValueError(f"Expected mode 'interpolate' or 'pool', got {mode!r}.")
    if student_map.shape[2:] == teacher_map.shape[2:]:
        return student_map, teacher_map
    maps = student_map.dim() == teacher_map.dim() == 4
    remedy = "only maps with height and width can be resized"
    expect(maps, "maps [B, C, H, W]", student_map, teacher_map, remedy=remedy)
    (h_s, w_s), (h_t, w_t) = student_map.shape[2:], teacher_map.shape[2:]
    if mode == "interpolate":
        # In float32, since the antialiasing resize knows no half precision on every device.
        (student,), shrinks = exact(student_map), h_t < h_s or w_t < w_s
        student = F.interpolate(student, size=(h_t, w_t), mode="bilinear", antialias=shrinks)
        return student.to(student_map.dtype), teacher_map
    smaller = (min(h_s, h_t), min(w_s, w_t))
    return F.adaptive_avg_pool2d(student_map, smaller), F.adaptive_avg_pool2d(teacher_map, smaller)


_Form = Callable[[Tensor, Tensor, bool], Tensor]


def _in_pieces(form: _Form, student: Tensor, teacher: Tensor, teacher_term: bool, entries: int) -> Tensor:
    """Runs a form on as many examples at a time as memory allows, the backward pass included.

    Args:
        form: Gives the values `[b]` of the examples.
        student: `[B, C_s, N]`.
        teacher: `[B, C_t, N]`.
        teacher_term: Passed on.
        entries: Size of the matrices that the form makes of one example.
    """
    step = max(1, _ENTRIES // entries)
    if len(student) <= step:
        return form(student, teacher, teacher_term)
    pieces = zip(student.split(step), teacher.split(step), strict=True)
    return torch.cat(
        [checkpoint(form, s, t, teacher_term, use_reentrant=False, preserve_rng_state=False) for s, t in pieces]
    )


def _linear(student: Tensor, teacher: Tensor, teacher_term: bool) -> Tensor:
    """The squared distance of the channels' means."""
    m_s, m_t = student.mean(1), teacher.mean(1)
    return (m_s - m_t).square().sum(1) if teacher_term else (m_s * (m_s - 2 * m_t)).sum(1)


def _spatial(student: Tensor, teacher: Tensor, teacher_term: bool) -> Tensor:
    """The second-degree polynomial without offset, as the squared distance of the positions' Gram matrices."""
    g_s, g_t = (x.mT @ x / x.shape[1] for x in (student, teacher))
    return (g_s - g_t).square().sum((1, 2)) if teacher_term else (g_s * (g_s - 2 * g_t)).sum((1, 2))


def _poly(c: float, d: int, eps: float) -> _Form:
    """Of maps as they are: their inner products are divided by the norms, which stand on the diagonals, and no map."""

    def mean(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (products * left.unsqueeze(2) * right.unsqueeze(1) + c).pow(d).mean((1, 2))

    def form(student: Tensor, teacher: Tensor, teacher_term: bool) -> Tensor:
        (own, cross), norms = _InnerProducts.apply(student, teacher), teacher.norm(dim=2)
        squares = own.diagonal(dim1=1, dim2=2)
        i_s = squares.clamp_min(eps**2).rsqrt() * (squares > eps**2)
        i_t = norms.clamp_min(eps).reciprocal() * (norms > eps)
        value = mean(own, i_s, i_s) - 2 * mean(cross, i_s, i_t)
        return value + mean(teacher @ teacher.mT, i_t, i_t) if teacher_term else value

    return form


class _InnerProducts(torch.autograd.Function):
    """`S S^T` and `S T^T`; the gradient for S is two products, where autograd takes three and two sums of maps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return student @ student.mT, student @ teacher.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, own: Tensor, cross: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        return torch.baddbmm(cross @ teacher, own + own.mT, student), None


def _gaussian(sigma2: float | None) -> _Form:
    def form(student: Tensor, teacher: Tensor, teacher_term: bool) -> Tensor:
        width = _mean_distance(student.detach(), teacher) if sigma2 is None else sigma2

        def mean(x: Tensor, y: Tensor) -> Tensor:
            # Norms are 1 or 0 and constant: what the gradient says of them is along the channel, and normalised away.
            norms = x.detach().square().sum(2).unsqueeze(2) + y.detach().square().sum(2).unsqueeze(1)
            return torch.exp((x @ y.mT - norms / 2) / width).mean((1, 2))

        return _mmd(mean, student, teacher, teacher_term)

    return form


def _mean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of all pairs among the channels of both maps `[B, 1, 1]`, kept away from rounding."""
    both = torch.cat([student, teacher], 1)
    n = both.shape[1]
    total = 2 * (n * both.square().sum((1, 2)) - both.sum(1).square().sum(1))
    return (total / (n * (n - 1))).clamp_min(torch.finfo(both.dtype).eps ** 0.5)[:, None, None]


def _mmd(mean: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, teacher_term: bool) -> Tensor:
    """The discrepancy `[B]` by a function that gives the mean of the kernel over all pairs of channels."""
    value = mean(student, student) - 2 * mean(student, teacher)
    return value + mean(teacher, teacher) if teacher_term else value


def _check(student: Tensor, teacher: Tensor, kernel: str, d: int, sigma2: float | None) -> None:
    if kernel not in get_args(Kernel):
        raise ValueError(f"Expected kernel 'linear', 'poly' or 'gaussian', got {kernel!r}.")
    if d < 1 or d != int(d):
        raise ValueError(f"Expected a whole degree d from 1, got {d}.")
    if sigma2 is not None and not sigma2 > 0:
        raise ValueError(f"Expected sigma2 above 0, got {sigma2}.")
    fits = student.dim() in (3, 4) and student.dim() == teacher.dim() and len(student) == len(teacher)
    expect(fits, "maps [B, C, H, W] or [B, C, N] of one batch", student, teacher)
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"Expected maps of one spatial size, got {list(student.shape[2:])} and {list(teacher.shape[2:])}: bring"
            " them together with match_spatial."
        )
