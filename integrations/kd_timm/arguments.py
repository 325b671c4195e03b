"""The command line: timm's flags with timm's names, types and defaults, and the flags of distillation.

Each module declares the flags that it reads (`add_arguments`). A flag that nothing reads is not accepted: it stands in
`kd_timm.unsupported.UNSUPPORTED`, and gets a clear error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from kd_plugins.errors import DistillError, did_you_mean
from kd_timm import build, data, distillation, setup, trackers
from kd_timm.compat import parser_actions
from kd_timm.flags import AppendKeyValues, KeyValues
from kd_timm.unsupported import UNSUPPORTED

__all__ = ["build_parser", "parse_args"]


def build_parser() -> argparse.ArgumentParser:
    """The parser: every flag of timm's script that is implemented, and those of distillation."""
    parser = argparse.ArgumentParser(
        prog="kd-timm-train",
        description="Train an image classifier of timm, alone or with knowledge distillation.",
        # A prefix of a flag of timm's must not end up as another of ours (--distill).
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", default="", type=str, metavar="FILE", help="YAML file with default arguments")
    for module in (data, build, setup, trackers, distillation):
        module.add_arguments(parser)
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
    for name in ("teacher_checkpoint", "teacher_kwargs", "peer_kwargs"):
        owner = name.partition("_")[0]
        if len(getattr(args, name)) > len(getattr(args, owner)):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag}: the i-th belongs to the i-th --{owner}, and there are more of them")
    return args


def _explain(parser: argparse.ArgumentParser, word: str) -> str:
    flag = word.partition("=")[0]
    if flag.startswith("--") and flag[2:].replace("-", "_") in UNSUPPORTED:
        return f"{flag} is a flag of timm's train.py that kd-timm-train does not support yet: leave it out"
    known = [
        option for action in parser_actions(parser).values() for option in action.option_strings if option[:2] == "--"
    ]
    return f"unrecognized argument {word}.{did_you_mean(flag, known)}"


def _read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise DistillError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DistillError(f"--config {path}: expected a mapping of argument names to values.")
    actions = parser_actions(parser)
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
    elif action.nargs in ("+", "*", 3) or isinstance(action.default, list):
        fits = isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value)
    else:
        fits = not isinstance(value, (dict, list, bool))
    if not fits:
        raise DistillError(f"{where} cannot be {value!r}: write it as on the command line.")
    if isinstance(action, KeyValues) or action.nargs == 0:
        return value
    convert: Any = action.type or str
    try:
        # As text, as it comes from the command line: 1.5 is no number of epochs.
        return [convert(str(v)) for v in value] if isinstance(value, list) else convert(str(value))
    except (TypeError, ValueError) as error:
        raise DistillError(f"{where} cannot be {value!r}: {error}") from error
