"""The losses of Structured Knowledge Distillation for Dense Prediction; its critic's loss is `wgan_gp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, reduce, unit
from kd_plugins.functional.kd import kd

__all__ = ["structured_pair", "structured_pixel"]


def structured_pixel(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Divergence of the student's class probabilities from the teacher's, pixel by pixel.

    Liu, Chen, Liu, Qin, Luo, Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019; Liu, Shu,
    Wang, Shen, TPAMI 2020, arXiv 1903.04197: the mean over the pixels of `KL(q_t || q_s)`, which is `kd` at T = 1.

    Departures: a mean over the pixels that count of each image, then over the images. The released code sums the
    cross-entropy over the batch and divides by the pixels of one image, the ignored ones among them: B times as much.

    Args:
        student_logits: Score maps `[B, K, H, W]`, or pixels in any order `[B, N, K]`.
        teacher_logits: The same shape; gets no gradient.
        mask: `[B, H, W]` (`[B, N]`), boolean or integer: the pixels that count, such as `labels != 255`.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([0.0, 9.0, 0.0, 0.0]).view(1, 2, 1, 2)
    >>> structured_pixel(student, teacher, mask=torch.tensor([[[1, 0]]]))
    tensor(0.)
    """
    if student_logits.dim() == teacher_logits.dim() == 4:
        student_logits, teacher_logits = student_logits.movedim(1, -1), teacher_logits.movedim(1, -1)
    return kd(student_logits, teacher_logits, 1.0, mask=mask, reduction=reduction)


def structured_pair(
    student_map: Tensor,
    teacher_map: Tensor,
    granularity: tuple[int, int] = (2, 2),
    neighbours: int | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared difference of the similarities between the nodes of two maps.

    Liu, Chen, Liu, Qin, Luo, Wang, CVPR 2019; Liu, Shu, Wang, Shen, TPAMI 2020, arXiv 1903.04197. A node is the average
    of a patch of `beta` pixels, its similarity to another the cosine `a_ij = <f_i, f_j> / (|f_i| |f_j|)`, and with
    `alpha` nodes R_i near each of the `H W / beta` nodes i, itself the first of them,
    `beta / (H W alpha) * sum_i sum_{j in R_i} (a_ij^s - a_ij^t)^2`: a mean over the pairs.

    Departures: the gradient passes through the norms, which the released code detaches; that code also pools by the
    maximum. A patch at the border that is cut off is a node like the others, as in that code. A node of zeros is
    similar to none.

    Args:
        student_map: `[B, C_s, H, W]`.
        teacher_map: `[B, C_t, H, W]`, of the same size (`match_spatial`); gets no gradient.
        granularity: Height and width of a patch.
        neighbours: The paper's `alpha`: how many of the nearest nodes each is compared with (by the distance between
            their first pixels, of equally near ones those that come first row by row); all by default.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; from 0 to 4.

    >>> student = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 2, 1, 2)
    >>> structured_pair(student, torch.ones(1, 3, 1, 2), granularity=(1, 1))
    tensor(0.5000)
    """
    fits = student_map.dim() == teacher_map.dim() == 4 and student_map[:, 0].shape == teacher_map[:, 0].shape
    remedy = "bring them together with match_spatial"
    expect(fits, "maps [B, C, H, W] of one batch and size", student_map, teacher_map, remedy=remedy)
    if min(granularity) < 1 or (neighbours is not None and neighbours < 1):
        raise ValueError(
            f"Expected patches of at least 1 x 1 and at least 1 neighbour, got {granularity} and {neighbours}."
        )
    with exactly(student_map, teacher_map.detach()) as maps:
        nodes = [F.avg_pool2d(x, granularity, ceil_mode=True) for x in maps]
        rows, columns = nodes[0].shape[2:]
        f_s, f_t = (unit(x.flatten(2), 1) for x in nodes)
        apart = (f_s.mT @ f_s - f_t.mT @ f_t).square()
        if neighbours is not None and neighbours < rows * columns:
            near = _nearest(rows, columns, granularity, neighbours, apart.device)
            apart = apart.gather(2, near.expand(len(apart), -1, -1))
        return reduce(apart.mean((1, 2)), reduction)


def _nearest(rows: int, columns: int, granularity: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """The numbers of the nodes that are nearest to each node of a grid, itself the first: `[nodes, count]`."""
    y, x = (torch.arange(n, device=device) * size for n, size in zip((rows, columns), granularity, strict=True))
    places = torch.cartesian_prod(y, x)
    squares = (places[:, None] - places[None]).square().sum(-1)
    return squares.argsort(stable=True)[:, :count]
