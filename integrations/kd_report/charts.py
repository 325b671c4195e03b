"""Charts with matplotlib, as inline SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["Series", "attention", "bars", "dots", "heatmap", "lines", "number", "points", "reliability"]

# Colours of the style sheet; each is drawn as a colour of its own, whose name is put in its place afterwards.
_NAMES = ("ink", "muted", "line", "soft", "accent", "on-accent", "minus", "dim", *(f"c{i}" for i in range(8)))
_PAINT = {name: f"#fe01{i:02x}" for i, name in enumerate(_NAMES)}
_INK, _MUTED, _LINE, _SOFT, _ACCENT, _ON_ACCENT, _MINUS, _DIM, *_C = _PAINT.values()
_LEFT_OUT = (
    r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|font-family: [^;]*; | transform=\"rotate\(-0 [^)]*\)\""
)
_SHADE = (72 / 255, 112 / 255, 214 / 255)  # The accent in a tone between its two themes.

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _LINE,
    "grid.linewidth": 1,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": _MUTED,
    "legend.handlelength": 1.1,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "kd",
}


class Series(NamedTuple):
    """One line of a chart: its name, its points, and the number of its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


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
    text = f"{value:.{max(digits - 1 - math.floor(math.log10(size)), 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Sheet:
    """A drawing of a size in pixels.

    Attributes:
        tips: What is told of each mark of a collection under the pointer, by the collection's id.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width / 72, height / 72))
        self.tips: dict[str, list[str]] = {}

    def axes(self, left: float, top: float, width: float, height: float, title: str = "") -> Axes:
        """Axes at a place in pixels, counted from the upper left corner."""
        bottom = self.height - top - height
        rectangle = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(rectangle)
        axes.set_title(title)
        return axes

    def marks(self, axes: Axes, xy: Sequence[tuple[float, float]], tips: Sequence[str], **style: Any) -> None:
        """Marks that tell what they are."""
        if xy:
            name = f"tips{len(self.tips)}"
            self.tips[name] = list(tips)
            axes.scatter(*zip(*xy, strict=True), clip_on=False, linewidths=0, **style).set_gid(name)

    def svg(self, label: str) -> Markup:
        """The drawing for a page; ids are unique once `own_ids` has seen the page."""
        file = io.StringIO()
        with warnings.catch_warnings():
            # The browser has glyphs that matplotlib's font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = re.sub(_LEFT_OUT, "", text[text.index("<svg") :], flags=re.DOTALL)
        for name, tips in self.tips.items():
            head, mark, rest = text.partition(f'<g id="{name}">')
            body, end, tail = rest.partition("\n   </g>")
            uses = re.split(r"(?<=<use )([^>]*)/>", body)
            told = [f"{use}><title>{escape(tip)}</title></use>" for use, tip in zip(uses[1::2], tips, strict=False)]
            body = "".join(x + y for x, y in zip(uses[::2], [*told, ""], strict=True))
            text = head + mark + body + end + tail
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
        text = re.sub(r"#fe01([0-9a-f]{2})", lambda m: f"var(--{_NAMES[int(m[1], 16)]})", text)
        text = re.sub(r"\n\s*", "\n", text.replace("xlink:href=", "href="))
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        opening = f'<svg class="chart" {size} role="img" aria-label="{escape(label)}">'
        return Markup(opening + text.partition(">")[2].strip())


def own_ids(page: str) -> str:
    """Gives every chart of a page ids of its own."""
    count = iter(range(page.count("<svg")))

    def renamed(found: re.Match[str]) -> str:
        prefix = f"s{next(count)}-"
        return re.sub(r'( id="| href="#|url\(#)', lambda m: m[1] + prefix, found[0])

    return re.sub(r"<svg.*?</svg>", renamed, page, flags=re.DOTALL)


def chart(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """Draws with the style of the page; matplotlib's settings are as before afterwards."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Markup:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _short(name: object, longest: int = 16) -> str:
    text = str(name)
    return text if len(text) <= longest else "…" + text[-(longest - 1) :]


_TICKS = FuncFormatter(lambda value, _: number(value, 4).replace("-", "−"))


@chart
def lines(
    series: Sequence[Series],
    *,
    title: str,
    stages: Sequence[tuple[str, float, float]] = (),
    x_label: str = "step",
    legend: bool = True,
) -> Markup:
    """Curves over the training, with a band for each stage.

    Args:
        series: At least one, none empty.
        title: What is drawn.
        stages: Name, start and end of each stage on the x axis; fewer than two are not drawn.
        x_label: Name of the x axis.
        legend: Whether the series are named in the chart.
    """
    sheet = Sheet(336, 214)
    axes = sheet.axes(46, 36, 280, 142)
    sheet.figure.text(0, 1 - 13 / 214, title, size=11.5, weight="bold")
    for name, points, colour in series:
        axes.plot(*zip(*points, strict=True), color=_C[colour % 8], linewidth=1.8, label=name)
        tips = [f"{name} at {x_label} {number(x, 4)}: {number(y, 4)}" for x, y in points]
        if len(points) <= 40:
            sheet.marks(axes, points, tips, s=20, color=_C[colour % 8], zorder=3)
    for i, (name, start, end) in enumerate(stages if len(stages) > 1 else ()):
        axes.axvspan(start, end, color=_SOFT, alpha=(1, 0)[i % 2], linewidth=0, zorder=0, gid=f"stage{i}")
        axes.text(start, 1.03, name, size=9, color=_MUTED, transform=axes.get_xaxis_transform())
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low, high = min(ys), max(ys)
    flat = high - low < 1e-6 * abs(high)
    pad = 0.25 * abs(high) if flat else 0.06 * (high - low) or 1.0
    # A quantity that is never negative is read from 0 when it comes near it.
    axes.set_ylim(0 if low >= 0 and (flat or low < 0.4 * high) else low - pad, high + pad or 1)
    if 0 < min(xs) < 0.25 * max(xs) or min(xs) == max(xs):
        axes.set_xlim(0 if min(xs) > 0 else min(xs) - 1, max(xs) if min(xs) > 0 else max(xs) + 1)
    else:
        axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_TICKS)
    axes.yaxis.set_major_formatter(_TICKS)
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    if legend and len(series) > 1:
        place = {"bbox_to_anchor": (326 / 336, 1 - 3 / 214), "ncols": len(series)}
        sheet.figure.legend(*axes.get_legend_handles_labels(), loc="upper right", **place)
    return sheet.svg(title)


@chart
def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str = "",
    column_label: str = "",
    signed: bool = False,
    digits: int = 2,
    scale: float | None = None,
    space: float = 400,
) -> Markup:
    """A matrix as squares; large ones carry their numbers.

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
    """
    n, m = len(rows), len(columns)
    side = max(min(space / max(m, 1), 40), 5)
    full = scale or max((abs(v) for row in values for v in row), default=1.0) or 1.0
    longest = [min(max((len(str(name)) for name in names), default=0), 16) for names in (rows, columns)]
    numbers, named = side >= 26, side >= 11
    upright = longest[1] * 6.4 < side
    left = 26 + (longest[0] * 6.4 if named else 0)
    below = 24 + (0 if not named else 12 if upright else longest[1] * 4.6)
    sheet = Sheet(max(left + m * side, left + 8 * len(title)) + 8, 28 + n * side + below)
    axes = sheet.axes(left, 28, m * side, n * side, title)
    cells: list[tuple[tuple[float, float], str, tuple[str, float]]] = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strength = min(abs(value) / full, 1.0)
            shown = (f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}").replace("-", "−")
            if strength or numbers:
                paint = _MINUS if signed and value < 0 else _ACCENT
                cells.append(((j, i), f"{rows[i]} / {columns[j]}: {shown}", (paint, strength)))
            if numbers:
                blank = signed and float(f"{value:.{digits}f}") == 0
                text = "·" if blank else shown.removeprefix("0") if digits and not signed else shown
                colour = _ON_ACCENT if strength > 0.55 else _INK
                axes.text(j, i, text, size=9, ha="center", va="center_baseline", color=colour)
    places, tips, paints = zip(*cells, strict=True) if cells else ((), (), ())
    sheet.marks(axes, places, tips, marker="s", s=(side - 1) ** 2, color=list(map(to_rgba, paints)))
    axes.set_xlim(-0.5, m - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.spines[:].set_visible(True)
    slant = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(m) if named else [], [_short(name) for name in columns] if named else [], color=_INK, **slant)
    axes.set_yticks(range(n) if named else [], [_short(name) for name in rows] if named else [], color=_INK)
    axes.tick_params(pad=5)
    sheet.figure.text((left + m * side / 2) / sheet.width, 4 / sheet.height, column_label, color=_MUTED, ha="center")
    middle = 1 - (28 + n * side / 2) / sheet.height
    sheet.figure.text(10 / sheet.width, middle, row_label, color=_MUTED, rotation=90, ha="center", va="center")
    return sheet.svg(title or f"{row_label} by {column_label}")


@chart
def reliability(diagram: Sequence[Sequence[float]], *, title: str, subtitle: str, colour: int) -> Markup:
    """Accuracy over confidence in bins, the diagonal of a calibrated network, and how many examples are in each bin.

    Args:
        diagram: Examples, mean confidence and accuracy of each bin.
        title: The network.
        subtitle: Its calibration error.
        colour: Number of the bars' colour.
    """
    sheet = Sheet(300, 300)
    axes = sheet.axes(46, 42, 246, 172)
    sheet.figure.text(46 / 300, 1 - 13 / 300, title, size=11.5, weight="bold")
    sheet.figure.text(46 / 300, 1 - 30 / 300, subtitle, color=_MUTED)
    counts = sheet.axes(46, 226, 246, 34)
    for i, (count, confidence, accuracy) in enumerate(diagram):
        if count:
            x, low, high = (i + 0.5) / len(diagram), *sorted((accuracy, confidence))
            style = {"width": 0.88 / len(diagram), "linewidth": 0}
            gap = {"color": _C[colour], "alpha": 0.45} if accuracy > confidence else {"color": _MINUS, "alpha": 0.32}
            axes.bar(x, low, color=_C[colour], **style)
            axes.bar(x, high - low, bottom=low, **gap, **style)
            counts.bar(x, count, color=_DIM, alpha=0.75, **style)
    axes.plot((0, 1), (0, 1), color=_MUTED, linewidth=1, linestyle=(0, (3, 4)))
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=(0, 0.25, 0.5, 0.75, 1), ylabel="accuracy")
    axes.yaxis.set_major_formatter(_TICKS)
    axes.grid(axis="y")
    counts.set(xlim=(0, 1), yticks=[], xticks=(0, 0.5, 1), xlabel="confidence")
    counts.xaxis.set_major_formatter(_TICKS)
    return sheet.svg(f"Reliability of {title}")


def _rows(names: Sequence[str], width: float, title: str) -> tuple[Sheet, Axes]:
    """Axes with a line for each name, the first on top."""
    left = min(max((len(name) for name in names), default=0), 44) * 6.6 + 14
    sheet = Sheet(width, 32 + 26 * len(names) + 24)
    axes = sheet.axes(left, 32, width - left - 100, 26 * len(names), title)
    axes.set_yticks(range(len(names)), [_short(name, 44) for name in names], color=_INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_TICKS)
    axes.grid(axis="x")
    return sheet, axes


@chart
def bars(values: Sequence[tuple[str, float]], *, title: str, mark: float | None = None) -> Markup:
    """Horizontal bars from 0 with their numbers, and a line to compare with."""
    sheet, axes = _rows([name for name, _ in values], 480, title)
    lengths = [float(value) for _, value in values]
    drawn = axes.barh(range(len(values)), lengths, height=0.58, color=_C[0])
    axes.bar_label(drawn, [f"{value:.2f}".replace("-", "−") for value in lengths], padding=6, color=_INK)
    if mark is not None:
        axes.axvline(mark, color=_MUTED, linewidth=1, linestyle=(0, (3, 4)))
    axes.set_xlim(min([0.0, *lengths]), max([0.0, *lengths, mark or 0.0]) or 1.0)
    return sheet.svg(title)


@chart
def dots(values: Sequence[tuple[str, Sequence[float]]], *, title: str) -> Markup:
    """A point for each number of a row, and their mean with its standard deviation; the axis need not begin at 0."""
    sheet, axes = _rows([name for name, _ in values], 760, title)
    for i, (_, found) in enumerate(values):
        mean = math.fsum(found) / len(found)
        spread = (math.fsum((x - mean) ** 2 for x in found) / max(len(found) - 1, 1)) ** 0.5
        if len(found) > 1:
            axes.errorbar(mean, i, xerr=spread, color=_INK, linewidth=1.3, capsize=3)
            sheet.marks(axes, [(x, i) for x in found], map(number, found), s=18, color=to_rgba(_C[0], 0.45), zorder=3)
        sheet.marks(axes, [(mean, i)], [number(mean, 4)], s=48, color=_C[0], zorder=4)
        text = f"{mean:.2f}" + (f" ± {spread:.2f}" if len(found) > 1 else "")
        axes.annotate(text, (1, i), (10, 0), ("axes fraction", "data"), "offset points", va="center")
    axes.margins(x=0.08)
    return sheet.svg(title)


@chart
def points(
    groups: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str,
    limits: Sequence[Sequence[float]] | None = None,
) -> Markup:
    """Points in a plane, in a colour for each group; the axes have no unit and so no numbers.

    Args:
        groups: Pairs (x, y) by the group's name; at most eight groups.
        title: What is drawn.
        limits: Points that the frame holds; by default those of the groups.
    """
    sheet = Sheet(420, 380)
    axes = sheet.axes(1, 46, 418, 332)
    sheet.figure.text(0, 1 - 13 / 380, title, size=11.5, weight="bold")
    held = [(p[0], p[1]) for p in (limits or [p for group in groups.values() for p in group])]
    axes.scatter(*zip(*held, strict=True), alpha=0) if held else None
    for i, (name, group) in enumerate(groups.items()):
        tips = [f"{name} {n}" for n in range(len(group))]
        sheet.marks(axes, [(p[0], p[1]) for p in group], tips, s=28, color=to_rgba(_C[i % 8], 0.75))
        axes.scatter([], [], s=40, color=_C[i % 8], label=name)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=8)
    return sheet.svg(title)


@chart
def attention(maps: Sequence[tuple[str, Any]], tokens: Sequence[str], full: float) -> Markup:
    """Attention matrices `[n, n]` of several layers of one network side by side, the tokens beside the first.

    Args:
        maps: Name and probabilities of each layer.
        tokens: The sentence.
        full: The probability of full colour.
    """
    n = min(len(tokens), *(len(probs) for _, probs in maps))
    side = max(min(196 / max(n, 1), 18), 7.5)
    named = side >= 8.5
    left = max((min(len(str(t)), 13) for t in tokens[:n]), default=0) * 6 + 8 if named else 2
    sheet = Sheet(left + len(maps) * (n * side + 20), n * side + 32)
    for k, (layer, probs) in enumerate(maps):
        axes = sheet.axes(left + k * (n * side + 20), 22, n * side, n * side)
        axes.set_title(layer, size=9.5, color=_MUTED, weight="normal", pad=6)
        alpha = (probs[:n, :n].float() / max(full, 1e-12)).clamp(0, 1)
        axes.imshow([[(*_SHADE, a) for a in row] for row in alpha.tolist()], interpolation="none", aspect="auto")
        axes.spines[:].set_visible(True)
        shown = [str(t) if len(str(t)) < 14 else f"{str(t)[:12]}…" for t in tokens[:n]] if named and not k else []
        axes.set(xticks=[], yticks=range(len(shown)))
        axes.set_yticklabels(shown, color=_INK, size=9)
    return sheet.svg("attention of " + ", ".join(layer for layer, _ in maps))
