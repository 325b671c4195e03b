"""Teachers are asked about rows, as they lie or as a transform shows them; what they say becomes columns."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from kd_accelerate.cached import check_twice
from kd_accelerate.streams import ReplayedDataset
from kd_plugins import Batch, DistillError, Net, Reads
from kd_plugins import functional as KF
from kd_plugins.reading.network import adapt
from kd_plugins.reading.view import View
from kd_transformers.checks import base, called, differ, inputs_of, scores_tokens
from kd_transformers.columns import TEACHER, TEACHER_CLASSES, TEACHER_LOGITS, as_file, is_told, layer_column
from kd_transformers.told import Absent

_LOOKED_AT = 16


@dataclass(eq=False)
class Asking:
    """Asks teachers about rows; refuses answers that cannot be kept when the first of them come.

    Args:
        teachers: The teachers; one that is not loaded is loaded for its first row.
        collate: Makes a batch of rows.
        layers: The layers of each teacher that are kept.
        many: Whether there are several teachers, whose logits stand side by side.
        top_k: How many of the logits are kept; None: all.
        temperature: That at which the rest of them is summed.
        batch_size: Rows in a forward.
        device: Where the teachers run.
        views: The rows as a transform shows them; None where they are as they lie.
    """

    teachers: Sequence[nn.Module]
    collate: Callable[[list[Any]], Any]
    layers: Sequence[tuple[str | int, ...]]
    many: bool
    top_k: int | None
    temperature: float
    batch_size: int
    device: torch.device
    views: Views | None
    _tried_twice = _tried_alone = False

    @cached_property
    def nets(self) -> list[Net]:
        """The teachers, loaded and where they run."""
        loaded = [t.load() if isinstance(t, Absent) else t for t in self.teachers]
        return [Net(adapt(t.to(self.device)), Reads, frozen=True) for t in loaded]

    def __call__(
        self, rows: Mapping[str, list[Any]], numbers: Sequence[int], *, first: int, view: int
    ) -> dict[str, list[Any]]:
        """The columns of some rows, for `Dataset.map`.

        Args:
            rows: The rows, as they lie.
            numbers: Their numbers, counted from `first`.
            first: The number of the first row that is asked about.
            view: Which view of them.
        """
        if self.views is None:
            # The others are not read: to decode their images would take long.
            columns = {column: rows[column] for column in rows if self._is_input(column)}
            items = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        else:
            shown = (self.views.item(first + number, view) for number in numbers)
            items = [{column: value for column, value in row.items() if self._is_input(column)} for row in shown]
        if not any(items):
            raise DistillError(
                f"Expected rows with inputs of the teacher ({called(self.teachers[0])}), got the columns"
                f" {', '.join(rows)}: tokenize or process them first, as for Trainer."
            )
        found: dict[str, list[Any]] = defaultdict(list)
        for start in range(0, len(items), self.batch_size):
            for column, values in self._columns(items[start : start + self.batch_size]).items():
                found[column] += values
        return dict(found)

    def _is_input(self, column: str) -> bool:
        names = set().union(*map(inputs_of, self.teachers))
        taken = not names or column in names or column.startswith(TEACHER)
        return taken and not is_told(column) and not column.startswith("label")

    def _columns(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
        """The columns of the rows of one batch."""
        inputs, said, mask = self._ask(items)
        if not self._tried_twice:
            again, same, _ = self._ask(items)
            _check_collator(inputs, again)
            check_twice(_all(said), _all(same))
            self._tried_twice = True
        logits = self._logits(said, mask)
        if not self._tried_alone and len(set(map(len, logits))) > 1:
            row = min(range(len(logits)), key=lambda i: len(logits[i]))
            _, same, alone = self._ask(items[row : row + 1])
            _check_padding(logits[row], self._logits(same, alone)[0])
            self._tried_alone = True
        found: dict[str, Sequence[Any]] = {}
        if self.top_k:
            highest = (KF.top_k(x, min(self.top_k, x.shape[-1]), self.temperature) for x in logits)
            logits, classes = map(list, zip(*highest, strict=True))
            found[TEACHER_CLASSES] = [x.int().numpy() for x in classes]
        found[TEACHER_LOGITS] = [x.numpy() for x in logits]
        for i, view in enumerate(said):
            for name, x in view.features.items():
                found[layer_column(i, name)] = _layer(name, x.float().cpu(), mask, len(items))
        return found

    def _ask(self, items: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[View], Tensor | None]:
        """The batch of some rows, what the teachers say of it, and the mask of what they read."""
        name = getattr(base(self.nets[0].module), "main_input_name", None)
        inputs = self.collate(list(map(dict, items)))
        theirs = {k.removeprefix(TEACHER): v for k, v in inputs.items() if k.startswith(TEACHER)}
        own = {k: v for k, v in inputs.items() if not k.startswith((TEACHER, "label"))}
        batch = Batch.of(own, name=name, teacher_kwargs=theirs).to(self.device)
        views = [net(batch, reads=Reads(features=names)) for net, names in zip(self.nets, self.layers, strict=True)]
        return inputs, views, batch.teacher_mask

    def _logits(self, said: Sequence[View], mask: Tensor | None) -> list[Tensor]:
        """Those of each row: of a text's tokens without the padding, of several teachers side by side."""
        scores = [view.logits.float().cpu() for view in said]
        shapes = [list(x.shape) for x in scores]
        tokens = scores_tokens([net.module for net in self.nets])
        if scores[0].dim() != (3 if tokens else 2) or any(shape != shapes[0] for shape in shapes):
            raise DistillError(
                f"Expected a teacher with logits [B, K], or [B, L, K] of tokens, got {', '.join(map(str, shapes))}: the"
                " cache holds one vector of each teacher for each row, or token; train without it."
            )
        whole = torch.stack(scores, -2) if self.many else scores[0]
        if not tokens or mask is None:
            return list(whole)
        if mask.shape != whole.shape[:2]:
            raise DistillError(
                f"Expected scores of each of the inputs that the mask {list(mask.shape)} tells of, got {shapes[0]}, so"
                " that padding among them is not known: train without a cache."
            )
        return [row[real.bool()] for row, real in zip(whole, mask.cpu(), strict=True)]


def _all(views: Sequence[View]) -> list[Tensor]:
    return [x for view in views for x in (view.logits, *view.features.values())]


def _layer(name: str | int, told: Tensor, mask: Tensor | None, rows: int) -> list[bytes]:
    """What a layer gives of each row; of a text's hidden states `[B, L, H]` those of its tokens without the padding."""
    if len(told) != rows:
        raise DistillError(
            f"The layer {name} gives {list(told.shape)} of {rows} rows, and the cache holds what it gives of each:"
            " leave distiller out."
        )
    if mask is not None and told.dim() == 3 and told.shape[:2] == mask.shape:
        return [as_file(row[real]) for row, real in zip(told, mask.bool().cpu(), strict=True)]
    return [as_file(row) for row in told]


def _check_collator(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuses a collator that draws random numbers: cached logits would belong to other inputs."""
    for name, value in first.items():
        if isinstance(value, Tensor) and not torch.equal(value, second[name]):
            raise DistillError(
                f"Expected a data_collator that makes the same batch of the same rows, got two {name}: it draws random"
                " numbers (masks, crops). Apply them once with map, or train without a cache."
            )


def _check_padding(padded: Tensor, alone: Tensor) -> None:
    """Refuses a teacher that says something else of a text beside a longer one: training has other batches."""
    if differ(padded, alone):
        raise DistillError(
            "Expected a teacher that says the same of a text whatever it is padded to, got one that does not (positions"
            " that are counted from padding on the left): pad on the right, or pad all rows to one length."
        )


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
