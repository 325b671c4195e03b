"""Streams that are looked at before the training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from kd_accelerate.randomness import load_random_state, random_state, undisturbed
from kd_plugins import DistillError


def check_anew(stream: Any) -> None:
    """Refuses what can be read only once, where it is read before the training as well."""
    if isinstance(stream, Iterator):
        raise DistillError(
            f"Expected training data that may be read before the training too, got {type(stream).__name__}, which can"
            " be read only once: give a data set whose every iter() begins anew, as train_dataset."
        )


class Peeked(IterableDataset):
    """A stream whose first rows may be read before the training; its first pass then begins with them.

    Nothing is lost of a stream that can be read once only. Read without workers, rows and collator get the random
    numbers that they would have got without the look.

    Args:
        rows: The stream. With workers, each of which reads it anew, it is read twice at its beginning, unless it is its
            own iterator.
        workers: Of the loader.
    """

    def __init__(self, rows: Any, workers: int) -> None:
        self.rows, self.workers = rows, workers
        self._first: list[Any] = []
        self._rest: Iterator[Any] | None = None
        self._drawn: dict[str, Any] = {}

    def peek(self, number: int) -> list[Any]:
        """The first rows."""
        with undisturbed():
            torch.empty((), dtype=torch.int64).random_()  # A loader that begins draws a seed.
            rest = iter(self.rows)
            first = list(itertools.islice(rest, number))
            if not self.workers or rest is self.rows:
                self._first, self._rest, self._drawn = first, rest, random_state()
        return first

    def __iter__(self) -> Iterator[Any]:
        first, rest, self._first, self._rest = self._first, self._rest, [], None
        if rest is None:
            yield from self.rows
            return
        for left, row in zip(range(len(first) - 1, -1, -1), first, strict=True):
            if left == 0:
                load_random_state(self._drawn)
            yield row
        yield from rest

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        if name == "rows":
            raise AttributeError(name)
        return getattr(self.rows, name)
