"""What a network's uncertainty is worth: does it find the network's errors, and data of another kind?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Distiller, uncertainty
from kd_plugins.functional.dirichlet import log_expected
from kd_plugins.methods.endd import ENDD
from kd_report.measures import calibration

__all__ = ["dirichlet_offset", "doubts", "uncertainty_metrics"]

Doubts = dict[str, Tensor]


def dirichlet_offset(distiller: Distiller | None, classes: int) -> float | None:
    """What the concentrations of a method's student have beside `exp(z)`; None where they are no concentrations."""
    methods = [] if distiller is None else distiller.methods.values()
    return next((method.offset(classes) for method in methods if isinstance(method, ENDD)), None)


def doubts(
    logits: Tensor, labels: Tensor | None = None, *, offset: float | None = None, members: bool = False
) -> Doubts:
    """How uncertain a network or an ensemble is of each example, by measure, and how right it is.

    Args:
        logits: `[B, K]`, or of an ensemble `[B, M, K]`.
        labels: Class numbers `[B]`; without them only the uncertainty is told.
        offset: What the concentrations of a Dirichlet distribution have beside `exp(z)`; None for a softmax.
        members: Whether axis 1 are the members of an ensemble, whose prediction is the mean of their probabilities.

    Returns:
        `confidence` (what the largest probability leaves of 1), `total`, and where they mean something `data` and
        `knowledge` (see `kd_plugins.uncertainty`); with labels also `label`, `predicted`, `nll`; on the CPU.
    """
    logits = logits.double()
    found = uncertainty(logits, members=members, offset=offset or 0.0)
    if members:
        logs = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    else:
        logs = log_expected(logits, offset or 0.0)
    top, predicted = logs.max(-1)
    measures = {"confidence": -top.expm1(), "total": found.total}
    if members or offset is not None:
        measures |= {"data": found.data, "knowledge": found.knowledge}
    if labels is not None:
        nll = F.nll_loss(logs, labels, reduction="none")
        measures |= {"label": labels, "predicted": predicted, "nll": nll}
    return {name: x.cpu() for name, x in measures.items()}


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
            metrics[f"errors_auroc_{name}"] = float(roc_auc_score(wrong.numpy(), values.numpy()))
        kept = wrong[values.argsort(stable=True)].double().cumsum(0)
        metrics[f"rejection_{name}"] = float((kept / torch.arange(1, len(kept) + 1)).mean())
        if other is not None and other[name].isfinite().all():
            both = torch.cat([values, other[name]]).numpy()
            metrics[f"ood_auroc_{name}"] = float(roc_auc_score([0] * len(values) + [1] * len(other[name]), both))
    return metrics
