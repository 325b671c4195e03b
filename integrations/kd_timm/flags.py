"""How flags are declared: each module adds those that it reads to the parser of `kd_timm.arguments`."""

from __future__ import annotations

import argparse
import ast
from typing import Any

__all__ = ["AppendKeyValues", "KeyValues", "switch"]


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


def switch(group: Any, *flags: str, help: str) -> None:
    """Adds a flag that is on where it is named."""
    group.add_argument(*flags, action="store_true", default=False, help=help)
