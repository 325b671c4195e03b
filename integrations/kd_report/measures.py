"""What is measured of networks on the same examples: decisions, calibration, likeness of layers, channels of maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Batch
from kd_plugins.reading.scores import class_scores
from kd_plugins.reading.view import View

__all__ = ["Predictions", "Similarity", "calibration", "common_maps", "decisions", "mean_decisions", "project_channels"]

_ROWS, _CLASSES, _BINS, _POINTS = 2048, 100, 15, 256


class Decisions(NamedTuple):
    """Scores `[N, K]` of single decisions, and their right answers `[N]` where those are known."""

    logits: Tensor
    labels: Tensor | None


def decisions(view: View, batch: Batch) -> Decisions | None:
    """The decisions in the scores of a batch; None for a task without classes.

    Tokens and pixels count one by one, at most 2,048 of a batch, evenly spaced; a score under a sigmoid is a decision
    between yes and no.
    """
    if batch.task == "regression":
        return None
    rows = class_scores(view, view, batch)
    logits, labels = rows.student.detach().float().flatten(0, 1), rows.labels
    if rows.binary:
        logits = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)
        given = batch.labels
        labels = given > 0.5 if isinstance(given, Tensor) and given.numel() == len(logits) else None
    index = torch.arange(len(logits), device=logits.device)
    if labels is not None:
        labels = labels.detach().flatten().long()
        index = index[(labels >= 0) & (labels < logits.shape[1])]
    elif rows.mask is not None and len(logits) == rows.mask.numel():
        index = index[rows.mask.flatten()]
    if len(index) > _ROWS:
        index = index[torch.linspace(0, len(index) - 1, _ROWS, device=index.device).round().long()]
    return Decisions(logits[index], None if labels is None else labels[index])


def mean_decisions(several: Sequence[Decisions | None]) -> Decisions | None:
    """The decisions of several networks together, by the mean of their probabilities; None where nobody decides."""
    known = [one for one in several if one is not None]
    if len(known) < 2:
        return known[0] if known else None
    return Decisions(torch.stack([one.logits.softmax(-1) for one in known]).mean(0).log(), known[0].labels)


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
    each = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)], 1).double()
    sums = torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, place.cpu(), each.cpu())
    means = sums[:, 1:] / sums[:, :1].clamp_min(1)
    error = float((sums[:, 1] - sums[:, 2]).abs().sum() / sums[:, 0].sum().clamp_min(1))
    return error, torch.cat([sums[:, :1], means], 1).float()


class Predictions:
    """Collects the decisions of networks, batch by batch; `compared` is what the student is compared with."""

    def __init__(self, compared: str) -> None:
        self.compared, self.classes = compared, 0
        self._rows: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, asked: Mapping[str, Decisions | None]) -> None:
        """Adds one batch; networks with other numbers of classes are not compared with the student."""
        known = {name: d for name, d in asked.items() if d is not None and len(d.logits)}
        student = known.get("student")
        if student is None:
            return
        self.classes, own = student.logits.shape[1], student.logits.log_softmax(-1)
        choices = own.argmax(-1)
        for name, (logits, labels) in known.items():
            logs = logits.log_softmax(-1)
            confidence, predicted = logs.exp().max(-1)
            values = {"confidence": confidence, "predicted": predicted}
            if labels is not None:
                values["label"] = labels
                values["nll"] = F.nll_loss(logs, labels.clamp_max(logs.shape[1] - 1), reduction="none")
            if name != "student" and logits.shape == student.logits.shape:
                values["kl"] = (logs.exp() * (logs - own)).nan_to_num().sum(-1)
                values["agreement"] = (choices == predicted).float()
            for key, value in values.items():
                self._rows.setdefault(name, {}).setdefault(key, []).append(value.cpu())

    def result(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Numbers for JSON, and arrays: reliability diagrams and confusion matrices by network.

        Agreement and KL are with the student; the student's own are with the compared network.
        """
        summary: dict[str, Any] = {"classes": self.classes}
        arrays: dict[str, Tensor] = {}
        for name, parts in self._rows.items():
            found = {key: torch.cat(values) for key, values in parts.items()}
            means: dict[str, float] = {
                k: float(found[k].mean()) for k in ("confidence", "nll", "kl", "agreement") if k in found
            }
            predicted, labels = found["predicted"], found.get("label")
            if labels is not None:
                correct = predicted == labels
                means["ece"], arrays[f"{name}/reliability"] = calibration(found["confidence"], correct)
                means["accuracy"] = float(correct.float().mean())
                if self.classes <= _CLASSES and predicted.max() < self.classes:
                    cells = torch.bincount(labels * self.classes + predicted, minlength=self.classes**2)
                    arrays[f"{name}/confusion"] = cells.view(self.classes, self.classes).int()
            summary[name] = means
        compared = summary.get(self.compared, {})
        if self._rows:
            summary["student"] |= {key: compared[key] for key in ("agreement", "kl") if key in compared}
        return summary if self._rows else None, arrays


class Similarity:
    """Linear CKA of all pairs of layers of several networks, summed over minibatches of any size above 3.

    The unbiased HSIC (Song et al., "Feature Selection via Dependence Maximization", JMLR 2012) of two Gram matrices K
    and L with zero diagonal: `(tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n(n-3))`.

    Args:
        layers: Number of layers of each network.

    >>> x = torch.arange(24.0).view(8, 3).sin()
    >>> similarity = Similarity([1, 1])
    >>> similarity.add([x, 5 * x[:, [2, 0, 1]]])
    >>> round(float(similarity.between(0, 1)), 3)
    1.0
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self.sum: Tensor | None = None

    def add(self, features: Sequence[Tensor]) -> None:
        """Adds one minibatch: the features `[n, D]` of every layer of every network."""
        if not features or (n := len(features[0])) < 4:
            return
        grams = torch.stack([_gram(x) for x in features])
        rows, flat = grams.sum(-1), grams.flatten(1)
        total = rows.sum(-1)
        hsic = flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)
        self.sum = hsic / (n * (n - 3)) + (0 if self.sum is None else self.sum)

    def between(self, i: int, j: int) -> Tensor:
        """CKA `[layers of i, layers of j]` of two networks, once a minibatch was added."""
        assert self.sum is not None  # noqa: S101
        own = self.sum.diagonal().clamp_min(0).sqrt()
        cka = self.sum / (own[:, None] * own).clamp_min(torch.finfo(own.dtype).tiny)
        rows, columns = (slice(sum(self.layers[:k]), sum(self.layers[: k + 1])) for k in (i, j))
        return cka.clamp(-1, 1).float().cpu()[rows, columns].contiguous()


def _gram(x: Tensor) -> Tensor:
    # The estimator does not care where the origin is, but float32 does.
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        return (x @ x.T).double().fill_diagonal_(0)


def common_maps(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The deepest layers of both whose maps `[B, C, H, W]` have the same size, above one position; None without any.

    >>> maps = {"a": torch.zeros(1, 2, 8, 8), "b": torch.zeros(1, 4, 4, 4), "c": torch.zeros(1, 4, 1, 1)}
    >>> common_maps(maps, {"x": torch.zeros(1, 3, 8, 8), "y": torch.zeros(1, 3, 4, 4)})
    ('b', 'y')
    """
    last = {x.shape[2:]: layer for layer, x in teacher.items() if x.dim() == 4}
    for layer, x in reversed(list(student.items())):
        if x.dim() == 4 and x[0, 0].numel() > 1 and x.shape[2:] in last:
            return layer, last[x.shape[2:]]
    return None


def project_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of maps, each scaled to length 1, in the plane of the teacher's two main directions.

    The plane is the teacher's alone (principal components of its channels, for each example), so that pictures made
    before and after a training share it. At most 256 channels of a network are kept, evenly spaced.

    Args:
        student: Maps `[B, C_s, H, W]`.
        teacher: Maps `[B, C_t, H, W]`.

    Returns:
        The student's points `[B, C_s, 2]` and the teacher's points `[B, C_t, 2]`.
    """
    ours, theirs = (F.normalize(x.flatten(2).float(), dim=2).cpu() for x in (student, teacher))
    centre = theirs.mean(1, keepdim=True)
    plane = torch.linalg.svd(theirs - centre, full_matrices=False).Vh[:, :2]
    # A component's sign is arbitrary; its largest entry shall be positive, on every machine.
    plane = (plane * plane.gather(2, plane.abs().argmax(2, keepdim=True)).sign()).mT
    plane = F.pad(plane, (0, 2 - plane.shape[2]))  # One channel, or two positions, span no plane.
    ours, theirs = (((x - centre) @ plane)[:, :: -(-x.shape[1] // _POINTS)].contiguous() for x in (ours, theirs))
    return ours, theirs
