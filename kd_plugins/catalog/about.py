"""What is known of a distiller without training it, and the tables of all of them."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kd_plugins.authors import check_made, overrides
from kd_plugins.catalog.installed import Source, distribution_of, entries_by_name, list_distillers
from kd_plugins.catalog.options import OptimSpec, Option, options_of
from kd_plugins.catalog.paper import Paper
from kd_plugins.catalog.registry import get_distiller
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError

HOSTS = {
    "bare": "a loop of your own",
    "accelerate": "kd_accelerate.TurnPlayer",
    "transformers": "DistillationTrainer and kd-transformers-train",
    "timm": "kd-timm-train",
    "timm-task": "kd_timm.DistillationTask, in timm's own train.py",
}
"""The hosts, by the names in `kd-plugins list`."""


@dataclass(frozen=True)
class Description:
    """What is known of a distiller without training it: the data of `kd-plugins info`.

    Attributes:
        name: Of the distiller.
        cls: Its class.
        source: The distribution that it comes from.
        summary: The first paragraph of its docstring.
        paper: What to cite.
        kind: `"offline"`, `"online"` or `"data-free"`.
        tasks: What it fits.
        networks: `"any"`, or `"transformer"`.
        teachers: Number of teachers, in words.
        refusals: Why some hosts cannot train with it, by host.
        options: Its options.
        groups: Optimizers of its own, where they are known before set-up.
    """

    name: str
    cls: type[Distiller]
    source: Source | None
    summary: str
    paper: Paper | None
    kind: str
    tasks: tuple[str, ...]
    networks: str
    teachers: str
    refusals: dict[str, str]
    options: dict[str, Option]
    groups: dict[str, OptimSpec]

    @property
    def hosts(self) -> list[str]:
        """The hosts that can train with it."""
        return [host for host in HOSTS if host not in self.refusals]


def describe(name: str) -> Description:
    """What a distiller is: made with its `example` options, and not set up.

    Raises:
        DistillError: No such distiller, or one that cannot be made.
    """
    cls = get_distiller(name)
    try:
        made = cls(**cls.example)
        check_made(made)
        groups, refused = {}, refusals(made)
        with suppress(AttributeError):  # of parts that set-up builds
            groups = dict(made.optimizers())
        for function, reason in (("stages", "trains in several stages"), ("extras", "has optimizers of its own")):
            if overrides(made, function):  # how many they are, set-up may have to tell
                refused.setdefault("timm-task", reason)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # another distribution's class may fail in any way
        raise DistillError(
            f"cannot make {name!r} with its example's options: {type(error).__name__}: {error}"
        ) from error
    return Description(
        name=name,
        cls=cls,
        source=distribution_of(name),
        summary=" ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split()),
        paper=cls.paper,
        kind=made.kind,
        tasks=tuple(made.tasks),
        networks=made.networks,
        teachers={"many": "one or more", "or peers": "one, or peers"}.get(str(made.teachers), str(made.teachers)),
        refusals=refused,
        options=options_of(cls),
        groups=groups,
    )


def list_row(name: str) -> list[str]:
    """What `kd-plugins list` says of a method: year, kind, tasks, hosts, paper."""
    about = describe(name)
    paper = about.paper
    cited = f"{paper}: {paper.title}" if paper else about.summary
    return [str(paper.year) if paper else "", about.kind, ", ".join(about.tasks), ", ".join(about.hosts), cited]


def refusals(distiller: Distiller) -> dict[str, str]:
    """Why a host cannot train with a method, by host; the first reason, as what follows the method's name.

    What only set-up tells (groups of parts that do not exist before it) is left to the hosts.
    """
    needs = distiller.needs()
    classifies = ("does not fit classification", "classification" not in distiller.tasks)
    reasons = {
        "transformers": [("makes its own data", not distiller.data)],
        "timm": [classifies],
        "timm-task": [
            classifies,
            ("trains several networks together", distiller.peers),
            ("makes its own data", not distiller.data),
            ("trains in several stages", len(distiller.stages()) > 1),
            ("reads held-out streams", bool(needs.streams)),
            ("reads row numbers", needs.index),
            ("passes over the training data first", overrides(distiller, "prepare")),
            ("has optimizers of its own", _has_groups(distiller)),
        ],
    }
    found = {host: next((text for text, holds in given if holds), "") for host, given in reasons.items()}
    return {host: reason for host, reason in found.items() if reason}


def _has_groups(distiller: Distiller) -> bool:
    """Whether a method has groups beside the student's; one whose `extras()` misses what set-up builds has."""
    try:
        return bool(distiller.extras())
    except AttributeError:
        if distiller.ready:
            raise
        return True


# --- tables in Markdown -----------------------------------------------------------------------------------------------

_MARKED = re.compile(r"(<!-- (methods|papers) -->\n).*?(<!-- /\2 -->)", re.S)
_COLUMNS = {
    "methods": ("name", "what it does", "paper"),
    "papers": ("name", "title", "paper", "tasks", "hosts", "code"),
}


def markdown(names: Iterable[str], table: str = "methods", page: str = "`{name}`") -> str:
    """A table of distillers: `methods` says what each does, `papers` where it comes from and what it fits.

    Args:
        names: Of the distillers.
        table: Which table.
        page: How a name is shown; `{name}` stands for it.
    """
    columns = _COLUMNS[table]
    rows = [
        columns,
        ["---"] * len(columns),
        *([_cells(about, page)[c] for c in columns] for about in map(describe, names)),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(about: Description, page: str) -> dict[str, str]:
    paper, url = about.paper, about.paper.url if about.paper else None
    cells = {
        "name": page.format(name=about.name),
        "what it does": about.summary.rstrip("."),
        "paper": f"{paper or ''}" + (f", [{paper.arxiv}]({url})" if paper and url else ""),
        "title": paper.title if paper else "",
        "tasks": ", ".join(about.tasks),
        "hosts": f"all but {', '.join(about.refusals)}" if about.refusals else "all",
        "code": f"`{about.cls.__module__}`",
    }
    return {column: text.replace("|", "\\|") for column, text in cells.items()}


def filled(file: Path) -> str:
    """The text of a file with the tables between its markers, of all distillers that have a page.

    The pages are `docs/methods/NAME.md`, in the file's folder or the nearest one above it. Of a file named `.json` the
    text is what `kd-plugins list` reads of this distribution's own methods.

    Raises:
        DistillError: The file has no markers, or no folder of pages is near.
    """
    if file.suffix == ".json":
        own = {name: e.value for name, (e, *_) in entries_by_name().items() if e.value.startswith("kd_plugins.")}
        return json.dumps({own[name]: list_row(name) for name in sorted(own)}, indent=2, ensure_ascii=False) + "\n"
    text = file.read_text(encoding="utf-8")
    pages = next((p for up in file.resolve().parents if (p := up / "docs" / "methods").is_dir()), None)
    if pages is None or not _MARKED.search(text):
        raise DistillError(
            f"expected the lines <!-- methods --> and <!-- /methods --> in {file}, and a folder docs/methods beside or"
            " above it, got not both"
        )
    names = [name for name in list_distillers() if (pages / f"{name}.md").is_file()]
    page = f"[`{{name}}`]({Path(os.path.relpath(pages, file.resolve().parent)).as_posix()}/{{name}}.md)"
    return _MARKED.sub(lambda found: found[1] + markdown(names, found[2], page) + found[3], text)
