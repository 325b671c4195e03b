"""What a method shows of itself: the pictures that it gave to the record of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from itertools import groupby
from typing import Any

from kd_report import charts
from kd_report.document import caption, figure_row
from kd_report.runs import Run

__all__ = ["section"]


def section(run: Run) -> str:
    """The section of a run's page; pictures of kinds that are not known here are left out."""
    known = [picture for picture in run.pictures if picture.get("kind") in _KINDS]
    html = ""
    for (words, _), group in groupby(known, key=lambda p: (p.get("caption") or "", p["kind"])):
        drawn = [_KINDS[picture["kind"]](picture) for picture in group]
        html += (caption(escape(words)) if words else "") + figure_row(drawn, "wide")
    return html


def _bars(picture: Mapping[str, Any]) -> str:
    values = [(name, value, None) for name, value in picture["values"]]
    return charts.bars(values, title=picture["title"], mark=picture["mark"], zero=True)


def _heatmap(picture: Mapping[str, Any]) -> str:
    labels = {key: picture[key] for key in ("title", "row_label", "column_label", "signed")}
    return charts.heatmap(picture["values"], picture["rows"], picture["columns"], **labels)


def _images(picture: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<span>{escape(name)}</span><div>"
        + "".join(f'<img src="{source}" alt="{escape(name)} {i + 1}">' for i, source in enumerate(sources))
        + "</div>"
        for name, sources in picture["rows"].items()
    )
    return f'<h3>{escape(picture["title"])}</h3><div class="strips">{rows}</div>'


def _points(picture: Mapping[str, Any]) -> str:
    return charts.points(picture["groups"], title=picture["title"])


_KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bars": _bars,
    "heatmap": _heatmap,
    "images": _images,
    "points": _points,
}
