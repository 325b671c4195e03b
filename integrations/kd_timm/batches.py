"""The batches of a loader, and the place that a run has come to in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from kd_accelerate.command import signals
from kd_accelerate.randomness import load_random_state, random_state
from kd_plugins import DistillError

_END = object()


class Batches:
    """The batches of a loader, whose place another run can take up.

    A loader draws random numbers where it begins, for the order, and for each batch that it reads, which may be one
    ahead of those it has given. A place therefore is the number of batches, with the random streams as they were before
    the first and before the last of them. Who takes it up reads as many again; with workers each image as it was.

    Args:
        loader: The loader.
        endless: Whether it begins again where it ends.

    Attributes:
        given: How many it has given, since it last began.
    """

    def __init__(self, loader: Any, *, endless: bool = False) -> None:
        self.loader, self.endless = loader, endless
        self.given = 0
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._rows: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._last = random_state(gpu=True)
        if self.given == 0:
            self._first, self._rows = self._last, batches(self.loader)
        batch = next(self._rows, _END)
        if batch is not _END:
            self.given += 1
            return batch
        if not self.endless or self.given == 0:
            raise StopIteration
        self.given = 0
        return next(self)

    def place(self) -> dict[str, Any]:
        """Where it is, as `torch.load` reads it without code."""
        return {"given": self.given, "first": self._first, "last": self._last}

    def take_up(self, place: dict[str, Any]) -> None:
        """Goes to a place; the random streams are then those of a loader that has read, and not of a training.

        Raises:
            DistillError: There are fewer batches.
            Stopped: A signal came to the only process, whose state is as it was.
        """
        for number in range(place["given"]):
            if number in (0, place["given"] - 1):
                load_random_state(place["first" if number == 0 else "last"])
            if next(self, _END) is _END:
                raise DistillError(
                    f"--resume: the run had read {place['given']} batches of its epoch, and there are {number}: give it"
                    " the data and flags of the run."
                )
            if PartialState().num_processes == 1:
                signals.check()


def batches(loader: Any) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        DistillError: A row cannot be read, or not be augmented as the flags say.
    """
    rows = iter(loader)
    try:
        yield from rows
    except (DistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever reads and augments
        # Of a worker process the text is a traceback, with the error in its last line.
        why = (str(error).strip().splitlines() or [""])[-1]
        raise DistillError(
            f"A batch of images cannot be read and augmented ({type(error).__name__}: {why}): mend the data, or the"
            " flags of size and augmentation."
        ) from error
