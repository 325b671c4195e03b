"""Rows that a transform augments, shown again with what the teachers say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kd_accelerate.streams import ReplayedDataset
from kd_plugins import DistillError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Views"]

_LOOKED_AT = 16


class Views(ReplayedDataset):
    """Rows that a transform augments, each view with what the teachers say of it, as `cache_teacher` makes them."""

    answers: Sequence[Dataset]

    def __getitem__(self, row: int) -> dict[str, Any]:
        view, row = self.view, int(row)
        return {**self.item(row, view), **self.answers[view][row]}

    @property
    def column_names(self) -> list[str]:
        """Those of the rows, and those of the teachers."""
        return [*self.dataset.column_names, *self.answers[0].column_names]

    @property
    def info(self) -> Any:
        """The description, which tells of the teachers."""
        return self.answers[0].info

    def sample(self) -> str:
        """Changes with the views of some rows; refuses a transform that cannot be replayed."""
        looks = [(number * len(self) // _LOOKED_AT, number % self.views) for number in range(_LOOKED_AT)]
        digests = [hashlib.sha256(b"".join(_bytes(self.item(*look)) for look in looks)).hexdigest() for _ in range(2)]
        if digests[0] != digests[1]:
            raise DistillError(
                "Expected a transform whose random numbers are Python's, NumPy's or torch's, got one that shows another"
                " view when it is asked for the same: it draws from a generator of its own, so train without a cache."
            )
        return digests[0]


def _bytes(value: Any) -> bytes:
    """What a value of a row is made of, so that another one has others."""
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _bytes(value[key]) for key in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    # Of numbers and words, of arrays and of images of PIL.
    return np.asarray(value).tobytes()
