"""What is measured of networks on the same examples: decisions, likeness of layers, channels of maps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Batch
from kd_plugins.evaluation import calibration, rejection
from kd_plugins.reading.scores import class_scores
from kd_plugins.reading.view import View

__all__ = ["cka", "decisions", "difference", "hsic", "predictions", "project_channels"]

_ROWS, _CLASSES, _POINTS, _SHARES = 2048, 100, 256, 50


class Decisions(NamedTuple):
    """Scores `[N, K]` of single decisions, and their right answers `[N]` where those are known."""

    logits: Tensor
    labels: Tensor | None


def decisions(view: View, batch: Batch) -> Decisions | None:
    """The decisions in the scores of a batch; None for a task without classes.

    Tokens and pixels count one by one, at most 2,048 of a batch (or as many as it has examples), evenly spaced; a score
    under a sigmoid is a decision between yes and no.
    """
    if batch.task in ("regression", "depth", "detection", "other"):
        return None
    rows = class_scores(view, view, batch)
    logits, labels = rows.student.detach().flatten(0, 1), rows.labels
    counts = torch.ones_like(logits[:, 0], dtype=torch.bool) if rows.mask is None else rows.mask.flatten()
    if rows.binary:
        counts = counts.repeat_interleave(logits.shape[1])
        logits = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)
        given = batch.labels
        if isinstance(given, Tensor) and given.shape == view.logits.shape:
            given = class_scores(View(given), View(given), batch).student  # in the order of the rows
        labels = given > 0.5 if isinstance(given, Tensor) and given.numel() == len(logits) else None
    if labels is not None:
        labels = labels.detach().flatten().long()
        counts = counts & (labels >= 0) & (labels < logits.shape[1])
    index = counts.nonzero().flatten()
    most = max(_ROWS, batch.size or 0)
    if len(index) > most:
        index = index[torch.linspace(0, len(index) - 1, most, device=index.device).round().long()]
    return Decisions(logits[index].float(), None if labels is None else labels[index])


def predictions(found: Mapping[str, Mapping[str, Tensor]], classes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `kd_plugins.evaluation.Answers` has collected of networks that know so many classes, in numbers.

    Returns:
        Means by network for JSON (agreement and KL are with the student; the student's own are with the teacher, and
        `peers` its mean agreement with them), and arrays: reliability diagrams, confusion matrices and rejection curves
        (share of the predictions that is kept, error among them) by network.
    """
    summary: dict[str, Any] = {"classes": classes}
    arrays: dict[str, Tensor] = {}
    for name, values in found.items():
        means = {key: float(values[key].double().mean()) for key in ("nll", "kl", "agreement") if key in values}
        predicted, labels, doubt = values["predicted"], values.get("label"), values.get("confidence")
        means["examples"] = len(predicted)
        if doubt is not None:
            means["confidence"] = 1 - float(doubt.mean())
        if labels is not None:
            correct, n = predicted == labels, len(labels)
            means["accuracy"] = float(correct.double().mean())
            if doubt is not None:
                means["ece"], arrays[f"{name}/reliability"] = calibration(1 - doubt, correct)
            if "total" in values and values["total"].isfinite().all():
                kept = torch.linspace(1, n, min(n, _SHARES), dtype=torch.float64).round().long()
                error = rejection(~correct, values["total"])[kept - 1]
                arrays[f"{name}/rejection"] = torch.stack([kept / n, error], 1).float()
            if classes <= _CLASSES and (predicted < classes).all():
                cells = torch.bincount(labels * classes + predicted, minlength=classes**2)
                arrays[f"{name}/confusion"] = cells.view(classes, classes).int()
        summary[name] = means
    student, teacher = summary.get("student", {}), summary.get("teacher", {})
    student |= {key: teacher[key] for key in ("agreement", "kl") if key in teacher}
    shares = [x["agreement"] for name, x in summary.items() if name.startswith("peer") and "agreement" in x]
    if shares:
        student["peers"] = statistics.fmean(shares)
    return summary, arrays


def difference(ours: Mapping[Any, float], theirs: Mapping[Any, float], form: str = "+.2f") -> str:
    """The mean difference of values with the same key, with the 95 % interval of Student's t of two pairs or more.

    A dash stands for a difference that is not known.

    >>> difference({0: 91.0, 1: 94.0, 2: 97.0}, {0: 90.0, 1: 92.0, 2: 91.0})
    '+3.00 [−3.57, +9.57]'
    """
    from scipy.stats import t

    found = [ours[key] - theirs[key] for key in ours if key in theirs]
    if not found or not all(map(math.isfinite, found)):
        return "–"
    mean, text = statistics.fmean(found), f"{statistics.fmean(found):{form}}"
    if len(found) > 1:
        half = float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / len(found) ** 0.5
        text += f" [{mean - half:{form}}, {mean + half:{form}}]"
    return text.replace("-", "−")


def hsic(features: Sequence[Tensor]) -> Tensor:
    """The unbiased HSIC of each pair of layers `[L, L]`, of features `[n, D]` of each layer, for more than 3 examples.

    Song et al., "Feature Selection via Dependence Maximization", JMLR 2012: of two Gram matrices K and L with zero
    diagonal `(tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n(n-3))`.
    """
    # The estimator does not care where the origin is, but float32 does.
    centred, n = [x - x.mean(0) for x in features], len(features[0])
    with torch.autocast(centred[0].device.type, enabled=False):
        grams = torch.stack([(x @ x.T).double().fill_diagonal_(0) for x in centred])
    rows, flat = grams.sum(-1), grams.flatten(1)
    total = rows.sum(-1)
    found = flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)
    return found / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """Linear CKA of each pair of layers `[L, L]`, of their `hsic`, which may be summed over minibatches.

    >>> x = torch.arange(24.0).view(8, 3).sin()
    >>> cka(hsic([x, 5 * x[:, [2, 0, 1]]])).round(decimals=3).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    own = hsic.diagonal().clamp_min(0).sqrt()
    return (hsic / (own[:, None] * own).clamp_min(torch.finfo(own.dtype).tiny)).clamp(-1, 1).float().cpu()


def project_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of maps `[B, C, H, W]`, each scaled to length 1, as points `[B, C, 2]` of a plane.

    The plane is the teacher's alone (the two principal components of its channels, for each example), so that pictures
    made before and after a training share it. At most 256 channels of a network are kept, evenly spaced.
    """
    ours, theirs = (F.normalize(x.flatten(2).float(), dim=2).cpu() for x in (student, teacher))
    centre = theirs.mean(1, keepdim=True)
    plane = torch.linalg.svd(theirs - centre, full_matrices=False).Vh[:, :2]
    # A component's sign is arbitrary; its largest entry shall be positive, on every machine.
    plane = (plane * plane.gather(2, plane.abs().argmax(2, keepdim=True)).sign()).mT
    plane = F.pad(plane, (0, 2 - plane.shape[2]))  # One channel, or two positions, span no plane.
    ours, theirs = (((x - centre) @ plane)[:, :: -(-x.shape[1] // _POINTS)].contiguous() for x in (ours, theirs))
    return ours, theirs
