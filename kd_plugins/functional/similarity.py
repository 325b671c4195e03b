"""How far features are apart."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, per_example, reduce

__all__ = ["feature_l1", "feature_l2"]


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

    >>> import torch
    >>> feature_l2(torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1))
    tensor(5.)
    """
    return _apart(F.mse_loss, student, teacher, reduction)


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

    >>> import torch
    >>> feature_l1(torch.zeros(1, 2, 1, 1), torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1))
    tensor(2.)
    """
    return _apart(F.l1_loss, student, teacher, reduction)


def _apart(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    fits = student.shape == teacher.shape and student.dim() >= 1
    remedy = "connect them by a layer that maps the student's to the teacher's"
    expect(fits, "features of one shape [B, ...]", student, teacher, remedy=remedy)
    with exactly(student, teacher) as both:
        return reduce(per_example(loss(*both, reduction="none")), reduction)
