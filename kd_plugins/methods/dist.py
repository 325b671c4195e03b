"""Knowledge Distillation from A Stronger Teacher."""

from __future__ import annotations

from kd_plugins import Batch, Distiller, Paper, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.errors import check_any
from kd_plugins.reading.scores import class_scores


class DIST(Distiller):
    """Correlates the student's probabilities with the teacher's: along the classes of a row, along the rows of a class.

    Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536:
    `task + beta * inter + gamma * intra`, each one less Pearson's correlation, and times `T^2`. A stronger teacher's
    probabilities need not be matched, only their relations.

    Scores are `[B, K]`, `[B, L, K]` per token or `[B, K, H, W]` per pixel; ignored labels and padding are left out. The
    relation along a class is over the rows of the batch that one process sees in one forward: with several processes
    or with accumulation over each part by itself, and over all tokens or pixels that count, of whichever example.

    **Departures**: `T^2` is from public copies of the code; per token, the relation of classes is averaged over an
    example's own tokens first; see also `KF.dist`.

    Args:
        beta: Weight of the relation between the classes of a row.
        gamma: Weight of the relation between the rows of a class.
        temperature: Softens both sides. 1, 1 and 1 are the released code's for ImageNet; 2, 2 and 4 are common on
            CIFAR-100.
    """

    paper = Paper(
        "Knowledge Distillation from A Stronger Teacher",
        ("Tao Huang", "Shan You", "Fei Wang", "Chen Qian", "Chang Xu"),
        "NeurIPS",
        2022,
        arxiv="2205.10536",
    )
    tasks = ("classification", "token", "causal-lm", "segmentation")
    teachers = "many"

    def __init__(self, *, beta: NonNegative = 1.0, gamma: NonNegative = 1.0, temperature: Temperature = 1.0) -> None:
        super().__init__()
        check_any(self, "beta", "gamma")

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        rows = class_scores(student, teacher, batch).exclusive(self.name)
        options = self.beta, self.gamma, self.temperature
        return {"dist": KF.dist(rows.student, rows.teacher, *options, mask=rows.mask)}
