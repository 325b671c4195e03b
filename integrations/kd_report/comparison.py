"""The page that compares several runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from kd_report import charts, curves
from kd_report.charts import Series, number
from kd_report.pages import ENVIRONMENT, calibration_charts, document, similarity_chart, value
from kd_report.runs import Run

__all__ = ["comparison_page"]

# Metrics between 0 and 1 that are read as percentages, and those of which less is better.
_SHARES = {"accuracy", "f1", "precision", "recall", "mean_iou"}
_LOWER = {"loss", "perplexity", "rmse", "mse", "mae"}
# What differs between the seeds of one experiment, or says nothing about it.
_INCIDENTAL = {"seed", "experiment", "output", "output_dir", "resume", "log_interval", "run_name", "logging_dir"}
_SECTIONS = {
    "results": "Results",
    "curves": "Learning curves",
    "calibration": "Calibration",
    "similarity": "Layer similarity",
    "cost": "Cost",
    "runs": "Runs",
}


class Groups:
    """Runs by experiment, those that differ in their seed alone together: the baseline first, the teacher last.

    Attributes:
        all: The runs as they were given.
        runs: Runs by the experiment's name.
        taught: Names of the experiments whose student is the teacher of others.
        asked: Runs that show a teacher which is no run itself, by the teacher's name.
        metric: What the last evaluations tell, with its unit.
        factor: What makes per cent of it.
        comparable: Whether all runs tell the same metric.
        axis: What curves run over.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.all = runs
        teachers = {_network(n) for run in runs for n in run.info.get("teachers") or []}
        students = {_network(run.info.get("student")) for run in runs if run.info.get("teachers")}
        found = _experiments(runs)
        # Where teacher and students are of one kind, a training alone is the baseline.
        own = {n: _network(r[0].info.get("student")) for n, r in found.items() if r[0].method == "alone"}
        self.taught = {name for name, network in own.items() if network in teachers - students}
        order = sorted(found, key=lambda n: (n in self.taught, found[n][0].method != "alone"))
        self.runs = {name: found[name] for name in order}
        here = {own[name] for name in self.taught}
        self.asked: dict[str, Run] = {}
        for run in runs:
            if run.other == "teacher" and run.part("after", "predictions", "teacher") and run.teacher:
                if not {_network(n) for n in run.info.get("teachers") or []} & here:
                    self.asked.setdefault(f"teacher: {run.teacher}", run)
        names = {(curves.final_metric(r) or ("metric",))[0] for r in runs}
        self.comparable = len(names) == 1
        name = names.pop() if self.comparable else "result"
        self.factor, self.lower = 100 if name in _SHARES else 1, name in _LOWER
        self.metric = f"{name}, %" if name in _SHARES else name
        self.axis = "step" if all(curves.axis(run) == "step" for run in runs) else "epoch"
        self.seeds = len(self.runs) < len(runs)


def comparison_page(runs: Sequence[Run]) -> str:
    """The comparison of at least two runs as HTML."""
    groups = Groups(runs)
    data = list(dict.fromkeys(str(r.info["data"]) for r in runs if r.info.get("data")))
    lead = [f"{len(runs)} runs", f"{len(groups.runs)} experiments" if groups.seeds else "", *data[:2]]
    return document("comparison.html.j2", groups, _SECTIONS, "Comparison of runs", lead)


def _network(info: Any) -> tuple[Any, Any]:
    return ((info or {}).get("name"), (info or {}).get("parameters"))


def _experiments(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one experiment by a name that tells the experiments apart."""
    kept: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in (run.info.get("settings") or {}).items() if k not in _INCIDENTAL}
        options = (run.info.get("method") or {}).get("options")
        key: tuple[str, ...] = (
            run.method,
            run.student,
            run.teacher,
            str(run.info.get("data")),
            repr((options, settings)),
        )
        # Without settings nothing says that two runs are the same experiment.
        kept.setdefault(key if settings else (*key, run.name), []).append(run)
    if len({run.name for run in runs}) == len(kept) == len(runs):
        # Names that the user chose, which the table of runs explains.
        return {run.name: [run] for run in runs}
    several = len({key[1:3] for key in kept}) > 1
    names: dict[str, list[Run]] = {}
    for key, members in kept.items():
        name = key[0] + (f" · {key[1]}" + (f" from {key[2]}" if key[2] else "") if several else "")
        taken = sum(k[0] == key[0] and (not several or k[1:3] == key[1:3]) for k in kept) > 1
        names[f"{name} ({members[0].name})" if taken else name] = members
    return names


def _metric(run: Run) -> float | None:
    final = curves.final_metric(run)
    return None if final is None else final[1]


def _known(runs: Sequence[Run], one: Callable[[Run], float | None], factor: float = 1) -> list[float]:
    return [factor * x for x in map(one, runs) if x is not None]


def _mean(known: Sequence[float], form: str, unit: str = "") -> Markup:
    if not known:
        return Markup("–")
    mean = format(statistics.fmean(known), form)
    spread = Markup(" <small>± {}</small>").format(format(statistics.stdev(known), form)) if len(known) > 1 else ""
    return Markup("{}{}{}").format(mean, spread, unit)


def _step(run: Run) -> float | None:
    return (run.info.get("cost") or {}).get("seconds_per_step")


def _result_rows(groups: Groups) -> list[list[Any]]:
    values = {name: _known(runs, _metric, groups.factor) for name, runs in groups.runs.items()}
    means = {n: statistics.fmean(v) for n, v in values.items() if v and n not in groups.taught}
    best = (min if groups.lower else max)(means, key=lambda n: means[n]) if means and groups.comparable else None
    rows: list[list[Any]] = []

    def row(name: str, result: Markup, style: str, runs: Sequence[Run], who: str) -> None:
        found = [run.part("after", "predictions", who) or {} for run in runs]
        agreement = lambda run: run.part("after", "predictions", "agreement") if who == "student" else None  # noqa: E731
        network = [run.info.get("student") if who == "student" else run.info["teachers"][0] for run in runs][0] or {}
        rows.append(
            [
                name,
                (result, style),
                _mean(_known(runs, agreement, 100), ".1f", " %"),
                _mean([100 * x["ece"] for x in found if "ece" in x], ".1f", " %"),
                _mean([x["nll"] for x in found if "nll" in x], ".3f"),
                _mean(_known(runs, _step, 1000), ".1f", " ms") if who == "student" else "–",
                value(network.get("parameters")),
                str(len(runs)) if who == "student" else "–",
            ]
        )

    for name, runs in groups.runs.items():
        form = ".2f" if values[name] and statistics.fmean(values[name]) > 1.5 else ".4f"
        shown = f"{name} (teacher)" if name in groups.taught and "teacher" not in name else name
        row(shown, _mean(values[name], form), "best" if name == best else "strong", runs, "student")
    for name, run in groups.asked.items():
        accuracy = run.part("after", "predictions", "teacher", "accuracy")
        known = [] if accuracy is None or groups.metric not in ("top1", "accuracy, %") else [100 * accuracy]
        row(name, _mean(known, ".2f"), "", [run], "teacher")
    return rows


def _result_chart(groups: Groups) -> list[Markup]:
    found = {name: _known(runs, _metric, groups.factor) for name, runs in groups.runs.items()}
    rows = [(name, values) for name, values in found.items() if values]
    # Numbers of different metrics have no common axis.
    return [charts.dots(rows, title=groups.metric)] if len(rows) > 1 and groups.comparable else []


def _comparison_curves(groups: Groups) -> list[Markup]:
    keys = dict.fromkeys(key for run in groups.all if (key := curves.metric_key(run)) is not None)
    wanted = {key.removeprefix("eval_"): [key] for key in keys}
    wanted |= {"evaluation loss": ["eval_loss"], "training loss": ["train_loss", "loss"]}
    drawn = []
    for title, names in wanted.items():
        series = []
        for i, (name, runs) in enumerate(groups.runs.items()):
            found = [next(filter(None, (curves.points(run, key, groups.axis) for key in names)), []) for run in runs]
            series += [Series(name, points, i) for points in found if points]
        if series:
            drawn.append(charts.lines(series, title=title, x_label=groups.axis, legend=False))
    return drawn


def _calibrations(groups: Groups) -> list[Markup]:
    drawn = [chart for name, runs in groups.runs.items() for chart in calibration_charts(runs[0], name)[:1]]
    return drawn + [chart for name, run in groups.asked.items() for chart in calibration_charts(run, name)[1:]]


def _similarities(groups: Groups) -> list[Markup]:
    shown = [(run, name if len(runs) == 1 else run.name) for name, runs in groups.runs.items() for run in runs]
    drawn = [similarity_chart(run, "after", name, 290) for run, name in shown if run.other != "student"]
    return [chart for chart in drawn if chart is not None]


def _cost_rows(groups: Groups) -> tuple[list[str], list[list[Any]]]:
    costs = {name: [run.info.get("cost") or {} for run in runs] for name, runs in groups.runs.items()}
    parts = list(dict.fromkeys(part for found in costs.values() for part in found[0].get("parts") or {}))
    rows: list[list[Any]] = []
    for name, found in costs.items():
        timed = [
            _mean([1000 * c["parts"][part] for c in found if part in (c.get("parts") or {})], ".1f") for part in parts
        ]
        step = _mean(_known(groups.runs[name], _step, 1000), ".1f")
        memory = max((c.get("memory") or 0 for c in found), default=0)
        rows.append([name, *timed, (step, "strong"), number(memory / 2**20, 3) if memory else "–"])
    return parts, rows if any(found for cost in costs.values() for found in cost) else []


def _run_rows(groups: Groups) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for run in groups.all:
        result, seed = _metric(run), value((run.info.get("settings") or {}).get("seed"))
        words = [(text or "–", "left") for text in (run.name, run.method, run.student, run.teacher)]
        rows.append([*words, seed, "–" if result is None else number(result, 4), str(run.info.get("status") or "")])
    return rows


for _one in (_result_rows, _result_chart, _comparison_curves, _calibrations, _similarities, _cost_rows, _run_rows):
    ENVIRONMENT.globals[_one.__name__.lstrip("_")] = _one
