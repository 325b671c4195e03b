"""Training rows with what a distillation asks beside them: their numbers, and the same view of an image again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_accelerate.streams import ReplayedDataset, StagedDataset


class Targets(NamedTuple):
    """Labels, with what a distillation asks beside them.

    Attributes:
        labels: Targets of timm's loader.
        index: Row numbers of the examples, where a distiller asks for them.
        told: What the teachers say of the images, where `--cache-teacher` holds it: their logits, or the highest of
            them and their classes, and layers.
    """

    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]
    told: tuple[Tensor, ...] = ()

    def to(self, *args: Any, **kwargs: Any) -> Targets:
        """All on another device, as timm's prefetcher asks of a target."""
        index = None if self.index is None else self.index.to(*args, **kwargs)
        return Targets(self.labels.to(*args, **kwargs), index, tuple(x.to(*args, **kwargs) for x in self.told))


class Transformed:
    """timm's loader sets the transform of what it is given; here it is that of the whole data set."""

    dataset: Any

    @property
    def transform(self) -> Any:
        """The transform of the whole data set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


class Rows(Transformed, Dataset[Any]):
    """Some rows of a data set, optionally with their numbers in the whole of it.

    Args:
        dataset: The whole data set; its `transform` is shared.
        rows: Row numbers.
        index: Whether an item carries its row number.
    """

    def __init__(self, dataset: Any, rows: Sequence[int], index: bool = False) -> None:
        self.dataset, self.rows, self.index = dataset, rows, index

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        row = self.rows[item]
        return numbered(self.dataset[row], row) if self.index else self.dataset[row]

    def __len__(self) -> int:
        return len(self.rows)


class StagedRows(Transformed, StagedDataset):
    """The training set of a distillation, whose stages may hold rows out for other streams."""


class Replayed(Transformed, ReplayedDataset):
    """A training set whose views are shown again, with what the teachers say of them.

    Attributes:
        answers: What they say of a view of a row; then an item carries it.
    """

    answers: Callable[[int, int], tuple[Tensor, ...]] | None = None

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        view, row = self.view, int(row)
        item: tuple[Any, Any] = self.item(row, view)
        return item if self.answers is None else (*item, self.answers(view, row))


class CollateTargets:
    """Collates images and labels with timm's collate function, and what a distillation asks beside them.

    Args:
        collate: timm's.
        index: Whether the last of an item is its row number.
        told: Whether the third of an item is what the teachers say of it.
    """

    def __init__(self, collate: Callable[[Any], tuple[Tensor, Tensor]], *, index: bool, told: bool) -> None:
        self.collate, self.index, self.told = collate, index, told

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Targets]:
        images, labels = self.collate([sample[:2] for sample in samples])
        index = torch.tensor([sample[-1] for sample in samples]) if self.index else None
        told = zip(*(sample[2] for sample in samples), strict=True) if self.told else ()
        return images, Targets(labels, index, tuple(map(torch.stack, told)))


def numbered(item: tuple[Any, Any], row: int) -> tuple[Any, Any, int]:
    return (*item, row)
