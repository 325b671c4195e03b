"""How flags are declared: each module adds those that it reads to the parser of `kd_timm.arguments`."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["AppendKeyValues", "KeyValues", "flag_group"]


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


def flag_group(parser: argparse.ArgumentParser, title: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A new group of flags: the functions that add one with a value, and one that is on where it is named."""
    add = parser.add_argument_group(title).add_argument
    return add, partial(add, action="store_true")
