"""The command `kd-plugins`: which distillers there are, and what each one is."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from kd_plugins.catalog import installed
from kd_plugins.errors import DistillError, told

# What is imported in a function brings torch, which a list of this distribution's methods can do without.
if TYPE_CHECKING:
    from rich.console import Console

    from kd_plugins.catalog.about import Description


# Commands with a command line of their own, imported only when asked for.
_WIDE = 120  # columns of a window for all that the list has
_MODULES = {
    "demo": ("kd_plugins.demo", "distil small networks and show what comes of it"),
    "report": ("kd_report", "a page of a run, or a comparison of several"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `kd-plugins`; returns the exit code.

    That is 0, 2 after an error that a user can mend, 130 after Ctrl-C, or 141 where nobody reads what it says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in _MODULES:
            return import_module(_MODULES[arguments[0]][0]).main(arguments[1:]) or 0
        options = _parser().parse_args(arguments)
        if options.command == "info":
            _info(options.names)
        else:
            _list(getattr(options, "markdown", None))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # `| head` has read what it wanted; the interpreter would tell of it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except DistillError as error:
        print(f"kd-plugins: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kd-plugins: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kd-plugins", description="Knowledge distillation that plugs into HuggingFace Trainer and timm."
    )
    parser.add_argument("--version", action="version", version=f"kd-plugins {installed.kd_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    listing = commands.add_parser("list", help="all installed distillers (the default)")
    listing.add_argument(
        "--markdown",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="as a table in Markdown; in the FILEs, between markers; a FILE named .json gets what this list reads",
    )
    info = commands.add_parser("info", help="a distiller's paper, options, parameter groups and BibTeX")
    info.add_argument("names", nargs="+", metavar="NAME", help='such as nst; "kd+nst" shows both')
    for name, (_, text) in _MODULES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _list(files: Sequence[Path] | None) -> None:
    from rich import box
    from rich.table import Table

    found, known = installed.entries_by_name(), installed.known_rows()
    if not found:
        raise DistillError("expected installed distillers, got none — run `pip install -e .` in a source checkout")
    if files is not None:
        from kd_plugins.catalog.about import filled, markdown

        for file in files:
            with told(f"{file} cannot be filled", OSError, UnicodeError, remedy="name a text file."):
                file.write_text(filled(file), encoding="utf-8")
        if not files:
            print(markdown(sorted(found)), end="")
        return
    console = _console()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    # In a narrow window columns break words, so it has fewer of them; what a pipe gets does not depend on any window.
    narrow = console.is_terminal and console.width < _WIDE
    shown = {"name": None, "year": None, "kind": None, "tasks": 14, "hosts": 12, "distribution": None, "paper": None}
    kept = [not narrow or column not in ("hosts", "distribution") for column in shown]
    for column, width in compress(shown.items(), kept):
        table.add_column(column, overflow="fold", min_width=width)

    def add(*cells: str) -> None:
        table.add_row(*compress(cells, kept))

    for name in sorted(found):
        entries = found[name]
        *cells, cited = (known.get(entries[0].value) if len(entries) == 1 else None) or _imported(name)
        source = str(installed.source_of(entries[0]) or "") if len(entries) == 1 else "several"
        add(name, *cells, source, cited)
    for entry in installed.unused():
        why = f"not used: {entry.name} is a method of kd-plugins ({entry.value})"
        add(entry.name, "", "", "", "", str(installed.source_of(entry)), why)
    _print(console, table)
    for line in _networks():
        _print(console, line)


def _networks() -> list[str]:
    """What other distributions' adapters of networks are, a line each; nothing of ours."""
    lines = [
        f"{entry.name} of {installed.source_of(entry)}: not used, the name is taken"
        for entry in installed.unused(installed.NETWORKS)
    ]
    for name, entries in sorted(installed.entries_by_name(installed.NETWORKS).items()):
        if installed.ours(entries[0]):
            continue
        from kd_plugins.reading.network import Network

        try:
            cls = installed.load(installed.only_entry(entries), Network, "adapter of networks")
            lines.append(f"{name} of {installed.source_of(entries[0])}: {cls.__module__}:{cls.__qualname__}")
        except DistillError as error:
            lines.append(f"{name}: broken: {str(error).splitlines()[0]}")
    return ["", *(f"networks of {line}" for line in lines)] if lines else []


def _imported(name: str) -> list[str]:
    """The cells of a method that is known only once it is imported."""
    from kd_plugins.catalog.about import list_row

    try:
        return list_row(name)
    except DistillError as error:
        return ["", "", "", "", f"broken: {str(error).splitlines()[0]}"]


def _info(names: Sequence[str]) -> None:
    from kd_plugins.catalog.about import describe

    parts = [part.strip() for name in names for part in name.split("+")]
    composed = any("+" in name for name in names)
    texts = [_about(about, f"{about.name}." if composed else "") for about in map(describe, parts)]
    _print(_console(), "\n\n\n".join(texts))


def _about(about: Description, prefix: str) -> str:
    from kd_plugins.catalog.options import options_table

    paper = about.paper
    facts = {
        "paper": f"{paper.title} ({paper})" if paper else "",
        "url": paper.url if paper else "",
        "kind": about.kind,
        "teachers": about.teachers,
        "tasks": ", ".join(about.tasks),
        "networks": about.networks,
        "hosts": ", ".join(about.hosts),
        **{f"not {host}": reason for host, reason in about.refusals.items()},
        "class": f"{about.cls.__module__}:{about.cls.__qualname__}",
        "distribution": str(about.source or ""),
    }
    lines = [f"{about.name}: {about.summary}".rstrip(": "), ""]
    facts = {f"{key}:": value for key, value in facts.items() if value}
    width = max(map(len, facts))
    lines += [f"{key:<{width}} {value}" for key, value in facts.items()]
    lines += ["", "Options (--distill-args name=value ...):", options_table(about.options, prefix)]
    if about.groups:
        setting = f"{prefix}{next(iter(about.groups))}.lr=..."
        lines += ["", f"Groups with an optimizer of their own (--distill-args {setting}):"]
        lines += [f"  {name}: {spec}" for name, spec in about.groups.items()]
    return "\n".join([*lines, *(["", paper.bibtex] if paper else [])])


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # A pipe or a file has none: nothing is wrapped or cut for it.
    return console


def _print(console: Console, what: object) -> None:
    with console.capture() as capture:
        console.print(what)
    print("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()))


if __name__ == "__main__":
    sys.exit(main())
