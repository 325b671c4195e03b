"""Writes the tables of docs/results.md from the files in benchmarks/results, so that no figure is typed by hand.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; its rows are those of `NAME.json`, what
`python -m benchmarks quality lists/NAME.yaml` wrote, `python -m benchmarks speed`, `phases`, or `tokens`.
Those of the table `methods` are every method's, as `methods.yaml` finds them in these files.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality import mean_and_spread, metrics_of, table
from kd_report.measures import difference

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def costs(report: dict[str, Any]) -> list[list[Any]]:
    """The times of `speed` as a head and rows."""
    rows: list[list[Any]] = [["step", "CPU ms", "times the floor", "95 %"]]
    for title, cases in report["jobs"].items():
        rows.append([f"**{title}**", "", "", ""])
        for case, found in cases.items():
            low, high = found["interval"]
            rows.append([case, f"{found['ms']:.0f}", f"{found['x_floor']:.2f}", f"{low:.2f} to {high:.2f}"])
    return rows


def phases(report: dict[str, Any]) -> list[list[Any]]:
    """The times and the memory of `phases` as a head and rows."""
    rows: list[list[Any]] = [["phase", "CPU ms", "times the way by hand", "95 %", "MiB", "MiB by hand"]]
    for title, found in report["phases"].items():
        rows.append([f"**{title}**", *[""] * 5])
        for phase, row in found.items():
            low, high = row["interval"]
            costs = [f"{row['ms']:.0f}", f"{row['x_by_hand']:.2f}", f"{low:.2f} to {high:.2f}"]
            rows.append([phase, *costs, f"{row['mib']:.0f}", f"{row['mib_by_hand']:.0f}"])
    return rows


def tokens(report: dict[str, Any]) -> list[list[Any]]:
    """The held-out losses of `tokens` as a head and rows."""
    rows: list[list[Any]] = [["setting", "loss", "against alone"]]
    for job, found in report["tokens"].items():
        rows.append([f"**{job}**, the teacher {found['teacher']:.3f}", "", ""])
        for setting, row in found["settings"].items():
            each = dict(enumerate(row["against alone"]))
            apart = "–" if setting == "alone" else difference(each, dict.fromkeys(each, 0.0), "+.3f")
            rows.append([setting, f"{row['loss']:.3f}", apart])
    return rows


MEASURED = {"jobs": costs, "phases": phases, "tokens": tokens}


def path_of(name: str) -> Path:
    """Where the results of a list are, or will be."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads(path_of(name).read_text())


def methods() -> list[list[Any]]:
    """Every method on every data set as a head and rows, beside the student alone and `kd`; the best first."""
    spec = yaml.safe_load((ROOT / "benchmarks" / "methods.yaml").read_text())
    lines: list[list[Any]] = [["method", "accuracy", "to alone", "to `kd`", "time"]]
    for data, files in spec.items():
        found = []
        for name, rows_of in files.items():
            if not path_of(name).is_file():
                continue
            report = read(name)
            rows, metric = report["rows"], metrics_of(report["rows"])[0]
            # Beside a GPU, or of trainings that share a clock, the seconds are not what one costs.
            timed = not (report.get("on_card") or report["machine"]["device"].startswith("NVIDIA"))
            alone, kd = (rows.get(rows_of.get(method)) for method in ("alone", "kd"))
            for method, row in rows_of.items():
                own = rows.get(row)
                # Fewer seeds stand in the list's own table alone.
                if own is None or len(own[metric]) < 3 or any(method == known for _, (known, *_) in found):
                    continue
                paired = [
                    difference(own[metric], other[metric], "+.1f") if other and other is not own else "–"
                    for other in (alone, kd)
                ]
                time = "–"
                if timed:
                    ours, theirs = (statistics.mean(x["seconds"].values()) for x in (own, alone))
                    time = f"{ours / theirs:.1f}"
                cells = [method, mean_and_spread(own[metric]), *paired, time]
                gain = statistics.mean(own[metric].values()) - statistics.mean(alone[metric].values())
                found.append((gain, cells))
        head = [[f"**{data}**", *[""] * 4]] if found else []
        lines += [*head, *(cells for _, cells in sorted(found, key=lambda x: -x[0]))]
    return lines


def markdown(name: str) -> str:
    """The table of one results file, or of all."""
    if name == "methods":
        head, *rows = methods()
    else:
        report = read(name)
        head, *rows = next((rows for key, rows in MEASURED.items() if key in report), table)(report)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n" + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines) + "\n"


def fill(page: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda block: block[1] + markdown(block[2]) + block[3], page)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks results", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    path = ROOT / "docs" / "results.md"
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
