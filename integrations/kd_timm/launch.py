"""timm's own train.py with a distiller: `python -m kd_timm.launch path/to/train.py ... --distill nst`.

The script runs as it is. What it makes of `timm.task.ClassificationTask` becomes a `DistillationTask`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm.data
import timm.scheduler
import timm.task

from kd_accelerate.command import run_command
from kd_plugins import DistillError
from kd_plugins.binding import schedule
from kd_plugins.catalog.registry import options_from_strings
from kd_timm.build import TASK_ARGUMENTS
from kd_timm.data import class_names
from kd_timm.task import DistillationTask


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        argv: The script, its flags, and ours; None takes those of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kd_timm.launch",
        allow_abbrev=False,
        description="Runs timm's train.py with knowledge distillation; what is not listed here goes to the script.",
    )
    parser.add_argument("script", type=Path, help="path of timm's train.py, from timm 1.0.27 on")
    parser.add_argument("--distill", required=True, metavar="NAME", help="distiller; see `kd-plugins list`")
    parser.add_argument("--distill-args", nargs="*", default=[], metavar="K=V", help="options of the distiller")
    parser.add_argument("--teacher", action="append", default=[], metavar="MODEL", help="teacher model (repeatable)")
    parser.add_argument("--teacher-checkpoint", action="append", default=[], metavar="PATH", help="its weights")
    args, rest = parser.parse_known_args(argv)
    return run_command("kd_timm.launch", lambda: launch(args, rest))


def launch(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs the script with its own arguments.

    Raises:
        DistillError: The script has no task to take the place of, distils by itself, or the distiller does not fit.
    """
    if not args.script.is_file():
        raise DistillError(f"expected the path of timm's train.py, got {str(args.script)!r}.")
    if not re.search(r"\bClassificationTask\(", args.script.read_text(encoding="utf-8")):
        raise DistillError(
            f"{args.script} makes no timm.task.ClassificationTask, whose place the distiller takes: use the train.py of"
            " timm 1.0.27 or newer, or kd-timm-train."
        )
    options: dict[str, Any] = {"distiller_args": options_from_strings(args.distill, args.distill_args)}
    options["teacher_checkpoint"] = args.teacher_checkpoint
    tasks: list[DistillationTask] = []
    seen: dict[str, Any] = {}

    def task(model: Any, **given: Any) -> DistillationTask:
        tasks.append(DistillationTask(model, args.distill, args.teacher, **options, **seen, **given))
        return tasks[-1]

    def refuse(*_: Any, **__: Any) -> Any:
        raise DistillError("--kd-model-name is timm's own distillation: give it or --distill, not both.")

    def keep(config: Any, bound: inspect.BoundArguments) -> None:
        seen["data_config"] = config

    def name(made: Any, bound: inspect.BoundArguments) -> None:
        if bound.arguments.get("is_training"):
            seen["classes"] = class_names(made, bound.arguments.get("kwargs", {}).get("target_key"))

    def length(made: Any, bound: inspect.BoundArguments) -> None:
        updates = bound.arguments.get("updates_per_epoch")
        for each in tasks if updates else ():
            schedule(each.distiller, updates * made[1])

    # timm's own distillation is refused, whatever flag or file asks the script for it.
    tasks_of_script: dict[str, Any] = {kind.__name__: refuse for kind, _ in TASK_ARGUMENTS.values()}
    tasks_of_script["ClassificationTask"] = task
    with (
        mock.patch.multiple(timm.task, **tasks_of_script),
        _observed(timm.data, "resolve_data_config", keep),
        _observed(timm.data, "create_dataset", name),
        _observed(timm.scheduler, "create_scheduler_v2", length),
        mock.patch.object(sys, "argv", [str(args.script), *rest]),
        mock.patch.object(sys, "path", [str(args.script.parent), *sys.path]),
    ):
        runpy.run_path(str(args.script), run_name="__main__")
    if not tasks:
        raise DistillError(
            f"{args.script} made no timm.task.ClassificationTask, so nothing was distilled: see its log."
        )


def _observed(module: Any, name: str, note: Callable[[Any, inspect.BoundArguments], None]) -> Any:
    """Lets `note` see what a function of timm returns to the script, and what it was given."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        note(result, signature.bind(*args, **kwargs))
        return result

    return mock.patch.object(module, name, call)


if __name__ == "__main__":
    sys.exit(main())
