"""What networks answer on the same examples, and what their uncertainty is worth: does it find their errors?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.distiller import Distiller
from kd_plugins.functional.dirichlet import log_expected, uncertainty
from kd_plugins.methods.endd import ENDD

Doubts = dict[str, Tensor]


def dirichlet_offset(distiller: Distiller | None, classes: int) -> float | None:
    """What the concentrations of a method's student have beside `exp(z)`; None where they are no concentrations."""
    methods = [] if distiller is None else distiller.methods.values()
    return next((method.offset(classes) for method in methods if isinstance(method, ENDD)), None)


def doubts(logits: Tensor, labels: Tensor | None = None, *, offset: float | None = None) -> Doubts:
    """How uncertain a network or an ensemble is of each example, by measure, and how right it is.

    Args:
        logits: `[B, K]`, or of the M members of an ensemble `[B, M, K]`, whose prediction is their mean probability.
        labels: Class numbers `[B]`, where they are known.
        offset: What the concentrations of a Dirichlet distribution have beside `exp(z)`; None for a softmax.

    Returns:
        `confidence` (what the largest probability leaves of 1), `total`, and where they mean something `data` and
        `knowledge` (see `kd_plugins.uncertainty`), `predicted`; with labels also `label` and `nll`; on the CPU.
    """
    members, logs = logits.dim() == 3, _logs(logits, offset)
    found = uncertainty(logits.double(), members=members, offset=offset or 0.0)
    top, predicted = logs.max(-1)
    measures = {"confidence": -top.expm1(), "total": found.total, "predicted": predicted}
    if members or offset is not None:
        measures |= {"data": found.data, "knowledge": found.knowledge}
    if labels is not None:
        measures |= {"label": labels, "nll": F.nll_loss(logs, labels, reduction="none")}
    return {name: x.cpu() for name, x in measures.items()}


def _logs(logits: Tensor, offset: float | None = None) -> Tensor:
    """Log-probabilities `[B, K]` of a network, or of an ensemble `[B, M, K]` by the mean of its probabilities."""
    logits = logits.double()
    if logits.dim() == 3:
        return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return log_expected(logits, offset or 0.0)


class Answers:
    """Collects what networks say of the same examples, batch by batch: `doubts`, and how far each is from the student.

    Attributes:
        offset: What the concentrations of the student have beside `exp(z)`; None for a softmax.
        classes: Number of classes of the student.
    """

    def __init__(self, offset: float | None = None) -> None:
        self.offset, self.classes = offset, 0
        self.parts: dict[str, list[Doubts]] = {}

    def add(self, name: str, logits: Tensor, labels: Tensor | None = None, *, student: Tensor | None = None) -> None:
        """Adds a batch of one network: scores `[B, K]`, or of an ensemble `[B, M, K]`, and the labels `[B]`.

        With the student's scores `[B, K]` of the same examples, `kl` (from the network to the student, in nats) and
        `agreement` are known.
        """
        own = name == "student"
        found = doubts(logits, labels, offset=self.offset if own else None)
        self.classes = logits.shape[-1] if own else self.classes
        if student is not None:
            ours, theirs = _logs(student, self.offset), _logs(logits)
            found["kl"] = (theirs.exp() * (theirs - ours)).masked_fill(theirs == -math.inf, 0).sum(-1).cpu()
            found["agreement"] = (ours.argmax(-1) == theirs.argmax(-1)).cpu()
        self.parts.setdefault(name, []).append(found)

    def ensemble(self, told: Sequence[Tensor], labels: Tensor | None, student: Tensor) -> None:
        """Adds what the teachers say, `[B, K]` each: one, or several as an ensemble."""
        if told:
            self.add("teacher", torch.stack([*told], 1) if len(told) > 1 else told[0], labels, student=student)

    def found(self) -> dict[str, Doubts]:
        """All examples by network."""
        return {name: {k: torch.cat([p[k] for p in parts]) for k in parts[0]} for name, parts in self.parts.items()}


def uncertainty_metrics(known: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """How well uncertainty finds errors and data of another kind, by every measure in `doubts`.

    Args:
        known: `doubts` of examples with labels.
        other: `doubts` of examples of another kind.

    Returns:
        `error`, `nll`, `ece` (15 bins); for each measure `errors_auroc_<measure>`, the area under the ROC curve of
        finding the errors, and `rejection_<measure>`, the area under the rejection curve: the error among the
        predictions that are kept, in the mean over all numbers of them, the most certain first (0 is best); with
        `other` also `ood_auroc_<measure>`. What is not defined (no errors at all, NaN) is left out.
    """
    from sklearn.metrics import roc_auc_score

    wrong = known["predicted"] != known["label"]
    metrics = {
        "error": float(wrong.double().mean()),
        "nll": float(known["nll"].mean()),
        "ece": calibration(1 - known["confidence"], ~wrong)[0],
    }
    for name in ("confidence", "total", "data", "knowledge"):
        values = known.get(name)
        if values is None or not values.isfinite().all():
            continue
        if wrong.any() and not wrong.all():
            metrics[f"errors_auroc_{name}"] = float(roc_auc_score(wrong, values))
        metrics[f"rejection_{name}"] = float(rejection(wrong, values).mean())
        if other is not None and other[name].isfinite().all():
            kinds = [0] * len(values) + [1] * len(other[name])
            metrics[f"ood_auroc_{name}"] = float(roc_auc_score(kinds, torch.cat([values, other[name]])))
    return metrics


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[float, Tensor]:
    """The expected calibration error, and the reliability diagram behind it.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599: the mean over bins of equal
    width of |accuracy - confidence|, weighted by the examples in a bin. The diagram `[bins, 3]` holds for each bin the
    number of examples, their mean confidence and their accuracy.

    Args:
        confidence: Probability of the predicted class `[N]`.
        correct: Whether the prediction was right `[N]`.
        bins: Number of bins.

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


def rejection(wrong: Tensor, uncertainty: Tensor) -> Tensor:
    """The error among the n most certain predictions, for n from 1 to N.

    >>> rejection(torch.tensor([True, False]), torch.tensor([0.9, 0.1])).tolist()
    [0.0, 0.5]
    """
    return wrong[uncertainty.argsort(stable=True)].double().cumsum(0) / torch.arange(1, len(wrong) + 1)
