"""What the class attributes of a distiller are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kd_plugins.catalog.paper import Paper
from kd_plugins.errors import DistillError

__all__ = ["check_attributes"]


def _words(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(word, str) for word in x)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "paper": (lambda x: x is None or isinstance(x, Paper), "a kd_plugins.Paper, or None"),
    "example": (lambda x: isinstance(x, Mapping), "a dict of options"),
    "tasks": (lambda x: bool(x) and _words(x), "a tuple of names of tasks"),
    "networks": (lambda x: x in ("any", "transformer"), "'any' or 'transformer'"),
    "teachers": (lambda x: x in ("many", "or peers") or _count(x), "a number, 'many' or 'or peers'"),
    **{name: (lambda x: isinstance(x, bool), "True or False") for name in ("peers", "data", "accumulation")},
    "untrained": (lambda x: _words(x), "a tuple of names of parameters"),
    "name": (lambda x: isinstance(x, str), "a text"),
    "task_weight": (lambda x: isinstance(x, (int, float)) and math.isfinite(x), "a finite number"),
}


def check_attributes(cls: type) -> None:
    """Refuses a class attribute of an author's distiller that is not what it should be."""
    for name, (fits, what) in _ATTRIBUTES.items():
        if name in vars(cls) and not isinstance(vars(cls)[name], property) and not fits(vars(cls)[name]):
            raise DistillError(f"Expected {cls.__name__}.{name} to be {what}, got {vars(cls)[name]!r}.")
