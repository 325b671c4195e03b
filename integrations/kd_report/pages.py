"""The page of a run, or of several that it compares: its sections, each made of tables, charts and images."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from os.path import commonprefix
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from matplotlib import colormaps
from torch import Tensor

from kd_plugins.picture import Bars, Heatmap, Points, png
from kd_report import charts
from kd_report.charts import formed, number
from kd_report.measures import difference
from kd_report.runs import Run

__all__ = ["page"]

Parts = list[tuple[str, Any]]
"""What a section shows: macros of the template, by name, and what each is given; empty contents are left out."""

_SENTENCES, _CHANNEL_EXAMPLES, _CHANGES = 3, 2, 8
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
# What is told of a network's predictions, by column: its key, and the format, the factor and the unit.
_MEASURES: dict[str, tuple[Any, ...]] = {
    "accuracy": ("accuracy", ".2f", 100, " %"),
    "agreement": ("agreement", ".1f", 100, " %"),
    "with peers": ("peers", ".1f", 100, " %"),
    "KL": ("kl", ".3f"),
    "ECE": ("ece", ".1f", 100, " %"),
    "NLL": ("nll", ".3f"),
    "confidence": ("confidence", ".1f", 100, " %"),
}
# The chart of each kind of picture that a method gives, and the fields of the picture that it draws.
_CHARTS = {
    made.kind: (draw, {field.name for field in dataclasses.fields(made)} - {"caption"})
    for made, draw in ((Bars, charts.bars), (Heatmap, charts.heatmap), (Points, charts.points))
}
# What counts as an example where it is not an input.
_UNITS = {"multilabel": "label", "token": "token", "causal-lm": "token", "ctc": "frame", "segmentation": "pixel"}
# What differs between the seeds of one experiment, or says nothing about it.
_INCIDENTAL = re.compile(
    "(data_)?seed|experiment|run_name|config|cache_dir|disable_tqdm|checkpoint_hist|(dataloader_num_)?workers"
    "|(output|resume|log|logging|save|report)(_.*)?"
)
# What a training alone cannot share with a distillation.
_OF_METHOD = re.compile("distill|teacher|peer|epoch_updates$|lr$|learning_rate$")
_FEW = 32  # Below, the similarity of layers is mostly noise.


class Subject:
    """The runs of a page.

    Attributes:
        all: The runs as they were given.
        one: The only run; None where several are compared.
        axis: What curves run over: steps where every row has them.
        groups: Runs by experiment, those that differ in their seed alone together: first what was trained alone, last
            those whose student is a teacher of others.
        networks: What is told of: a name, the runs that show it, and its key there.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.all, self.one = list(runs), runs[0] if len(runs) == 1 else None
        self.axis = "step" if all("step" in row for run in runs for row in run.history) else "epoch"
        found = {"student": self.all} if self.one else _experiments(runs)
        teachers: dict[Any, Run] = {}
        for run in runs:
            if run.info["teachers"]:
                teachers.setdefault(_measured(run, "teacher"), run)
        taught = {_student(run) for run in runs if run.method != "alone"}
        above = {}
        for name, group in found.items():
            own = {_measured(run, "student") for run in group} & teachers.keys()
            if own and group[0].method == "alone" and _student(group[0]) not in taught:
                above[name] = own
        order = sorted(found, key=lambda name: (name in above, found[name][0].method != "alone"))
        self.groups = {f"{n} (teacher)" if n in above and n != "teacher" else n: found[n] for n in order}
        others = [run for who, run in teachers.items() if not any(who in own for own in above.values())]
        peers = enumerate(self.one.info["peers"] if self.one else (), 1)
        self.networks = [(name, group, "student") for name, group in self.groups.items()]
        self.networks += [(f"teacher: {run.teacher}", [run], "teacher") for run in others]
        self.networks += [(f"peer{i}: {peer['name']}", self.all, f"peer{i}") for i, peer in peers]

    def baseline(self, name: str) -> tuple[str | None, list[str]]:
        """The first experiment that trained the same student alone, on the same data, with the same settings.

        Returns:
            Its name, None for itself and where there is none; there the settings in which the first differs that has
            the same student and data.
        """
        run, differ = self.groups[name][0], list[str]()
        for other, (alone, *_) in self.groups.items() if run.method != "alone" else ():
            if alone.method != "alone" or _job(run) != _job(alone):
                continue
            ours, theirs = ({k: v for k, v in _settings(r).items() if not _OF_METHOD.search(k)} for r in (run, alone))
            different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if not different:
                return other, []
            differ = differ or different
        return None, differ


def page(runs: Sequence[Run]) -> str:
    """The page of a run, or the comparison of several, as HTML."""
    about, run = Subject(runs), runs[0]
    if about.one:
        title = f"{run.method}: {run.student}" + (f" from {run.teacher}" if run.teacher else "")
        started = str(run.info.get("started") or "")[:16].replace("T", " ")
        lead = [*(run.info.get(key) for key in ("host", "data", "device")), started and f"{started} UTC"]
        lead += [f"({run.status})" if run.status != "finished" else None]
    else:
        title, data = "Comparison of runs", [run.info.get("data") for run in runs]
        lead = [f"{len(runs)} runs", f"{len(about.groups)} experiments", *dict.fromkeys(data)]
    with charts.style():
        found = {find.__name__.strip("_"): find(about) for find in _OF_RUNS}
        found |= {find.__name__.strip("_"): find(run) for find in _OF_ONE_RUN if about.one}
    sections = {key: kept for key, parts in found.items() if (kept := [part for part in parts if part[1]])}
    given = {"about": about, "run": run, "last": ("", *run.phases)[-1], "number": number}
    given["several"] = max((len(run.info["teachers"]) for run in runs), default=0) > 1
    environment = Environment(
        loader=PackageLoader("kd_report", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(title=title, lead=lead, sections=sections, **given)


def _student(run: Run) -> tuple[str, Any]:
    return run.student, run.part("student", "parameters")


def _job(run: Run) -> list[Any]:
    """Which network was trained for what."""
    return [_student(run), *(run.info.get(key) for key in ("data", "task", "metric", "classes"))]


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.info["settings"].items() if not _INCIDENTAL.fullmatch(k)}


def _measured(run: Run, who: str) -> tuple[Any, ...]:
    """Which network a run's student or teacher is: of one name there may be several, which answer differently."""
    accuracy, examples = (run.part("after", "predictions", who, key) for key in ("accuracy", "examples"))
    name, parameters = _student(run)
    if who == "teacher":
        name, parameters = run.teacher, sum(n.get("parameters") or 0 for n in run.info["teachers"])
    return name, parameters, examples, None if accuracy is None else round(accuracy, 5)


def _experiments(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one experiment by a name: the beginning that their folders share, or else the method."""
    kept: dict[str, list[Run]] = {}
    for run in runs:
        # Without settings nothing says that two runs are the same experiment.
        apart = run.info["settings"].keys() <= {"seed", "output_dir", "run_name", "logging_dir"} and run.name
        others = [[n["name"], n.get("parameters")] for key in ("teachers", "peers") for n in run.info[key]]
        key = [run.method, run.part("method", "options"), _job(run), others]
        kept.setdefault(json.dumps([*key, _settings(run) or apart], sort_keys=True), []).append(run)
    found: dict[str, list[Run]] = {}
    for group in chain.from_iterable(map(_seeds_apart, kept.values())):
        names, folder = [run.name for run in group], group[0].folder
        shared = names[0] if len(names) == 1 else _stem(commonprefix(names))
        ways = [shared if re.search("[A-Za-z]", shared) else "", group[0].method, str(folder), str(folder.resolve())]
        found[next(name for name in ways if name and name not in found)] = group
    return found


def _stem(name: str) -> str:
    return re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", name)


def _seeds_apart(group: list[Run]) -> list[list[Run]]:
    """Runs of which each has a seed of its own; where two share one, something that no record tells differs too."""
    for key in (lambda run: "", lambda run: _stem(run.name)):
        parts: dict[str, list[Run]] = {}
        for run in group:
            parts.setdefault(key(run), []).append(run)
        seeds = [[s for run in part if (s := run.part("settings", "seed")) is not None] for part in parts.values()]
        if all(len(set(own)) == len(own) for own in seeds):
            return list(parts.values())
    return [[run] for run in group]


# Words and numbers


def _value(given: Any) -> str:
    if isinstance(given, (bool, Mapping, list)) or given is None:
        return json.dumps(given, ensure_ascii=False)
    return number(given, 4) if isinstance(given, float) else f"{given:,}" if isinstance(given, int) else str(given)


def _mean(values: Iterable[float | None], form: str = ".0f", factor: float = 1, unit: str = "") -> str:
    known = [factor * x for x in values if x is not None]
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    # "NaN", as charts.number has it.
    return f"{statistics.fmean(known):{form}}{spread}{unit}".replace("nan", "NaN") if known else "–"


def _paired(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """The mean difference of the results of runs of one seed."""
    found = [{r.part("settings", "seed"): m for r in group if (m := r.result)} for group in (runs, others)]
    metrics = {metric for known in found for metric, _ in known.values()}
    if len(metrics) != 1 or len(found[0]) < len(runs) or len(found[1]) < len(others):
        return "–"  # Results of different metrics, or runs without a seed of their own, make no pairs.
    ours, theirs = ({seed: value for seed, (_, value) in known.items()} for known in found)
    return difference(ours, theirs, "+.2f" if max(map(abs, ours.values())) > 1.5 else "+.4f")


def _label(run: Run, i: int) -> str:
    labels, names = run.part("after", "labels") or run.part("before", "labels") or [], run.info["classes"]
    if i >= len(labels):
        return f"example {i + 1}"
    return f"label: {names[labels[i]] if 0 <= labels[i] < len(names) else labels[i]}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, found in values.items():
        if isinstance(found, list) and found and all(isinstance(item, Mapping) for item in found):
            found = {str(i): item for i, item in enumerate(found, 1)}
        flat |= _flat(found, f"{prefix}{key} ") if isinstance(found, Mapping) else {prefix + key: _value(found)}
    return flat


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, Any]:
    """A table without the columns of which nothing is known."""
    kept = [j for j in range(len(columns)) if any(row[j] not in ("–", "") for row in rows)]
    return "table", rows and [[row[j] for j in kept] for row in (columns, *rows)]


# Of one run or several


def _results(about: Subject) -> Parts:
    found = {name: [r.result for r in runs if r.result] for name, runs in about.groups.items()}
    metrics = {metric for results in found.values() for metric, _ in results}
    # Numbers of different metrics have no common axis.
    metric = metrics.pop() if len(metrics) == 1 else ""
    values = {name: [value for _, value in results] for name, results in found.items()}
    # What a comparison has no room for stands on the page of each run.
    measures = {name: form for name, form in _MEASURES.items() if about.one or name != "confidence"}
    stopped = [run.name for run in about.all if run.result and run.info.get("status") in ("unfinished", "interrupted")]
    words = [f"Not at their end, and counted by their last evaluation: {', '.join(stopped)}."] if stopped else []
    units = dict.fromkeys(_UNITS.get(run.info.get("task") or "", "input") for run in about.all)
    rows = []
    for name, runs, key in about.networks:
        own = [dict(run.part("after", "predictions", key) or {}) for run in runs]
        results, (base, differ) = (values[name], about.baseline(name)) if key == "student" else ([], (None, []))
        if differ:
            words.append(f"{name} is not compared with the student alone, which differs in {', '.join(differ)}.")
        if key != "student":
            # A peer's agreement is with the student, and a teacher's stands beside the student that agrees with it.
            for x in own:
                x |= {"kl": None, "agreement": None, "peers": x.get("agreement") if key != "teacher" else None}
        counts = sorted({int(x["examples"]) for x in own if "examples" in x})
        seen = " to ".join(f"{n:,}" for n in [*counts[:1], *counts[1:][-1:]])
        accuracy, *others = (_mean((x.get(k) for x in own), *form) for k, *form in measures.values())
        mean = _mean(results, ".2f" if results and abs(results[0]) > 1.5 else ".4f")
        beside = _paired(runs, about.groups[base]) if base else "–"
        rows.append([name, "–" if about.one else str(len(runs)), mean, beside, accuracy, seen or "–", *others])
    if [*units] != ["input"] and any(row[5] != "–" for row in rows):
        words.append(f"An example is here one {' or '.join(units)}, of which at most 2,048 of a batch count.")
    named = f"{metric}, as logged" if metric in measures else metric or "result"
    columns = ["", "runs", named, "against alone", "accuracy", "examples", *list(measures)[1:]]
    table = _table(columns, [row for row in rows if set(row[2:]) != {"–"}])
    if about.one:
        tiles = [(cell, name) for name, cell in zip(columns[1:], rows[0][1:], strict=True) if cell != "–"]
        written = _flat(about.one.info["results"])
        folded = ("folded", written and ("All that the script wrote", written))
        return [("tiles", tiles[:6]), table, ("words", " ".join(words)), folded]
    finite = {name: kept for name, given in values.items() if (kept := [x for x in given if math.isfinite(x)])}
    drawn = [charts.dots(finite, title=metric)] if metric and finite else []
    return [table, ("words", " ".join(words)), ("charts", drawn)]


def _curves(about: Subject) -> Parts:
    drawn: dict[str, dict[str, list[Any]]] = {}
    for name, run in ((name, run) for name, runs in about.groups.items() for run in runs):
        for title, line, points in run.curves(about.axis):
            panel, entry = (title, line) if about.one else (f"{title}, {line}", name)
            drawn.setdefault(panel, {}).setdefault(entry, []).append(points)
    if not about.one:
        drawn = {title: lines for title, lines in drawn.items() if len(lines) > 1 and "learning rate" not in title}
    names = list(dict.fromkeys(name for lines in drawn.values() for name in lines))
    # Where a stage begins is known in steps.
    stages = about.one.stages if about.one and about.axis == "step" else ()
    words: dict[str, Any] = {"x_label": about.axis, "stages": stages}
    pictures = [charts.lines(lines, names, title=title, **words) for title, lines in drawn.items()]
    return [("legend", names if len(names) > 1 else []), ("panels", pictures)]


def _calibration(about: Subject) -> Parts:
    drawn = []
    for name, (run, *more), key in about.networks:
        diagram, ece = run.array("after", f"{key}/reliability"), run.part("after", "predictions", key, "ece")
        if diagram is not None and ece is not None:
            title = f"{name}{f', {run.name}' if more else ''}\nECE {100 * ece:.1f} %"
            drawn.append(charts.reliability(diagram.tolist(), title=title, colour=0 if key == "student" else 5))
    return [("charts", drawn)]


def _rejection(about: Subject) -> Parts:
    drawn: dict[str, list[Any]] = {}
    for name, runs, key in about.networks:
        found = [x.tolist() for run in runs if (x := run.array("after", f"{key}/rejection")) is not None]
        drawn |= {name: found} if found else {}
    if not drawn:
        return []
    chart = charts.lines(drawn, list(drawn), title="Error among the kept", x_label="share that is kept")
    return [("legend", list(drawn) if len(drawn) > 1 else []), ("panels", [chart])]


def _similarity(about: Subject) -> Parts:
    drawn = []
    words: dict[str, Any] = {"scale": 1.0, "space": 400 if about.one else 290}
    for name, (run, *more) in about.groups.items():
        for phase in run.phases if about.one else run.phases[-1:] if run.other != "student" else ():
            title = f"{phase.capitalize()} training" if about.one else f"{name}, {run.name}" if more else name
            layers = [run.part(phase, who, "layers") for who in ("student", run.other)]
            trained = ["student", *(run.part(phase, "peers") or [])]
            found = [("cka", layers, "student", run.other)]
            found += [("peers/similarity", [trained, trained], "last layer", "last layer")] if about.one else []
            for key, names, row, column in found:
                alike, examples = run.array(phase, key), run.part(phase, "examples") or 0
                if alike is not None and all(names) and examples >= _FEW:
                    words |= {"title": f"{title}, {examples} examples", "row_label": row, "column_label": column}
                    drawn.append(charts.heatmap(alike.clamp_min(0), *names, **words))
    return [("charts", drawn)]


def _cost(about: Subject) -> Parts:
    parts = list(dict.fromkeys(part for run in about.all for part in run.part("cost", "parts") or {}))
    rows = []
    for name, runs in about.groups.items():
        times = [_mean((run.part("cost", "parts", part) for run in runs), ".1f", 1000) for part in parts]
        step = _mean((run.part("cost", "seconds_per_step") for run in runs), ".1f", 1000)
        memory, kind = max((run.part("cost", "memory") or 0, run.part("cost", "memory_kind") or "") for run in runs)
        analyses = [sum(run.part(phase, "seconds") or 0 for phase in run.phases) for run in runs]
        spent = [_mean(run.info.get("seconds") for run in runs), _mean(analyses)]
        rows.append([name, *times, step, f"{memory / 2**20:,.0f} {kind.partition(' ')[0]}" if memory else "–", *spent])
    return [_table(["", *parts, "step, mean", "peak memory, MiB", "whole run, s", "analysis, s"], rows)]


def _runs(about: Subject) -> Parts:
    rows = []
    for run in () if about.one else about.all:
        metric, seed = run.result, run.part("settings", "seed")
        words = [run.name, run.method, run.student, run.teacher or "–", "–" if seed is None else str(seed)]
        rows.append([*words, number(metric[1], 4) if metric else "–", run.status or "–"])
    return [_table(["folder", "method", "student", "teacher or peers", "seed", "result", "status"], rows)]


# Of one run


def _run(run: Run) -> Parts:
    info, described = run.info, run.part("method", "parts") or []
    method = [f"{p['name']}: {p['summary']}" for p in described] or run.part("method", "name")
    papers = [part["paper"] for part in described if part.get("paper")]
    options = {k: v for k, v in (run.part("method", "options") or {}).items() if v is not None}

    def networks(given: Iterable[Mapping[str, Any] | None]) -> list[str]:
        return [f"{n['name']}, {_value(n.get('parameters') or '?')} parameters" for n in given if n]

    facts = {
        "Method": method or "none: plain training",
        "Options": ", ".join(f"{k}={_value(v)}" for k, v in options.items()),
        "Paper": [f"{p['title']} ({p['short']}" + (f", arXiv:{p['arxiv']})" if p["arxiv"] else ")") for p in papers],
        "Student": networks([info.get("student")]),
        "Teacher": networks(info["teachers"]),
        "Peers": networks(info["peers"]),
        "Data": info.get("data"),
        "Stages": [f"{name}: steps {a:,.0f} to {b:,.0f}" for name, a, b in run.stages],
        "Device": info.get("device"),
        "Versions": ", ".join(f"{k} {v}" for k, v in info["versions"].items()),
        "Folder": run.name,
    }
    command = shlex.join(map(str, info["command"]))
    given = _flat(info["settings"])
    return [("pre", command), ("facts", facts), ("folded", given and ("All settings", given))]


def _method(run: Run) -> Parts:
    """Pictures that the method gave to the record; those of kinds that are not known here are left out."""
    parts: Parts = []
    for caption, pictures in groupby(run.info["pictures"], key=lambda p: p.get("caption") or ""):
        parts.append(("words", caption))
        drawn = []
        for given in pictures:
            if given["kind"] in _CHARTS:
                draw, fields = _CHARTS[given["kind"]]
                drawn.append(draw(**{key: x for key, x in given.items() if key in fields}))
            elif given["kind"] == "images":
                each = given["rows"].items()
                rows = {name: [("", x) for x in sources if _PNG.fullmatch(str(x))] for name, sources in each}
                parts.append(("strips", [(given["title"], rows)]))
        parts.append(("charts", drawn))
    return parts if any(kind != "words" and content for kind, content in parts) else []


def _shown(run: Run) -> list[tuple[str, str, str]]:
    """Name of a row, phase and network, from top to bottom."""
    other = [(run.other, "after", run.other)] if run.other != "student" else []
    return [*other, ("student", "after", "student"), ("student before", "before", "student")]


def _strips(run: Run, rows: Mapping[str, Sequence[tuple[str, Tensor]]]) -> Parts:
    """The maps `[n, h, w]` of each row and layer beside the images that they are of."""
    images, strips = run.array("after", "images"), []
    given = {name: maps for name, maps in rows.items() if maps}
    for i in range(min((len(maps[0][1]) for maps in given.values()), default=0)):
        image = [("", png(images[i]))] if images is not None and i < len(images) else []
        own = {name: [(layer, _heat(x[i])) for layer, x in maps] for name, maps in given.items()}
        strips.append((_label(run, i), {"": image} | own))
    return [("strips", strips)]


def _heat(values: Tensor) -> str:
    """A map in colours, scaled from its minimum to its maximum."""
    values = values.float() - values.float().min()
    colours = colormaps["viridis"]((values / values.max().clamp_min(1e-12)).numpy(), bytes=True)
    return png(torch.from_numpy(colours[..., :3].copy()).movedim(2, 0))


def _features(run: Run) -> Parts:
    rows = {}
    for name, phase, who in _shown(run):
        maps = enumerate(run.part(phase, who, "maps") or [])
        rows[name] = [(layer, x) for i, layer in maps if (x := run.array(phase, f"{who}/map/{i}")) is not None]
    return _strips(run, rows)


def _attention(run: Run) -> Parts:
    """The attention of each network: maps of the images, or charts of a few sentences."""
    rows = {}
    for name, phase, who in _shown(run):
        maps = run.array(phase, f"{who}/attention")
        if maps is not None:
            rows[name] = list(zip(run.part(phase, who, "attention"), maps, strict=True))
    if run.array("after", "images") is not None:
        return _strips(run, rows)
    parts: Parts = []
    sentences = run.part("after", "tokens") or run.part("before", "tokens") or []
    for i, tokens in enumerate(sentences[:_SENTENCES] if rows else ()):
        n = len(tokens)
        cut = {name: [(layer, x[i, :n, :n].float()) for layer, x in maps] for name, maps in rows.items()}
        # The probability that is drawn in full colour: few are larger.
        full = float(torch.cat([x.flatten() for maps in cut.values() for _, x in maps]).quantile(0.98)) or 1.0
        words: dict[str, Any] = {"scale": full, "space": min(18 * n, 196)}
        parts.append(("heading", _label(run, i)))
        for name, maps in cut.items():
            # The tokens stand beside the first layer.
            sided = [(x, () if j else tokens, f"{name}, {layer}") for j, (layer, x) in enumerate(maps)]
            parts.append(("charts", [charts.heatmap(x, side, title=title, **words) for x, side, title in sided]))
    return parts


def _channels(run: Run) -> Parts:
    """The channels of student and teacher as points of a plane, before and after on one scale."""
    drawn = []
    for i in range(_CHANNEL_EXAMPLES):
        planes = {}
        for phase in run.phases:
            found = {who: run.array(phase, f"{who}/channels") for who in ("teacher", "student")}
            planes[phase] = {who: x[i].tolist() for who, x in found.items() if x is not None and i < len(x)}
        everything = [point for groups in planes.values() for group in groups.values() for point in group]
        titles = {phase: f"{_label(run, i)}, {phase} training" for phase, groups in planes.items() if groups}
        drawn += [charts.points(planes[phase], title=title, limits=everything) for phase, title in titles.items()]
    return [("charts", drawn)]


def _confusion(run: Run) -> Parts:
    """The confusion matrix, or how it differs from the other network's, and the mistakes that changed most."""
    found = [run.array("after", f"{who}/confusion") for who in dict.fromkeys(("student", run.other))]
    cells = [x for x in found if x is not None]
    if found[0] is None:
        return []
    given = run.info["classes"]
    names = [str(given[i]) if i < len(given) else str(i) for i in range(len(cells[0]))]
    words: dict[str, Any] = {"row_label": "true class", "column_label": "answer", "digits": 0, "space": 460}
    shares = [100 * x.float() / x.sum(1, keepdim=True).clamp_min(1) for x in cells]
    if len(cells) == 1:
        return [("charts", [charts.heatmap(shares[0], names, names, title="Share of each class, %", **words)])]
    words |= {"title": f"Student − {run.other}, percentage points", "signed": True}
    chart = charts.heatmap(shares[0] - shares[1], names, names, **words)
    student, other = cells
    change = (student - other).fill_diagonal_(0)
    rows = []
    for place in change.abs().flatten().argsort(descending=True, stable=True)[:_CHANGES].tolist():
        i, j = divmod(place, len(names))
        if change[i, j] and len(names) > 2:
            counts = [formed(int(x[i, j]), form) for x, form in ((other, "d"), (student, "d"), (change, "+d"))]
            rows.append([f"{names[i]} taken for {names[j]}", *counts])
    table = _table(["Mistakes that changed most", run.other, "student", "change"], rows)
    return [("charts", [chart]), table]


def _notes(run: Run) -> Parts:
    asked = {who: run.part("after", who, "attention_note") for who in ("student", run.other)}
    of_attention = [f"Attention of the {who}: {note}" for who, note in asked.items() if note]
    return [("list", list(dict.fromkeys([*run.info["notes"], *of_attention])))]


# A section is named as its function; the template has their order and their headings.
_OF_RUNS = (_results, _calibration, _rejection, _curves, _similarity, _cost, _runs)
_OF_ONE_RUN = (_run, _method, _features, _channels, _attention, _confusion, _notes)
