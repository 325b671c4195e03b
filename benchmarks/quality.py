"""Runs a list of trainings, each with several seeds, skips what is done, and tabulates mean and spread.

A list is YAML:

    seeds: [0, 1, 2]
    metrics: {accuracy: evaluation.top1, agreement: evaluation.agreement}     # keys in the run's results file
    baseline: alone                   # optional: a column of the first metric's differences to this row, seed by seed
    published: {kd: 70.7}             # optional: a column of figures by others
    scale: 1                          # what the metrics are multiplied by; 100 makes shares percentages
    results: results.json             # written by the run into {out}
    common: kd-timm-train ... --seed {seed} --output {out}
    before: {teacher: "{common} ..."}      # runs once, first, with seed 0, where rows need it; {teacher} is its folder
    rows:
      alone: ""
      kd: --distill kd --teacher ...
    variants: {short: --epochs 4, long: --epochs 8}    # optional: every row with each of them, `kd, short`
    on_card: true                     # commands are the flags of `python -m benchmarks card`; `--jobs` share the card

`$DATA` and other variables of the environment are expanded, and `{device}` is `--device`. One process for each core.
What is in the output folder is not run again, and with `--keep` nothing that the results file has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import card
from benchmarks.timing import machine, print_table, write


def find(results: dict[str, Any], key: str) -> float | None:
    """A value by a dotted key, `evaluation.top1` or `peers.0.top1`; None where the run has none."""
    value: Any = results
    for part in key.split("."):
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(part))
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def folder_name(row: str) -> str:
    """A row's name as a folder's: what a shell or a format string would read otherwise becomes a dash."""
    return re.sub(r"[^\w.+-]+", "-", row).strip("-")


def run(command: str, folder: Path, wanted: str, start: bool = True) -> dict[str, Any] | None:
    """Runs one command unless its results are there; returns them, or None when it failed or may not start."""
    unfinished = folder / "unfinished"  # what was killed, or failed, may have left results of its training alone
    done = None if unfinished.exists() else next(iter(sorted(folder.rglob(wanted))), None)
    if done is None and not start:
        return None
    if done is None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        with open(folder / "log.txt", "w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            process = subprocess.Popen(shlex.split(command), stdout=log, stderr=subprocess.STDOUT, env=env)
            # The processor's seconds and not the clock's: the machines are shared.
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        done = next(iter(sorted(folder.rglob(wanted))), None)
        print(f"{'done' if code == 0 else 'FAILED'} {folder} ({seconds:.0f} CPU s)", flush=True)
        if code or done is None:
            print((folder / "log.txt").read_text()[-1500:], flush=True)
            return None
        (folder / "seconds.txt").write_text(f"{seconds:.1f}\n")
        unfinished.unlink()
    taken = folder / "seconds.txt"
    return {**json.loads(done.read_text()), "seconds": float(taken.read_text()) if taken.is_file() else None}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__.splitlines()[0])
    parser.add_argument("list", help="the YAML list")
    parser.add_argument("--output", default="output/quality", help="where the runs go")
    parser.add_argument("--json", help="where the results go; by default benchmarks/results/<list>.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="what lists call {device}"
    )
    parser.add_argument("--only", nargs="*", help="rows to run; the table has all that are done")
    parser.add_argument("--collect", action="store_true", help="run nothing: the table of what is done")
    parser.add_argument(
        "--keep", action="store_true", help="run no seed that the results file has of a row with these flags"
    )
    args = parser.parse_args(argv)
    spec = yaml.safe_load(Path(args.list).read_text())
    target = Path(args.json or f"benchmarks/results/{Path(args.list).stem}.json")
    earlier = json.loads(target.read_text()) if args.keep and target.is_file() else {}
    kept = earlier.get("rows", {}) if earlier.get("common", spec["common"]) == spec["common"] else {}
    root = Path(args.output) / Path(args.list).stem
    wanted = spec.get("results", "results.json")
    scale = spec.get("scale", 1)
    lines, baselines = {}, {}
    for variant, more in (spec.get("variants") or {"": ""}).items():
        end = f", {variant}" if variant else ""
        for row, flags in spec["rows"].items():
            lines[row + end] = " ".join(f"{flags} {more}".split())
            # A variant is compared with the same variant of the baseline.
            baselines[row + end] = f"{spec['baseline']}{end}" if "baseline" in spec else None
    if unknown := set(args.only or ()) - set(lines):
        parser.error(f"--only: expected rows of the list, got {sorted(unknown)}; it has {list(lines)}")
    on_card, names, todo = spec.get("on_card", False), {"device": args.device}, {}
    before = spec.get("before") or {}
    text = "" if args.collect else " ".join([spec["common"], *(lines[row] for row in args.only or lines)])
    for name, command in reversed(before.items()):
        text += f" {command}" if f"{{{name}}}" in text else ""
    for name, command in before.items():
        folder = root / name
        names[name] = str(folder)
        if f"{{{name}}}" not in text:
            continue
        command = os.path.expandvars(command.replace("{common}", spec["common"]).format(out=folder, seed=0, **names))
        if on_card:
            todo[folder] = command
        elif run(command, folder, wanted) is None:
            return 1
        else:
            names[name] = str(next(iter(sorted(folder.rglob(wanted)))).parent)
    planned: dict[tuple[str, int], tuple[str, Path, bool]] = {}
    # What was measured with other flags is another row, whatever its name.
    kept = {row: values for row, values in kept.items() if values["flags"] == lines.get(row)}
    first = next(iter(spec["metrics"]))
    for seed in spec["seeds"]:
        for row, flags in lines.items():
            if row in kept and str(seed) in kept[row].get(first, {}):
                continue
            folder = root / folder_name(row) / f"seed{seed}"
            command = os.path.expandvars(f"{spec['common']} {flags}".format(out=folder, seed=seed, **names))
            start = not args.collect and row in (args.only or lines)
            planned[row, seed] = command, folder, start and not on_card
            if start and on_card:
                todo[folder] = command
    if on_card and not args.collect:
        card.train_all([shlex.split(c) for f, c in todo.items() if not (f / wanted).is_file()], args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            key: pool.submit(run, command, folder, wanted, start) for key, (command, folder, start) in planned.items()
        }
    results: dict[str, Any] = {}
    for row, flags in lines.items():
        found = {seed: job.result() for (name, seed), job in jobs.items() if name == row}
        done = {str(seed): result for seed, result in found.items() if result is not None}
        if not done and row not in kept:
            continue
        values = {
            label: {seed: value * scale for seed, result in done.items() if (value := find(result, key)) is not None}
            for label, key in spec["metrics"].items()
        }
        values["seconds"] = {seed: result["seconds"] for seed, result in done.items() if result["seconds"]}
        values = {label: {**kept.get(row, {}).get(label, {}), **of_seed} for label, of_seed in values.items()}
        results[row] = {"flags": flags, "baseline": baselines[row], **values}
    report = {"list": Path(args.list).name, "common": spec["common"], "machine": machine(), "on_card": on_card}
    report |= {"baseline": spec.get("baseline"), "published": spec.get("published") or {}, "rows": results}
    head, *rows = table(report)
    print_table(spec.get("title", root.name), head, rows)
    write(target, report)
    return 0


def table(report: dict[str, Any]) -> list[list[Any]]:
    """A results file as a head and rows: mean and standard deviation of each metric, seeds, mean seconds."""
    results, baseline, published = report["rows"], report.get("baseline"), report.get("published")
    labels = metrics_of(results)
    more = [*([f"against {baseline}"] if baseline else []), *(["published"] if published else [])]
    # The clock's where trainings share a card, which waits for no processor.
    rows = [["", *labels, *more, "seeds", "seconds" if report.get("on_card") else "CPU seconds"]]
    for row, values in results.items():
        found, seconds = values[labels[0]], list(values["seconds"].values())
        mean = f"{statistics.mean(seconds):.0f}" if seconds else "-"
        beside = []
        if baseline:
            name = values.get("baseline", baseline)
            before = results.get(name, {}).get(labels[0], {})
            paired = {seed: value - before[seed] for seed, value in found.items() if seed in before}
            beside.append("-" if row == name else mean_and_spread(paired, sign="+"))
        if published:
            beside.append(published.get(row, "-"))
        rows.append([row, *(mean_and_spread(values[label]) for label in labels), *beside, len(found), mean])
    return rows


def metrics_of(results: dict[str, Any]) -> list[str]:
    """The names of the metrics in a results file."""
    return [label for label in next(iter(results.values())) if label not in ("flags", "baseline", "seconds")]


def mean_and_spread(values: dict[str, float], sign: str = "") -> str:
    """`64.0 ± 0.5`, the standard deviation over seeds; a dash where nothing was measured. `sign="+"` shows a plus."""
    if not values:
        return "-"
    found = list(values.values())
    return f"{statistics.mean(found):{sign}.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")
