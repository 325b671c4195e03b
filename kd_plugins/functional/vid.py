"""The loss of Variational Information Distillation."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.functional._common import Reduction, exactly, expect, per_example, reduce

__all__ = ["vid"]


def vid(mean: Tensor, teacher: Tensor, variance: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Negative log-likelihood of the teacher's features under a Gaussian that the student's features predict.

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv
    1904.05835, the Gaussian model with one variance for each channel:
    `-log q(t|s) = sum_chw (t_chw - mu_chw(s))^2 / (2 sigma_c^2) + log sigma_c + constant`. The smaller, the larger is a
    lower bound of the mutual information of the two.

    Departures: the mean over channels and positions in place of the sum, as in the public code (read there), so that a
    weight means the same for every size of map; the constant `log(2 pi) / 2` is left out.

    Args:
        mean: What the student's features predict `[B, C, ...]`.
        teacher: The teacher's features, of that shape; get no gradient.
        variance: `[C]`, above 0; gets a gradient.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; may be negative.

    >>> import torch
    >>> vid(torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([1.0, 1.0]))
    tensor(1.2500)
    """
    fits = mean.shape == teacher.shape and mean.dim() >= 2 and variance.shape == mean.shape[1:2]
    expect(fits, "a mean and a teacher of one shape [B, C, ...] and a variance [C]", mean, teacher, variance)
    with exactly(mean, teacher.detach(), variance) as (mean, teacher, variance):
        variance = variance.view(-1, *[1] * (mean.dim() - 2))
        return reduce(per_example(((teacher - mean).square() / variance + variance.log()) / 2), reduction)
