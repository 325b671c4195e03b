"""Runs: what they leave (`record`), what is found in their networks (`analysis`), and the pages made of both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kd_plugins.errors import DistillError, told
from kd_plugins.states import write_text
from kd_report.runs import Run, find_runs, load_run

__all__ = ["Run", "check_pages", "load_run", "main", "page_hint", "render"]

INSTALL = 'pip install "kd-plugins[report]"'


def _missing() -> list[str]:
    return [name for name in ("jinja2", "matplotlib") if not find_spec(name)]


def check_pages() -> None:
    """Raises `DistillError` where the packages that pages are made with are not installed."""
    if _missing():
        raise DistillError(f"Report pages are made with {' and '.join(_missing())}, not installed here: {INSTALL}")


def page_hint(folder: str | Path) -> str:
    """How to get the page of a run, for the last line of a script."""
    return f"Report: {f'{INSTALL}, then ' if _missing() else ''}kd-plugins report {folder}"


def render(folders: Sequence[str | Path]) -> str:
    """The page of a run, or the comparison of several, as HTML that needs no other file.

    A folder that is no run itself stands for all runs below it.

    Raises:
        DistillError: A folder without a record, a record that cannot be shown, or packages that are not installed.
    """
    check_pages()
    from kd_report.pages import page

    runs = [load_run(folder) for folder in find_runs(folders)]
    named = ", ".join(str(run.folder) for run in runs)
    # What a file that was edited may do to a page has no end.
    with told(f"The record in {named} cannot be shown", Exception, remedy="it was edited, or by another version."):
        return page(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `kd-plugins report`: writes the page and prints where it is."""
    parser = argparse.ArgumentParser(
        prog="kd-plugins report", description="One HTML page of a run; of several runs, a comparison."
    )
    what = "output folder of a run, or a folder above several"
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help=what)
    where = "where to write the page (default: report.html in the run's folder; comparison.html in the folder above)"
    parser.add_argument("-o", "--output", metavar="FILE", help=where)
    options = parser.parse_args(argv)
    folders, first = find_runs(options.runs), Path(options.runs[0])
    above = first.resolve().parent if folders[0] == first else first
    output = Path(options.output or (above / "comparison.html" if len(folders) > 1 else folders[0] / "report.html"))
    page = render(folders)
    with told(f"{output} cannot be written", OSError, remedy="name another file, --output FILE."):
        output.parent.mkdir(parents=True, exist_ok=True)
    # In place of a link, and not through it.
    write_text(output, page)
    print(output)
    return 0
