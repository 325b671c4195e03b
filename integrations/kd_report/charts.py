"""Charts with matplotlib, as inline SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["bars", "dots", "formed", "heatmap", "lines", "number", "points", "reliability", "style"]

Points = Sequence[Sequence[float]]

# Colours of the style sheet; each is drawn as a colour of its own, whose name is put in its place afterwards.
_NAMES = ("ink", "muted", "line", "soft", "minus", *(f"c{i}" for i in range(8)))
_INK, _MUTED, _LINE, _SOFT, _MINUS, *_C = (f"#fe01{i:02x}" for i in range(len(_NAMES)))
# Pixels have no names: tones on which the ink of either theme can be read.
_PLUS_TONE, _MINUS_TONE, _FULL = to_rgb("#4870d6"), to_rgb("#d6694f"), 0.75
_LEFT_OUT = r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|font-family: [^;]*; "
_FILE: dict[str, Any] = {"format": "svg", "transparent": True, "bbox_inches": "tight", "metadata": {"Date": None}}
_DASHED: dict[str, Any] = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (3, 4))}
_STYLE: dict[str, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "text.parse_math": False},
    **{"svg.fonttype": "none", "axes.axisbelow": True, "grid.color": _LINE},
    **{"axes.edgecolor": _LINE, "axes.labelcolor": _MUTED, "axes.titlesize": 11.5, "axes.titleweight": "bold"},
    **{"axes.titlelocation": "left", "axes.titlepad": 9, "axes.spines.top": False, "axes.spines.right": False},
    **{f"{axis}.{key}": x for axis in ("xtick", "ytick") for key, x in (("color", _MUTED), ("major.size", 0))},
    **{"legend.frameon": False, "legend.labelcolor": _MUTED, "legend.handletextpad": 0.1},
}


def style() -> AbstractContextManager[None]:
    """The style of the page while charts are drawn; matplotlib's settings are as before afterwards."""
    return rc_context(_STYLE)


def number(value: float, digits: int = 3) -> str:
    """A number for people.

    >>> number(0.12345), number(123456.0), number(0.0000123), number(-2.0), number(999.7)
    ('0.123', '123,456', '1.23e-05', '−2', '1,000')
    """
    text = f"{value:.{digits}g}".replace("nan", "NaN")
    # Rounding decides, as of 999.7, how many digits stand before the point.
    if math.isfinite(value) and abs(float(text)) >= 10**digits:
        text = f"{value:,.0f}"
    return re.sub("^-", "−", text)


def formed(value: float, form: str) -> str:
    """A number in a form, with a real minus; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:{form}}".replace("-", "−")


def _axes(width: float, height: float, title: object, **given: Any) -> Axes:
    """Axes of a size in pixels; what stands around them makes the drawing larger."""
    axes = Figure((width / 72, height / 72)).add_axes((0, 0, 1, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda x, _: number(x, 4)))
    axes.set(title=str(title), **given)
    return axes


def _svg(axes: Axes, label: object) -> Markup:
    """The drawing for a page; ids are made of its label and of what they stand for."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": str(label)}), warnings.catch_warnings():
        # The browser has glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        axes.figure.savefig(file, **_FILE)  # type: ignore[union-attr]
    text = re.sub(_LEFT_OUT, "", file.getvalue(), flags=re.DOTALL).replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text).replace("<g/>", "")
    text = re.sub(r"#fe01([0-9a-f]{2})", lambda m: f"var(--{_NAMES[int(m[1], 16)]})", text)
    opening, _, rest = text.partition(">")
    sizes = " ".join(re.findall(r'(?:width|height|viewBox)="[^"]*"', opening)).replace("pt", "")
    return Markup(f'<svg class="chart" {sizes} role="img" aria-label="{escape(str(label))}">{rest.strip()}')


def lines(
    series: Mapping[str, Sequence[Points]],
    colours: Sequence[str],
    *,
    title: str,
    x_label: str = "step",
    stages: Sequence[tuple[str, float, float]] = (),
) -> Markup:
    """Curves by name, whose place in `colours` is their colour; each stage is a band from its start to its end."""
    axes = _axes(270, 142, title, xlabel=x_label)
    for name, curves in series.items():
        for xy in curves:
            x, y = zip(*xy, strict=True)
            axes.plot(x, y, "o-" if len(x) <= 40 else "-", color=_C[colours.index(name) % 8], markersize=4)
    low, high = axes.dataLim.intervaly
    # A quantity that is never negative is read from 0 when it comes near it.
    if 0 <= low < 0.4 * high:
        axes.set_ylim(bottom=0)
    elif 0 <= high - low < 0.01 * abs(high):
        # Of a constant the ticks would be closer than their labels tell.
        axes.set_ylim(low - 0.05 * abs(low), high + 0.05 * abs(high))
    for i, (name, start, end) in enumerate(stages):
        axes.axvspan(start, end, color=_SOFT, alpha=1 - i % 2, linewidth=0, zorder=0)
        axes.text(start, 1.03, name, size=9, color=_MUTED, transform=axes.get_xaxis_transform())
        axes.set_title(title, pad=22)
    axes.grid(axis="y")
    return _svg(axes, title)


def heatmap(
    values: Any,
    rows: Sequence[object] = (),
    columns: Sequence[object] = (),
    *,
    title: str,
    row_label: str = "",
    column_label: str = "",
    signed: bool = False,
    digits: int = 2,
    scale: float | None = None,
    space: float = 400,
) -> Markup:
    """A matrix as cells, `space` pixels wide together, large ones with numbers; the labels say what both sides are.

    With `signed` there are two colours, for values below and above 0; `scale`, by default the largest value that there
    is, has the full colour.
    """
    grid = np.asarray(values, dtype=float)
    n, m = grid.shape
    side, strength = min(space / m, 40), np.nan_to_num(np.abs(grid))
    axes = _axes(m * side, n * side, title, ylabel=row_label, xlabel=column_label)
    alpha = _FULL * (strength / (scale or strength.max() or 1)).clip(0, 1)
    tones = np.where((signed & (grid < 0))[..., None], _MINUS_TONE, _PLUS_TONE)
    axes.imshow(np.concatenate([tones, alpha[..., None]], 2), interpolation="none", aspect="auto")
    for (i, j), value in np.ndenumerate(grid) if side >= 28 and columns else ():
        text = formed(value, f"{'+' if signed else ''}.{digits}f")
        axes.text(j, i, text, size=9, ha="center", va="center_baseline", in_layout=False)
    axes.spines[:].set_visible(True)
    upright = max((len(str(name)) for name in columns), default=0) * 6.4 < side
    slant: dict[str, Any] = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    for ticks, names, turned in ((axes.set_yticks, rows, {}), (axes.set_xticks, columns, slant)):
        short = [text if len(text) <= 16 else "…" + text[-15:] for text in map(str, names)] if side >= 8 else []
        ticks(range(len(short)), short, color=_INK, size=9, **turned)
    return _svg(axes, title)


def reliability(diagram: Sequence[Sequence[float]], *, title: str, colour: int) -> Markup:
    """Accuracy over confidence, and how many examples are in each bin `(examples, mean confidence, accuracy)`."""
    axes = _axes(230, 160, title, xlim=(0, 1), ylim=(0, 1), xticks=(), ylabel="accuracy")
    below = axes.inset_axes((0, -0.28, 1, 0.22), xlim=(0, 1), yticks=(), xlabel="confidence")
    counts, confidence, accuracy = np.asarray(diagram).T
    x, width = (np.arange(len(counts)) + 0.5) / len(counts), 0.88 / len(counts)
    low, high = np.minimum(confidence, accuracy), np.maximum(confidence, accuracy)
    gaps = [to_rgba(_C[colour], 0.45) if more else to_rgba(_MINUS, 0.32) for more in accuracy > confidence]
    axes.bar(x, low, width, color=_C[colour])
    axes.bar(x, high - low, width, low, color=gaps)
    below.bar(x, counts, width, color=to_rgba(_MUTED, 0.6))
    axes.plot((0, 1), (0, 1), **_DASHED)
    axes.grid(axis="y")
    return _svg(axes, f"Reliability of {title}")


def _rows(names: Sequence[str], width: float, title: str) -> Axes:
    """Axes with a line for each name, the first on top."""
    axes = _axes(width, 26 * len(names), title, ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names, color=_INK)
    axes.grid(axis="x")
    return axes


def bars(values: Sequence[tuple[str, float]], *, title: str, mark: float | None = None) -> Markup:
    """Horizontal bars from 0 with their numbers, and a line to compare with."""
    axes = _rows([str(name) for name, _ in values], 260, title)
    lengths = np.array([value for _, value in values], float)
    drawn = axes.barh(range(len(lengths)), lengths, height=0.58, color=_C[0])
    axes.bar_label(drawn, [formed(value, ".2f") for value in lengths], padding=6)
    if mark is not None:
        axes.axvline(mark, **_DASHED)
    return _svg(axes, title)


def dots(values: Mapping[str, Sequence[float]], *, title: str) -> Markup:
    """A point for each number of a row, and their mean with its standard deviation; the axis need not begin at 0."""
    axes = _rows(list(values), 480, title)
    for i, found in enumerate(values.values()):
        axes.plot(found, [i] * len(found), "o", markersize=4, color=to_rgba(_C[0], 0.5), clip_on=False)
        spread = statistics.stdev(found) if len(found) > 1 else 0
        axes.errorbar(statistics.fmean(found), i, xerr=spread, color=_C[0], marker="o", capsize=3)
    return _svg(axes, title)


def points(groups: Mapping[str, Points], *, title: str, limits: Points = ()) -> Markup:
    """Points (x, y) in a plane, in a colour for each of at most eight groups, in a frame that holds `limits` too.

    The axes have no unit and so no numbers.
    """
    axes = _axes(380, 300, "", xticks=(), yticks=())
    axes.scatter(*np.array(limits, float).reshape(-1, 2).T, alpha=0)
    for i, (name, group) in enumerate(groups.items()):
        xy = np.array(group, float).reshape(-1, 2)
        axes.scatter(xy[:, 0], xy[:, 1], s=28, linewidths=0, color=to_rgba(_C[i % 8], 0.75), label=name)
    axes.spines[:].set_visible(True)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=8, title=title, alignment="left")
    return _svg(axes, title)
