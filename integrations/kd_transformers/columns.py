"""Rows on their way to a batch: the teacher's own columns, and row numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_plugins import DistillError
from kd_transformers.checks import base, check_vocabulary, scores_tokens, stated

INDEX = "kd_index"
TEACHER = "teacher_"
"""A column of this prefix goes to the teacher."""
TEACHER_LOGITS = "teacher_logits"
"""The column that stands for the teacher's forward."""
TEACHER_CLASSES = "teacher_classes"
"""The classes of these logits, where they are the highest alone."""
TEACHER_LAYER = "teacher_layer:"
"""A column of this prefix, with the teacher's number and a layer as JSON behind it, holds what that layer gives, as a
file of NumPy's: nested lists would take longer to read than the teacher to ask."""


TOLD = TEACHER_LOGITS, TEACHER_CLASSES


def is_told(column: Any) -> bool:
    """Whether a column holds what teachers have said."""
    return column in TOLD or str(column).startswith(TEACHER_LAYER)


def layer_column(number: int, layer: str | int) -> str:
    """The column of a layer of the teacher with this number."""
    return f"{TEACHER_LAYER}{number}:{json.dumps(layer)}"


def told_layers(columns: Iterable[Any]) -> dict[str, tuple[int, str | int]]:
    """The columns of layers, with the number of the teacher and the name of the layer."""
    found = {}
    for column in columns:
        if str(column).startswith(TEACHER_LAYER):
            number, _, layer = str(column).removeprefix(TEACHER_LAYER).partition(":")
            found[str(column)] = int(number), json.loads(layer)
    return found


def told_columns(dataset: Any) -> list[str]:
    """The columns of what teachers have said that a data set may have, those of the layers that it has among them."""
    return [*TOLD, *told_layers(getattr(dataset, "column_names", None) or ())]


def check_ids(
    student: nn.Module, teachers: Sequence[nn.Module], peers: Sequence[nn.Module], columns: Iterable[Any]
) -> None:
    """Refuses networks that read the same token ids and do not share a vocabulary.

    Args:
        student: The student.
        teachers: The teachers; those for whose main input there is a column read that and not the student's.
        peers: The other networks that are trained.
        columns: Of the data.
    """
    own = [t for t in teachers if TEACHER + getattr(base(t), "main_input_name", "input_ids") in columns]
    for network in [*(t for t in teachers if t not in own), *peers]:
        check_vocabulary(student, network)
    sizes: set[Any] = {stated(t, "vocab_size") for t in own} - {None}
    if len(sizes) > 1:
        raise DistillError(
            f"The columns {TEACHER}... go to every teacher, got teachers with vocabularies of"
            f" {' and '.join(map(str, sorted(sizes)))} tokens: use teachers that share a tokenizer, and"
            " resize_token_embeddings where one has rows of padding alone."
        )


def as_file(array: Tensor) -> bytes:
    """A tensor as a file of NumPy's."""
    file = io.BytesIO()
    np.save(file, array.numpy(), allow_pickle=False)
    # Data sets in the format of NumPy or torch lose zeros at the end of bytes.
    return file.getvalue() + b"."


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, bytes):
        return torch.from_numpy(np.load(io.BytesIO(value), allow_pickle=False))
    return torch.as_tensor(value)


def with_padding(collate: Any, teachers: Sequence[nn.Module]) -> Any:
    """A collator that knows our columns: row numbers, what teachers have said, and the teacher's own inputs.

    The last go to a collator of the user's, who may know them, and past one of transformers'.
    """
    pad = next((p for p in (stated(t, "pad_token_id") for t in teachers) if p is not None), None)
    inputs = bool(teachers) and getattr(collate, "__module__", "").startswith("transformers.")
    return Told(collate, tokens=scores_tokens(teachers), inputs=inputs, pad=pad)


class Told:
    """A collator that carries columns of ours past another one.

    What teachers have said of tokens is put where the mask of the batch has a token, whichever side is padded. A
    teacher's input of sequences is padded to its longest row: token ids with the teacher's padding token, everything
    else (masks, types) with 0.

    Args:
        collate: The other one.
        tokens: Whether the teachers have scored tokens.
        inputs: Whether the teacher's inputs go past it, too.
        pad: The teacher's padding token, where it has one.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], *, tokens: bool, inputs: bool = False, pad: int | None = None
    ) -> None:
        self.collate, self.tokens, self.inputs, self.pad = collate, tokens, inputs, pad

    def __call__(self, items: list[Any]) -> Any:
        known = items[0] if isinstance(items[0], Mapping) else {}
        told = [name for name in known if is_told(name) or name == INDEX]
        # What is no number is left out by transformers' collators.
        numbers = [name for name, value in known.items() if not isinstance(value, (str, NoneType))]
        inputs = [name for name in numbers if self.inputs and name.startswith(TEACHER) and name not in told]
        ours = {*told, *inputs}
        if not ours:
            return self.collate(items)
        batch = self.collate([{k: v for k, v in item.items() if k not in ours} for item in items])
        for name, value in self._inputs({name: _rows(name, items) for name in inputs}).items():
            batch[name] = value
        mask = batch.get(f"{TEACHER}attention_mask", batch.get("attention_mask"))
        for name in told:
            rows = [_as_tensor(item[name]) for item in items]
            tokens = rows[0].dim() == 2 if name.startswith(TEACHER_LAYER) else self.tokens and name != INDEX
            masked = tokens and isinstance(mask, Tensor) and mask.dim() == 2
            fits = masked and mask.sum(1).tolist() == list(map(len, rows))
            if not fits and len({row.shape for row in rows}) > 1:
                raise DistillError(
                    f"The column {name} tells of {', '.join(str(len(row)) for row in rows[:4])}, ... tokens, and"
                    " the batch has no attention_mask with as many: give the rows and the data_collator with which"
                    " cache_teacher asked the teacher."
                )
            if not fits:
                batch[name] = torch.stack(rows)
                continue
            whole = torch.cat(rows)
            batch[name] = whole.new_zeros(*mask.shape, *whole.shape[1:])
            batch[name][mask.bool()] = whole
        return batch

    def _inputs(self, columns: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """The teacher's inputs of a batch, with a mask of its tokens where they were padded without one."""
        ids, mask = f"{TEACHER}input_ids", f"{TEACHER}attention_mask"
        if len(set(map(len, columns.get(ids, ())))) > 1:
            if self.pad is None:
                raise DistillError(
                    f"Expected a teacher whose configuration has a pad_token_id, to pad the column {ids} with: set"
                    " teacher.config.pad_token_id, or give a data_collator that pads it."
                )
            columns = {mask: list(map(torch.ones_like, columns[ids])), **columns}
        fill = {ids: self.pad or 0}
        return {name: _padded(rows, fill.get(name, 0)) for name, rows in columns.items()}


def _rows(name: str, items: list[Any]) -> list[Tensor]:
    """The rows of a teacher's input, of which only single sequences may have unequal lengths."""
    try:
        rows = [_as_tensor(item[name]) for item in items]
    except ValueError:  # of the texts in a row
        rows = []
    if not rows or rows[0].dim() > 1 and len({row.shape for row in rows}) > 1:
        raise DistillError(
            f"The column {name} has several sequences a row (choices), of unequal lengths: pad all to one length, or"
            " give a data_collator of your own that pads them."
        )
    return rows


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    if rows[0].dim() != 1 or len(set(map(len, rows))) == 1:
        return torch.stack(rows)
    # By way of numbers, which find their type together: a row without any has none of its own.
    return torch.tensor([*zip_longest(*(row.tolist() for row in rows), fillvalue=fill)]).T.contiguous()


def with_index(item: Any, row: int) -> Any:
    """An item with its row number."""
    return {**item, INDEX: row}
