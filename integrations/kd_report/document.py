"""The frame of a page, and the pieces that all pages are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from kd_report.charts import number

__all__ = ["Section", "caption", "definitions", "document", "figure_row", "percent", "table", "text", "tiles"]


class Section(NamedTuple):
    """A part of a page: its anchor, its heading, its HTML."""

    key: str
    title: str
    html: str


def document(title: str, lead: str, sections: Sequence[Section], *, head: str = "") -> str:
    """A whole page with its style and script inside.

    Args:
        title: Heading, plain text.
        lead: What stands under it, HTML.
        sections: The parts in their order; empty ones are left out.
        head: What stands above the sections, HTML.
    """
    shown = [section for section in sections if section.html]
    links = "".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in shown)
    body = "".join(f'<section id="{s.key}"><h2>{escape(s.title)}</h2>{s.html}</section>\n' for s in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('style.css')}</style>\n</head>\n<body>\n"
        f'<header><div><h1>{escape(title)}</h1><p class="lead">{lead}</p></div>'
        '<button class="theme" type="button">Theme: auto</button></header>\n'
        f"<main>{head}<nav>{links}</nav>\n{body}</main>\n"
        "<footer>Made by kd-plugins report. Everything on this page is inside this file.</footer>\n"
        f"<script>\n{_asset('theme.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (files("kd_report") / name).read_text(encoding="utf-8")


def text(value: object) -> str:
    """A value of a record as HTML text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, (Mapping, list, tuple)):
        return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"
    return escape(str(value))


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def caption(words: str) -> str:
    """What a figure shows, under a heading; HTML."""
    return f'<p class="caption">{words}</p>'


def definitions(entries: Mapping[str, str]) -> str:
    """Terms and their HTML; empty ones are left out."""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{value}</dd>" for key, value in entries.items() if value)
    return f"<dl>{items}</dl>" if items else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> str:
    """A table of HTML cells; a pair is a cell and its class."""

    def cell(content: str | tuple[str, str]) -> str:
        return f"<td>{content}</td>" if isinstance(content, str) else f'<td class="{content[1]}">{content[0]}</td>'

    rows = list(rows)
    left = {i for row in rows[:1] for i, c in enumerate(row) if isinstance(c, tuple) and c[1] == "left"}
    heads = "".join(
        f'<th class="left">{escape(c)}</th>' if i in left else f"<th>{escape(c)}</th>" for i, c in enumerate(columns)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter most: pairs of a number and what it is."""
    items = "".join(
        f'<div class="tile{"" if i else " main"}"><b>{value}</b><span>{words}</span></div>'
        for i, (value, words) in enumerate(entries)
    )
    return f'<div class="tiles">{items}</div>' if items else ""


def figure_row(charts: Sequence[str], style: str = "") -> str:
    """Charts beside each other."""
    return f'<div class="charts {style}">{"".join(f"<div>{c}</div>" for c in charts)}</div>' if charts else ""
