"""Predictions of several networks on the same examples: accuracy, calibration, agreement, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Batch

__all__ = ["Predictions", "Rows", "calibration", "rows_of"]

_ROWS = 2048
_CLASSES = 100
_BINS = 15


class Rows(NamedTuple):
    """Scores `[N, K]` of single decisions, and their right answers `[N]` where those are known."""

    logits: Tensor
    labels: Tensor | None


def rows_of(logits: Tensor, batch: Batch) -> Rows | None:
    """The decisions in the logits of a batch; None for a task without classes.

    Tokens and pixels count one by one, at most 2,048 of a batch, evenly spaced; a multi-label score is a decision
    between yes and no.

    Args:
        logits: As the network gave them.
        batch: Its labels and its task say how to read them.
    """
    logits, labels, task = logits.detach().float(), batch.labels, batch.task
    labels = labels.detach() if isinstance(labels, Tensor) else None
    if task == "classification" and logits.dim() == 2 and logits.shape[1] > 1:
        if labels is not None and labels.dim() == 2:
            labels = labels.argmax(1)
        return Rows(logits, labels)
    if task == "multilabel":
        flat = logits.flatten()
        rows = torch.stack([torch.zeros_like(flat), flat], 1)
        return _some(rows, None if labels is None else (labels.flatten() > 0.5).long())
    if task == "segmentation" and logits.dim() == 4:
        if labels is not None:
            labels = F.interpolate(labels[:, None].float(), logits.shape[-2:]).flatten().long()
        return _some(logits.movedim(1, -1).flatten(0, 2), labels)
    if task in ("token", "causal-lm") and logits.dim() == 3:
        if task == "causal-lm":
            logits, labels = logits[:, :-1], None if labels is None else labels[:, 1:]
        return _some(logits.flatten(0, 1), None if labels is None else labels.flatten())
    return None


def _some(logits: Tensor, labels: Tensor | None) -> Rows:
    """Rows with a label, or all where there are none; not more than are needed."""
    index = torch.arange(len(logits), device=logits.device)
    if labels is not None:
        index = index[(labels >= 0) & (labels < logits.shape[1])]
    if len(index) > _ROWS:
        index = index[torch.linspace(0, len(index) - 1, _ROWS, device=index.device).round().long()]
    return Rows(logits[index], None if labels is None else labels[index])


def calibration(confidence: Tensor, correct: Tensor, bins: int = _BINS) -> tuple[float, Tensor]:
    """The expected calibration error, and the reliability diagram behind it.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599: the mean over bins of equal
    width of |accuracy - confidence|, weighted by the examples in a bin.

    Args:
        confidence: Probability of the predicted class `[N]`.
        correct: Whether the prediction was right `[N]`.
        bins: Number of bins.

    Returns:
        The error, and for each bin the number of examples, their mean confidence and their accuracy `[bins, 3]`.

    >>> error, diagram = calibration(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([True, True, True, False]))
    >>> round(error, 3)
    0.1
    """
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    sums = torch.zeros(bins, 3, dtype=torch.float64, device=confidence.device)
    sums.index_add_(
        0, place, torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)], 1).double()
    )
    count = sums[:, :1].clamp_min(1)
    means = sums[:, 1:] / count
    error = float(((means[:, 0] - means[:, 1]).abs() * sums[:, 0]).sum() / sums[:, 0].sum().clamp_min(1))
    return error, torch.cat([sums[:, :1], means], 1).float().cpu()


class Predictions:
    """Collects the decisions of networks, batch by batch.

    Args:
        names: The networks; the first is the student, the last what it is compared with.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.classes = 0
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Rows | None]) -> None:
        """Adds one batch; networks with other numbers of classes are not compared with each other."""
        known = {name: r for name, r in rows.items() if r is not None and len(r.logits)}
        if self.names[0] not in known:
            return
        student = known[self.names[0]]
        self.classes = student.logits.shape[1]
        own = student.logits.log_softmax(-1)
        for name, (logits, labels) in known.items():
            logs = logits.log_softmax(-1)
            confidence, predicted = logs.exp().max(-1)
            self._add(f"{name}/confidence", confidence)
            self._add(f"{name}/predicted", predicted)
            if labels is not None:
                self._add(f"{name}/label", labels)
                self._add(f"{name}/nll", F.nll_loss(logs, labels.clamp_max(logs.shape[1] - 1), reduction="none"))
            if name != self.names[0] and logits.shape == student.logits.shape:
                self._add(f"{name}/kl", (logs.exp() * (logs - own)).nan_to_num().sum(-1))

    def _add(self, name: str, value: Tensor) -> None:
        self._rows.setdefault(name, []).append(value.cpu())

    def result(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Numbers for JSON, and arrays: reliability diagrams and confusion matrices by network.

        Agreement and KL are with the student; those of the last network are given for the whole as well.
        """
        all_ = {name: torch.cat(parts) for name, parts in self._rows.items()}
        student = self.names[0]
        if f"{student}/predicted" not in all_:
            return None, {}
        summary: dict[str, Any] = {"decisions": len(all_[f"{student}/predicted"]), "classes": self.classes}
        arrays: dict[str, Tensor] = {}
        for name in self.names:
            if f"{name}/predicted" not in all_:
                continue
            predicted, confidence = all_[f"{name}/predicted"], all_[f"{name}/confidence"]
            own: dict[str, float] = {"confidence": float(confidence.mean())}
            if f"{name}/label" in all_:
                labels = all_[f"{name}/label"]
                correct = predicted == labels
                error, diagram = calibration(confidence, correct)
                own |= {
                    "accuracy": float(correct.float().mean()),
                    "ece": error,
                    "nll": float(all_[f"{name}/nll"].mean()),
                }
                arrays[f"{name}/reliability"] = diagram
                if self.classes <= _CLASSES and predicted.max() < self.classes:
                    cells = torch.bincount(labels * self.classes + predicted, minlength=self.classes**2)
                    arrays[f"{name}/confusion"] = cells.view(self.classes, self.classes).int()
            if f"{name}/kl" in all_:
                same = all_[f"{student}/predicted"] == predicted
                both = {"agreement": float(same.float().mean()), "kl": float(all_[f"{name}/kl"].mean())}
                own |= both
                summary |= both if name == self.names[-1] else {}
            summary[name] = own
        return summary, arrays
