"""What the author of a method has written: its parts, whether it is whole, what it overrides, what it needs."""

from __future__ import annotations

from typing import Any

from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError
from kd_plugins.reading.view import Needs


def parts(distiller: Distiller) -> dict[str, Distiller]:
    """A method and the methods that it is composed of, by module path."""
    return {name or ".": part for name, part in distiller.named_modules() if isinstance(part, Distiller)}


def overrides(distiller: Distiller, name: str) -> bool:
    """Whether a method, or any part of a composition, has its own implementation of a function of `Distiller`."""
    return any(getattr(type(part), name) is not getattr(Distiller, name) for part in distiller.methods.values())


def check_made(distiller: Any) -> None:
    """Refuses what is no distiller, or one whose author has left out `super().__init__()`."""
    if not isinstance(distiller, Distiller):
        raise DistillError(f"Expected a distiller, got {distiller!r}: make one, create_distiller(NAME).")
    if "progress" not in distiller.__dict__:
        raise DistillError(f"{type(distiller).__name__}.__init__ does not call super().__init__(): begin it with that.")


def needs_of(distiller: Distiller) -> Needs:
    """What a method needs now, checked."""
    needs = distiller.needs()
    if not isinstance(needs, Needs):
        raise DistillError(f"Expected needs() of {distiller.name} to return Needs(...), got {type(needs).__name__}.")
    return needs
