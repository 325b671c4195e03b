"""What precedes a run: the checks of its arguments, and the accelerator."""

from __future__ import annotations

import argparse
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from kd_plugins import DistillError
from kd_timm.flags import flag_group
from kd_timm.trackers import tracker_names

__all__ = ["add_arguments", "check_arguments", "create_accelerator"]

_logger = logging.getLogger("kd_timm.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the device and what does not fit elsewhere."""
    _add_device(parser)
    _add_misc(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Device parameters")
    add("--device", default="cuda", type=str, help="cuda, cuda:N or cpu; falls back to cpu where there is no GPU")
    switch("--amp", help="mixed precision training")
    add("--amp-dtype", default="float16", type=str, help="lower precision of --amp: float16 or bfloat16")
    switch("--no-ddp-bb", help="do not broadcast buffers in DistributedDataParallel")


def _add_misc(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Miscellaneous parameters")
    add("--seed", type=int, default=42, metavar="S", help="random seed")
    add("--worker-seeding", type=str, default="all", help="worker seed mode")
    add("--log-interval", type=int, default=50, metavar="N", help="updates between log lines")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between validation and checkpointing")
    add("--checkpoint-hist", type=int, default=10, metavar="N", help="number of checkpoints to keep")
    add("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes")
    switch("--pin-mem", help="pin CPU memory in the data loader")
    add("--output", default="", type=str, metavar="PATH", help="output folder (default: ./output/train)")
    add("--experiment", default="", type=str, metavar="NAME", help="sub-folder of the output folder")
    add("--eval-metric", default="top1", type=str, help="metric that picks the best checkpoint: top1, top5 or loss")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses values that would fail late or silently."""
    for name in ("batch_size", "grad_accum_steps", "log_interval", "val_interval", "checkpoint_hist", "epochs"):
        if getattr(args, name) < 1:
            raise DistillError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}.")
    if args.eval_metric not in ("top1", "top5", "loss"):
        raise DistillError(f"--eval-metric: expected top1, top5 or loss, got {args.eval_metric}.")
    if args.clip_mode not in ("norm", "value", "agc"):
        raise DistillError(f"--clip-mode: expected norm, value or agc, got {args.clip_mode}.")
    if args.dist_bn not in ("broadcast", "reduce", ""):
        raise DistillError(f"--dist-bn: expected broadcast, reduce or nothing, got {args.dist_bn}.")
    for name in ("teacher", "peer", "distill_args"):
        if getattr(args, name) and not args.distill:
            flag = f"--{name.replace('_', '-')}"
            raise DistillError(f"{flag} does nothing without --distill NAME: name a distiller.")


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Device, precision and processes, from `--device`, `--amp`, `--amp-dtype` and the launcher's environment."""
    kind, _, index = args.device.partition(":")
    if kind not in ("cuda", "cpu"):
        raise DistillError(f"--device: expected cuda, cuda:N or cpu, got {args.device}.")
    if kind == "cuda" and not torch.cuda.is_available():
        _logger.info("No GPU is available: training on the CPU (say so with --device cpu).")
        kind = "cpu"
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        if index:
            torch.cuda.set_device(int(index))
    precision = "no"
    if args.amp:
        names = {"float16": "fp16", "bfloat16": "bf16"}
        if args.amp_dtype not in names:
            raise DistillError(f"--amp-dtype: expected float16 or bfloat16, got {args.amp_dtype}.")
        precision = names[args.amp_dtype]
        if precision == "fp16" and kind == "cpu":
            raise DistillError("--amp in float16 needs a GPU to scale the loss on: add --amp-dtype bfloat16.")
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        log_with=tracker_names(args) or None,
        project_dir=".",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )
    if args.sync_bn and kind == "cpu" and accelerator.num_processes > 1:
        raise DistillError("--sync-bn needs GPUs: leave it out, --dist-bn averages the statistics after each epoch.")
    return accelerator
