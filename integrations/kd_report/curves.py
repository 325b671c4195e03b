"""Learning curves: every number of the history, in panels that belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kd_report.runs import Run

__all__ = ["Points", "axis", "final_metric", "metric_key", "panels", "points", "stages"]

Points = list[tuple[float, float]]
_AXES, _RATES = ("step", "epoch"), ("lr", "learning_rate")
# Metrics of networks that were trained with the student: `eval_peer1-resnet8_top1`.
_PEER = re.compile(r"eval_(?P<name>peer(?P<number>\d+))-.+_(?P<metric>[^_]+)")
_COST = ("runtime", "per_second", "flos", "samples", "steps_per", "grad_norm", "seconds", "memory")


def axis(run: Run) -> str:
    """What the curves run over: steps where every row has them."""
    return "step" if run.history and all("step" in row for row in run.history) else "epoch"


def points(run: Run, key: str, x: str) -> Points:
    """The points of one curve."""
    return [(row.get(x, float(i)), row[key]) for i, row in enumerate(run.history) if key in row]


def _keys(run: Run) -> list[str]:
    keys = dict.fromkeys(key for row in run.history for key in row)
    return [k for k in keys if k not in _AXES and not any(word in k for word in _COST)]


def metric_key(run: Run) -> str | None:
    """The key of the history that tells how good the student is."""
    keys, named = _keys(run), str(run.info.get("metric") or "")
    candidates = [named, f"eval_{named}", "eval_top1", "eval_accuracy", "eval_f1", "eval_mean_iou"]
    candidates += [k for k in keys if k.startswith("eval_") and k != "eval_loss"] + ["eval_loss"]
    return next((key for key in candidates if key in keys), None)


def final_metric(run: Run) -> tuple[str, float] | None:
    """The metric's name and its last value."""
    key = metric_key(run)
    return None if key is None else (key.removeprefix("eval_"), points(run, key, "step")[-1][1])


def panels(run: Run) -> dict[str, list[tuple[str, Points, int]]]:
    """Panels by title: the losses, the metrics, every term, the rate; each line with its name and colour."""
    keys, x, first = _keys(run), axis(run), metric_key(run)
    peers = {k: match for k in keys if (match := _PEER.fullmatch(k))}
    losses = [k for k in keys if k in ("loss", "train_loss", "eval_loss")]
    metrics = sorted(
        (k for k in keys if k.startswith("eval_") and k not in (*losses, *peers)), key=lambda k: k != first
    )
    terms = [k for k in keys if "distill/" in k and k not in metrics]
    others = [k for k in keys if k not in (*losses, *terms, *_RATES, *metrics, *peers)]
    found: dict[str, list[tuple[str, Points, int]]] = {}

    def draw(title: str, key: str, name: str, colour: int) -> None:
        found.setdefault(title, []).append((name, points(run, key, x), colour))

    for key in losses:
        draw("loss", key, *(("evaluation", 1) if key == "eval_loss" else ("training", 0)))
    for key in metrics:
        draw(key.removeprefix("eval_"), key, "student" if peers else key, 1)
    for key, parts in peers.items():
        draw(parts["metric"], key, parts["name"], 2 + int(parts["number"]) % 6)
    for key in [*terms, *others]:
        draw(key.rpartition("distill/")[2].replace("/", ": "), key, key, 0)
    for key in [k for k in keys if k in _RATES]:
        draw("learning rate", key, key, 5)
    # Of a run that is finished one point is no curve: it stands among the results.
    least = 2 if run.info.get("status") == "finished" else 1
    return {title: lines for title, lines in found.items() if any(len(line[1]) >= least for line in lines)}


def stages(run: Run, x: str = "") -> Sequence[tuple[str, float, float]]:
    """Name, start and end of each stage on the axis of the curves; empty for fewer than two."""
    table, scale = run.info.get("stages"), 1.0
    if not table or len(table["names"]) < 2:
        return []
    if (x or axis(run)) == "epoch":
        last = max((row.get("epoch", 0.0) for row in run.history), default=0.0)
        scale = last / table["total"] if table["total"] else 0.0
    ends = [*table["starts"][1:], table["total"]]
    return [(str(n), a * scale, b * scale) for n, a, b in zip(table["names"], table["starts"], ends, strict=True)]
