"""The one exception of this package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from textwrap import shorten
from typing import Any


class DistillError(ValueError):
    """Something a user can mend: the message says what was expected, what came, and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown name, empty when nothing is close.

    >>> did_you_mean("temprature", ["temperature", "alpha"])
    ' Did you mean temperature?'
    >>> did_you_mean("x", ["temperature"])
    ''
    """
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def check_built(method: Any, **built: Any) -> None:
    """Refuses options that were 0 when a method was set up, which so has built nothing for them, and no longer are.

    Args:
        method: The method.
        built: By option, whether what it needs is there.
    """
    for option, there in built.items():
        if getattr(method, option) and not there:
            raise DistillError(f"{option} was 0 when {method.name} was set up: begin with a value above 0.")


def check_any(method: Any, *weights: str) -> None:
    """Refuses options that are all 0, with which a method would teach nothing.

    Args:
        method: The method.
        weights: The options.
    """
    if not any(getattr(method, name) for name in weights):
        raise DistillError(f"{method.name} has nothing to distil where {', '.join(weights)} are 0: give one a value.")


@contextmanager
def told(what: str, *errors: type[BaseException], remedy: str = "") -> Iterator[None]:
    """Says in one sentence what the errors of a library mean for a user.

    >>> with told("The vocabulary cannot be read", KeyError, remedy="name another"):
    ...     {}["words"]
    Traceback (most recent call last):
    kd_plugins.errors.DistillError: The vocabulary cannot be read (KeyError: 'words'): name another

    Args:
        what: What cannot be done.
        errors: What the library raises where a user can mend it.
        remedy: What to do, where the error's own text does not say; its type is told, too.
    """
    try:
        yield
    except DistillError:
        raise
    except errors as error:
        kind, text = type(error).__name__, shorten(" ".join(str(error).split()), 400, placeholder=" ...")
        # Some say a key, or nothing.
        said = text if " " in text else f"{kind} {text}".rstrip() + "."
        raise DistillError(what + (f" ({kind}: {text}): {remedy}" if remedy else f": {said}")) from error
