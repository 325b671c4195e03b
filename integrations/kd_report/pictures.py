"""Feature maps and attention of student and teacher, side by side for the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from kd_report import charts
from kd_report.document import caption, figure_row
from kd_report.images import heat, rgb, shade
from kd_report.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention", "channels", "features"]

_SENTENCES = 3
_CHANNEL_EXAMPLES = 2


def features(run: Run) -> str:
    """The section with the feature maps of a vision run; empty for others."""
    lines = {}
    for name, phase, who in _shown(run):
        layers = run.part(phase, who, "maps") or []
        maps = [(layer, run.array(phase, f"{who}/map/{i}")) for i, layer in enumerate(layers)]
        lines[name] = [(layer, x) for layer, x in maps if x is not None]
    lines = {name: maps for name, maps in lines.items() if maps}
    if not lines:
        return ""
    words = (
        "Where each network responds: root mean square over the channels, at the last layer of each resolution or, with"
        " one resolution, over the depth. Each map is scaled to its own range."
    )
    return caption(words) + _examples(run, lines)


def channels(run: Run) -> str:
    """The section with the channels of student and teacher as points of a plane; empty without maps of one size."""
    phases = [phase for phase in ("before", "after") if run.array(phase, "student/channels") is not None]
    drawn = []
    for i in range(_CHANNEL_EXAMPLES):
        planes = {}
        for phase in phases:
            networks = {who: run.array(phase, f"{who}/channels") for who in ("teacher", "student")}
            planes[phase] = {who: x[i].tolist() for who, x in networks.items() if x is not None and i < len(x)}
        # Both phases are drawn on one scale: what moves is the student.
        everything = [point for groups in planes.values() for group in groups.values() for point in group]
        drawn += [
            charts.points(groups, title=f"{_label(run, i)}, {phase} training", limits=everything)
            for phase, groups in planes.items()
            if groups
        ]
    if not drawn:
        return ""
    places = [run.part(phase, "channels") for phase in phases]
    distances = ", ".join(f"{charts.number(x['mmd'])} {phase}" for phase, x in zip(phases, places, strict=True))
    last = places[-1]
    words = (
        "One point is one channel: its map of one example, scaled to length 1, in the plane of the two main directions"
        f" of the teacher's channels (principal components). Layers: {escape(last['student'])} of the student,"
        f" {escape(last['teacher'])} of the teacher. Squared MMD of all channels (polynomial kernel), mean of"
        f" {last['examples']} examples: {distances} the training."
    )
    return caption(words) + figure_row(drawn, "wide")


def attention(run: Run) -> str:
    """The section with the attention maps of a run on text or of vision transformers; empty for others."""
    lines = {}
    for name, phase, who in _shown(run):
        maps = run.array(phase, f"{who}/attention")
        if maps is not None:
            lines[name] = list(zip(run.part(phase, who, "attention"), maps, strict=True))
    if not lines:
        return ""
    if run.array("after", "images") is not None:
        words = (
            "Which patches are attended to, mean over the heads: by the class token where there is one, else by all"
            " patches together. Each map is scaled to its own range."
        )
        return caption(words) + _examples(run, lines)
    words = (
        "Who attends to whom, mean over the heads: each row is a token, and its columns say how much it takes from"
        " every other, in the order of the sentence. All maps of a sentence share one scale."
    )
    return caption(words) + _sentences(run, lines)


def _shown(run: Run) -> list[tuple[str, str, str]]:
    """Line name, phase and network, from top to bottom."""
    other = [(run.other, "after", run.other)] if run.other != "student" else []
    return [*other, ("student", "after", "student"), ("student before", "before", "student")]


def _examples(run: Run, lines: dict[str, list[tuple[str, Tensor]]]) -> str:
    """Images with a line of maps for each network."""
    images = run.array("after", "images")
    count = min(len(maps[0][1]) for maps in lines.values())
    html = []
    for i in range(count):
        figure = ""
        if images is not None and i < len(images):
            figure = f'<img src="{rgb(images[i])}" alt="example {i + 1}">'
        thumbs = "".join(
            f"<span>{escape(name)}</span>"
            + "".join(
                f'<figure><img src="{heat(maps[k][1][i])}" alt="{escape(f"{name}, {maps[k][0]}, example {i + 1}")}"'
                f' title="{escape(maps[k][0])}, {maps[k][1].shape[1]} × {maps[k][1].shape[2]}">'
                f"<figcaption>{escape(_tail(maps[k][0]))}</figcaption></figure>"
                if k < len(maps)
                else "<i></i>"
                for k in range(4)
            )
            for name, maps in lines.items()
        )
        html.append(
            f'<div class="example"><figure>{figure}<figcaption>{_label(run, i)}</figcaption></figure>'
            f'<div class="thumbs">{thumbs}</div></div>'
        )
    return f'<div class="examples">{"".join(html)}</div>'


def _tail(layer: str, longest: int = 12) -> str:
    return layer if len(layer) <= longest else "…" + layer[-(longest - 1) :]


def _label(run: Run, i: int) -> str:
    labels = run.part("after", "labels") or run.part("before", "labels")
    if not labels or i >= len(labels):
        return f"example {i + 1}"
    names = run.info.get("classes") or []
    name = names[labels[i]] if 0 <= labels[i] < len(names) else labels[i]
    return f"label: {escape(str(name))}"


def _sentences(run: Run, lines: dict[str, list[tuple[str, Tensor]]]) -> str:
    sentences = run.part("after", "tokens") or run.part("before", "tokens") or []
    html = []
    for i, tokens in enumerate(sentences[:_SENTENCES]):
        full = _scale([x[i, : len(tokens), : len(tokens)] for maps in lines.values() for _, x in maps])
        rows = "".join(
            f'<span>{escape(name)}</span><div class="maps">'
            + "".join(_matrix(maps[k][1][i], maps[k][0], tokens, full, first=k == 0) for k in range(len(maps)))
            + "</div>"
            for name, maps in lines.items()
        )
        html.append(f'<div><h3>{_label(run, i)}</h3><div class="sentence">{rows}</div></div>')
    return f'<div class="sentences">{"".join(html)}</div>'


def _scale(maps: Sequence[Tensor]) -> float:
    """The probability that is drawn in full colour: few are larger."""
    values = sorted(v for x in maps for v in x.flatten().tolist())
    return values[round(0.98 * (len(values) - 1))] if values else 1.0


def _matrix(probs: Tensor, layer: str, tokens: list[str], full: float, first: bool) -> str:
    """One attention matrix; the first of a line has the tokens beside it."""
    n = min(len(tokens), len(probs))
    side = max(min(196 / max(n, 1), 18), 7.5)
    named = side >= 8.5
    left = (max((min(len(t), 13) for t in tokens[:n]), default=0) * 5.9 + 8 if named else 16) if first else 2
    size = n * side
    top, below = 22, 8
    body = [f'<text x="{left:.1f}" y="13" class="small muted">{escape(layer)}</text>']
    body.append(
        f'<image x="{left:.1f}" y="{top}" width="{size:.1f}" height="{size:.1f}" preserveAspectRatio="none"'
        f' href="{shade(probs[:n, :n], full)}"/>'
    )
    body.append(f'<rect class="frame" x="{left:.1f}" y="{top}" width="{size:.1f}" height="{size:.1f}"/>')
    if first and named:
        body += [
            f'<text x="{left - 5:.1f}" y="{top + (k + 0.5) * side + 3.4:.1f}" class="token" text-anchor="end">'
            f"<title>{escape(token)}</title>{escape(token if len(token) < 14 else token[:12] + '…')}</text>"
            for k, token in enumerate(tokens[:n])
        ]
    return charts.svg(left + size + 2, top + size + below, body, f"attention of {layer}")
