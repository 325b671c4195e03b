"""The page of one run, and what all pages are made with."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import colormaps
from torch import Tensor

from kd_plugins.picture import png
from kd_report import charts, curves
from kd_report.charts import number, own_ids
from kd_report.runs import Run

__all__ = ["calibration_charts", "count", "document", "percent", "run_page", "similarity_chart", "value"]

Lines = dict[str, list[tuple[str, Tensor]]]
_SENTENCES, _CHANNEL_EXAMPLES, _CHANGES = 3, 2, 8
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
_SECTIONS = {
    "run": "What was run",
    "results": "Results",
    "peers": "Peers",
    "calibration": "Calibration",
    "curves": "Learning curves",
    "method": "Found by the method",
    "similarity": "Layer similarity",
    "features": "Feature maps",
    "channels": "Channels",
    "attention": "Attention",
    "confusion": "Confusion",
    "cost": "Cost",
    "notes": "Notes",
}


def run_page(run: Run) -> str:
    """The page of one run as HTML."""
    title = f"{run.method}: {run.student}" + (f" from {run.teacher}" if run.teacher else "")
    status, started = run.info.get("status"), str(run.info.get("started") or "")[:16].replace("T", " ")
    when = [started and f"{started} UTC", f"({status})" if status not in (None, "finished") else ""]
    lead = [run.info.get("host"), run.info.get("data"), run.info.get("device"), " ".join(filter(None, when))]
    return document("run.html.j2", run, _SECTIONS, title, lead, head="tiles")


def document(
    template: str, about: Any, sections: Mapping[str, str], title: str, lead: Sequence[Any], *, head: str = ""
) -> str:
    """A whole page: the macros of a template, one for each section, in the frame; what comes out empty is left out."""
    macros = vars(ENVIRONMENT.get_template(template).module)
    html = [(key, name, Markup(macros[key](about).strip())) for key, name in sections.items()]
    shown = [section for section in html if section[2]]
    top = macros[head](about) if head else ""
    page = ENVIRONMENT.get_template("page.html.j2").render(title=title, lead=lead, sections=shown, head=top)
    return own_ids(page)


# Words and numbers


def value(given: object) -> str:
    """A value of a record in words."""
    if given is None:
        return "–"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        return number(given, 4)
    if isinstance(given, (Mapping, list, tuple)):
        return json.dumps(given, ensure_ascii=False)
    return f"{given:,}" if isinstance(given, int) else str(given)


def percent(share: float | None) -> str:
    """A share as per cent."""
    return "–" if share is None else f"{100 * share:.1f} %"


def count(n: float | None) -> str:
    """A large number in short."""
    if not n:
        return "–"
    size, unit = next(((size, unit) for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if n >= size), (1, ""))
    return f"{number(n / size)}{unit}"


def _seconds(seconds: float) -> str:
    for size, unit, most in ((1e-3, "ms", 1), (1, "s", 120), (60, "min", 7200)):
        if seconds < most:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 3600)} h"


def _decimals(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _options(method: Mapping[str, Any]) -> str:
    given = {k: v for k, v in (method.get("options") or {}).items() if v is not None}
    return ", ".join(f"{k}={number(v, 4) if isinstance(v, float) else v}" for k, v in given.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, found in values.items():
        if isinstance(found, list) and found and all(isinstance(item, Mapping) for item in found):
            found = {str(i): item for i, item in enumerate(found, 1)}
        flat |= _flat(found, f"{prefix}{key} ") if isinstance(found, Mapping) else {prefix + key: found}
    return flat


def _sizes(run: Run) -> list[tuple[str, int]]:
    named = [("student", run.info.get("student") or {}), *(("teacher", n) for n in run.info.get("teachers") or [])]
    return [(who, network["parameters"]) for who, network in named if network.get("parameters")]


def _label(run: Run, i: int) -> str:
    labels, names = run.part("after", "labels") or run.part("before", "labels") or [], run.info.get("classes") or []
    if i >= len(labels):
        return f"example {i + 1}"
    return f"label: {names[labels[i]] if 0 <= labels[i] < len(names) else labels[i]}"


# Tables and charts


def _predictions(run: Run) -> list[list[Any]]:
    named = [("student, before", "before", "student", ""), ("student, after", "after", "student", "strong")]
    if run.other != "student":
        named.append((run.other, "after" if run.part("after", "predictions", run.other) else "before", run.other, ""))
    rows = []
    for name, phase, who, style in named:
        own = run.part(phase, "predictions", who)
        if own:
            both = (run.part(phase, "predictions") or {}) if who == "student" else {}
            cells = [percent(own.get("accuracy")), _decimals(own.get("nll"))]
            cells += [percent(own.get("ece")), percent(own.get("confidence"))]
            if run.other != "student":
                cells += [percent(both.get("agreement")), _decimals(both.get("kl"))]
            rows.append([name, *((cell, style) for cell in cells)])
    return rows


def _peers(run: Run) -> list[str]:
    """Names of the networks that were trained together in the analysis, the student first."""
    keys = run.part("after", "peers") or run.part("before", "peers") or []
    return ["student", *keys] if keys and len(keys) == len(run.info.get("peers") or []) else []


def _peer_rows(run: Run) -> list[list[Any]]:
    """The networks that were trained together: accuracy, agreement, and how alike their features are."""
    rows: list[list[Any]] = []
    infos = [run.info.get("student") or {}, *(run.info.get("peers") or [])]
    alike = [run.array(phase, "peers/similarity") for phase in ("before", "after")]
    for i, (key, info) in enumerate(zip(_peers(run), infos, strict=False)):
        own = run.part("after", "predictions", key) or {}
        name = f"{f'peer {i}' if i else 'student'}, {info.get('name', '')}"
        similar = [_decimals(None if m is None or not i else float(m[0, i])) for m in alike]
        agreement = percent(own.get("agreement")) if i else "–"
        rows.append(
            [name, count(info.get("parameters")), (percent(own.get("accuracy")), "strong"), agreement, *similar]
        )
    return rows


def _peer_charts(run: Run) -> list[Markup]:
    names = ["student", *(f"peer {i}" for i in range(1, len(_peers(run))))]
    found = {phase: run.array(phase, "peers/similarity") for phase in ("before", "after")}
    words = {"row_label": "network", "column_label": "network", "scale": 1.0, "space": 300}
    return [
        charts.heatmap(x.clamp_min(0).tolist(), names, names, title=f"Last layers, {phase} training", **words)
        for phase, x in found.items()
        if x is not None
    ]


def calibration_charts(run: Run, label: str = "") -> list[Markup]:
    """Reliability diagrams of the student after the training and of what it is compared with."""
    drawn = []
    for who, colour in {"student": 0, run.other: 0 if run.other == "student" else 5}.items():
        diagram, ece = run.array("after", f"{who}/reliability"), run.part("after", "predictions", who, "ece")
        if diagram is not None and ece is not None:
            words = {"title": label or who.capitalize(), "subtitle": f"ECE {percent(ece)}"}
            drawn.append(charts.reliability(diagram.tolist(), colour=colour, **words))
    return drawn


def _curve_charts(run: Run) -> list[Markup]:
    found = {title: [charts.Series(*line) for line in lines] for title, lines in curves.panels(run).items()}
    about = {"stages": curves.stages(run), "x_label": curves.axis(run)}
    return [charts.lines(lines, title=title, **about) for title, lines in found.items()]


def similarity_chart(run: Run, phase: str, title: str, space: float = 400) -> Markup | None:
    """Linear CKA between the layers of student and teacher as a heat map; None where it was not computed."""
    cka, layers = run.array(phase, "cka"), [run.part(phase, who, "layers") for who in ("student", run.other)]
    if cka is None:
        return None
    words = {"row_label": "student", "column_label": run.other, "scale": 1.0, "space": space}
    return charts.heatmap(cka.clamp_min(0).tolist(), *layers, title=title, **words)


def _confusions(run: Run) -> tuple[Markup | None, list[list[Any]]]:
    """The confusion matrix, or how it differs from the other network's, and the mistakes that changed most."""
    student, other = (run.array("after", f"{who}/confusion") for who in ("student", run.other))
    if student is None:
        return None, []
    given = run.info.get("classes") or []
    names = [str(given[i]) if i < len(given) else str(i) for i in range(len(student))]
    words: dict[str, Any] = {"row_label": "true class", "column_label": "answer", "digits": 0, "space": 460}

    def rates(cells: Tensor) -> Tensor:
        return 100 * cells.float() / cells.sum(1, keepdim=True).clamp_min(1)

    if other is None or run.other == "student":
        return charts.heatmap(rates(student).tolist(), names, names, title="", **words), []
    title, change = f"Student − {run.other}", student - other
    chart = charts.heatmap((rates(student) - rates(other)).tolist(), names, names, title=title, signed=True, **words)
    change.fill_diagonal_(0)
    order = change.abs().flatten().argsort(descending=True, stable=True)[:_CHANGES].tolist() if len(names) > 2 else []
    rows: list[list[Any]] = []
    for i, j in (divmod(place, len(names)) for place in order):
        if change[i, j]:
            counts, more = [str(int(x[i, j])) for x in (other, student)], f"{int(change[i, j]):+d}".replace("-", "−")
            rows.append([f"{names[i]} taken for {names[j]}", *counts, (more, "strong")])
    return chart, rows


# Maps and attention


def _shown(run: Run) -> list[tuple[str, str, str]]:
    """Line name, phase and network, from top to bottom."""
    other = [(run.other, "after", run.other)] if run.other != "student" else []
    return [*other, ("student", "after", "student"), ("student before", "before", "student")]


def _feature_maps(run: Run) -> Lines:
    lines = {}
    for name, phase, who in _shown(run):
        maps = [(x, run.array(phase, f"{who}/map/{i}")) for i, x in enumerate(run.part(phase, who, "maps") or [])]
        lines[name] = [(layer, x) for layer, x in maps if x is not None]
    return {name: maps for name, maps in lines.items() if maps}


def _attention_maps(run: Run) -> Lines:
    found = {name: (run.array(phase, f"{who}/attention"), phase, who) for name, phase, who in _shown(run)}
    return {
        name: list(zip(run.part(phase, who, "attention"), maps, strict=True))
        for name, (maps, phase, who) in found.items()
        if maps is not None
    }


def _sentences(run: Run, lines: Lines) -> list[list[tuple[str, Markup]]]:
    """The attention of each network for a few sentences."""
    drawn = []
    sentences = run.part("after", "tokens") or run.part("before", "tokens") or []
    for i, tokens in enumerate(sentences[:_SENTENCES]):
        n = len(tokens)
        values = torch.cat([x[i, :n, :n].flatten() for maps in lines.values() for _, x in maps]).float().sort().values
        # The probability that is drawn in full colour: few are larger.
        full = float(values[round(0.98 * (len(values) - 1))]) if len(values) else 1.0
        one = {name: [(layer, x[i]) for layer, x in maps] for name, maps in lines.items()}
        drawn.append([(name, charts.attention(maps, tokens, full)) for name, maps in one.items()])
    return drawn


def _channel_charts(run: Run) -> list[Markup]:
    """The channels of student and teacher as points of a plane, before and after on one scale."""
    drawn = []
    for i in range(_CHANNEL_EXAMPLES):
        planes = {}
        for phase in ("before", "after"):
            found = {who: run.array(phase, f"{who}/channels") for who in ("teacher", "student")}
            planes[phase] = {who: x[i].tolist() for who, x in found.items() if x is not None and i < len(x)}
        everything = [point for groups in planes.values() for group in groups.values() for point in group]
        titles = {phase: f"{_label(run, i)}, {phase} training" for phase, groups in planes.items() if groups}
        drawn += [charts.points(planes[phase], title=title, limits=everything) for phase, title in titles.items()]
    return drawn


def _heat(values: Tensor) -> str:
    """A map in colours, scaled from its minimum to its maximum."""
    values = values.float() - values.float().min()
    colours = colormaps["viridis"]((values / values.max().clamp_min(1e-12)).numpy(), bytes=True)
    return png(torch.from_numpy(colours[..., :3].copy()).movedim(2, 0))


# What a method shows of itself: the pictures that it gave to the record of its run.


def _draw(picture: Mapping[str, Any]) -> Markup:
    kind, title = picture["kind"], str(picture["title"])
    if kind == "bars":
        return charts.bars([(str(k), v) for k, v in picture["values"]], title=title, mark=picture.get("mark"))
    if kind == "heatmap":
        words = {key: picture.get(key) or "" for key in ("row_label", "column_label", "signed")}
        return charts.heatmap(picture["values"], picture["rows"], picture["columns"], title=title, **words)
    return charts.points(picture["groups"], title=title) if kind == "points" else Markup()


def _pictures(run: Run) -> list[tuple[str, list[tuple[Mapping[str, Any], Markup]]]]:
    """Pictures that are drawn, by caption and kind; those of kinds that are not known here are left out."""
    known = [p for p in run.pictures if p.get("kind") in ("bars", "heatmap", "images", "points")]
    grouped = groupby(known, key=lambda p: (p.get("caption") or "", p["kind"]))
    return [(words, [(picture, _draw(picture)) for picture in pictures]) for (words, _), pictures in grouped]


ENVIRONMENT = Environment(
    loader=PackageLoader("kd_report", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters |= {
    "count": count,
    "heat": _heat,
    "number": number,
    "percent": percent,
    "png": png,
    "seconds": _seconds,
    "shell": shlex.join,
    "tail": lambda layer: layer if len(layer) <= 12 else f"…{layer[-11:]}",
    "value": value,
    "times": lambda parts: {name: seconds for name, seconds in parts.items() if seconds > 0},
}
ENVIRONMENT.tests |= {
    "pair": lambda cell: isinstance(cell, tuple),
    "png": lambda source: isinstance(source, str) and _PNG.fullmatch(source) is not None,
}
_GLOBALS: list[Callable[..., Any]] = [_predictions, _peer_rows, _peer_charts, calibration_charts, _curve_charts, _sizes]
_GLOBALS += [similarity_chart, _confusions, _feature_maps, _attention_maps, _sentences, _channel_charts, _pictures]
_GLOBALS += [_flat, _label, _options, curves.axis, curves.final_metric, curves.stages]
ENVIRONMENT.globals |= {one.__name__.lstrip("_"): one for one in _GLOBALS}
