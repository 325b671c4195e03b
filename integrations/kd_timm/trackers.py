"""Experiment trackers (Weights & Biases, TensorBoard, ...) through Accelerate, with what timm's `--log-wandb` logs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from kd_plugins.errors import DistillError, did_you_mean
from kd_timm.compat import LOGGER_TYPE_TO_CLASS
from kd_timm.flags import flag_group

__all__ = ["add_arguments", "start_trackers", "tracker_names"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of trackers: timm's for Weights & Biases, and `--report-to` for all that Accelerate knows."""
    add, switch = flag_group(parser, "Tracker parameters")
    switch("--log-wandb", help="log training and validation metrics to wandb, as --report-to wandb")
    add("--wandb-project", type=str, help="wandb project name (default: kd-timm-train)")
    add("--wandb-tags", default=[], type=str, nargs="+", help="wandb tags")
    add("--wandb-resume-id", default="", type=str, metavar="ID", help="continue the wandb run with this id")
    add(
        "--report-to",
        default=[],
        nargs="+",
        metavar="NAME",
        help="trackers that get the columns of summary.csv: tensorboard, wandb, mlflow, ..., or all that are installed",
    )


def tracker_names(args: argparse.Namespace) -> list[str]:
    """The trackers that the arguments name.

    Raises:
        DistillError: One is unknown or not installed, or an option of wandb stands without it.
    """
    names = list(dict.fromkeys([*args.report_to, *(["wandb"] if args.log_wandb else [])]))
    if not {"wandb", "all"} & set(names):
        given = [name for name in ("wandb_project", "wandb_tags", "wandb_resume_id") if getattr(args, name)]
        if given:
            raise DistillError(f"--{given[0].replace('_', '-')} does nothing without wandb: add --log-wandb.")
    for name in names:
        if name != "all" and name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise DistillError(f"--report-to {name}: Accelerate has no such tracker.{hint}")
        if name in LoggerType and name not in map(str, get_available_trackers()) and name != "all":
            raise DistillError(f"--report-to {name}: that tracker is not installed: pip install {name}.")
    return names


def start_trackers(
    accelerator: Accelerator, args: argparse.Namespace, folder: Path, settings: Mapping[str, Any]
) -> None:
    """Starts the accelerator's trackers; those that write files write to `logs` in the run's folder.

    Args:
        accelerator: Made with `log_with=tracker_names(args)`.
        args: Parsed arguments.
        folder: Output folder of the run.
        settings: What the run was started with.
    """
    accelerator.project_configuration.logging_dir = str(folder / "logs")
    wandb: dict[str, Any] = {"name": folder.name, "tags": args.wandb_tags}
    if args.wandb_resume_id:
        wandb |= {"id": args.wandb_resume_id, "resume": "must"}
    # Trackers take numbers and text alone.
    config = {k: v if v is None or isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
    try:
        accelerator.init_trackers(args.wandb_project or "kd-timm-train", config, {"wandb": wandb})
    # Whatever a tracker raises (no account, no server), the remedy is the same.
    except Exception as error:
        raise DistillError(
            f"The trackers {', '.join(map(str, accelerator.log_with))} cannot start ({type(error).__name__}: {error}):"
            " mend that, or leave --report-to and --log-wandb out."
        ) from error
