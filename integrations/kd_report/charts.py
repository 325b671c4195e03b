"""Charts with matplotlib, as inline SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["Series", "attention", "bars", "dots", "heatmap", "lines", "number", "own_ids", "points", "reliability"]

# Colours of the style sheet; each is drawn as a colour of its own, whose name is put in its place afterwards.
_NAMES = ("ink", "muted", "line", "soft", "accent", "on-accent", "minus", "dim", *(f"c{i}" for i in range(8)))
_INK, _MUTED, _LINE, _SOFT, _ACCENT, _ON_ACCENT, _MINUS, _DIM, *_C = (f"#fe01{i:02x}" for i in range(len(_NAMES)))
_SHADE = (72 / 255, 112 / 255, 214 / 255)  # The accent in a tone between its two themes.
_LEFT_OUT = (
    r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|font-family: [^;]*; | transform=\"rotate\(-0 [^)]*\)\""
)

_STYLE: dict[str, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "text.parse_math": False}
_STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "kd", "grid.color": _LINE, "grid.linewidth": 1}
_STYLE |= {"axes.edgecolor": _LINE, "axes.labelcolor": _MUTED, "axes.labelsize": 9.5, "axes.axisbelow": True}
_STYLE |= {"axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9}
_STYLE |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
for _axis in ("xtick", "ytick"):
    _STYLE |= {f"{_axis}.color": _MUTED, f"{_axis}.labelsize": 9.5, f"{_axis}.major.size": 0, f"{_axis}.major.pad": 6}
_STYLE |= {"legend.frameon": False, "legend.fontsize": 9.5, "legend.labelcolor": _MUTED, "legend.borderaxespad": 0}
_STYLE |= {"legend.handlelength": 1.1, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2}
_DASHED: dict[str, Any] = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (3, 4))}


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
    size = abs(value)
    if size >= 10 ** (digits + 1):
        return f"{value:,.0f}"
    if 0 < size < 10**-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    text = f"{value:.{max(digits - 1 - math.floor(math.log10(size)), 0) if size else 0}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _short(name: object, longest: int = 16) -> str:
    text = str(name)
    return text if len(text) <= longest else "…" + text[-(longest - 1) :]


def _longest(names: Iterable[object], most: int) -> int:
    return min(max((len(str(name)) for name in names), default=0), most)


class Sheet:
    """A drawing of a size in pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width / 72, height / 72))
        self.tips: dict[str, list[str]] = {}

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place in pixels, counted from the upper left corner."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, left: float, top: float, words: str, **style: Any) -> None:
        """Words at a place in pixels; in bold type a title."""
        self.figure.text(left / self.width, 1 - top / self.height, words, **style)

    def title(self, left: float, words: str) -> None:
        self.text(left, 13, words, size=11.5, weight="bold")

    def marks(self, axes: Axes, xy: Sequence[tuple[float, float]], tips: Iterable[str], **style: Any) -> None:
        """Marks that tell what they are under the pointer."""
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
            # Many marks are uses of one path, few are paths of their own.
            tag = "use" if "<use " in body else "path"
            marks = re.split(rf"(<{tag} [^>]*)/>", body)
            marks[1::2] = [f"{m}><title>{escape(t)}</title></{tag}>" for m, t in zip(marks[1::2], tips, strict=True)]
            text = head + mark + "".join(marks) + end + tail
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
        text = re.sub(r"#fe01([0-9a-f]{2})", lambda m: f"var(--{_NAMES[int(m[1], 16)]})", text)
        text = re.sub(r"(\s*(<g/>)?\n)+\s*", "\n", text.replace("xlink:href=", "href="))
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        opening = f'<svg class="chart" {size} role="img" aria-label="{escape(label)}">'
        return Markup(opening + text.partition(">")[2].strip())


def own_ids(page: str) -> str:
    """Gives every chart of a page ids of its own."""
    parts = re.split(r"(<svg.*?</svg>)", page, flags=re.DOTALL)
    for i in range(1, len(parts), 2):
        parts[i] = re.sub(r'( id="| href="#|url\(#)', rf"\g<1>s{i}-", parts[i])
    return "".join(parts)


def chart(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """Draws with the style of the page; matplotlib's settings are as before afterwards."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Markup:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


_TICKS = FuncFormatter(lambda value, _: _minus(number(value, 4)))


@chart
def lines(
    series: Sequence[Series],
    *,
    title: str,
    stages: Sequence[tuple[str, float, float]] = (),
    x_label: str = "step",
    legend: bool = True,
) -> Markup:
    """Curves over the training, with a band for each stage: its name, its start and its end."""
    sheet = Sheet(336, 214)
    axes = sheet.axes(46, 36, 280, 142)
    sheet.title(0, title)
    for name, points, colour in series:
        axes.plot(*zip(*points, strict=True), color=_C[colour % 8], linewidth=1.8, label=name)
        if len(points) <= 40:
            tips = [f"{name} at {x_label} {number(x, 4)}: {number(y, 4)}" for x, y in points]
            sheet.marks(axes, points, tips, s=20, color=_C[colour % 8], zorder=3)
    for i, (name, start, end) in enumerate(stages):
        axes.axvspan(start, end, color=_SOFT, alpha=1 - i % 2, linewidth=0, zorder=0)
        axes.text(start, 1.03, name, size=9, color=_MUTED, transform=axes.get_xaxis_transform())
    xs, ys = ([point[k] for s in series for point in s.points] for k in (0, 1))
    xs += [x for _, *ends in stages for x in ends]
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    flat = high - low < 1e-6 * abs(high)
    pad = 0.25 * abs(high) if flat else 0.06 * (high - low)
    # A quantity that is never negative is read from 0 when it comes near it.
    axes.set_ylim(0 if low >= 0 and (flat or low < 0.4 * high) else low - pad, high + (pad or 1))
    left = 0 if 0 < left < 0.25 * right or 0 < left == right else left
    axes.set_xlim(left, right if right > left else left + 1)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_TICKS)
    axes.yaxis.set_major_formatter(_TICKS)
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    if legend and len(series) > 1:
        axes.legend(loc="upper right", bbox_to_anchor=(1, 1 + 33 / 142), ncols=len(series))
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
    numbers, named = side >= 26, side >= 11
    upright = _longest(columns, 16) * 6.4 < side
    left = 26 + (_longest(rows, 16) * 6.4 if named else 0)
    below = 24 + (0 if not named else 12 if upright else _longest(columns, 16) * 4.6)
    sheet = Sheet(max(left + m * side, left + 8 * len(title)) + 8, 28 + n * side + below)
    axes = sheet.axes(left, 28, m * side, n * side)
    axes.set_title(title)
    cells = [(i, j, value, min(abs(value) / full, 1.0)) for i, row in enumerate(values) for j, value in enumerate(row)]
    form = f"{'+' if signed else ''}.{digits}f"
    seen = [cell for cell in cells if cell[3]]
    tips = [f"{rows[i]} / {columns[j]}: {_minus(format(value, form))}" for i, j, value, _ in seen]
    paints = [to_rgba(_MINUS if signed and value < 0 else _ACCENT, strength) for _, _, value, strength in seen]
    sheet.marks(axes, [(j, i) for i, j, *_ in seen], tips, marker="s", s=(side - 1) ** 2, color=paints)
    for i, j, value, strength in cells if numbers else ():
        words = _minus(format(value, form)) if not signed or float(format(value, form)) else "·"
        words = words if signed or not digits else words.removeprefix("0")
        colour = _ON_ACCENT if strength > 0.55 else _INK
        axes.text(j, i, words, size=9, ha="center", va="center_baseline", color=colour)
    axes.set(xlim=(-0.5, m - 0.5), ylim=(n - 0.5, -0.5))
    axes.spines[:].set_visible(True)
    slant: dict[str, Any] = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(m if named else 0), [_short(name) for name in columns[: m if named else 0]], **slant)
    axes.set_yticks(range(n if named else 0), [_short(name) for name in rows[: n if named else 0]])
    axes.tick_params(labelcolor=_INK, pad=5)
    sheet.text(left + m * side / 2, sheet.height - 4, column_label, color=_MUTED, ha="center")
    sheet.text(10, 28 + n * side / 2, row_label, color=_MUTED, rotation=90, ha="center", va="center")
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
    axes, counts = sheet.axes(46, 42, 246, 172), sheet.axes(46, 226, 246, 34)
    sheet.title(46, _short(title, 32))
    sheet.text(46, 30, subtitle, color=_MUTED)
    width = 0.88 / len(diagram)
    for i, (count, confidence, accuracy) in enumerate(diagram):
        if count:
            x, low, high = (i + 0.5) / len(diagram), *sorted((accuracy, confidence))
            gap = to_rgba(_C[colour], 0.45) if accuracy > confidence else to_rgba(_MINUS, 0.32)
            axes.bar(x, low, width, color=_C[colour])
            axes.bar(x, high - low, width, low, color=gap)
            counts.bar(x, count, width, color=to_rgba(_DIM, 0.75))
    axes.plot((0, 1), (0, 1), **_DASHED)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=(0, 0.25, 0.5, 0.75, 1), ylabel="accuracy")
    axes.yaxis.set_major_formatter(_TICKS)
    axes.grid(axis="y")
    counts.set(xlim=(0, 1), yticks=[], xticks=(0, 0.5, 1), xlabel="confidence")
    counts.xaxis.set_major_formatter(_TICKS)
    return sheet.svg(f"Reliability of {title}")


def _rows(names: Sequence[str], width: float, title: str) -> tuple[Sheet, Axes]:
    """Axes with a line for each name, the first on top."""
    left = _longest(names, 44) * 6.6 + 14
    sheet = Sheet(width, 32 + 26 * len(names) + 24)
    axes = sheet.axes(left, 32, width - left - 100, 26 * len(names))
    axes.set_title(title)
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
    axes.bar_label(drawn, [_minus(f"{value:.2f}") for value in lengths], padding=6)
    if mark is not None:
        axes.axvline(mark, **_DASHED)
    held = [0.0, *lengths, mark or 0.0]
    axes.set_xlim(min(held), max(held) if any(held) else 1)
    return sheet.svg(title)


@chart
def dots(values: Sequence[tuple[str, Sequence[float]]], *, title: str) -> Markup:
    """A point for each number of a row, and their mean with its standard deviation; the axis need not begin at 0."""
    sheet, axes = _rows([name for name, _ in values], 760, title)
    for i, (_, found) in enumerate(values):
        mean = math.fsum(found) / len(found)
        spread = (math.fsum((x - mean) ** 2 for x in found) / max(len(found) - 1, 1)) ** 0.5
        text = _minus(f"{mean:.2f}" if abs(mean) > 1.5 else f"{mean:.4f}")
        if len(found) > 1:
            text += f" ± {spread:.2f}" if abs(mean) > 1.5 else f" ± {spread:.4f}"
            axes.errorbar(mean, i, xerr=spread, color=_INK, linewidth=1.3, capsize=3)
            sheet.marks(axes, [(x, i) for x in found], map(number, found), s=18, color=to_rgba(_C[0], 0.5), zorder=3)
        sheet.marks(axes, [(mean, i)], [number(mean, 4)], s=48, color=_C[0], zorder=4)
        axes.annotate(text, (1, i), (10, 0), ("axes fraction", "data"), "offset points", va="center")
    axes.margins(x=0.08)
    return sheet.svg(title)


@chart
def points(
    groups: Mapping[str, Sequence[Sequence[float]]], *, title: str, limits: Sequence[Sequence[float]] | None = None
) -> Markup:
    """Points (x, y) in a plane, in a colour for each of at most eight groups, in a frame that holds `limits` too.

    The axes have no unit and so no numbers.
    """
    sheet = Sheet(420, 380)
    axes = sheet.axes(1, 46, 418, 332)
    sheet.title(0, title)
    held = limits if limits is not None else [p for group in groups.values() for p in group]
    axes.scatter([p[0] for p in held], [p[1] for p in held], alpha=0)
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
    """Attention `[n, n]` of one network's layers side by side, the tokens beside the first; `full` has full colour."""
    n = min(len(tokens), *(len(probs) for _, probs in maps))
    side = max(min(196 / max(n, 1), 18), 7.5)
    names = [str(t) if len(str(t)) < 14 else f"{str(t)[:12]}…" for t in tokens[: n if side >= 8.5 else 0]]
    left, step = _longest(names, 13) * 6 + 8, n * side + 20
    sheet = Sheet(left + len(maps) * step, n * side + 32)
    for k, (layer, probs) in enumerate(maps):
        axes = sheet.axes(left + k * step, 22, n * side, n * side)
        axes.set_title(layer, size=9.5, color=_MUTED, weight="normal", pad=6)
        shades = (probs[:n, :n].float() / max(full, 1e-12)).clamp(0, 1).tolist()
        axes.imshow([[(*_SHADE, a) for a in row] for row in shades], interpolation="none", aspect="auto")
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[])
        if not k:
            axes.set_yticks(range(len(names)), names, color=_INK, size=9)
    return sheet.svg("attention of " + ", ".join(layer for layer, _ in maps))
