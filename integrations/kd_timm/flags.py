"""The flags of kd-timm-train, from the table `flags.yaml`; a test holds that each of them is read somewhere."""

from __future__ import annotations

import argparse
import ast
import copy
from pathlib import Path
from typing import Any

import yaml

__all__ = ["UNSUPPORTED", "AppendKeyValues", "KeyValues", "add_flags"]

_FLAGS, _refused = yaml.safe_load_all(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds every flag of `flags.yaml`, in its groups."""
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    actions = {"KeyValues": KeyValues, "AppendKeyValues": AppendKeyValues}
    for title, flags in copy.deepcopy(_FLAGS).items():
        group = parser.add_argument_group(title)
        for names, options in flags.items():
            if "action" in options:
                options["action"] = actions.get(options["action"], options["action"])
            elif (kind := options.get("type", type(options.get("default")).__name__)) in types:
                options["type"] = types[kind]
            group.add_argument(*names.split(", "), **options)
