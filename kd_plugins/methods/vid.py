"""Variational Information Distillation for Knowledge Transfer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kd_plugins import Batch, Paper
from kd_plugins.catalog.values import NonNegative, Positive
from kd_plugins.functional.nst import match_spatial
from kd_plugins.functional.vid import vid
from kd_plugins.layers import LayerDistiller
from kd_plugins.nn.connectors import GaussianRegressor


class VID(LayerDistiller):
    """Keeps as much information about the teacher's layer as the student's can hold, by a bound on what they share.

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv
    1904.05835: `task + weight * sum_layers -log q(t|s)`, a Gaussian whose mean `[B, C_t, H, W]` a regressor makes of
    the student's map `[B, C_s, H, W]` and whose variance is one for each channel, `softplus(alpha) + eps`. Both are
    trained; channels that the student cannot predict get a large variance and count less.

    **Departures** A mean over channels and positions in place of the sum; the regressor, the first variance and eps are
    the public code's (read there). The larger of two maps is averaged down to the other's size.

    Args:
        weight: Weight of the sum over the layers; 1 is that of the authors of CRD for their benchmark, for this mean.
        variance: The variance at first; 5 is the public code's.
    """

    paper = Paper(
        "Variational Information Distillation for Knowledge Transfer",
        ("Sungsoo Ahn", "Shell Xu Hu", "Andreas Damianou", "Neil D. Lawrence", "Zhenwen Dai"),
        "CVPR",
        2019,
        arxiv="1904.05835",
    )

    def __init__(self, *, weight: NonNegative = 1.0, variance: Positive = 5.0, **layers: Any) -> None:
        super().__init__(**layers)

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return GaussianRegressor(student.shape[1], teacher.shape[1], self.variance)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        student, teacher = match_spatial(student, teacher, "pool")
        mean, variance = part(student)
        return vid(mean, teacher, variance)
