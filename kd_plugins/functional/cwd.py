"""The loss of Channel-wise Knowledge Distillation for Dense Prediction."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.functional._common import Reduction, expect
from kd_plugins.functional.kd import kd

__all__ = ["cwd"]


def cwd(student_map: Tensor, teacher_map: Tensor, temperature: float = 4.0, *, reduction: Reduction = "mean") -> Tensor:
    """Divergence, channel by channel, of where the student's map is active from where the teacher's is.

    Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256:
    each channel is a distribution over the positions, `phi(y)_ci = softmax_i(y_ci / T)`, and the loss
    `T^2 / C * sum_c KL(phi(y_t)_c || phi(y_s)_c)`, in the mean over the batch. It is `kd` with channels in the place of
    tokens, and positions in the place of classes.

    Args:
        student_map: `[B, C, H, W]` (any number of position axes), of scores or of features with the teacher's channels.
        teacher_map: The same shape (`match_spatial` for sizes); gets no gradient.
        temperature: Softens both sides, so that more of the map counts; the paper's is 4.
        reduction: `"mean"` over the batch, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    >>> cwd(student, teacher, temperature=2.0)
    tensor(0.4438)
    """
    fits = student_map.shape == teacher_map.shape and student_map.dim() >= 3
    remedy = "bring the channels together with a convolution, and the sizes with match_spatial"
    expect(fits, "maps [B, C, H, W] of one shape", student_map, teacher_map, remedy=remedy)
    return kd(student_map.flatten(2), teacher_map.flatten(2), temperature, reduction=reduction)
