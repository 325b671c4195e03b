"""The student, its loss, optimizer and schedule, as timm's script makes them."""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from timm.utils import set_jit_fuser
from torch import Tensor, nn

from kd_accelerate.randomness import undisturbed
from kd_plugins.errors import DistillError, did_you_mean, told
from kd_plugins.finite import check_weights
from kd_timm.data import model_dtype, uses_mixup

_logger = logging.getLogger(__name__)

# Arguments of a model, by what timm's factory calls them.
MODEL_ARGUMENTS = {
    **dict(drop_rate="drop", drop_path_rate="drop_path", drop_block_rate="drop_block", global_pool="gp"),
    **{name: name for name in ("num_classes", "bn_momentum", "bn_eps")},
    **dict(scriptable="torchscript"),
}
# Further arguments of each loss.
LOSS_ARGUMENTS = {
    "bce": ("bce_target_thresh", "bce_sum"),
    "asl": ("asl_gamma_pos", "asl_gamma_neg", "asl_clip", "asl_reduction"),
    "poly": ("poly_epsilon", "poly_gamma", "poly_alpha"),
    "twoway": ("twoway_tp", "twoway_tn"),
    "db": ("db_neg_scale", "db_init_bias", "db_focal_gamma"),
}
# Those of each kind of timm's own distillation, by what its tasks call them.
_DIMENSIONS = {"student_feature_dim": "kd_student_feature_dim", "teacher_feature_dim": "kd_teacher_feature_dim"}
TASK_ARGUMENTS: dict[str, tuple[Any, dict[str, str]]] = {
    "logit": (LogitDistillationTask, {"loss_type": "kd_loss_type", "temperature": "kd_temperature"}),
    "feature": (FeatureDistillationTask, _DIMENSIONS),
    "token": (TokenDistillationTask, {"distill_type": "kd_token_distill_type", "temperature": "kd_temperature"}),
}


def check_model_name(name: str, flag: str, *, weights: bool = False) -> None:
    """Refuses a model name that timm does not know, with a hint, and a folder of which nobody knows what is meant.

    Args:
        name: A name of timm's registry, or `hf-hub:...` or `local-dir:...`.
        flag: The flag it came from.
        weights: Whether the model's own weights are taken, and no file that is named beside it.
    """
    with told(f"{flag} {name}", ValueError):
        source, model = timm.models.parse_model_name(name)
    if source is None and not timm.is_model(model.split(".")[0]):
        hint = did_you_mean(model, timm.list_models())
        raise DistillError(f"{flag}: timm has no model named {name!r}.{hint} timm.list_models() names them all.")
    files = sorted(Path(model).glob("*.safetensors")) if weights and source == "local-dir" else []
    if len(files) > 1 and not any(file.name.endswith("model.safetensors") for file in files):
        # As the folder of a run, whose first file by name is not its best epoch.
        raise DistillError(
            f"{flag} {name}: expected a folder with one file of weights, got {len(files)}, of which timm would take"
            f" {files[0].name}: name the file, with --teacher-checkpoint or --initial-checkpoint."
        )


def check_normalisation(config: Mapping[str, Any], who: str) -> None:
    """Refuses a data configuration whose images would not be numbers."""
    mean, std = config["mean"], config["std"]
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise DistillError(f"{who}: expected a finite mean and a positive std of the images, got {mean} and {std}.")


def data_config(
    model: nn.Module, args: Mapping[str, Any] | None = None, cfg: Any = None, *, verbose: bool = False
) -> dict[str, Any]:
    """timm's data configuration of a model, without its warning where grey images have one mean for three colours.

    Args:
        model: A model of timm.
        args: Arguments that override the configuration.
        cfg: Its pretrained configuration; by default the model's own.
        verbose: Whether timm logs it.
    """
    cfg = dict(getattr(model, "pretrained_cfg", None) or {}) if cfg is None else dict(cfg)
    if timm.models.get_model_input_config(model)["input_size"][0] == 1:
        several = {key: cfg[key] for key in ("mean", "std") if isinstance(cfg.get(key), (tuple, list))}
        cfg |= {key: (sum(values) / len(values),) for key, values in several.items()}
    return resolve_input_data_config(model, args, pretrained_cfg=cfg, verbose=verbose)


def create_student(
    args: argparse.Namespace, flag: str = "--model", verbose: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes the model to train and resolves its data configuration; fills in `args.num_classes`.

    Args:
        args: Parsed arguments, after `apply_data_defaults`.
        flag: Where the model was named.
        verbose: Whether the log has the lines of timm's script about both.

    Returns:
        The model, on the CPU, and the data configuration (input size, mean, std, interpolation, crop).
    """
    check_model_name(args.model, flag, weights=args.pretrained and not args.pretrained_path)
    files = {"--initial-checkpoint": args.initial_checkpoint, "--pretrained-path": args.pretrained_path}
    names: set[str] = set()
    for option, path in files.items():
        if path and not os.path.exists(path):
            raise DistillError(f"{option} {path} does not exist: mend the path.")
        # The names in a file of NumPy's are another framework's, which the model translates by itself.
        if path and not (option == "--initial-checkpoint" and path.endswith((".npy", ".npz"))):
            with told(f"{option} {path} cannot be read", Exception, remedy="name a file of weights."), _silently():
                names = set(timm.models.load_state_dict(path))
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    overlay |= args.pretrained_cfg_overlay
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    channels = args.in_chans if args.in_chans is not None else (args.input_size or (None,))[0]
    wanted = {name: getattr(args, flag) for name, flag in MODEL_ARGUMENTS.items()} | {"in_chans": channels}
    # What timm makes of arguments and files fails in every way.
    with told(f"{flag} {args.model} cannot be made with these arguments", Exception):
        resolved = timm.models.resolve_model_input_args(
            args.model, vars(args), pretrained_cfg_overlay=overlay or None, **{**wanted, **args.model_kwargs}
        )
        model = timm.create_model(pretrained=args.pretrained or bool(args.pretrained_path), **resolved)
        if verbose:
            count = sum(p.numel() for p in model.parameters())
            _logger.info(f"Model {timm.models.safe_model_name(args.model)} created, param count:{count}")
        config = data_config(model, vars(args), verbose=verbose)
    if args.pretrained_path:
        _check_filled(model, resolved, args, names)
    if args.initial_checkpoint:
        what = f"--initial-checkpoint {args.initial_checkpoint} does not fit {args.model}"
        with told(what, Exception, remedy="name a checkpoint of that model."):
            timm.models.load_checkpoint(model, args.initial_checkpoint)
    check_normalisation(config, f"{flag} {args.model}")
    if args.naflex_loader and "patch_coord" not in inspect.signature(model.forward).parameters:
        raise DistillError(f"--naflex-loader gives patches, and {args.model} takes images: choose a NaFlex model.")
    with torch.no_grad():
        if args.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    check_weights({f"{flag} {args.model}": model}, "it learns nothing; begin with weights that are numbers.")
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if args.split_bn:
        if args.aug_splits < 2 and not args.resplit:
            raise DistillError("--split-bn keeps statistics for each augmentation split: add --aug-splits N.")
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.sync_bn and PartialState().num_processes > 1:
        model = convert_sync_batchnorm(model)
    return model.to(model_dtype(args)), config


def place(module: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Puts a network on the device, laid out as `--channels-last` says."""
    module.to(device)
    if args.channels_last:
        module.to(memory_format=torch.channels_last)


@contextmanager
def _silently() -> Iterator[None]:
    """What is read a second time is not told of again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_filled(
    model: nn.Module, resolved: Mapping[str, Any], args: argparse.Namespace, names: Collection[str]
) -> None:
    """Refuses a file that leaves weights before the classifier as they are drawn: timm takes what has a place.

    One that has more than the model is told of, as timm does without their number.

    Args:
        model: The model with the file's weights.
        resolved: What it was made with.
        args: Parsed arguments.
        names: Of the weights in the file.
    """
    with undisturbed(gpu=True), _silently():
        # A second time the file gives the same weights, and the random stream others.
        again = dict(timm.create_model(pretrained=True, **resolved).named_parameters())
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    drawn = {name: (p - again[name]).nan_to_num().any() for name, p in model.named_parameters()}
    left = [name for name, differs in drawn.items() if differs and not name.startswith(heads)]
    if left:
        raise DistillError(
            f"--pretrained-path {args.pretrained_path} has no weights for {len(left)} layers of {args.model}, such as"
            f" {left[0]}: it is of another model."
        )
    more = sorted(set(names) - set(model.state_dict()))
    # Under names of its own, which timm translates, nothing can be said.
    if more and all(name in names or name.startswith(heads) for name in model.state_dict()):
        _logger.warning(
            f"--pretrained-path {args.pretrained_path} fills {args.model} and has {len(more)} tensors more, such as"
            f" {more[0]}, which are left out: it may be of another model."
        )


def check_size(model: nn.Module, args: argparse.Namespace, config: Mapping[str, Any], device: torch.device) -> None:
    """Refuses image sizes that a model's layers do not take.

    Args:
        model: The model, on the device and in training mode.
        args: Parsed arguments.
        config: Its data configuration.
        device: Where it is.
    """
    channels, *size = config["input_size"]
    model.eval()
    for height, width in [size, *((side, side) for side in args.train_img_sizes or ())]:
        what = f"{args.model} does not take images of {height} x {width} pixels"
        remedy = "name others, --img-size or --train-img-sizes."
        with told(what, AssertionError, RuntimeError, ValueError, remedy=remedy), torch.no_grad():
            model(torch.zeros(1, channels, height, width, dtype=model_dtype(args), device=device))
    model.train()


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """The training loss that timm's script selects for these arguments.

    Departure: one logit (`--num-classes 1`), which timm's losses do not take without `--task multilabel`, is the score
    of class 1 of two.
    """
    several = args.task == "multilabel"
    one_logit = args.num_classes == 1 and not several
    if one_logit and args.loss != "bce":
        raise DistillError("--num-classes 1: the softmax of one class is always 1, so nothing would learn: --loss bce.")
    if args.aug_splits == 1:
        raise DistillError("--aug-splits: expected 0 or at least 2, got 1.")
    with told("The loss cannot be made with these arguments", Exception):
        stats = load_class_stats(args.class_stats)
        weighting: dict[str, Any] = dict(
            class_stats=stats, power=args.loss_weight_power, beta=args.loss_weight_beta, max_weight=args.loss_weight_max
        )
        weights = {
            kind: resolve_class_weights(getattr(args, f"loss_{kind}"), kind, **weighting)
            for kind in ("class_weight", "pos_weight")
        }
        # Those of other losses are at their defaults, and timm passes them over.
        options: dict[str, Any] = {name: getattr(args, name) for names in LOSS_ARGUMENTS.values() for name in names}
        if args.loss == "db" and stats is not None:
            options["class_counts"], options["num_samples"] = stats
        criterion = create_classification_loss(
            args.loss,
            multi_label=several or one_logit,
            smoothing=args.smoothing,
            soft_targets=uses_mixup(args),
            jsd_splits=args.aug_splits,
            **weights,
            **options,
        )
    for weight in (*weights.values(), options.get("class_counts")):
        if isinstance(weight, Tensor) and len(weight) != args.num_classes:
            raise DistillError(f"Expected {args.num_classes} weights or counts, one for each class, got {len(weight)}.")
    return OneLogit(criterion) if one_logit else criterion


def create_task(
    args: argparse.Namespace, student: nn.Module, criterion: nn.Module, device: torch.device
) -> TrainingTask | None:
    """timm's own distillation, as `--kd-model-name` and its like describe it; None without them."""
    if args.kd_model_name is None:
        return None
    check_model_name(args.kd_model_name, "--kd-model-name", weights=True)
    kind, names = TASK_ARGUMENTS[args.kd_distill_type]
    options = {name: getattr(args, flag) for name, flag in names.items()}
    common: dict[str, Any] = dict(criterion=criterion, device=device, dtype=model_dtype(args))
    common |= dict(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    with told(f"--kd-model-name {args.kd_model_name} does not fit", Exception):
        return kind(student_model=student, teacher_model=args.kd_model_name, **options, **common)


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


def resolve_learning_rate(args: argparse.Namespace, processes: int, mean_batch: float) -> None:
    """Derives `args.lr` from `--lr-base` and the global batch size where no rate is given."""
    if args.lr:
        return
    batch = mean_batch * processes * args.grad_accum_steps
    if not args.lr_base_scale:
        args.lr_base_scale = "sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear"
    ratio = batch / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == "sqrt" else ratio)
    _logger.info(
        f"Learning rate ({args.lr}) calculated from base learning rate ({args.lr_base}) and effective global batch size"
        f" ({batch:g}) with {args.lr_base_scale} scaling."
    )


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer for the model's parameters."""
    what, known = f"--opt {args.opt} cannot be made with these arguments", timm.optim.list_optimizers()
    names = f"timm.optim.list_optimizers() names them all.{did_you_mean(args.opt, known)}"
    unknown = "" if args.opt.lower().removeprefix("lookahead_") in known else names
    # timm would take the letters of a single pattern for patterns.
    one = {k: [v] for k, v in args.opt_kwargs.items() if k == "fallback_list" and isinstance(v, str)}
    with told(what, Exception, remedy=unknown), told(what, IndexError, remedy="it has more --opt-betas."):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs | one)
    if getattr(optimizer, "is_second_order", False) and args.distill:
        raise DistillError(
            f"--opt {args.opt} differentiates the gradients of one loss, and a method has several terms."
        )
    return optimizer


def create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int, *, decreasing: bool
) -> tuple[Any, int]:
    """timm's learning-rate schedule.

    Args:
        args: Parsed arguments.
        optimizer: The optimizer that it steers.
        updates_per_epoch: Optimizer steps in one epoch.
        decreasing: Whether a lower metric is better, to the plateau schedule.

    Returns:
        The scheduler (None for `--sched none`) and the number of epochs with warmup prefix and cooldown.
    """
    options = scheduler_kwargs(args, decreasing_metric=decreasing)
    with told(f"--sched {args.sched} cannot be made with these arguments", Exception):
        # On a small optimizer first, to the end: some flags are wrong in the course of the training alone.
        small = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optimizer.param_groups[0]["lr"])
        trial, epochs = create_scheduler_v2(small, **options, updates_per_epoch=updates_per_epoch)
        for epoch in range(epochs + 1) if trial is not None else ():
            trial.step(epoch, 0.0)
            trial.step_update(epoch * updates_per_epoch)
            if not math.isfinite(rate := small.param_groups[0]["lr"]):
                raise ValueError(f"the learning rate of epoch {epoch} would be {rate}")
        return create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)


def of_stage(args: argparse.Namespace, epochs: int, of: int) -> argparse.Namespace:
    """The arguments of the schedule of one stage: that of the whole run, drawn together to the stage's epochs.

    Args:
        args: Parsed arguments.
        epochs: Epochs of the stage.
        of: Epochs of the whole run, with warmup prefix and cooldown.
    """
    part, share = copy.copy(args), epochs / of
    for name in ("warmup_epochs", "cooldown_epochs", "patience_epochs"):
        setattr(part, name, int(getattr(args, name) * share))
    if args.decay_epochs is None and args.sched == "step":
        part.decay_epochs = 90 * share
    elif args.decay_epochs is not None and args.decay_epochs >= 1:
        part.decay_epochs = args.decay_epochs * share
    if args.lr_stable_timescale is not None:
        part.lr_stable_timescale = args.lr_stable_timescale * share
    part.decay_milestones = [round(milestone * share) for milestone in args.decay_milestones]
    part.epochs = epochs - part.cooldown_epochs - (part.warmup_epochs if args.warmup_prefix else 0)
    return part
