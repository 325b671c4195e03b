"""How alike features are."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.functional._common import Reduction, check_reduction, exact, no_autocast, per_example, reduce

__all__ = ["feature_l1", "feature_l2", "linear_cka"]


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment: how alike two networks see N inputs, whatever the widths and rotations.

    Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv
    1905.00414, section 3, with linear kernels: `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)` for columns of mean 0.

    Computed in float64, by the inner products of the features or of the inputs, whichever are fewer.

    Args:
        x: Features `[N, D_x]`.
        y: Features `[N, D_y]` of the same inputs.

    Returns:
        A float64 scalar: 1 for features that are equal up to rotation, scale and shift, 0 for unrelated ones, and for
        features that are constant.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> round(linear_cka(x, 3 * x.flip(1) + 1).item(), 12)
    1.0
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            f"Expected features [N, D] of the same N inputs, got {list(x.shape)} and {list(y.shape)}: pool maps and"
            " tokens first."
        )
    with no_autocast(x):
        x, y = _centred(x.double()), _centred(y.double())
        n, d_x, d_y = len(x), x.shape[1], y.shape[1]
        if n * n < max(d_x * d_y, d_x * d_x, d_y * d_y):
            k_x, k_y = x @ x.mT, y @ y.mT
            shared, norms = (k_x * k_y).sum(), k_x.norm() * k_y.norm()
        else:
            shared, norms = (y.mT @ x).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
        return shared / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _centred(x: Tensor) -> Tensor:
    """Columns of mean 0; those that differ from their mean by rounding only become 0."""
    centred = x - x.mean(0)
    return torch.where(centred.norm(dim=0) > 1e-12 * x.norm(dim=0), centred, 0)


def feature_l2(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference of features, whatever their shape and size.

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550,
    eq. 3: `|u(x) - r(v(x))|^2`, the regressor r being the caller's.

    Departures: divided by the number of entries, so that a weight means the same for every size of map; without the
    paper's factor 1/2. Both sides get a gradient, since a teacher's side may have parameters to learn: give a detached
    teacher where it should not.

    Args:
        student: `[B, ...]`.
        teacher: The same shape.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> feature_l2(torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1))
    tensor(5.)
    """
    ours, theirs = _checked(student, teacher, reduction)
    with no_autocast(student):
        return reduce(per_example((ours - theirs).square()), reduction)


def feature_l1(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean absolute difference of features, whatever their shape and size.

    The direct alignment of feature maps that AFD is compared with (Chung, Park, Kim, Kwak, ICML 2020, arXiv
    2002.01775): `|f_s - f_t|_1`.

    Departures: divided by the number of entries, so that a weight means the same for every size of map. Both sides get
    a gradient: give a detached teacher where it should not.

    Args:
        student: `[B, ...]`.
        teacher: The same shape.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> feature_l1(torch.zeros(1, 2, 1, 1), torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1))
    tensor(2.)
    """
    ours, theirs = _checked(student, teacher, reduction)
    with no_autocast(student):
        return reduce(per_example((ours - theirs).abs()), reduction)


def _checked(student: Tensor, teacher: Tensor, reduction: str) -> tuple[Tensor, ...]:
    """Features of one shape, in float32."""
    check_reduction(reduction)
    if student.shape != teacher.shape or student.dim() < 1:
        raise ValueError(
            f"Expected features of one shape [B, ...], got {list(student.shape)} and {list(teacher.shape)}: connect"
            " them by a layer that maps the student's to the teacher's."
        )
    return exact(student, teacher)
