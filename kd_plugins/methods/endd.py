"""Ensemble Distribution Distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kd_plugins import Batch, Distiller, Paper, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import Share, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.reading.scores import class_scores

# Above this number of classes the likelihood of the members no longer trains well.
_MANY = 100


class ENDD(Distiller):
    """Distils an ensemble into one network whose Dirichlet distribution tells how far the members disagree.

    Malinin, Mlodozeniec, Gales, "Ensemble Distribution Distillation", ICLR 2020, arXiv 1905.00076: the student's logits
    `z` are the concentrations `alpha = exp(z / T)`, trained by `-mean_m log Dir(pi_m; alpha)`, times `T^2`, of the
    members' probabilities `pi_m` at the same temperature, without labels. The members are the teachers: several
    trainings, or several checkpoints of one. `kd_plugins.uncertainty` reads what the student has learnt.

    Scores are `[B, K]`, `[B, L, K]` per token or `[B, K, H, W]` per pixel; ignored labels and padding are left out, and
    every example counts the same.

    **Departures**: the temperature falls with every step, the released code's with every epoch. The members see the
    student's inputs, with their augmentation; the released code asks them once, on plain images. Concentrations and
    the proxy's precision are bounded (`KF.endd`, `KF.endd_proxy`).

    Args:
        target: What the student learns from: `members`, their likelihood; `reverse-proxy` or `forward-proxy`, a
            Dirichlet distribution that is fitted to them: Ryabinin, Malinin, Gales, "Scaling Ensemble Distribution
            Distillation to Many Classes with Proxy Targets", NeurIPS 2021, arXiv 2105.06987; `mean`, their mean
            probabilities, which is plain ensemble distillation (EnD). `auto` is `members` up to 100 classes and
            `reverse-proxy` above.
        temperature: What the training begins with; by default 10, and 1 with a proxy, which has no temperature in its
            paper.
        cycle: Share of the training in which the temperature is above 1: it stays in the first half of it and falls
            linearly to 1 in the second. By default that of a reproduction, 60 of 90 epochs.
        smoothing: How far the members' probabilities are drawn to uniform ones; by default 1e-3, and 0 for `mean` and
            with a proxy.
    """

    paper = Paper(
        "Ensemble Distribution Distillation",
        ("Andrey Malinin", "Bruno Mlodozeniec", "Mark Gales"),
        "ICLR",
        2020,
        arxiv="1905.00076",
    )
    tasks = ("classification", "token", "causal-lm", "segmentation")
    teachers = "many"
    task_weight = 0.0

    def __init__(
        self,
        *,
        target: Literal["auto", "members", "reverse-proxy", "forward-proxy", "mean"] = "auto",
        temperature: Temperature | None = None,
        cycle: Share = 0.67,
        smoothing: Share | None = None,
    ) -> None:
        super().__init__()

    def target_of(self, classes: int) -> str:
        """The target with this number of classes."""
        return self.target if self.target != "auto" else "members" if classes <= _MANY else "reverse-proxy"

    def offset(self, classes: int) -> float | None:
        """What the student's concentrations have beside `exp(z)`; None where it learns a softmax."""
        return {"mean": None, "members": 0.0}.get(self.target_of(classes), 1.0)

    def temperature_at(self, start: float) -> float:
        """The temperature of the current step, where the first is `start`."""
        if start == 1 or self.cycle == 0:
            return 1.0
        left = 2 - 2 * self.progress.fraction / self.cycle
        return 1 + (start - 1) * min(max(left, 0.0), 1.0)

    def taught(self, student: View, teachers: Sequence[View], batch: Batch) -> Terms:
        rows = [class_scores(student, teacher, batch).exclusive(self.name) for teacher in teachers]
        scores, members, mask = rows[0].student, torch.stack([r.teacher for r in rows], 1), rows[0].mask
        target = self.target_of(scores.shape[-1])
        proxy = target.endswith("proxy")
        start = self.temperature or (1.0 if proxy else 10.0)
        smoothing = self.smoothing if self.smoothing is not None else 1e-3 if target == "members" else 0.0
        options = (scores, members, self.temperature_at(start), smoothing)
        if proxy:
            return {"endd": KF.endd_proxy(*options, target.removesuffix("-proxy"), mask=mask)}
        if target == "mean":
            return {"endd": KF.end(*options, mask=mask)}
        return {"endd": KF.endd(*options, mask=mask)}
