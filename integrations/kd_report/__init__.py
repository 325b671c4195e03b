"""The command `kd-plugins report`: one self-contained HTML page of one run, or a comparison of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_report.compare import comparison_page
from kd_report.page import run_page
from kd_report.runs import Run, load_run

__all__ = ["Run", "load_run", "main", "render"]


def render(folders: Sequence[str | Path]) -> str:
    """The page of a run, or the comparison of several, as HTML that needs no other file.

    Args:
        folders: Output folders of runs.
    """
    runs = [load_run(folder) for folder in folders]
    return run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and prints where it is.

    Args:
        argv: Arguments after `kd-plugins report`.
    """
    parser = argparse.ArgumentParser(
        prog="kd-plugins report", description="One HTML page of a run; of several runs, a comparison."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output folder of a run of either training script")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write the page (default: report.html in the run's folder; comparison.html beside the first run)",
    )
    options = parser.parse_args(argv)
    folders = [Path(folder) for folder in options.runs]
    default = folders[0] / "report.html" if len(folders) == 1 else folders[0].resolve().parent / "comparison.html"
    output = Path(options.output) if options.output else default
    page = render(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    print(output)
    return 0
