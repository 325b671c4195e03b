"""Similarity-Preserving Knowledge Distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_plugins import Batch, Paper
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative
from kd_plugins.layers import LayerDistiller


class SP(LayerDistiller):
    """Makes examples that are alike to the teacher alike to the student: inner products of maps within the batch.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682:
    `task + gamma / B^2 * sum over pairs of layers |G_t - G_s|_F^2`, G being `A A^T` with rows of length 1.

    Maps are `[B, C, H, W]`; neither channels nor sizes need agree. The pairs of examples are those of the batch that
    one process sees in one forward.

    Args:
        weight: The paper's gamma.
    """

    paper = Paper(
        "Similarity-Preserving Knowledge Distillation",
        ("Frederick Tung", "Greg Mori"),
        "ICCV",
        2019,
        arxiv="1907.09682",
    )
    teachers = "many"
    examples = 2

    def __init__(self, *, weight: NonNegative = 3000.0, **layers: Any) -> None:
        super().__init__(**layers)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        return KF.sp(student, teacher)
