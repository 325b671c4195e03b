"""The page that compares several runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from kd_report import charts, curves
from kd_report.charts import Series, number
from kd_report.document import Section, caption, document, figure_row, table, text
from kd_report.page import calibration_charts, similarity_chart
from kd_report.runs import Run

__all__ = ["comparison_page"]

# Metrics between 0 and 1 that are read as percentages.
_SHARES = {"accuracy", "f1", "precision", "recall", "mean_iou"}
# What differs between the seeds of one experiment, or says nothing about it.
_INCIDENTAL = {"seed", "experiment", "output", "output_dir", "resume", "log_interval", "run_name", "logging_dir"}


def comparison_page(runs: Sequence[Run]) -> str:
    """The comparison of runs as HTML; runs that differ in the seed alone are summed up as mean and spread.

    Args:
        runs: At least two.
    """
    groups = _groups(runs)
    sections = [
        Section("results", "Results", _results(groups)),
        Section("curves", "Learning curves", _curves(groups)),
        Section("calibration", "Calibration", _calibration(runs, groups)),
        Section("similarity", "Layer similarity", _similarity(runs)),
        Section("cost", "Cost", _cost(groups)),
        Section("runs", "Runs", _runs(runs)),
    ]
    data = list(dict.fromkeys(str(r.info["data"]) for r in runs if r.info.get("data")))
    lead = [f"{len(runs)} runs", f"{len(groups)} experiments" if len(groups) < len(runs) else "", *data[:2]]
    return document("Comparison of runs", " · ".join(escape(part) for part in lead if part), sections)


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one experiment, which differ in the seed alone, by a name that tells the experiments apart."""
    kept: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in (run.info.get("settings") or {}).items() if k not in _INCIDENTAL}
        options = (run.info.get("method") or {}).get("options")
        key: tuple[str, ...] = (
            run.method,
            run.student,
            run.teacher,
            str(run.info.get("data")),
            repr(options),
            repr(settings),
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


def _mean(values: Sequence[float | None], form: str, factor: float = 1.0) -> str:
    known = [v * factor for v in values if v is not None]
    if not known:
        return "–"
    mean = format(statistics.fmean(known), form)
    return mean if len(known) < 2 else f"{mean} <small>± {format(statistics.stdev(known), form)}</small>"


def _metric(run: Run) -> float | None:
    final = curves.final_metric(run)
    return None if final is None else final[1]


def _agreement(run: Run) -> float | None:
    return run.part("after", "predictions", "agreement")


def _ece(run: Run) -> float | None:
    return run.part("after", "predictions", "student", "ece")


def _step(run: Run) -> float | None:
    return (run.info.get("cost") or {}).get("seconds_per_step")


def _results(groups: dict[str, list[Run]]) -> str:
    names = {(curves.final_metric(r) or ("metric",))[0] for members in groups.values() for r in members}
    metric = names.pop() if len(names) == 1 else "result"
    factor = 100 if metric in _SHARES else 1
    means = {name: [factor * m for m in map(_metric, members) if m is not None] for name, members in groups.items()}
    averages = {name: statistics.fmean(values) for name, values in means.items() if values}
    lower = metric in ("loss", "perplexity", "rmse", "mse", "mae")
    best = (min if lower else max)(averages, key=lambda n: averages[n]) if averages and not names else None
    rows: list[list[Any]] = []
    for name, members in groups.items():
        value = _mean([_metric(r) for r in members], ".2f" if averages.get(name, 0) > 1.5 else ".4f", factor)
        rows.append(
            [
                escape(name),
                (value, "best" if name == best else "strong"),
                _mean([_agreement(r) for r in members], ".1f", 100) + _unit(members, _agreement, " %"),
                _mean([_ece(r) for r in members], ".1f", 100) + _unit(members, _ece, " %"),
                _mean([_nll(r) for r in members], ".3f"),
                _mean([_step(r) for r in members], ".1f", 1000) + _unit(members, _step, " ms"),
                text((members[0].info.get("student") or {}).get("parameters")),
                str(len(members)),
            ]
        )
    columns = ["", f"{metric}, %" if factor > 1 else metric, "agreement", "ECE", "NLL", "step", "parameters", "runs"]
    words = (
        "The last evaluation of each run. Runs that differ in their seed alone are one line: mean ± standard deviation."
        " Agreement, calibration error (ECE) and negative log-likelihood (NLL) are those of the analysed examples."
    )
    bars = [(name, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None) for name, v in means.items() if v]
    # Numbers of different metrics have no common axis.
    chart = charts.bars(bars, title=metric, width=760) if len(bars) > 1 and not names else ""
    return caption(words) + table(columns, rows) + figure_row([chart] if chart else [])


def _nll(run: Run) -> float | None:
    return run.part("after", "predictions", "student", "nll")


def _unit(members: Sequence[Run], value: Any, unit: str) -> str:
    return unit if any(value(r) is not None for r in members) else ""


def _curves(groups: dict[str, list[Run]]) -> str:
    runs = [run for members in groups.values() for run in members]
    x = "step" if all(curves.axis(run) == "step" for run in runs) else "epoch"
    wanted: dict[str, str] = {}
    for run in runs:
        key = curves.metric_key(run)
        if key is not None:
            wanted.setdefault(key.removeprefix("eval_"), key)
    wanted |= {"evaluation loss": "eval_loss", "training loss": "train_loss"}
    drawn = []
    for title, key in wanted.items():
        series = []
        for i, (name, members) in enumerate(groups.items()):
            for run in members:
                found = curves.points(run, key, x) or (curves.points(run, "loss", x) if key == "train_loss" else [])
                if found:
                    series.append(Series(name, found, f"c{i % 8}"))
        if series:
            drawn.append(charts.lines(series, title=title, x_label=x, legend=False))
    keys = "".join(f'<li><i class="c{i % 8}"></i>{escape(name)}</li>' for i, name in enumerate(groups))
    if not drawn:
        return ""
    words = (
        f"Over the {x}s; one line a run. Training losses of different methods have different terms and do not compare."
    )
    return caption(words) + f'<ul class="legend">{keys}</ul>' + figure_row(drawn, "thirds")


def _calibration(runs: Sequence[Run], groups: dict[str, list[Run]]) -> str:
    drawn, seen = [], set()
    for name, members in groups.items():
        own = calibration_charts(members[0], label=name.partition(" · ")[0])
        drawn += own[:1]
        teacher = members[0].teacher
        if len(own) > 1 and teacher not in seen:
            seen.add(teacher)
            drawn += calibration_charts(members[0], label=members[0].other)[1:]
    several = " The first run of each line is shown." if len(groups) < len(runs) else ""
    return (
        caption("Accuracy over confidence after the training." + several) + figure_row(drawn, "wide") if drawn else ""
    )


def _similarity(runs: Sequence[Run]) -> str:
    drawn = [
        similarity_chart(
            run, "after", run.method if run.method == run.name else f"{run.method} ({run.name})", space=290
        )
        for run in runs
        if run.other != "student"
    ]
    drawn = [chart for chart in drawn if chart]
    words = "Linear CKA between the layers of student and teacher after the training."
    return caption(words) + figure_row(drawn, "wide") if drawn else ""


def _cost(groups: dict[str, list[Run]]) -> str:
    parts: list[str] = []
    rows: list[list[Any]] = []
    for members in groups.values():
        for name in (members[0].info.get("cost") or {}).get("parts") or {}:
            parts = parts if name in parts else [*parts, name]
    for name, members in groups.items():
        costs = [r.info.get("cost") or {} for r in members]
        memory = [c["memory"] for c in costs if c.get("memory")]
        timed = [c.get("parts") or {} for c in costs]
        rows.append(
            [
                escape(name),
                *(_mean([t.get(part) for t in timed], ".1f", 1000) for part in parts),
                (_mean([c.get("seconds_per_step") for c in costs], ".1f", 1000), "strong"),
                number(max(memory) / 2**20, 3) if memory else "–",
            ]
        )
    if all(cell in ("–", ("–", "strong")) for row in rows for cell in row[1:]):
        return ""
    words = (
        "Milliseconds of a training step by part (medians of early steps), the mean over the training, and MiB at most."
    )
    return caption(words) + table(["", *parts, "step", "memory"], rows)


def _runs(runs: Sequence[Run]) -> str:
    rows: list[list[Any]] = []
    for run in runs:
        settings = run.info.get("settings") or {}
        value = _metric(run)
        status = str(run.info.get("status") or "")
        teacher = (escape(run.teacher) or "–", "left")
        seed = text(settings.get("seed"))
        cells = [
            (f"<code>{escape(run.name)}</code>", "left"),
            (escape(run.method), "left"),
            (escape(run.student), "left"),
            teacher,
            seed,
        ]
        rows.append([*cells, "–" if value is None else number(value, 4), escape(status)])
    return table(["folder", "method", "student", "teacher", "seed", "result", "status"], rows)
