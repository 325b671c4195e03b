"""Streams: further ones of training batches, drawn from held-out rows, and those that are looked at beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from kd_accelerate.randomness import load_random_state, random_state, seeded, undisturbed
from kd_plugins import Distiller, DistillError
from kd_plugins.binding import needs_in
from kd_plugins.host import world
from kd_plugins.states import read_json, write_json


def split(rows: int, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Splits the rows of a training set into the streams' shares and, under the name `""`, the rest.

    >>> {name: len(rows) for name, rows in split(10, {"search": 0.5}, seed=0).items()}
    {'search': 5, '': 5}
    """
    if sum(shares.values()) >= 1:
        raise DistillError(f"Expected the streams' shares to leave rows to train on, got {dict(shares)}.")
    order = iter(torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist())
    parts: dict[str, list[int]] = {}
    for name, share in shares.items():
        size = round(rows * share)
        if size == 0:
            raise DistillError(
                f"The stream {name!r} gets a share of {share} of {rows} rows, which is none: use more data."
            )
        parts[name] = sorted(islice(order, size))
    return parts | {"": sorted(order)}


class StagedDataset(Dataset):
    """A training set of which some stages of a distillation leave rows to other streams.

    It keeps its length; in a stage with streams, positions count through the rows that are left. The host's sampler,
    shuffling and epochs so stay as they are.

    Args:
        dataset: The training set.
        distiller: Its schedule tells the stage of an epoch.
        epoch_steps: Updates in an epoch.
        seed: Of the split.
        wrap: Makes the item of a row: `wrap(item, row)`.
    """

    def __init__(
        self,
        dataset: Any,
        distiller: Distiller,
        epoch_steps: int,
        seed: int,
        wrap: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.dataset, self.distiller, self.wrap = dataset, distiller, wrap
        self.epoch_steps, self.seed = epoch_steps, seed
        # In shared memory, where workers that outlive an epoch see it change.
        self._rows = torch.arange(len(dataset)).share_memory_()
        self._left = torch.tensor(len(dataset)).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Takes the rows of the stage that an epoch belongs to; a loader or its host calls it before every epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        table = self.distiller.progress.table
        stage = table.index(epoch * self.epoch_steps) if table else 0
        shares = needs_in(self.distiller, stage).streams
        rows = split(len(self.dataset), shares, self.seed)[""] if shares else range(len(self.dataset))
        self._rows[: len(rows)] = torch.tensor(rows)
        self._left.fill_(len(rows))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        if position >= len(self):
            raise IndexError(position)  # What ends a loop over the rows.
        row = int(self._rows[int(position) % int(self._left)])
        item = self.dataset[row]
        return item if self.wrap is None else self.wrap(item, row)


class ReplayedDataset(Dataset):
    """A training set whose augmentation follows from row and view, so that it can be shown again.

    The view is the number of the epoch, modulo the number of views, wherever a run begins.

    Args:
        dataset: The training set.
        views: How many of each row there are.
    """

    def __init__(self, dataset: Any, views: int = 1) -> None:
        self.dataset, self.views = dataset, views
        # In shared memory, where workers that outlive an epoch see it change.
        self._view = torch.tensor(0).share_memory_()

    @property
    def view(self) -> int:
        """The number of the view that is shown."""
        return int(self._view)

    def set_epoch(self, epoch: int) -> None:
        """Takes the view of an epoch; a loader or its host calls it before every epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._view.fill_(epoch % self.views)

    def item(self, row: int, view: int) -> Any:
        """A view of a row."""
        with seeded(row, view):
            return self.dataset[row]

    def __len__(self) -> int:
        return len(self.dataset)


class Streams:
    """Endless streams of batches over held-out rows, shuffled anew in every pass and sharded over the processes.

    Args:
        dataset: The training set; its items are made where they are drawn, without workers.
        shares: Share of the training set of each stream.
        batch_size: Examples in a batch of one process.
        collate: Makes a batch of items.
        seed: Of the split and the shuffling.
        wrap: Makes the item of a row: `wrap(item, row)`.
    """

    def __init__(
        self,
        dataset: Any,
        shares: Mapping[str, float],
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        wrap: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.collate, self.seed, self.wrap = dataset, batch_size, collate, seed, wrap
        self.rows = split(len(dataset), shares, seed)
        self.drawn = dict.fromkeys(shares, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def draw(self, name: str) -> Any:
        """This process's next batch of a stream."""
        rank, processes = world()
        first = (self.drawn[name] * processes + rank) * self.batch_size
        self.drawn[name] += 1
        rows = [self._row(name, first + i) for i in range(self.batch_size)]
        items = [self.dataset[row] for row in rows]
        return self.collate(items if self.wrap is None else list(map(self.wrap, items, rows)))

    def _row(self, name: str, position: int) -> int:
        rows = self.rows[name]
        turn, place = divmod(position, len(rows))
        if self._orders.get(name, (-1, []))[0] != turn:
            generator = torch.Generator().manual_seed(self.seed + 1 + turn)
            self._orders[name] = turn, torch.randperm(len(rows), generator=generator).tolist()
        return rows[self._orders[name][1][place]]

    def save(self, folder: str | Path) -> None:
        """Writes how far every stream has been drawn."""
        write_json(Path(folder) / "streams.json", self.drawn)

    def load(self, folder: str | Path) -> None:
        """Takes up what `save` wrote."""
        self.drawn = read_json(Path(folder) / "streams.json")


# Streams that are looked at before the training


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
            first = list(islice(rest, number))
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
