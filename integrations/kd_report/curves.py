"""Learning curves: every number of the history, in panels that belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kd_report import charts
from kd_report.charts import Series
from kd_report.document import caption, figure_row
from kd_report.runs import Run

__all__ = ["axis", "final_metric", "metric_key", "points", "section"]

_AXES = ("step", "epoch")
_RATES = ("lr", "learning_rate")
# Metrics of networks that were trained with the student: `eval_peer1-resnet8_top1`.
_PEER = re.compile(r"eval_(?P<name>peer(?P<number>\d+))-.+_(?P<metric>[^_]+)")
_COST = ("runtime", "per_second", "flos", "samples", "steps_per", "grad_norm", "seconds", "memory")


def section(run: Run) -> str:
    """The section of a run's page."""
    panels = _panels(run)
    if not panels:
        return ""
    x, stages = axis(run), _stages(run)
    drawn = [charts.lines(series, title=title, stages=stages, x_label=x) for title, series in panels.items()]
    marked = " Bands mark the stages of the training." if len(stages) > 1 else ""
    words = f"Loss, every term of it as the method weights it, and what was evaluated, over the {x}s.{marked}"
    return caption(words) + figure_row(drawn, "thirds")


def axis(run: Run) -> str:
    """What the curves run over: steps where every row has them."""
    return "step" if run.history and all("step" in row for row in run.history) else "epoch"


def points(run: Run, key: str, x: str | None = None) -> list[tuple[float, float]]:
    """The points of one curve."""
    x = x or axis(run)
    return [(row.get(x, float(i)), row[key]) for i, row in enumerate(run.history) if key in row]


def metric_key(run: Run) -> str | None:
    """The key of the history that tells how good the student is."""
    keys = list(dict.fromkeys(key for row in run.history for key in row))
    named = str(run.info.get("metric") or "")
    candidates = [named, f"eval_{named}", "eval_top1", "eval_accuracy", "eval_f1", "eval_mean_iou"]
    candidates += [k for k in keys if k.startswith("eval_") and k != "eval_loss" and not _is_cost(k)] + ["eval_loss"]
    return next((key for key in candidates if key in keys), None)


def final_metric(run: Run) -> tuple[str, float] | None:
    """The metric's name and its last value."""
    key = metric_key(run)
    if key is None:
        return None
    return key.removeprefix("eval_"), points(run, key)[-1][1]


def _is_cost(key: str) -> bool:
    return any(word in key for word in _COST)


def _panels(run: Run) -> dict[str, list[Series]]:
    """Panels by title: the losses, the metrics, every term, the rate."""
    keys = [k for k in dict.fromkeys(k for row in run.history for k in row) if k not in _AXES and not _is_cost(k)]
    losses = [k for k in keys if k.removeprefix("train_").removeprefix("eval_") == "loss"]
    terms = [k for k in keys if "distill/" in k and not k.startswith("eval_")]
    rates = [k for k in keys if k in _RATES]
    peers = {k: found for k in keys if (found := _PEER.fullmatch(k))}
    metrics = [k for k in keys if k.startswith("eval_") and k not in losses and k not in peers]
    others = [k for k in keys if k not in (*losses, *terms, *rates, *metrics, *peers)]
    panels: dict[str, list[Series]] = {}
    if losses:
        names = {"eval_loss": ("evaluation", "c1")}
        panels["loss"] = [_series(run, k, *names.get(k, ("training", "c0"))) for k in losses]
    first = metric_key(run)
    for key in sorted(metrics, key=lambda k: k != first):
        panels[key.removeprefix("eval_")] = [_series(run, key, "student" if peers else key, "c1")]
    for key, found in peers.items():
        # All networks in one panel.
        panel = panels.setdefault(found["metric"], [])
        panel.append(_series(run, key, found["name"], f"c{2 + int(found['number']) % 6}"))
    for key in [*terms, *others]:
        panels[key.rpartition("distill/")[2].replace("/", ": ")] = [_series(run, key, key, "c0")]
    for key in rates:
        panels["learning rate"] = [_series(run, key, key, "c5")]
    panels = {title: [s for s in series if s.points] for title, series in panels.items()}
    # Of a run that is finished one point is no curve: it stands among the results.
    least = 2 if run.info.get("status") == "finished" else 1
    return {title: series for title, series in panels.items() if any(len(s.points) >= least for s in series)}


def _series(run: Run, key: str, name: str, style: str) -> Series:
    return Series(name, points(run, key), style)


def _stages(run: Run) -> Sequence[tuple[str, float, float]]:
    """Name, start and end of each stage on the axis of the curves."""
    table = run.info.get("stages")
    if not table or len(table["names"]) < 2:
        return []
    scale = 1.0
    if axis(run) == "epoch":
        last = max((row.get("epoch", 0.0) for row in run.history), default=0.0)
        scale = last / table["total"] if table["total"] else 0.0
    ends = [*table["starts"][1:], table["total"]]
    return [(str(n), a * scale, b * scale) for n, a, b in zip(table["names"], table["starts"], ends, strict=True)]
