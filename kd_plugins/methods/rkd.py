"""Relational Knowledge Distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_plugins import Batch, Paper
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative
from kd_plugins.errors import check_any
from kd_plugins.layers import LayerDistiller


class RKD(LayerDistiller):
    """Keeps the distances of the examples of a batch, and the angles of their triangles, as the teacher has them.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068:
    `task + lambda_D * RKD-D + lambda_A * RKD-A`, Huber losses of relative distances and of cosines.

    The embedding of an example is a layer's vector `[B, D]`, or the mean over the positions of its map `[B, D, H, W]`
    or over the real tokens of `[B, L, D]`; widths may differ. Pairs and triples are those of the batch that one process
    sees in one forward; angles take memory for `B * B * max(B, D)` numbers.

    **Departures**: means over all pairs and triples, where the paper has sums; the authors' script for CIFAR divides
    embeddings by their norms first, which is left out here, as in the field's benchmarks.

    Args:
        distance_weight: Weight of the distances; 25 is the authors' for CIFAR-100, 1 for metric learning.
        angle_weight: Weight of the angles; 50 is the authors' for CIFAR-100, 2 for metric learning.
    """

    paper = Paper(
        "Relational Knowledge Distillation",
        ("Wonpyo Park", "Dongju Kim", "Yan Lu", "Minsu Cho"),
        "CVPR",
        2019,
        arxiv="1904.05068",
    )
    teachers = "many"
    examples = 3
    maps = False

    def __init__(self, *, distance_weight: NonNegative = 25.0, angle_weight: NonNegative = 50.0, **layers: Any) -> None:
        super().__init__(**layers)
        check_any(self, "distance_weight", "angle_weight")

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        s = KF.embedding(student, batch.mask)
        t = KF.embedding(teacher, batch.teacher_mask)
        distances = self.distance_weight * KF.rkd_distance(s, t)
        return distances + self.angle_weight * KF.rkd_angle(s, t) if self.angle_weight else distances
