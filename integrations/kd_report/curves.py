"""Learning curves: every number of the history, in panels that belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kd_report.runs import Run

__all__ = ["axis", "final_metric", "panels", "stages"]

Points = list[tuple[float, float]]
_KEY = re.compile(r"(?:(eval|train)_)?(?:(peer\d+)-.+_(?=[^_]+$))?(?:distill/)?(.+)")
_COST = ("runtime", "per_second", "flos", "samples", "steps_per", "grad_norm", "seconds", "memory")
_RATES = ("lr", "learning_rate")


def axis(runs: Sequence[Run]) -> str:
    """What the curves run over: steps where every row has them."""
    return "step" if all("step" in row for run in runs for row in run.history) else "epoch"


def _keys(run: Run) -> list[str]:
    keys = dict.fromkeys(key for row in run.history for key in row)
    return [k for k in keys if k not in ("step", "epoch") and not any(word in k for word in _COST)]


def final_metric(run: Run) -> tuple[str, float] | None:
    """Name of the metric that tells how good the student is, and its value: of the exported student, or the last."""
    keys, named = _keys(run), str(run.info.get("metric") or "")
    # Of the student that is exported, whose epoch need not be the last.
    exported = run.part("results", "evaluation", named.removeprefix("eval_"))
    if type(exported) in (int, float):
        return named.removeprefix("eval_"), float(exported)
    candidates = [named, "eval_top1", "eval_accuracy", "eval_f1", "eval_mean_iou"]
    candidates += [k for k in keys if k.startswith("eval_") and k != "eval_loss"] + ["eval_loss"]
    key = next((key for key in candidates if key in keys), None)
    return None if key is None else (key.removeprefix("eval_"), [row[key] for row in run.history if key in row][-1])


def panels(run: Run, x: str) -> list[tuple[str, str, Points]]:
    """Panel (losses, metrics, each term, the rate), line ("training", "evaluation", a peer), and points of a curve."""
    found = []
    first = (final_metric(run) or ("", 0))[0]
    # Of a run that is finished one point is no curve: it stands among the results.
    least = 2 if run.info.get("status") == "finished" else 1
    for key in sorted(_keys(run), key=lambda k: (k in _RATES, "distill/" in k, not k.endswith(("loss", first)))):
        kind, peer, title = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
        title = "learning rate" if key in _RATES else title.replace("/", ": ")
        points = [(row.get(x, float(i)), row[key]) for i, row in enumerate(run.history) if key in row]
        if len(points) >= least:
            found.append((title, peer or ("evaluation" if kind == "eval" else "training"), points))
    return found


def stages(run: Run, x: str) -> list[tuple[str, float, float]]:
    """Name, start and end of each stage on the axis of the curves; empty for fewer than two."""
    table = run.info.get("stages")
    if not table or len(table["names"]) < 2 or not table["total"]:
        return []
    last = max((row.get("epoch", 0.0) for row in run.history), default=0.0)
    scale = last / table["total"] if x == "epoch" else 1.0
    ends = [*table["starts"][1:], table["total"]]
    return [(str(n), a * scale, b * scale) for n, a, b in zip(table["names"], table["starts"], ends, strict=True)]
