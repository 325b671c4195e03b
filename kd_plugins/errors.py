"""The one exception of this package."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["DistillError", "did_you_mean"]


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
