"""Decoupled Knowledge Distillation."""

from __future__ import annotations

from kd_plugins import Batch, Distiller, Paper, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative, Share, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.errors import check_any
from kd_plugins.reading.scores import class_scores


class DKD(Distiller):
    """Distils the probability of the true class and those of the other classes as two terms with weights of their own.

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679:
    `task + alpha * TCKD + beta * NCKD`, both times `T^2`: the soft labels are `TCKD + (1 - p_t[y]) * NCKD`, which mutes
    what a confident teacher says of the other classes.

    Scores are `[B, K]`, `[B, L, K]` per token or `[B, K, H, W]` per pixel, with class numbers as labels; ignored labels
    and padding are left out, and every example counts the same.

    **Departures**: the warm-up is a share of the steps, and continuous; the released code's is in whole epochs.

    Args:
        alpha: Weight of the true class' part, TCKD.
        beta: Weight of the other classes' part, NCKD; the released code's default, which its pairs of networks change:
            2 for resnet56 to resnet20 on CIFAR-100, 0.5 with temperature 1 on ImageNet.
        temperature: Softens both sides.
        warmup: Share of the training in which the term grows linearly from 0 to its weight; none is our default, the
            released code takes 20 of 240 epochs on CIFAR-100, 0.083, and 1 of 100 on ImageNet.
    """

    paper = Paper(
        "Decoupled Knowledge Distillation",
        ("Borui Zhao", "Quan Cui", "Renjie Song", "Yiyu Qiu", "Jiajun Liang"),
        "CVPR",
        2022,
        arxiv="2203.08679",
    )
    tasks = ("classification", "token", "causal-lm", "segmentation")
    teachers = "many"

    def __init__(
        self, *, alpha: NonNegative = 1.0, beta: NonNegative = 8.0, temperature: Temperature = 4.0, warmup: Share = 0.0
    ) -> None:
        super().__init__()
        check_any(self, "alpha", "beta")

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        rows = class_scores(student, teacher, batch).exclusive(self.name)
        labels, known = rows.hard_labels(self.name)
        s, t, options = rows.student, rows.teacher, (self.alpha, self.beta, self.temperature)
        return {"dkd": self.progress.warmed(self.warmup) * KF.dkd(s, t, labels, *options, mask=known)}
