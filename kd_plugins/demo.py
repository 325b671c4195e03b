"""`kd-plugins demo`: real teachers teach real students, on images and on text, without any download.

It starts the two training scripts as any user does, on the data sets that every machine has: scikit-learn's handwritten
digits, and paragraphs of the docstrings of Python's standard library. The teacher has seen all training rows, its
students a few of them. The students of one part and seed have the same network, rows, initial weights and number of
updates (but `dafl`, which has no data). Their settings were chosen on training rows held out for it (docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from kd_plugins.errors import DistillError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["main"]


@dataclass(frozen=True)
class Part:
    """The trainings on one data set.

    Attributes:
        title: Of the table.
        script: The training script, as a module.
        common: Flags of every run; `{folder}` is where the part's runs go, `{name}` the run.
        teacher: Flags of the teacher's run.
        students: Flags of the students' runs, by their row in the table; `{teacher}` is the teacher's folder.
        results: File with a run's results.
        seeds: How many students of each row there are, of the seeds 0, 1, ...
        note: What to know about the table's rows.
    """

    title: str
    script: str
    common: str
    teacher: str
    students: dict[str, str]
    results: str
    seeds: Mapping[str, int]
    note: str = ""

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Row and seed of each student, in the order in which they are trained."""
        seeds = range(max(self.seeds.values()))
        return [(row, seed) for seed in seeds for row in self.students if seed < self.seeds[row]]


_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_IMAGES = (
    "--weight-decay 0.01 --lr 5e-3 --opt adamw --smoothing 0 --hflip 0 --color-jitter 0 --scale 0.8 1 --ratio 0.9 1.1"
)
_FEW = f"--model lenet5_half --train-split train[:100] --epochs 75 -b 25 --seed {{seed}} {_IMAGES}"
_LENET5 = "--teacher lenet5 --teacher-checkpoint {teacher}/model_best.safetensors"
_TEXT = (
    "--max_train_samples 200 --teacher {teacher} --student_layers 1 --student_init teacher --learning_rate 2e-4"
    " --num_train_epochs 27 --seed {seed}"
)

PARTS = {
    "images": Part(
        title="Images: 100 labelled digits (the teacher: 1,297), evaluated on 500",
        script="kd_timm.train",
        common="--dataset digits --device cpu --in-chans 1 --warmup-epochs 0 -j 0 --log-interval 1000"
        " --val-interval 1000 --checkpoint-hist 1 --output {folder} --experiment {name}",
        teacher=f"--model lenet5 --epochs 20 -b 64 {_IMAGES}",
        students={
            "alone": _FEW,
            "kd": f"{_FEW} --distill kd {_LENET5}",
            # The last map of a LeNet has one position.
            "kd+nst": f"{_FEW} --distill kd+nst --distill-args layers=1 nst.weight=1 {_LENET5}",
            "dafl, no data": "--model lenet5_half --opt adam --lr 2e-3 -b 32 --epochs 5 --epoch-updates 100"
            f" --seed {{seed}} --distill dafl --distill-args preset=mnist layer=-1 width=8 {_LENET5}",
        },
        results="results.json",
        seeds={"alone": 5, "kd": 5, "kd+nst": 5, "dafl, no data": 3},
    ),
    "text": Part(
        title="Text: 200 labelled paragraphs of docstrings (the teacher: 4,322)",
        script="kd_transformers.train",
        common="--use_cpu --save_strategy no --logging_steps 100 --output_dir {folder}/{name}",
        teacher="--student_layers 4 --num_train_epochs 8",
        students={
            "alone": _TEXT,
            "kd": f"{_TEXT} --distill kd --cache_teacher",
            "internal": f"{_TEXT} --distill internal --cache_teacher",
        },
        results="all_results.json",
        seeds={"alone": 5, "kd": 3, "internal": 5},
        note="Which of 12 packages a paragraph is from. All students begin with one of the teacher's four layers.",
    ),
}
_NEXT = {
    "images": "kd-timm-train --data-dir DATA --model resnet18 --distill kd --teacher resnet50"
    " --teacher-checkpoint FILE",
    "text": "kd-transformers-train --train_file train.csv --validation_file test.csv --distill internal --train_teacher"
    " --teacher bert-base-uncased --student_layers 6",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command: trains, prints the tables, and writes a report page.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="kd-plugins demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", choices=sorted(PARTS), help="one of the two parts")
    parser.add_argument("--output", default="kd-plugins-demo", help="folder of the runs (default: ./kd-plugins-demo)")
    args = parser.parse_args(argv)
    from rich.console import Console

    from kd_report import check_pages

    check_pages()
    console = Console()
    start, root, names = time.perf_counter(), Path(args.output), [args.only] if args.only else list(PARTS)
    play({root / name: PARTS[name] for name in names}, console)
    for name in names:
        console.print(table(PARTS[name], root / name))
        if PARTS[name].note:
            console.print(PARTS[name].note)
        console.print(f"Report: {report(root / name, root / name / 'comparison.html')}", soft_wrap=True)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(
        f"Took {minutes} min {seconds} s. Accuracy is the mean of the seeds and their standard deviation; against"
        " alone, the mean difference of students of one seed with its 95 % interval. Next, on your own data:"
    )
    for name in names:
        console.print(f"  {_NEXT[name]}", soft_wrap=True, highlight=False)
    return 0


def play(parts: Mapping[Path, Part], console: Console) -> None:
    """Runs all trainings, as many at once as there are cores; the students of a part wait for its teacher.

    Args:
        parts: What to run, by the folder where its runs go.
        console: Where the commands are printed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    cores = os.cpu_count() or 1
    whole = sum(1 + len(part.runs) for part in parts.values())
    at_once = min(cores, whole)
    console.print(
        f"{whole} trainings, {at_once} at a time, with a log each, and a page of the first of every row, in"
        f" {', '.join(map(str, parts))}:"
    )

    begun, lock = count(1), Lock()

    def one(folder: Path, name: str, words: list[str]) -> None:
        script = parts[folder].script
        place = f"{next(begun)}/{whole}"
        console.print(f"{place} [bold]{program(script)}[/bold] {shlex.join(words)}", highlight=False, soft_wrap=True)
        run(script, words, folder / f"{name}.log", cores // at_once)

    def student() -> None:
        with lock:
            # Short trainings come last, so that all cores end together.
            job = next((job for job in waiting if teachers[job[0]].done()), waiting[-1])
            waiting.remove(job)
        teachers[job[0]].result()
        one(*job)

    pool = ThreadPoolExecutor(at_once)
    try:
        lines = {folder: commands(part, folder) for folder, part in parts.items()}
        # The teachers come first, so that no student waits in the place that its teacher needs.
        teachers = {folder: pool.submit(one, folder, "teacher", own.pop("teacher")) for folder, own in lines.items()}
        # The trainings of the last part are the longest.
        waiting = [(folder, name, own[name]) for folder, own in reversed(lines.items()) for name in own]
        students = [pool.submit(student) for _ in range(len(waiting))]
        for done in as_completed((*teachers.values(), *students)):
            done.result()
    finally:
        # After a failure, or Ctrl-C, nobody waits for trainings that have not begun.
        pool.shutdown(cancel_futures=True)


def commands(part: Part, folder: Path) -> dict[str, list[str]]:
    """The arguments of the script for each run of a part, by the run's folder; the teacher's are the first."""

    def command(flags: str, name: str, seed: int = 0) -> list[str]:
        given = {"folder": folder, "name": name, "teacher": folder / "teacher", "seed": seed}
        return [word.format(**given) for word in shlex.split(f"{part.common} {flags}")]

    names = [(folder_name(row, seed), row, seed) for row, seed in part.runs]
    students = {name: command(part.students[row], name, seed) for name, row, seed in names}
    return {"teacher": command(part.teacher, "teacher")} | students


def table(part: Part, folder: Path) -> Table:
    """The results of a part whose runs are done."""
    from rich.table import Table

    from kd_report.measures import difference

    shown = Table(title=part.title, title_justify="left", min_width=78)
    shown.add_column("", no_wrap=True)
    for column in ("accuracy, %", "against alone", "agreement", "ms/step"):  # fits 80 characters
        shown.add_column(column, justify="right", no_wrap=True)
    found = {"teacher": {0: figures(folder / "teacher" / part.results)}}
    for row, seed in part.runs:
        found.setdefault(row, {})[seed] = figures(folder / folder_name(row, seed) / part.results)
    alone = {seed: values["accuracy"] for seed, values in found["alone"].items()}
    for row, runs in found.items():
        accuracy = {seed: values["accuracy"] for seed, values in runs.items()}
        told = [values["agreement"] for values in runs.values() if values["agreement"] is not None]
        shown.add_row(
            row,
            f"{statistics.fmean(accuracy.values()):.1f}"
            + (f" ± {statistics.stdev(accuracy.values()):.1f}" if len(accuracy) > 1 else ""),
            "-" if row in ("teacher", "alone") else difference(accuracy, alone, "+.1f"),
            f"{statistics.fmean(told):.1f} %" if told and row != "teacher" else "-",
            f"{statistics.fmean(values['step'] for values in runs.values()):.0f}",
        )
    return shown


def report(folder: Path, page: Path) -> Path:
    """Writes the page of a run, or of the runs below a folder, and returns its path."""
    from kd_report import render

    page.write_text(render([folder]), encoding="utf-8")
    return page


def folder_name(row: str, seed: int) -> str:
    """The folder of a row's run."""
    return f"{row.replace(',', '').replace(' ', '-')}-{seed}"


def program(script: str) -> str:
    """The command that starts a training script."""
    return script.replace("_", "-").replace(".", "-")


def run(script: str, words: list[str], log: Path, threads: int) -> None:
    """Runs a training script in a process of its own, whose output goes to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        # The scripts' imports take longer than some of the trainings: once is enough.
        context.set_forkserver_preload([*(part.script for part in PARTS.values()), "kd_report.pages"])
    process = context.Process(target=_train, args=(script, words, log, threads))
    process.start()
    process.join()
    if process.exitcode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise DistillError(f"{script} ended with status {process.exitcode}; {log} ends with: {''.join(last)}")


def _train(script: str, words: Sequence[str], log: Path, threads: int) -> None:
    """What a process does: trains, with all that it prints in a file."""
    import torch

    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(threads)
    sys.argv = [program(script), *words]  # what the page of the run shows as its command
    sys.exit(train(script, words, log.with_suffix("")))


def train(script: str, words: Sequence[str], folder: Path) -> int:
    """Does `python -m script words`, writes a page of the first run of a row, and returns the status."""
    status: int = import_module(script).main(list(words))
    if not status and folder.name.endswith(("teacher", "-0")):
        report(folder, folder / "report.html")
    return status


def figures(path: Path) -> dict[str, Any]:
    """A run's part of the table, of what either script writes."""
    results = json.loads(path.read_text(encoding="utf-8"))
    evaluation = results.get("evaluation", results)
    accuracy = evaluation["top1"] if "top1" in evaluation else 100 * evaluation["eval_accuracy"]
    agreement = evaluation.get("agreement")
    if agreement is None and "eval_teacher_agreement" in evaluation:
        agreement = 100 * evaluation["eval_teacher_agreement"]
    step = 1000 * results["seconds_per_step"]
    return {"accuracy": accuracy, "agreement": agreement, "step": step}
