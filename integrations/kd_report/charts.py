"""Charts as inline SVG whose colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Series", "bars", "heatmap", "lines", "number", "points", "reliability", "stacked", "svg", "ticks"]


class Series(NamedTuple):
    """One line of a chart: its name, its points, and its class in the style sheet (`c0` to `c7`, `dim`)."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "c0"


def number(value: float, digits: int = 3) -> str:
    """A number for people.

    >>> number(0.12345), number(123456.0), number(0.0000123), number(2.0)
    ('0.123', '123,456', '1.23e-5', '2')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10 ** (digits + 1):
        return f"{value:,.0f}"
    if size < 10**-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round numbers from low to high.

    >>> ticks(0.0, 1.0), ticks(3, 97)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [25.0, 50.0, 75.0])
    """
    span = high - low
    if not span > 0:
        return [low]
    rough = span / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(width: float, height: float, body: Sequence[str], label: str, style: str = "") -> str:
    """A chart of its natural size in pixels."""
    return (
        f'<svg class="chart {style}" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
        f' role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start", rotate: float = 0) -> str:
    turn = f' transform="rotate({rotate:g} {x:.1f} {y:.1f})"' if rotate else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def lines(
    series: Sequence[Series],
    *,
    title: str,
    stages: Sequence[tuple[str, float, float]] = (),
    x_label: str = "step",
    legend: bool = True,
    width: int = 336,
    height: int = 214,
) -> str:
    """Curves over the training, with a band for each stage.

    Args:
        series: At least one, none empty.
        title: What is drawn.
        stages: Name, start and end of each stage on the x axis; fewer than two are not drawn.
        x_label: Name of the x axis.
        legend: Whether the series are named in the chart.
        width: In pixels.
        height: In pixels.
    """
    left, right, top, bottom = 46, 10, 36, 32
    xs = [x for s in series for x, _ in s.points] + [x for _, *ends in stages for x in ends]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    x0 = 0.0 if 0 < x0 < 0.25 * x1 or 0 < x0 == x1 else x0
    x1 = x1 if x1 > x0 else x0 + 1
    flat = y1 - y0 < 1e-6 * abs(y1)
    pad = 0.25 * abs(y1) if flat else (y1 - y0) * 0.06 or 1.0
    # A quantity that is never negative is read from 0 when it comes near it.
    y0, y1 = (0.0 if y0 >= 0 and (flat or y0 < 0.4 * y1) else y0 - pad), y1 + pad
    inner_w, inner_h = width - left - right, height - top - bottom

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * inner_w

    def py(y: float) -> float:
        return top + (1 - (y - y0) / (y1 - y0)) * inner_h

    body = [_text(0, 13, title, "title")]
    place = float(width - right)
    for s in reversed(series if legend and len(series) > 1 else ()):
        place -= 5.8 * len(s.name)
        body.append(_text(place, 13, s.name, "key"))
        body.append(f'<path class="line {s.style}" d="M{place - 15:.1f} 9.5h11"/>')
        place -= 26
    if len(stages) > 1:
        for i, (name, start, end) in enumerate(stages):
            a, b = px(start), px(end)
            body.append(
                f'<rect class="stage s{i % 2}" x="{a:.1f}" y="{top}" width="{max(b - a, 0):.1f}" height="{inner_h}">'
                f"<title>{escape(name)}: {number(start)} to {number(end)}</title></rect>"
            )
            if len(name) * 5.2 + 4 < b - a:
                body.append(_text(a + 1, top - 5, name, "small muted"))
    for y in ticks(y0, y1):
        body.append(f'<path class="grid" d="M{left} {py(y):.1f}h{inner_w}"/>')
        body.append(_text(left - 6, py(y) + 3.5, number(y), "small muted", "end"))
    for x in ticks(x0, x1):
        body.append(_text(px(x), height - bottom + 15, number(x, 4), "small muted", "middle"))
    body.append(_text(left + inner_w / 2, height - 3, x_label, "small muted", "middle"))
    for s in series:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
        if len(s.points) > 1:
            body.append(f'<polyline class="line {s.style}" points="{path}"/>')
        if len(s.points) <= 40:
            body += [
                f'<circle class="dot {s.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.4">'
                f"<title>{escape(s.name)} at {x_label} {number(x, 4)}: {number(y, 4)}</title></circle>"
                for x, y in s.points
            ]
    return svg(width, height, body, title)


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
    signed: bool = False,
    digits: int = 2,
    scale: float | None = None,
    space: float = 400,
    largest: float = 40,
) -> str:
    """A matrix as squares; small ones carry their numbers.

    Args:
        values: One list for each row.
        rows: Names of the rows.
        columns: Names of the columns.
        title: What is drawn.
        row_label: What the rows are.
        column_label: What the columns are.
        signed: Two colours, for values below and above 0.
        digits: Decimals of the numbers.
        scale: The value of full colour; by default the largest there is.
        space: Width of the squares together, in pixels.
        largest: Side of a square at most.
    """
    n, m = len(rows), len(columns)
    side = max(min(space / max(m, 1), largest), 5)
    full = scale or max((abs(v) for row in values for v in row), default=1.0) or 1.0
    numbers, names = side >= 26, side >= 11
    left = 26 + (min(max((len(str(r)) for r in rows), default=0), 16) * 6.1 if names else 0)
    below = 24 + (min(max((len(str(c)) for c in columns), default=0), 16) * 4.4 if names else 0)
    top = 26
    width, height = max(left + m * side, left + 7.4 * len(title)) + 8, top + n * side + below
    flat = names and max((len(str(c)) for c in columns), default=0) * 6.2 < side
    height = top + n * side + 34 if flat else height
    body = [_text(left, 13, title, "title")]
    for i, row in enumerate(values):
        y = top + i * side
        if names:
            body.append(_text(left - 7, y + side / 2 + 3.5, _short(rows[i]), "small", "end"))
        for j, value in enumerate(row):
            strength = min(abs(value) / full, 1.0)
            shown = (f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}").replace("-", "−")
            x = left + j * side
            if not strength and not numbers:
                continue
            style = "cell minus" if signed and value < 0 else "cell plus"
            body.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}"'
                f' fill-opacity="{strength:.3f}"><title>{escape(str(rows[i]))} / {escape(str(columns[j]))}: {shown}'
                "</title></rect>"
            )
            if numbers:
                blank = signed and float(f"{value:.{digits}f}") == 0
                text = "·" if blank else shown if signed else shown.removeprefix("0") if digits else shown
                tone = "cellnumber on" if strength > 0.55 else "cellnumber"
                body.append(_text(x + side / 2 - 0.5, y + side / 2 + 3.2, text, tone, "middle"))
    body.append(
        f'<rect class="frame" x="{left - 0.5:.1f}" y="{top - 0.5}" width="{m * side:.1f}" height="{n * side:.1f}"/>'
    )
    if names:
        for j, name in enumerate(columns):
            x, y = left + (j + 0.5) * side, top + n * side + 13
            body.append(
                _text(x, y, _short(name), "small", "middle")
                if flat
                else _text(x + 3, y, _short(name), "small", "end", -40)
            )
    body.append(_text(left + m * side / 2, height - 3, column_label, "small muted", "middle"))
    middle = top + n * side / 2
    body.append(_text(9, middle, row_label, "small muted", "middle", -90))
    return svg(width, height, body, title)


def _short(name: object, longest: int = 16) -> str:
    text = str(name)
    return text if len(text) <= longest else "…" + text[-(longest - 1) :]


def reliability(
    diagram: Sequence[Sequence[float]], *, title: str, subtitle: str, style: str, width: int = 250, height: int = 290
) -> str:
    """Accuracy over confidence in bins, the diagonal of a calibrated network, and how many examples are in each bin.

    Args:
        diagram: Examples, mean confidence and accuracy of each bin.
        title: The network.
        subtitle: Its calibration error.
        style: Class of the bars in the style sheet.
        width: In pixels.
        height: In pixels.
    """
    left, right, top, bottom, counts = 46, 8, 40, 78, 34
    w, h = width - left - right, height - top - bottom
    n = len(diagram)
    most = max((row[0] for row in diagram), default=1) or 1
    total = sum(row[0] for row in diagram) or 1
    body = [_text(left, 13, title, "title"), _text(left, 29, subtitle, "small muted")]
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * h
        body.append(f'<path class="grid" d="M{left} {y:.1f}h{w}"/>')
        if value in (0, 0.5, 1):
            body.append(_text(left - 6, y + 3.5, f"{value:g}", "small muted", "end"))
    for i, (count, confidence, accuracy) in enumerate(diagram):
        if not count:
            continue
        x, bar = left + i / n * w + 0.8, w / n - 1.6
        solid = min(accuracy, confidence)
        tip = f"{count:.0f} examples: confidence {confidence:.3f}, accuracy {accuracy:.3f}"
        body.append(
            f'<rect class="bar {style}" x="{x:.1f}" y="{top + (1 - solid) * h:.1f}" width="{bar:.1f}"'
            f' height="{solid * h:.1f}"><title>{tip}</title></rect>'
        )
        low, high = sorted((accuracy, confidence))
        gap = f"bar {style} under" if accuracy > confidence else "gap"
        body.append(
            f'<rect class="{gap}" x="{x:.1f}" y="{top + (1 - high) * h:.1f}" width="{bar:.1f}"'
            f' height="{(high - low) * h:.1f}"><title>{tip}</title></rect>'
        )
        tall = count / most * counts
        body.append(
            f'<rect class="bar dim" x="{x:.1f}" y="{top + h + 12 + counts - tall:.1f}" width="{bar:.1f}"'
            f' height="{tall:.1f}"><title>{count:.0f} of {total:.0f} examples</title></rect>'
        )
    body.append(f'<path class="diagonal" d="M{left} {top + h}L{left + w} {top}"/>')
    base = top + h + 12 + counts
    body.append(f'<path class="axis" d="M{left} {base:.1f}h{w}"/>')
    for value in (0, 0.5, 1):
        body.append(_text(left + value * w, base + 14, f"{value:g}", "small muted", "middle"))
    body.append(_text(left + w / 2, height - 3, "confidence", "small muted", "middle"))
    body.append(_text(10, top + h / 2, "accuracy", "small muted", "middle", -90))
    return svg(width, height, body, f"Reliability of {title}")


def stacked(parts: Mapping[str, float], *, unit: str = "ms", width: int = 980) -> str:
    """One bar made of parts, with a legend that names each part, its size and its share."""
    total = sum(parts.values()) or 1.0
    body, x = [], 0.0
    for i, (name, value) in enumerate(parts.items()):
        w = value / total * width
        body.append(
            f'<rect class="bar c{i}" x="{x:.1f}" y="0" width="{max(w - 1.5, 0.5):.1f}" height="26" rx="2">'
            f"<title>{escape(name)}: {number(value)} {unit}</title></rect>"
        )
        if w > 46:
            body.append(_text(x + w / 2 - 1, 17, f"{100 * value / total:.0f} %", "small on", "middle"))
        x += w
    chart = svg(width, 26, body, "Parts of a step", "wide")
    keys = "".join(
        f'<li><i class="c{i}"></i>{escape(name)} <b>{number(value)} {unit}</b></li>'
        for i, (name, value) in enumerate(parts.items())
    )
    return f'{chart}<ul class="legend">{keys}</ul>'


def bars(
    values: Sequence[tuple[str, float, float | None]],
    *,
    title: str,
    unit: str = "",
    width: int = 480,
    mark: float | None = None,
    zero: bool = False,
) -> str:
    """Horizontal bars with their numbers, and a whisker for the spread where there are several seeds.

    Args:
        values: Name, mean, and standard deviation or None.
        title: What is drawn.
        unit: Behind the numbers.
        width: In pixels.
        mark: A line to compare with, such as the teacher's value.
        zero: Whether the axis begins at 0, also where all values lie close together.
    """
    left = min(max((len(name) for name, *_ in values), default=0), 44) * 6.3 + 12
    right, row, top = 96, 26, 28
    w = width - left - right
    high = max([v + (sd or 0) for _, v, sd in values] + ([mark] if mark is not None else [])) or 1.0
    # Accuracies lie close together: the axis begins below the lowest, and says so by its numbers.
    low = min([v - (sd or 0) for _, v, sd in values] + ([mark] if mark is not None else []))
    low = 0.0 if zero or low < 0.5 * high else low - 0.5 * (high - low) if high > low else 0.0
    height = top + row * len(values) + 22

    def px(v: float) -> float:
        return left + (v - low) / ((high - low) or 1) * w

    body = [_text(left, 13, title, "title")]
    for v in ticks(low, high, 4):
        body.append(f'<path class="grid" d="M{px(v):.1f} {top - 4}v{row * len(values) + 4}"/>')
        body.append(_text(px(v), height - 6, number(v), "small muted", "middle"))
    for i, (name, v, sd) in enumerate(values):
        y = top + i * row
        body.append(_text(left - 8, y + 14, _short(name, 44), "small", "end"))
        body.append(
            f'<rect class="bar c0" x="{left:.1f}" y="{y + 3}" width="{max(px(v) - left, 1):.1f}" height="15" rx="2"/>'
        )
        if sd:
            body.append(f'<path class="whisker" d="M{px(v - sd):.1f} {y + 10.5}H{px(v + sd):.1f}"/>')
        end = px(v + (sd or 0)) + 7
        body.append(_text(end, y + 14, f"{v:.2f}{f' ± {sd:.2f}' if sd else ''}{unit}", "small"))
    if mark is not None:
        body.append(f'<path class="diagonal" d="M{px(mark):.1f} {top - 4}v{row * len(values) + 4}"/>')
    return svg(width, height, body, title)


def points(
    groups: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str,
    limits: Sequence[Sequence[float]] | None = None,
    width: int = 420,
    height: int = 380,
) -> str:
    """Points in a plane, in a colour for each group; the axes have no unit and so no numbers.

    Args:
        groups: Pairs (x, y) by the group's name; at most eight groups.
        title: What is drawn.
        limits: Points that the frame holds; by default those of the groups.
        width: In pixels.
        height: In pixels.
    """
    pad, top = 12, 44
    held = [p for group in groups.values() for p in group] if limits is None else limits
    xs, ys = ([float(p[k]) for p in held] or [0.0] for k in (0, 1))
    x0, y0 = min(xs), min(ys)
    wide, tall = (max(xs) - x0) or 1.0, (max(ys) - y0) or 1.0
    body, place = [_text(0, 13, title, "title")], 0.0
    for i, (name, group) in enumerate(groups.items()):
        body.append(f'<circle class="dot c{i % 8}" cx="{place + 5:.1f}" cy="27" r="4"/>')
        body.append(_text(place + 14, 31, name, "key"))
        place += 5.8 * len(name) + 30
        for n, (x, y) in enumerate(group):
            cx = pad + (float(x) - x0) / wide * (width - 2 * pad)
            cy = top + pad + (1 - (float(y) - y0) / tall) * (height - top - 2 * pad)
            tip = f"<title>{escape(name)} {n}</title>"
            body.append(
                f'<circle class="dot c{i % 8}" cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill-opacity="0.75">{tip}</circle>'
            )
    body.append(f'<rect class="frame" x="0.5" y="{top}" width="{width - 1}" height="{height - top - 1}"/>')
    return svg(width, height, body, title)
