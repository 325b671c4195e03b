"""Distilling the Knowledge in a Neural Network."""

from __future__ import annotations

from torch import Tensor

from kd_plugins import functional as KF
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller, Terms
from kd_plugins.errors import DistillError
from kd_plugins.reading.view import Batch, View

__all__ = ["KD", "soft_labels"]


def soft_labels(student: View, teacher: View, batch: Batch, temperature: float) -> Tensor:
    """The soft-label term of a batch, as its task needs it: per example, per label, or per token that counts.

    Args:
        student: Student logits `[B, K]`, or `[B, L, K]` per token.
        teacher: Teacher logits of the same shape.
        batch: Its task tells what the logits are; labels of -100 and padding leave a token out.
        temperature: Softens both sides; the term is multiplied by its square.
    """
    s, t = student.logits, teacher.logits
    if batch.task == "multilabel":
        return KF.kd_multilabel(s, t, temperature)
    if s.dim() == 2:
        return KF.kd(s, t, temperature)
    mask = batch.mask if batch.mask is not None and batch.mask.shape == s.shape[:-1] else None
    if isinstance(batch.labels, Tensor) and batch.labels.dim() == 2:
        labelled = batch.labels != batch.ignore_index
        mask = labelled if mask is None else labelled & mask.bool()
    if batch.task == "causal-lm":
        s, t, mask = s[:, :-1], t[:, :-1], None if mask is None else mask[:, 1:]
    return KF.kd(s, t, temperature, mask=mask)


class KD(Distiller):
    """Distils the teacher's softened class probabilities.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014, arXiv
    1503.02531, section 2: `(1 - alpha) * task + alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`.

    Logits are `[B, K]` (classification, or multi-label with one sigmoid for each class), or `[B, L, K]` per token,
    where tokens labelled -100 are left out and every example counts the same.

    Args:
        temperature: Softens both distributions; 4 is what the field's benchmarks use, the paper tried 1 to 20.
        alpha: Weight of the soft labels; the task loss gets the rest. Our default, that of the field's benchmarks.
    """

    paper = Paper(
        "Distilling the Knowledge in a Neural Network",
        ("Geoffrey Hinton", "Oriol Vinyals", "Jeff Dean"),
        "NIPS Deep Learning Workshop",
        2014,
        arxiv="1503.02531",
    )
    tasks = ("classification", "multilabel", "token", "causal-lm")

    def __init__(self, *, temperature: float = 4.0, alpha: float = 0.9) -> None:
        super().__init__()
        if temperature <= 0:
            raise DistillError(f"Expected a temperature above 0, got {temperature}.")
        if not 0 <= alpha <= 1:
            raise DistillError(f"Expected alpha between 0 and 1, got {alpha}.")
        self.temperature = temperature
        self.alpha = alpha
        self.task_weight = 1 - alpha

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        return {"kd": self.alpha * soft_labels(student, teacher, batch, self.temperature)}
