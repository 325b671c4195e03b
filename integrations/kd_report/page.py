"""The page of one run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from kd_report import charts, curves, found, pictures
from kd_report.charts import number
from kd_report.document import Section, caption, definitions, document, figure_row, percent, table, text, tiles
from kd_report.runs import Run

__all__ = ["calibration_charts", "run_page", "similarity_chart"]


def run_page(run: Run) -> str:
    """The page of one run as HTML.

    Args:
        run: As `load_run` read it.
    """
    sections = [
        Section("run", "What was run", _what(run)),
        Section("results", "Results", _results(run)),
        Section("peers", "Peers", _peers(run)),
        Section("calibration", "Calibration", _calibration(run)),
        Section("curves", "Learning curves", curves.section(run)),
        Section("method", "Found by the method", found.section(run)),
        Section("similarity", "Layer similarity", _similarity(run)),
        Section("features", "Feature maps", pictures.features(run)),
        Section("channels", "Channels", pictures.channels(run)),
        Section("attention", "Attention", pictures.attention(run)),
        Section("confusion", "Confusion", _confusion(run)),
        Section("cost", "Cost", _cost(run)),
        Section("notes", "Notes", _notes(run)),
    ]
    title = f"{run.method}: {run.student}" + (f" from {run.teacher}" if run.teacher else "")
    info = run.info
    lead = [info.get("host"), info.get("data"), info.get("device"), _when(info)]
    return document(title, " · ".join(escape(str(part)) for part in lead if part), sections, head=_tiles(run))


def _when(info: Mapping[str, Any]) -> str:
    started = str(info.get("started") or "")[:16].replace("T", " ")
    status = info.get("status")
    return " ".join(
        filter(None, [started and f"{started} UTC", f"({status})" if status not in (None, "finished") else ""])
    )


def _tiles(run: Run) -> str:
    entries = []
    accuracy = run.part("after", "predictions", "student", "accuracy")
    if accuracy is not None:
        before = run.part("before", "predictions", "student", "accuracy")
        entries.append(
            (percent(accuracy), "student accuracy" + ("" if before is None else f", {percent(before)} before"))
        )
    elif curves.final_metric(run) is not None:
        name, value = curves.final_metric(run) or ("", 0.0)
        entries.append((number(value, 4), f"{escape(name)}, last evaluation"))
    other = run.part("after", "predictions", run.other) if run.other != "student" else None
    if other and "accuracy" in other:
        entries.append((percent(other["accuracy"]), f"{run.other} accuracy"))
    agreement = run.part("after", "predictions", "agreement")
    if agreement is not None:
        entries.append((percent(agreement), f"agreement with the {run.other}"))
    ece = run.part("after", "predictions", "student", "ece")
    if ece is not None:
        beside = f", {run.other} {percent(other['ece'])}" if other and "ece" in other else ""
        entries.append((percent(ece), f"calibration error{beside}"))
    sizes = [run.info.get("student") or {}, *(run.info.get("teachers") or [])]
    if sizes[0].get("parameters"):
        large = max(s.get("parameters", 0) for s in sizes)
        ratio = large / sizes[0]["parameters"]
        words = "parameters" + (f", {ratio:.1f}&nbsp;× fewer than the teacher" if ratio > 1.05 else "")
        entries.append((_count(sizes[0]["parameters"]), words))
    step = (run.info.get("cost") or {}).get("seconds_per_step")
    if step:
        entries.append((_seconds(step), "per training step"))
    return tiles(entries)


def _count(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{number(n / size)} {unit}"
    return f"{n:g}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{number(1000 * seconds)} ms"
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes = seconds / 60
    return f"{number(minutes)} min" if minutes < 120 else f"{number(minutes / 60)} h"


# What was run


def _what(run: Run) -> str:
    info = run.info
    method = info.get("method") or {}
    parts = method.get("parts") or []
    papers = [p for p in (part.get("paper") for part in parts) if p]
    command = info.get("command")
    html = f"<pre>{escape(shlex.join(command))}</pre>" if command else ""
    names = "<br>".join(f"<b>{escape(p['name'])}</b>: {escape(p['summary'])}" for p in parts)
    options = ", ".join(f"{k}={_plain(v)}" for k, v in (method.get("options") or {}).items() if v is not None)
    html += definitions(
        {
            "Method": names or (escape(str(method["name"])) if method.get("name") else "none: plain training"),
            "Options": f"<code>{escape(options)}</code>" if options else "",
            "Paper": "<br>".join(_paper(paper) for paper in papers),
            "Student": _network(info.get("student")),
            "Teacher": "<br>".join(_network(n) for n in info.get("teachers") or []),
            "Peers": "<br>".join(_network(n) for n in info.get("peers") or []),
            "Data": escape(str(info.get("data") or "")),
            "Stages": _stages(info.get("stages")),
            "Device": escape(str(info.get("device") or "")),
            "Versions": escape(", ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items())),
            "Started": escape(str(info.get("started") or "").replace("T", " ").replace("+00:00", " UTC"))
            + (f", {_seconds(info['seconds'])}" if info.get("seconds") else ""),
            "Folder": f"<code>{escape(run.name)}</code>",
        }
    )
    settings = info.get("settings") or {}
    if settings:
        html += f"<details><summary>All settings ({len(settings)})</summary>"
        html += definitions({k: text(v) for k, v in settings.items()}) + "</details>"
    bibtex = "\n\n".join(paper["bibtex"] for paper in papers if paper.get("bibtex"))
    if bibtex:
        html += f"<details><summary>BibTeX</summary><pre>{escape(bibtex)}</pre></details>"
    return html


def _plain(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)


def _paper(paper: Mapping[str, Any]) -> str:
    arxiv = f", arXiv:{paper['arxiv']}" if paper.get("arxiv") else ""
    return f"{escape(paper['title'])} <small>({escape(paper['short'])}{escape(arxiv)})</small>"


def _network(network: Mapping[str, Any] | None) -> str:
    if not network:
        return ""
    words = f"<b>{escape(str(network.get('name', '')))}</b>"
    if network.get("class") and network["class"] != network.get("name"):
        words += f", {escape(str(network['class']))}"
    return words + (f", {network['parameters']:,} parameters" if network.get("parameters") else "")


def _stages(stages: Mapping[str, Any] | None) -> str:
    if not stages or len(stages["names"]) < 2:
        return ""
    ends = [*stages["starts"][1:], stages["total"]]
    return ", ".join(
        f"{escape(str(n))} (steps {a:,} to {b:,})"
        for n, a, b in zip(stages["names"], stages["starts"], ends, strict=True)
    )


# Results


def _results(run: Run) -> str:
    rows = []
    student = {phase: run.part(phase, "predictions", "student") for phase in ("before", "after")}
    other = run.part("after", "predictions", run.other) or run.part("before", "predictions", run.other)

    def row(name: str, own: Mapping[str, Any], both: Mapping[str, Any] | None, strong: bool) -> list[Any]:
        cells = [
            percent(own.get("accuracy")),
            "–" if own.get("nll") is None else f"{own['nll']:.3f}",
            percent(own.get("ece")),
            percent(own.get("confidence")),
            "–" if not both or both.get("agreement") is None else percent(both["agreement"]),
            "–" if not both or both.get("kl") is None else f"{both['kl']:.3f}",
        ]
        return [name, *((cell, "strong") if strong else cell for cell in cells)]

    if student["before"]:
        rows.append(row("student, before", student["before"], run.part("before", "predictions"), False))
    if student["after"]:
        rows.append(row("student, after", student["after"], run.part("after", "predictions"), True))
    if other and run.other != "student":
        rows.append(row(run.other, other, None, False))
    html = ""
    if rows:
        n = run.part("after", "examples") or run.part("before", "examples")
        several = run.part("after", "teachers") or 1
        words = f"On the first {n:,} evaluation examples."
        if run.other != "student":
            words += f" Agreement: how often student and {run.other} choose the same class. KL: mean divergence of the"
            words += f" student from the {run.other}, in nats."
        words += f" The teacher is the mean of {several} networks' probabilities." if several > 1 else ""
        columns = ["", "accuracy", "NLL", "ECE", "confidence", "agreement", "KL"]
        shown = len(columns) - 2 * (run.other == "student")
        html += caption(words) + table(columns[:shown], [row[:shown] for row in rows])
    flat = _flat(run.info.get("results") or {})
    if flat:
        html += "<h3>As the script wrote them, over the whole evaluation set</h3>" if rows else ""
        html += definitions({key: text(value) for key, value in flat.items()})
    return html


def _peers(run: Run) -> str:
    """The networks that were trained together: accuracy, agreement, and how alike their features are."""
    keys = run.part("after", "peers") or run.part("before", "peers") or []
    infos = [run.info.get("student") or {}, *(run.info.get("peers") or [])]
    if not keys or len(infos) != len(keys) + 1:
        return ""
    names = ["student", *(f"peer {i}" for i in range(1, len(infos)))]
    alike = {phase: run.array(phase, "peers/similarity") for phase in ("before", "after")}
    rows: list[list[Any]] = []
    for i, (name, key, info) in enumerate(zip(names, ["student", *keys], infos, strict=True)):
        own = run.part("after", "predictions", key) or {}
        similar = [None if m is None or not i else float(m[0, i]) for m in alike.values()]
        rows.append(
            [
                f"{name}, {escape(str(info.get('name', '')))}",
                _count(info["parameters"]) if info.get("parameters") else "–",
                (percent(own.get("accuracy")), "strong"),
                percent(own.get("agreement")) if i else "–",
                *("–" if value is None else f"{value:.3f}" for value in similar),
            ]
        )
    words = (
        "Networks that were trained together. Agreement and similarity are with the student; similarity is linear CKA"
        " of the last layers, before and after the training."
    )
    columns = ["", "parameters", "accuracy", "agreement", "similarity before", "similarity after"]
    drawn = [
        charts.heatmap(
            matrix.clamp_min(0).tolist(),
            names,
            names,
            title=f"Similarity of the last layers, {phase} training",
            row_label="network",
            column_label="network",
            scale=1.0,
            space=300,
        )
        for phase, matrix in alike.items()
        if matrix is not None
    ]
    return caption(words) + table(columns, rows) + figure_row(drawn, "wide")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        else:
            flat[prefix + key] = value
    return flat


def calibration_charts(run: Run, *, width: int = 250, label: str = "") -> list[str]:
    """Reliability diagrams of the student after the training and of what it is compared with."""
    shown = [("after", "student", "Student", "c0"), ("after", run.other, run.other.capitalize(), "c5")]
    if run.other == "student":
        shown = shown[:1]
    drawn = []
    for phase, who, name, style in shown:
        diagram = run.array(phase, f"{who}/reliability")
        ece = run.part(phase, "predictions", who, "ece")
        if diagram is not None and ece is not None:
            title = label or name
            drawn.append(
                charts.reliability(
                    diagram.tolist(),
                    title=title,
                    subtitle=f"ECE {percent(ece)}",
                    style=style,
                    width=width,
                )
            )
    return drawn


def _calibration(run: Run) -> str:
    drawn = calibration_charts(run, width=400)
    words = (
        "Accuracy over confidence in 15 bins; a calibrated network follows the dashed diagonal. Red: more confident"
        " than right; pale: more often right than confident. The mean of these gaps over the examples is the expected"
        " calibration error (ECE). Below: how many examples fall into each bin."
    )
    return caption(words) + figure_row(drawn, "wide") if drawn else ""


def similarity_chart(run: Run, phase: str, title: str, space: float = 400) -> str:
    """Linear CKA between the layers of student and teacher as a heat map; empty where it was not computed."""
    cka = run.array(phase, "cka")
    if cka is None:
        return ""
    other = run.other
    return charts.heatmap(
        cka.clamp_min(0).tolist(),
        run.part(phase, "student", "layers"),
        run.part(phase, other, "layers"),
        title=title,
        row_label="student",
        column_label=other,
        scale=1.0,
        space=space,
    )


def _similarity(run: Run) -> str:
    drawn = [similarity_chart(run, "before", "Before training"), similarity_chart(run, "after", "After training")]
    drawn = [chart for chart in drawn if chart]
    pair = "the student, with each other" if run.other == "student" else f"student and {run.other}"
    words = (
        f"Linear CKA between the layers of {pair}: 1 where both tell the same pairs of examples apart, 0 where they"
        " have nothing in common. It does not change under rotation or scaling of the features; the estimate is"
        " unbiased."
    )
    return caption(words) + figure_row(drawn, "wide") if drawn else ""


# Confusion


def _confusion(run: Run) -> str:
    student, other = (run.array("after", f"{who}/confusion") for who in ("student", run.other))
    if student is None:
        return ""
    n = len(student)
    names = run.info.get("classes") or []
    names = [str(names[i]) if i < len(names) else str(i) for i in range(n)]

    def rates(cells: Any) -> Any:
        return 100 * cells.float() / cells.sum(1, keepdim=True).clamp_min(1)

    alone = other is None or run.other == "student"
    values = rates(student) if alone else rates(student) - rates(other)
    words = (
        "Share of each class that is given each answer, in per cent"
        if alone
        else f"Student minus {run.other}, in percentage points of each true class: blue where the student gives an"
        " answer more often, red where less often. On the diagonal red is accuracy lost; elsewhere blue is new mistakes"
    )
    chart = charts.heatmap(
        values.tolist(),
        names,
        names,
        title="" if alone else f"Student − {run.other}",
        row_label="true class",
        column_label="answer",
        signed=not alone,
        digits=0,
        space=460,
    )
    drawn = [chart]
    if not alone and n > 2:
        drawn.append(_changes(student, other, names, run.other))
    return caption(words + ".") + figure_row(drawn, "wide")


def _changes(student: Any, other: Any, names: list[str], who: str) -> str:
    change = student - other
    change.fill_diagonal_(0)
    order = change.abs().flatten().argsort(descending=True, stable=True).tolist()
    rows: list[list[Any]] = []
    for place in order[:8]:
        i, j = divmod(place, len(names))
        if change[i, j]:
            arrow = f"{escape(names[i])} taken for {escape(names[j])}"
            rows.append(
                [
                    arrow,
                    str(int(other[i, j])),
                    str(int(student[i, j])),
                    (f"{int(change[i, j]):+d}".replace("-", "−"), "strong"),
                ]
            )
    return "<h3>Mistakes that changed most</h3>" + table(["examples", who, "student", "change"], rows) if rows else ""


# Cost


def _cost(run: Run) -> str:
    cost = run.info.get("cost") or {}
    html = ""
    parts = {name: 1000 * value for name, value in (cost.get("parts") or {}).items() if value > 0}
    if parts:
        n = cost.get("timed_steps", 0)
        html += caption(
            f"One training step by part: medians of {n} early steps, {number(sum(parts.values()))} ms together."
        )
        html += charts.stacked(parts)
    memory = cost.get("memory")
    steps = [row["step"] for row in run.history if "step" in row]
    html += definitions(
        {
            "Step": f"{_seconds(cost['seconds_per_step'])}, mean over the training"
            if cost.get("seconds_per_step")
            else "",
            "Steps": f"{max(steps):,.0f}" if steps else "",
            "Whole run": _seconds(run.info["seconds"]) + ", evaluation and analysis included"
            if run.info.get("seconds")
            else "",
            "Memory": f"{memory / 2**20:,.0f} MiB <small>({escape(cost.get('memory_kind', ''))})</small>"
            if memory
            else "",
            "Parameters": _parameters(run),
            "Analysis": _analysis_seconds(run),
        }
    )
    return html


def _parameters(run: Run) -> str:
    networks = {"student": [run.info.get("student") or {}], "teacher": run.info.get("teachers") or []}
    sizes = [f"{who} {n['parameters']:,}" for who, list_ in networks.items() for n in list_ if n.get("parameters")]
    return ", ".join(sizes)


def _analysis_seconds(run: Run) -> str:
    seconds = [run.part(phase, "seconds") for phase in ("before", "after")]
    known = [s for s in seconds if s is not None]
    return f"{_seconds(sum(known))} for this report's analysis, outside of the training" if known else ""


def _notes(run: Run) -> str:
    notes = list(run.info.get("notes") or [])
    for who in ("student", run.other):
        note = run.part("after", who, "attention_note")
        if note:
            notes.append(f"Attention of the {who}: {note}")
    items = "".join(f"<li>{escape(str(note))}</li>" for note in dict.fromkeys(notes))
    return f'<ul class="notes">{items}</ul>' if items else ""
