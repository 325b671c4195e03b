"""`kd-plugins demo`: real teachers teach real students, on images and on text, without any download.

It starts the two training scripts as any user does, on the data sets that every machine has: scikit-learn's handwritten
digits, and paragraphs of the docstrings of Python's standard library. The students of one part have the same network,
data, initial weights and number of updates. Their settings were chosen on training rows held out for it
(docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
        student: Flags of every student's run; `{teacher}` is the teacher's folder.
        students: Flags that each student adds, by its row in the table.
        results: File with a run's results.
    """

    title: str
    script: str
    common: str
    teacher: str
    student: str
    students: dict[str, str]
    results: str


_RESNET8 = "--teacher resnet8 --teacher-checkpoint {teacher}/model_best.safetensors"

PARTS = {
    "images": Part(
        title="Images: handwritten digits, 1,297 to train on and 500 to evaluate on",
        script="kd_timm.train",
        common="--device cpu --in-chans 1 --opt adamw --weight-decay 0.01 --lr 5e-3 --epochs 8 --warmup-epochs 0 -b 64"
        " -j 0 --smoothing 0 --hflip 0 --color-jitter 0 --scale 0.8 1 --ratio 0.9 1.1 --log-interval 1000"
        " --val-interval 100 --checkpoint-hist 1 --output {folder} --experiment {name}",
        teacher="--model resnet8",
        student="--model lenet5_half",
        students={
            "alone": "",
            "kd": f"--distill kd {_RESNET8}",
            # The last map of a LeNet has one position.
            "nst": f"--distill nst --distill-args layers=1 teacher_layers=2 weight=1 {_RESNET8}",
            "kd+nst": f"--distill kd+nst --distill-args layers=1 teacher_layers=2 weight=1 {_RESNET8}",
        },
        results="results.json",
    ),
    "text": Part(
        title="Text: paragraphs of the standard library's docstrings, by package, split by file",
        script="kd_transformers.train",
        common="--use_cpu --save_strategy no --logging_steps 100 --eval_strategy epoch --output_dir {folder}/{name}",
        teacher="--student_layers 4 --num_train_epochs 8",
        student="--teacher {teacher} --student_layers 2 --student_init teacher --num_train_epochs 6"
        " --learning_rate 2e-4",
        students={
            "alone": "",
            "internal, progressive": "--distill internal --distill-args schedule=progressive",
            "internal, stacked": "--distill internal --distill-args schedule=stacked",
        },
        results="all_results.json",
    ),
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
    start, root = time.perf_counter(), Path(args.output)
    for name in [args.only] if args.only else list(PARTS):
        table = play(PARTS[name], root / name, console)
        console.print(table)
        console.print(f"Report: {report(PARTS[name], root / name)}", soft_wrap=True)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(f"Took {minutes} min {seconds} s. Agreement is with the teacher.", soft_wrap=True)
    return 0


def play(part: Part, folder: Path, console: Console) -> Table:
    """Runs all trainings of a part, one after the other.

    Args:
        part: What to run.
        folder: Where its runs go.
        console: Where the commands are printed.

    Returns:
        The table of results.
    """
    from rich.table import Table

    table = Table(title=part.title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("weights", "accuracy", "agreement", "ms/step", "MB"):  # fits 80 characters
        table.add_column(column, justify="right", no_wrap=True)
    teacher = folder / "teacher"
    for row, flags in {"teacher": part.teacher, **{n: f"{part.student} {f}" for n, f in part.students.items()}}.items():
        name = folder_name(row)
        words = [w.format(folder=folder, name=name, teacher=teacher) for w in shlex.split(f"{part.common} {flags}")]
        run(part.script, words, console)
        table.add_row(row, *figures(json.loads((folder / name / part.results).read_text()), row == "teacher"))
    return table


def report(part: Part, folder: Path) -> Path:
    """Writes a page for each run of a part and one that compares them, whose path it returns."""
    from kd_report import render

    runs = [folder / folder_name(row) for row in ("teacher", *part.students)]
    for path in runs:
        (path / "report.html").write_text(render([path]), encoding="utf-8")
    page = folder / "comparison.html"
    page.write_text(render(runs), encoding="utf-8")
    return page


def folder_name(row: str) -> str:
    """The folder of a row's run."""
    return row.replace(",", "").replace(" ", "-")


def run(script: str, words: Sequence[str], console: Console) -> None:
    """Runs one training script, whose progress goes where ours does."""
    console.print(f"[bold]python -m {script}[/bold] {shlex.join(words)}", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", script, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code:
        raise DistillError(f"{script} ended with status {code}; its message is above.")


def figures(results: dict[str, Any], teacher: bool) -> list[str]:
    """A row of the table, of what either script writes."""
    evaluation = results.get("evaluation", results)
    accuracy = evaluation["top1"] if "top1" in evaluation else 100 * evaluation["eval_accuracy"]
    agreement = evaluation.get("agreement")
    if agreement is None and "eval_teacher_agreement" in evaluation:
        agreement = 100 * evaluation["eval_teacher_agreement"]
    return [
        f"{results['parameters']:,}",
        f"{accuracy:.1f} %",
        "-" if teacher or agreement is None else f"{agreement:.1f} %",
        f"{1000 * results['seconds_per_step']:.0f}",
        f"{results['bytes'] / 1e6:.2f}",
    ]
