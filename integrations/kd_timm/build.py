"""The student, its loss, optimizer and schedule, as timm's script makes them."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.loss import create_classification_loss
from timm.models import parse_model_name, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import Tensor, nn

from kd_plugins.errors import DistillError, did_you_mean, told
from kd_timm.data import uses_mixup

_logger = logging.getLogger(__name__)

# Arguments of a model, by what timm's factory calls them.
MODEL_ARGUMENTS = {
    **dict(drop_rate="drop", drop_path_rate="drop_path", drop_block_rate="drop_block", global_pool="gp"),
    **{name: name for name in ("num_classes", "bn_momentum", "bn_eps")},
}


def check_model_name(name: str, flag: str) -> None:
    """Refuses a model name that timm does not know, with a hint.

    Args:
        name: A name of timm's registry, or `hf-hub:...` or `local-dir:...`.
        flag: The flag it came from.
    """
    with told(f"{flag} {name}", ValueError):
        source, model = parse_model_name(name)
    if source is None and not timm.is_model(model.split(".")[0]):
        hint = did_you_mean(model, timm.list_models())
        raise DistillError(f"{flag}: timm has no model named {name!r}.{hint} timm.list_models() names them all.")


def check_normalisation(config: Mapping[str, Any], who: str) -> None:
    """Refuses a data configuration whose images would not be numbers."""
    mean, std = config["mean"], config["std"]
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise DistillError(f"{who}: expected a finite mean and a positive std of the images, got {mean} and {std}.")


def create_student(args: argparse.Namespace, flag: str = "--model") -> tuple[nn.Module, dict[str, Any]]:
    """Makes the model to train and resolves its data configuration; fills in `args.num_classes`.

    Args:
        args: Parsed arguments, after `apply_data_defaults`.
        flag: Where the model was named.

    Returns:
        The model, on the CPU, and the data configuration (input size, mean, std, interpolation, crop).
    """
    check_model_name(args.model, flag)
    files = {"--initial-checkpoint": args.initial_checkpoint, "--pretrained-path": args.pretrained_path}
    for option, path in files.items():
        if path and not os.path.exists(path):
            raise DistillError(f"{option} {path} does not exist: mend the path.")
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    channels = args.in_chans if args.in_chans is not None else (args.input_size or (None,))[0]
    wanted = {name: getattr(args, flag) for name, flag in MODEL_ARGUMENTS.items()} | {"in_chans": channels}
    with told(f"{flag} {args.model} cannot be made with these arguments", ValueError, TypeError):
        resolved = resolve_model_input_args(
            args.model, vars(args), pretrained_cfg_overlay=overlay, **{**wanted, **args.model_kwargs}
        )
        model = timm.create_model(
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            **resolved,
        )
        config = resolve_input_data_config(model, vars(args))
    check_normalisation(config, f"{flag} {args.model}")
    with torch.no_grad():
        if args.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model, config


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """The training loss that timm's script selects for these arguments.

    Departures: `--bce-loss --smoothing 0` without Mixup is the binary loss, where timm's script falls back to softmax
    cross entropy; one logit (`--num-classes 1`), which timm's losses do not take, is the score of class 1 of two.
    """
    one_logit = args.num_classes == 1
    if one_logit and not args.bce_loss:
        raise DistillError("--num-classes 1: the softmax of one class is always 1, so nothing would learn: --bce-loss.")
    binary: dict[str, Any] = dict(
        bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight
    )
    criterion = create_classification_loss(
        "bce" if args.bce_loss else "ce",
        multi_label=one_logit,
        smoothing=args.smoothing,
        soft_targets=uses_mixup(args),
        **binary if args.bce_loss else {},
    )
    return OneLogit(criterion) if one_logit else criterion


class OneLogit(nn.Module):
    """Binary cross entropy of one logit.

    Args:
        loss: Of scores and targets `[B, 1]`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.checked = loss, False

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of scores `[B, 1]` and labels 0 and 1, `[B]`, or shares of both classes, `[B, 2]`."""
        targets = labels[:, -1:] if labels.dim() == 2 else labels[:, None]
        if not self.checked and (targets.min() < 0 or targets.max() > 1):
            raise DistillError(f"One logit tells two classes apart, 0 and 1, got the label {int(targets.max())}.")
        self.checked = True
        return self.loss(scores, targets.to(scores.dtype))


def resolve_learning_rate(args: argparse.Namespace, processes: int) -> None:
    """Derives `args.lr` from `--lr-base` and the global batch size where no rate is given."""
    if args.lr:
        return
    batch = args.batch_size * processes * args.grad_accum_steps
    if not args.lr_base_scale:
        args.lr_base_scale = "sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear"
    ratio = batch / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == "sqrt" else ratio)
    _logger.info(
        f"Learning rate ({args.lr}) calculated from base learning rate ({args.lr_base}) and global batch size ({batch})"
        f" with {args.lr_base_scale} scaling."
    )


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer for the model's parameters."""
    with told(f"--opt {args.opt} cannot be made with these arguments", ValueError, TypeError, AssertionError):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    if getattr(optimizer, "is_second_order", False):
        raise DistillError(f"--opt {args.opt} needs second-order gradients, which are not supported: choose another.")
    return optimizer


def create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Any, int]:
    """timm's learning-rate schedule.

    Args:
        args: Parsed arguments.
        optimizer: The optimizer that it steers.
        updates_per_epoch: Optimizer steps in one epoch.

    Returns:
        The scheduler (None for `--sched none`) and the number of epochs with warmup prefix and cooldown.
    """
    options = scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss")
    with told(f"--sched {args.sched} cannot be made with these arguments", ValueError, AssertionError):
        return create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)


def create_stage_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int, *, epochs: int, of: int
) -> Any:
    """The schedule of one stage: that of the whole run, drawn together to the stage's epochs.

    Args:
        args: Parsed arguments.
        optimizer: The optimizer that it steers.
        updates_per_epoch: Optimizer steps in one epoch.
        epochs: Epochs of the stage.
        of: Epochs of the whole run, with warmup prefix and cooldown.
    """
    part, share = copy.copy(args), epochs / of
    for name in ("warmup_epochs", "cooldown_epochs", "patience_epochs"):
        setattr(part, name, int(getattr(args, name) * share))
    part.decay_epochs = args.decay_epochs * share if args.decay_epochs >= 1 else args.decay_epochs
    part.decay_milestones = [round(milestone * share) for milestone in args.decay_milestones]
    part.epochs = epochs - part.cooldown_epochs - (part.warmup_epochs if args.warmup_prefix else 0)
    return create_scheduler(part, optimizer, updates_per_epoch)[0]
