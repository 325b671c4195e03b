"""The student, its loss, optimizer and schedule, as timm's script makes them."""

from __future__ import annotations

import argparse
import copy
import logging
import os
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.loss import create_classification_loss
from timm.models import parse_model_name, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import Tensor, nn

from kd_plugins.errors import DistillError, did_you_mean
from kd_timm.data import uses_mixup
from kd_timm.flags import KeyValues, flag_group

__all__ = [
    "add_arguments",
    "check_model_name",
    "create_criterion",
    "create_optimizer",
    "create_scheduler",
    "create_stage_scheduler",
    "create_student",
    "resolve_learning_rate",
]

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model, its optimizer, schedule, norms and moving average."""
    for add in (_add_model, _add_optimizer, _add_schedule, _add_norm_and_ema):
        add(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Model parameters")
    add("--model", default="resnet50", type=str, metavar="MODEL", help="name of the model (the student) to train")
    switch("--pretrained", help="start with the published weights")
    add(
        "--pretrained-path", type=str, help="load this checkpoint as if it were the published weights (adapts the head)"
    )
    add("--initial-checkpoint", default="", type=str, metavar="PATH", help="load this checkpoint after initialization")
    add("--resume", default="", type=str, metavar="PATH", help="continue the run in this output folder, exactly")
    add("--num-classes", type=int, metavar="N", help="number of label classes (model default if None)")
    add("--gp", type=str, metavar="POOL", help="global pool type (fast, avg, max, avgmax, avgmaxc)")
    add("--img-size", type=int, metavar="N", help="image size (model default if None)")
    add("--in-chans", type=int, metavar="N", help="image input channels (default: None => 3)")
    add("--input-size", nargs=3, type=int, metavar="N", help="all input dimensions, e.g. --input-size 3 224 224")
    add("--crop-pct", type=float, metavar="N", help="center crop percent, validation only")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="override mean pixel value of the dataset")
    add("--std", type=float, nargs="+", metavar="STD", help="override std deviation of the dataset")
    add("--interpolation", default="", type=str, metavar="NAME", help="resize interpolation (overrides model)")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="training batch size, per process")
    add("-vb", "--validation-batch-size", type=int, metavar="N", help="validation batch size")
    switch("--channels-last", help="use channels_last memory layout")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps to accumulate gradients over")
    switch("--grad-checkpointing", help="gradient checkpointing through the model's blocks")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, help="further arguments of the model")
    add("--head-init-scale", type=float, help="head initialization scale")
    add("--head-init-bias", type=float, help="head initialization bias value")
    add("--list-layers", metavar="MODEL", help="print stages, module paths and fitting methods of a model, and stop")
    add("--torchcompile", nargs="?", type=str, const="inductor", help="compile with this backend (default: inductor)")
    add("--torchcompile-mode", type=str, help="torch.compile mode")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Optimizer parameters")
    add("--opt", default="sgd", type=str, metavar="OPTIMIZER", help="optimizer")
    add("--opt-eps", type=float, metavar="EPSILON", help="optimizer epsilon")
    add("--opt-betas", type=float, nargs="+", metavar="BETA", help="optimizer betas")
    add("--momentum", type=float, default=0.9, metavar="M", help="optimizer momentum")
    add("--weight-decay", type=float, default=2e-5, help="weight decay")
    add("--clip-grad", type=float, metavar="NORM", help="clip gradient norm (None: no clipping)")
    add("--clip-mode", type=str, default="norm", help="gradient clipping mode: norm, value or agc")
    add("--layer-decay", type=float, help="layer-wise learning rate decay")
    add("--layer-decay-min-scale", type=float, default=0, help="layer-wise lr decay minimum scale clamp")
    add("--layer-decay-no-opt-scale", type=float, help="layer-wise lr decay no optimization scale")
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, help="further arguments of the optimizer")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Learning rate schedule parameters")
    add("--sched", type=str, default="cosine", metavar="SCHEDULER", help="learning rate schedule")
    switch("--sched-on-updates", help="step the schedule on every update instead of at epoch ends")
    add("--lr", type=float, metavar="LR", help="learning rate, overrides --lr-base")
    add("--lr-base", type=float, default=0.1, metavar="LR", help="lr = lr_base * global_batch_size / base_size")
    add("--lr-base-size", type=int, default=256, metavar="DIV", help="base learning rate batch size (divisor)")
    add("--lr-base-scale", type=str, default="", metavar="SCALE", help='"linear" or "sqrt"; by optimizer if empty')
    add("--lr-noise", type=float, nargs="+", metavar="pct", help="learning rate noise on/off epoch percentages")
    add("--lr-noise-pct", type=float, default=0.67, metavar="PERCENT", help="learning rate noise limit percent")
    add("--lr-noise-std", type=float, default=1.0, metavar="STDDEV", help="learning rate noise std-dev")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="MULT", help="cycle length multiplier")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="MULT", help="decay of the rate after each cycle")
    add("--lr-cycle-limit", type=int, default=1, metavar="N", help="number of cycles, cycles enabled if > 1")
    add("--lr-k-decay", type=float, default=1.0, help="k-decay for cosine/poly")
    add("--warmup-lr", type=float, default=1e-5, metavar="LR", help="warmup learning rate")
    add("--min-lr", type=float, default=0, metavar="LR", help="lower bound of the rate for cyclic schedules")
    add("--epochs", type=int, default=300, metavar="N", help="number of epochs to train")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="decay epochs of multistep")
    add("--decay-epochs", type=float, default=90, metavar="N", help="epoch interval to decay the rate")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs to warm up, if the schedule supports it")
    switch("--warmup-prefix", help="exclude warmup from the decay schedule")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="epochs at min_lr after the schedule")
    add("--patience-epochs", type=int, default=10, metavar="N", help="patience of the plateau schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="decay rate of the learning rate")


def _add_norm_and_ema(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Batch norm parameters")
    add("--bn-momentum", type=float, help="BatchNorm momentum override")
    add("--bn-eps", type=float, help="BatchNorm epsilon override")
    switch("--sync-bn", help="synchronized BatchNorm")
    add("--dist-bn", default="reduce", help='BatchNorm statistics between processes: "broadcast", "reduce", ""')
    add, switch = flag_group(parser, "Model exponential moving average parameters")
    switch("--model-ema", help="track a moving average of the weights; it is what is evaluated and exported")
    add("--model-ema-decay", type=float, default=0.9998, help="decay of the moving average")
    switch("--model-ema-warmup", help="warm up the decay")


def check_model_name(name: str, flag: str) -> None:
    """Refuses a model name that timm does not know, with a hint.

    Args:
        name: A name of timm's registry, or `hf-hub:...` or `local-dir:...`.
        flag: The flag it came from.
    """
    try:
        source, model = parse_model_name(name)
    except ValueError as error:
        raise DistillError(f"{flag} {name}: {error}") from error
    if source is None and not timm.is_model(model.split(".")[0]):
        hint = did_you_mean(model, timm.list_models())
        raise DistillError(f"{flag}: timm has no model named {name!r}.{hint} timm.list_models() names them all.")


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
    wanted: dict[str, Any] = dict(
        in_chans=channels,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    try:
        resolved = resolve_model_input_args(
            args.model, vars(args), pretrained_cfg_overlay=overlay, **{**wanted, **args.model_kwargs}
        )
        model = timm.create_model(
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            **resolved,
        )
        config = resolve_input_data_config(model, vars(args))
    except (ValueError, TypeError) as error:
        raise DistillError(f"{flag} {args.model} cannot be made with these arguments: {error}") from error
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
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise DistillError(f"--opt {args.opt} cannot be made with these arguments: {error}") from error
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
    try:
        return create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as error:
        raise DistillError(f"--sched {args.sched} cannot be made with these arguments: {error}") from error


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
