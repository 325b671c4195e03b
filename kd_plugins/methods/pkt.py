"""Learning Deep Representations with Probabilistic Knowledge Transfer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_plugins import Batch, Paper
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative
from kd_plugins.layers import LayerDistiller


class PKT(LayerDistiller):
    """Gives each example of a batch the neighbours that it has to the teacher: conditional probabilities of cosines.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837:
    `task + weight * KL(p_t || p_s)` with `p_ij = K(x_i, x_j) / sum_{k != i} K(x_i, x_k)` and `K = (cos + 1) / 2`.

    The feature of an example is a layer's vector `[B, D]`, or the mean over the positions of its map `[B, D, H, W]` or
    over the real tokens of `[B, L, D]`; widths may differ. Neighbours are those of the batch that one process sees in
    one forward.

    **Departures**: divided by `B^2`, where the paper has a sum; see also `KF.pkt`.

    Args:
        weight: Weight of the divergence; 30000 is that of the field's benchmarks (RepDistiller), the paper has none.
    """

    paper = Paper(
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        ("Nikolaos Passalis", "Anastasios Tefas"),
        "ECCV",
        2018,
        arxiv="1803.10837",
    )
    teachers = "many"
    examples = 3
    maps = False

    def __init__(self, *, weight: NonNegative = 30000.0, **layers: Any) -> None:
        super().__init__(**layers)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        return KF.pkt(KF.embedding(student, batch.mask), KF.embedding(teacher, batch.teacher_mask))
