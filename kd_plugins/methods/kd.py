"""Distilling the Knowledge in a Neural Network."""

from __future__ import annotations

from torch import Tensor

from kd_plugins import Batch, Distiller, DistillError, Needs, Paper, Reads, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import Share, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.reading.scores import class_scores


def soft_labels(student: View, teacher: View, batch: Batch, temperature: float, standardize: bool = False) -> Tensor:
    """The soft-label term of a batch: per example, per label, or per token or pixel that counts; of numbers the MSE.

    Args:
        student: Student scores, as `class_scores` reads them.
        teacher: Teacher scores of the same classes.
        batch: Its task tells what the scores are; ignored labels and padding leave a token or pixel out.
        temperature: Softens both sides, but of a regression; the term is multiplied by its square.
        standardize: Standardise both sides over the classes first.
    """
    rows = class_scores(student, teacher, batch, None if standardize else temperature)
    s, t = rows.student, rows.teacher
    if standardize:
        if rows.exclusive("standardize=true").student.shape[-1] == 2:
            raise DistillError(
                "standardize=true makes 1 and -1 of any row of two classes, which teaches nothing: leave it out."
            )
        s, t = KF.standardize(s), KF.standardize(t)
    if rows.numbers:
        return KF.kd_regression(s, t, mask=rows.mask)
    if rows.binary:
        return KF.kd_multilabel(s, t, temperature, mask=rows.mask)
    return KF.kd(s, t, temperature, mask=rows.mask)


class KD(Distiller):
    """Distils the teacher's softened class probabilities.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014, arXiv
    1503.02531, section 2: `(1 - alpha) * task + alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`.

    Logits are `[B, K]` (classification; a sigmoid for each class where the task is multi-label or K is 1), `[B, L, K]`
    per token or frame of sound, or `[B, K, H, W]` per pixel, where ignored labels and padding are left out and every
    example counts the same. The numbers of a regression are pulled to the teacher's by their squared distance, which no
    temperature softens. With several teachers the terms are averaged, whose gradient is that of their mean
    probabilities.

    Args:
        temperature: Softens both distributions. By default 4, what the field's benchmarks use, and 1 for the next token
            of a language model, where 4 costs more than the teacher gives (measured here); the paper tried 1 to 20.
        alpha: Weight of the soft labels; the task loss gets the rest. Our default, that of the field's benchmarks.
        standardize: Standardise the logits over the classes before the temperature: Sun et al., "Logit Standardization
            in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.
    """

    paper = Paper(
        "Distilling the Knowledge in a Neural Network",
        ("Geoffrey Hinton", "Oriol Vinyals", "Jeff Dean"),
        "NIPS Deep Learning Workshop",
        2014,
        arxiv="1503.02531",
    )
    tasks = ("classification", "multilabel", "regression", "token", "causal-lm", "ctc", "segmentation")
    teachers: int | str = "many"

    def __init__(
        self, *, temperature: Temperature | None = None, alpha: Share = 0.9, standardize: bool = False
    ) -> None:
        super().__init__()

    @property
    def task_weight(self) -> float:  # type: ignore[override]
        return 1 - self.alpha

    def temperature_for(self, task: str) -> float:
        """The temperature at a task: the option, or its default."""
        return self.temperature or (1.0 if task == "causal-lm" else 4.0)

    def needs(self) -> Needs:
        return Needs(teacher=Reads(softened=None if self.standardize else self.temperature_for(self.host.task)))

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        if not self.alpha:
            return {}
        term = soft_labels(student, teacher, batch, self.temperature_for(batch.task), self.standardize)
        return {"kd": self.alpha * term}
