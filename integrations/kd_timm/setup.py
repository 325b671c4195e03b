"""What precedes a run: the checks of its arguments, and the accelerator."""

from __future__ import annotations

import argparse
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from kd_plugins import DistillError
from kd_timm.trackers import tracker_names

__all__ = ["check_arguments", "create_accelerator"]

_logger = logging.getLogger("kd_timm.train")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses values that would fail late or silently."""
    for name in ("batch_size", "grad_accum_steps", "log_interval", "val_interval", "checkpoint_hist", "epochs"):
        if getattr(args, name) < 1:
            raise DistillError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}.")
    choices = {"eval_metric": ("top1", "top5", "loss"), "clip_mode": ("norm", "value", "agc")}
    for name, known in (choices | {"dist_bn": ("broadcast", "reduce", "")}).items():
        if getattr(args, name) not in known:
            words = f"{known[0]}, {known[1]} or {known[2] or 'nothing'}"
            raise DistillError(f"--{name.replace('_', '-')}: expected {words}, got {getattr(args, name)}.")
    if args.ood_dataset and not args.val_split:
        raise DistillError("--ood-dataset is compared with the evaluation split: name one, --val-split.")
    if args.ood_dataset and args.bce_loss:
        raise DistillError("--ood-dataset reads the uncertainty of a softmax, and --bce-loss trains none: drop one.")
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
