"""The command line: timm's flags with timm's names, types and defaults, and the flags of distillation.

The flags stand in `flags.yaml`, with those that need others, that `--distill` refuses, or that cannot be.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml

from kd_accelerate.command import explain, flags, with_file
from kd_plugins.catalog.values import AtLeastOne, NonNegative, Positive, Range, Share, convert

_FLAGS, _RULES = yaml.safe_load_all(Path(__file__).with_name("flags.yaml").read_text(encoding="utf-8"))
_OURS = ("Tracker parameters", "Uncertainty parameters", "Distillation parameters")

REFUSED: dict[str, str] = {name: reason for name, (_, reason) in _RULES["refused"].items()}
"""The flags of timm's train.py that kd-timm-train refuses, by argparse name, and why."""


class KeyValues(argparse.Action):
    """Reads `key=value ...` into a dict, values as Python literals where they are such, else as text.

    Where the default is a list, each use of the flag adds a dict to it.
    """

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
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*earlier, pairs] if isinstance(earlier, list) else pairs)


# What a flag's text may be, by the type in flags.yaml: an annotation, as options of distillers have it, and its words.
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a finite number"),
    "count": (AtLeastOne, "a whole number, at least 1"),
    "whole": (Annotated[int, Range(low=0)], "a whole number, at least 0"),
    "seed": (Annotated[int, Range(low=0, high=2**32 - 1)], f"a whole number from 0 to {2**32 - 1}"),
    "share": (Share, "a number from 0 to 1"),
    "part": (Annotated[float, Range(low=0, below=1)], "a number from 0 to below 1"),
    "nonnegative": (NonNegative, "a number, at least 0"),
    "positive": (Positive, "a number above 0"),
}


def _read(kind: str, text: str) -> Any:
    """The value that a flag of this type has on the command line."""
    hint, words = _TYPES[kind]
    try:
        return convert(text.strip(), hint, text=True)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {words}, got {text}") from None


def build_parser() -> argparse.ArgumentParser:
    """The parser: every flag of timm's script that is implemented, and those of distillation."""
    parser = argparse.ArgumentParser(
        prog="kd-timm-train",
        # What is said of a typo should not follow sixty lines of flags.
        usage="kd-timm-train --data-dir DIR --model MODEL [--distill NAME --teacher MODEL] ... (--help for all flags)",
        description="Train an image classifier of timm, alone or with knowledge distillation.",
        # What timm's users abbreviate is written out before, so that no flag of ours makes it ambiguous.
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", default="", type=str, metavar="FILE", help="YAML file with default arguments")
    parser.add_argument("data", nargs="?", metavar="DIR", help="path to dataset (positional is deprecated)")
    parser.register("action", "KeyValues", KeyValues)
    for kind in _TYPES:
        parser.register("type", kind, partial(_read, kind))
    for title, group_flags in copy.deepcopy(_FLAGS).items():
        group = parser.add_argument_group(title)
        for names, options in group_flags.items():
            if (kind := type(options.get("default")).__name__) in _TYPES:
                options.setdefault("type", kind)
            if options.get("default") not in (None, "", [], {}, True) and "default" not in options["help"]:
                options["help"] += " (default: %(default)s)"
            group.add_argument(*names.split(", "), **options)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line over the arguments of `--config`; exits with a message where it cannot.

    Args:
        argv: Arguments; None takes those of the process.
    """
    parser = build_parser()
    words = [_in_full(parser, word) for word in (sys.argv[1:] if argv is None else argv)]
    args, unknown = parser.parse_known_args(with_file(parser, words, _RULES["refused"]))
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--").replace("-", "_")
        if name in REFUSED:
            parser.error(f"{as_flag(name)}: {REFUSED[name]}")
        parser.error(explain(parser, unknown[0]))
    for name in ("teacher_checkpoint", "teacher_kwargs", "peer_kwargs"):
        owner = name.partition("_")[0]
        if len(getattr(args, name)) > len(getattr(args, owner)):
            parser.error(f"{as_flag(name)}: the i-th belongs to the i-th --{owner}, and there are more of them")
    _resolve(parser, args)
    _check(parser, args)
    return args


def as_flag(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def _in_full(parser: argparse.ArgumentParser, word: str) -> str:
    """A word of the command line; what abbreviates one flag of timm's is written out."""
    name, equals, value = word.partition("=")
    if len(name) < 3 or not name.startswith("--") or name in flags(parser):
        return word
    timms = [names.split(", ") for title, group in _FLAGS.items() if title not in _OURS for names in group]
    meant = [flag for names in timms for flag in names if flag.startswith(name)]
    if len(meant) > 1:
        parser.error(f"{name} is short for {', '.join(meant)}: write out which")
    return meant[0] + equals + value if meant else word


def _resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what follows from other flags: the loss, and the defaults of the task."""
    for given, loss in (("bce_loss", "bce"), ("jsd_loss", "jsd")):
        if getattr(args, given):
            if args.loss not in (None, loss):
                parser.error(f"{as_flag(given)} and --loss {args.loss} are two losses: name one")
            args.loss = loss
    if args.bce_pos_weight is not None:
        if args.loss_pos_weight not in (None, str(args.bce_pos_weight)):
            parser.error("--bce-pos-weight and --loss-pos-weight are two weights of the same: give one")
        args.loss_pos_weight = str(args.bce_pos_weight)
    several = args.task == "multilabel"
    if args.smoothing is None:
        args.smoothing = 0.0 if several else 0.1
    args.eval_metric = args.eval_metric or ("map" if several else "top1")


def _given(args: argparse.Namespace, owner: str, changed: set[str]) -> bool:
    """Whether a flag, or a flag with this value, was given."""
    name, _, value = owner[2:].replace("-", "_").partition(" ")
    return getattr(args, name) == value if value else name in changed


def _check_policy(parser: argparse.ArgumentParser, policy: str) -> None:
    """Refuses a section of `--aa` that timm would pass over."""
    name, *sections = policy.split("-")
    for section in sections:
        named = name == "rand" and re.fullmatch("t[a-z0-9]+", section)
        if not (named or re.fullmatch(r"(?:[mnpwdab]|mstd|mmax|inc)(?:\d+\.?\d*|\.\d+)", section)):
            parser.error(f"--aa {policy}: expected a letter and a number in {section!r}, as in rand-m9-mstd0.5-inc1")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags that would do nothing, or that do not go together."""
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for owners, dependent in _RULES["needs"].items():
        idle = sorted(changed & set(dependent))
        if idle and not any(_given(args, owner, changed) for owner in owners.split(" or ")):
            parser.error(f"{as_flag(idle[0])} does nothing without {owners}")
    for name in ("scale", "ratio", "cutmix_minmax"):
        low, high = getattr(args, name) or (0, 1)
        if low > high or not high:
            parser.error(f"{as_flag(name)}: expected the smaller number first and the larger above 0, got {low} {high}")
    if args.aa:
        _check_policy(parser, args.aa)
    for owner, reasons in _RULES["alone"].items():
        alone = sorted(changed & set(reasons)) if _given(args, owner, changed) else []
        if alone:
            parser.error(f"{as_flag(alone[0])} does not go with {owner}: {reasons[alone[0]]}")
    if args.cache_teacher and args.reprob and not args.no_prefetcher:
        parser.error(
            "--reprob erases on the device, a batch at a time, which --cache-teacher cannot replay: add"
            " --no-prefetcher, with which every image is erased by itself"
        )
    for one, other in _RULES["exclude"]:
        if {one, other} <= changed:
            parser.error(f"{as_flag(one)} and {as_flag(other)} exclude each other")
