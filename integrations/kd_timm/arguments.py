"""The command line: timm's flags with timm's names, types and defaults, and the flags of distillation.

One function a group of timm's script. A flag that is not implemented is not accepted: it stands in
`kd_timm.unsupported.UNSUPPORTED`, moves into its group here once something reads it, and until then gets a clear error.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

import yaml

from kd_plugins.errors import DistillError, did_you_mean
from kd_timm.unsupported import UNSUPPORTED

__all__ = ["build_parser", "parse_args"]


class KeyValues(argparse.Action):
    """Reads `key=value ...` into a dict, values as Python literals where they are such, else as text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = {}
        for item in values:
            key, equals, value = item.partition("=")
            if not equals or not key:
                parser.error(f"{option_string} expects key=value, got {item!r}")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


class AppendKeyValues(KeyValues):
    """`key=value ...`, once for each use of the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier = list(getattr(namespace, self.dest) or [])
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, [*earlier, getattr(namespace, self.dest)])


def _switch(group: Any, *flags: str, help: str) -> None:
    group.add_argument(*flags, action="store_true", default=False, help=help)


def _dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR", help="path to dataset (positional is deprecated)")
    group = parser.add_argument_group("Dataset parameters")
    add = group.add_argument
    add("--data-dir", metavar="DIR", help="path to dataset (root dir)")
    add(
        "--dataset",
        default="",
        metavar="NAME",
        help='dataset type + name ("<type>/<name>"); empty: a folder or tar of images; "digits": scikit-learn\'s'
        " handwritten digits, also taken when no data is named",
    )
    add("--train-split", default="train", metavar="NAME", help="dataset train split")
    add("--val-split", default="validation", metavar="NAME", help="dataset validation split")
    _switch(group, "--dataset-download", help="allow download for torch/ and tfds/ datasets that support it")
    add("--class-map", default="", type=str, metavar="FILENAME", help="path to class to idx mapping file")
    add("--input-img-mode", type=str, help="image conversion mode for input images")
    add("--input-key", type=str, help="dataset key for input images")
    add("--target-key", type=str, help="dataset key for target labels")
    _switch(group, "--dataset-trust-remote-code", help="allow a hub dataset to run code of its repository")


def _model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Model parameters")
    add = group.add_argument
    add("--model", default="resnet50", type=str, metavar="MODEL", help="name of the model (the student) to train")
    _switch(group, "--pretrained", help="start with the published weights")
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
    _switch(group, "--channels-last", help="use channels_last memory layout")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps to accumulate gradients over")
    _switch(group, "--grad-checkpointing", help="gradient checkpointing through the model's blocks")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, help="further arguments of the model")
    add("--head-init-scale", type=float, help="head initialization scale")
    add("--head-init-bias", type=float, help="head initialization bias value")
    add("--torchcompile", nargs="?", type=str, const="inductor", help="compile with this backend (default: inductor)")
    add("--torchcompile-mode", type=str, help="torch.compile mode")


def _device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Device parameters")
    add = group.add_argument
    add("--device", default="cuda", type=str, help="cuda, cuda:N or cpu; falls back to cpu where there is no GPU")
    _switch(group, "--amp", help="mixed precision training")
    add("--amp-dtype", default="float16", type=str, help="lower precision of --amp: float16 or bfloat16")
    _switch(group, "--no-ddp-bb", help="do not broadcast buffers in DistributedDataParallel")


def _optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Optimizer parameters")
    add = group.add_argument
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


def _schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Learning rate schedule parameters")
    add = group.add_argument
    add("--sched", type=str, default="cosine", metavar="SCHEDULER", help="learning rate schedule")
    _switch(group, "--sched-on-updates", help="step the schedule on every update instead of at epoch ends")
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
    _switch(group, "--warmup-prefix", help="exclude warmup from the decay schedule")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="epochs at min_lr after the schedule")
    add("--patience-epochs", type=int, default=10, metavar="N", help="patience of the plateau schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="decay rate of the learning rate")


def _augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Augmentation and regularization parameters")
    add = group.add_argument
    _switch(group, "--no-aug", help="disable all training augmentation")
    add("--train-crop-mode", type=str, help="crop mode in training")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="PCT", help="random resize scale")
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="RATIO", help="random aspect ratio")
    add("--hflip", type=float, default=0.5, help="horizontal flip probability")
    add("--vflip", type=float, default=0.0, help="vertical flip probability")
    add("--color-jitter", type=float, default=0.4, metavar="PCT", help="color jitter factor")
    add("--color-jitter-prob", type=float, metavar="PCT", help="probability of applying color jitter")
    add("--grayscale-prob", type=float, metavar="PCT", help="probability of grayscale conversion")
    add("--gaussian-blur-prob", type=float, metavar="PCT", help="probability of gaussian blur")
    add("--aa", type=str, metavar="NAME", help='AutoAugment policy, e.g. "rand-m9-mstd0.5"')
    _switch(group, "--bce-loss", help="binary cross entropy, with or without Mixup/CutMix")
    _switch(group, "--bce-sum", help="sum over classes in the binary cross entropy")
    add("--bce-target-thresh", type=float, help="threshold for binarizing softened targets of --bce-loss")
    add("--bce-pos-weight", type=float, help="positive weighting of --bce-loss")
    add("--reprob", type=float, default=0.0, metavar="PCT", help="random erase probability")
    add("--remode", type=str, default="pixel", help="random erase mode")
    add("--recount", type=int, default=1, help="random erase count")
    add("--mixup", type=float, default=0.0, help="mixup alpha, enabled if > 0")
    add("--cutmix", type=float, default=0.0, help="cutmix alpha, enabled if > 0")
    add("--cutmix-minmax", type=float, nargs="+", help="cutmix min/max ratio, overrides alpha")
    add("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are enabled")
    add("--mixup-mode", type=str, default="batch", help='"batch", "pair" or "elem"')
    add("--mixup-off-epoch", default=0, type=int, metavar="N", help="turn mixup off after this epoch")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--train-interpolation", type=str, default="random", help="training interpolation")
    add("--drop", type=float, default=0.0, metavar="PCT", help="dropout rate")
    add("--drop-path", type=float, metavar="PCT", help="drop path rate")
    add("--drop-block", type=float, metavar="PCT", help="drop block rate")


def _norm_and_ema(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Batch norm parameters")
    group.add_argument("--bn-momentum", type=float, help="BatchNorm momentum override")
    group.add_argument("--bn-eps", type=float, help="BatchNorm epsilon override")
    _switch(group, "--sync-bn", help="synchronized BatchNorm")
    group.add_argument(
        "--dist-bn",
        type=str,
        default="reduce",
        help='BatchNorm statistics between processes: "broadcast", "reduce", ""',
    )
    group = parser.add_argument_group("Model exponential moving average parameters")
    _switch(group, "--model-ema", help="track a moving average of the weights; it is what is evaluated and exported")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="decay of the moving average")
    _switch(group, "--model-ema-warmup", help="warm up the decay")


def _misc(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Miscellaneous parameters")
    add = group.add_argument
    add("--seed", type=int, default=42, metavar="S", help="random seed")
    add("--worker-seeding", type=str, default="all", help="worker seed mode")
    add("--log-interval", type=int, default=50, metavar="N", help="updates between log lines")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between validation and checkpointing")
    add("--checkpoint-hist", type=int, default=10, metavar="N", help="number of checkpoints to keep")
    add("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes")
    _switch(group, "--pin-mem", help="pin CPU memory in the data loader")
    add("--output", default="", type=str, metavar="PATH", help="output folder (default: ./output/train)")
    add("--experiment", default="", type=str, metavar="NAME", help="sub-folder of the output folder")
    add("--eval-metric", default="top1", type=str, help="metric that picks the best checkpoint: top1, top5 or loss")


def _distillation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Distillation parameters")
    add = group.add_argument
    add("--distill", type=str, metavar="NAME", help="distiller, or several joined with +; see `kd-plugins list`")
    add("--distill-args", nargs="*", default=[], metavar="K=V", help="options of the distiller; see `kd-plugins info`")
    add("--teacher", action="append", default=[], metavar="MODEL", help="teacher model (repeatable)")
    add(
        "--teacher-checkpoint",
        action="append",
        default=[],
        metavar="PATH",
        help='weights of the i-th teacher ("": the published ones)',
    )
    add(
        "--teacher-kwargs",
        nargs="*",
        default=[],
        action=AppendKeyValues,
        metavar="K=V",
        help="further arguments of the i-th teacher model (repeatable)",
    )
    add("--peer", action="append", default=[], metavar="MODEL", help="model trained together with --model (repeatable)")
    add(
        "--peer-kwargs",
        nargs="*",
        default=[],
        action=AppendKeyValues,
        metavar="K=V",
        help="further arguments of the i-th peer (repeatable); default --model-kwargs for the student's architecture",
    )


_GROUPS = (_dataset, _model, _device, _optimizer, _schedule, _augmentation, _norm_and_ema, _misc, _distillation)


def build_parser() -> argparse.ArgumentParser:
    """The parser: every flag of timm's script that is implemented, and those of distillation."""
    parser = argparse.ArgumentParser(
        prog="kd-timm-train",
        description="Train an image classifier of timm, alone or with knowledge distillation.",
        # A prefix of a flag of timm's must not end up as another of ours (--distill).
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", default="", type=str, metavar="FILE", help="YAML file with default arguments")
    for add_group in _GROUPS:
        add_group(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line over the defaults of `--config`; exits with a message where it cannot.

    Args:
        argv: Arguments; None takes those of the process.
    """
    parser = build_parser()
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("-c", "--config", default="")
    path = config.parse_known_args(argv)[0].config
    if path:
        try:
            parser.set_defaults(**_read_config(parser, path))
        except DistillError as error:
            parser.error(str(error))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_explain(parser, unknown[0]))
    if len(args.teacher_checkpoint) > len(args.teacher):
        parser.error("--teacher-checkpoint: the i-th belongs to the i-th --teacher, and there are more of them")
    if len(args.teacher_kwargs) > len(args.teacher):
        parser.error("--teacher-kwargs: the i-th belongs to the i-th --teacher, and there are more of them")
    if len(args.peer_kwargs) > len(args.peer):
        parser.error("--peer-kwargs: the i-th belongs to the i-th --peer, and there are more of them")
    return args


def _explain(parser: argparse.ArgumentParser, word: str) -> str:
    flag = word.partition("=")[0]
    if flag.startswith("--") and flag[2:].replace("-", "_") in UNSUPPORTED:
        return f"{flag} is a flag of timm's train.py that kd-timm-train does not support yet: leave it out"
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    return f"unrecognized argument {word}.{did_you_mean(flag, known)}"


def _read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise DistillError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DistillError(f"--config {path}: expected a mapping of argument names to values.")
    actions = {a.dest: a for a in parser._actions if a.dest != "help"}
    checked = {}
    for key, value in values.items():
        dest = str(key).replace("-", "_")
        if dest in actions:
            checked[dest] = _config_value(actions[dest], value, f"--config {path}: {key}")
        elif dest not in UNSUPPORTED:
            raise DistillError(f"--config {path}: unknown argument {key!r}.{did_you_mean(dest, actions)}")
        # A file that timm's own script wrote names every flag; one at its default asks for nothing.
        elif value != UNSUPPORTED[dest]:
            raise DistillError(f"--config {path}: {key} is a flag of timm's that is not supported yet: leave it out.")
    return checked


def _config_value(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None or value == action.default:
        return value
    if isinstance(action, KeyValues):
        fits = isinstance(value, list) if isinstance(action, AppendKeyValues) else isinstance(value, dict)
    elif action.nargs == 0:
        fits = isinstance(value, bool)
    elif action.nargs in ("+", "*", 3) or isinstance(action, argparse._AppendAction):
        fits = isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value)
    else:
        fits = not isinstance(value, (dict, list, bool))
    if not fits:
        raise DistillError(f"{where} cannot be {value!r}: write it as on the command line.")
    convert: Any = action.type or (lambda v: v)
    try:
        if isinstance(action, KeyValues) or action.nargs == 0:
            return value
        return [convert(v) for v in value] if isinstance(value, list) else convert(value)
    except (TypeError, ValueError) as error:
        raise DistillError(f"{where} cannot be {value!r}: {error}") from error
