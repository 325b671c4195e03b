"""Experiment trackers (Weights & Biases, TensorBoard, ...) through Accelerate, with what timm's `--log-wandb` logs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from kd_plugins.errors import DistillError, did_you_mean, told
from kd_timm.arguments import as_flag
from kd_timm.compat import LOGGER_TYPE_TO_CLASS


def tracker_names(args: argparse.Namespace) -> list[str]:
    """The trackers that the arguments name.

    Raises:
        DistillError: One is unknown or not installed, or an option of wandb stands without it.
    """
    names = list(dict.fromkeys([*args.report_to, *(["wandb"] if args.log_wandb else [])]))
    if not {"wandb", "all"} & set(names):
        given = [name for name in ("wandb_project", "wandb_tags", "wandb_resume_id") if getattr(args, name)]
        if given:
            raise DistillError(f"{as_flag(given[0])} does nothing without wandb: add --log-wandb.")
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
    names, remedy = ", ".join(map(str, accelerator.log_with)), "mend that, or leave --report-to and --log-wandb out."
    # Whatever a tracker raises (no account, no server), the remedy is the same.
    with told(f"The trackers {names} cannot start", Exception, remedy=remedy):
        accelerator.init_trackers(args.wandb_project or "kd-timm-train", config, {"wandb": wandb})
