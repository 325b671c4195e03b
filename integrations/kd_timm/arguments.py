"""The command line: timm's flags with timm's names, types and defaults, and the flags of distillation.

The flags stand in `flags.yaml`; one of timm's that nothing reads is refused with a clear error.
"""

from __future__ import annotations

import argparse
import ast
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kd_accelerate.command import explain, with_file

_FLAGS, _refused = yaml.safe_load_all(Path(__file__).with_name("flags.yaml").read_text(encoding="utf-8"))

UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(_refused["unset"]),
    **dict.fromkeys(_refused["switches"], False),
    **_refused["others"],
}
"""The flags of timm's train.py that kd-timm-train does not read, by argparse name, with timm's default."""


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
        earlier = getattr(namespace, self.dest)
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, [*earlier, getattr(namespace, self.dest)])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser: every flag of timm's script that is implemented, and those of distillation."""
    parser = argparse.ArgumentParser(
        prog="kd-timm-train",
        # Else an error stands below a page of flags.
        usage="%(prog)s [DIR] [--FLAG ...]",
        description="Train an image classifier of timm, alone or with knowledge distillation.",
        # A prefix of a flag of timm's must not end up as another of ours (--distill).
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", default="", type=str, metavar="FILE", help="YAML file with default arguments")
    parser.add_argument("data", nargs="?", metavar="DIR", help="path to dataset (positional is deprecated)")
    types: dict[str, Any] = {"int": int, "float": float, "str": str, "count": _count}
    actions = {"KeyValues": KeyValues, "AppendKeyValues": AppendKeyValues}
    for title, flags in copy.deepcopy(_FLAGS).items():
        group = parser.add_argument_group(title)
        for names, options in flags.items():
            if "action" in options:
                options["action"] = actions.get(options["action"], options["action"])
            elif (kind := options.get("type", type(options.get("default")).__name__)) in types:
                options["type"] = types[kind]
            group.add_argument(*names.split(", "), **options)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line over the arguments of `--config`; exits with a message where it cannot.

    Args:
        argv: Arguments; None takes those of the process.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(with_file(parser, argv, UNSUPPORTED))
    if unknown:
        flag = unknown[0].partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") in UNSUPPORTED:
            parser.error(f"{flag} is a flag of timm's train.py that kd-timm-train does not support yet: leave it out")
        parser.error(explain(parser, unknown[0]))
    for name in ("teacher_checkpoint", "teacher_kwargs", "peer_kwargs"):
        owner = name.partition("_")[0]
        if len(getattr(args, name)) > len(getattr(args, owner)):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag}: the i-th belongs to the i-th --{owner}, and there are more of them")
    return args
