"""Rows on their way to a batch: the teacher's own columns, and row numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_plugins import DistillError
from kd_transformers.checks import base, check_vocabulary, scores_tokens

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
    sizes: set[Any] = {getattr(getattr(base(t), "config", None), "vocab_size", None) for t in own} - {None}
    if len(sizes) > 1:
        raise DistillError(
            f"The columns {TEACHER}... go to every teacher, got teachers with vocabularies of"
            f" {' and '.join(map(str, sorted(sizes)))} tokens: use teachers that share a tokenizer, and"
            " resize_token_embeddings where one has rows of padding alone."
        )


def pop_told(
    inputs: dict[str, Any], teachers: int
) -> tuple[Tensor | None, Tensor | None, tuple[dict[str | int, Tensor], ...]]:
    """Takes what teachers have said out of a batch's inputs for them: logits, their classes, the layers of each."""
    logits, classes = (inputs.pop(name.removeprefix(TEACHER), None) for name in TOLD)
    layers: list[dict[str | int, Tensor]] = [{} for _ in range(teachers)]
    for column, (number, layer) in told_layers(TEACHER + name for name in list(inputs)).items():
        value = inputs.pop(column.removeprefix(TEACHER))
        if number < teachers:
            layers[number][layer] = value
    return logits, classes, tuple(layers)


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
    """A collator that knows the teacher's columns: what teachers have said, and where it is transformers' own the rest.

    Collators of transformers do not know the teacher's columns, which they get padded.
    """
    if not teachers:
        return collate
    pads = [getattr(getattr(base(t), "config", None), "pad_token_id", None) for t in teachers]
    pad = next((p for p in pads if p is not None), None)
    own = getattr(collate, "__module__", "").startswith("transformers.")
    return Told(Padded(collate, pad) if own else collate, tokens=scores_tokens(teachers))


class Told:
    """A collator that carries what teachers have said past another one.

    What they say of tokens is put where the mask of the batch has a token, whichever side is padded.

    Args:
        collate: The other one.
        tokens: Whether the teachers have scored tokens.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], *, tokens: bool) -> None:
        self.collate, self.tokens = collate, tokens

    def __call__(self, items: list[Any]) -> Any:
        names = [name for name in items[0] if is_told(name)] if isinstance(items[0], Mapping) else []
        if not names:
            return self.collate(items)
        batch = self.collate([{k: v for k, v in item.items() if k not in names} for item in items])
        mask = batch.get(f"{TEACHER}attention_mask", batch.get("attention_mask"))
        for name in names:
            rows = [_as_tensor(item[name]) for item in items]
            tokens = rows[0].dim() == 2 if name.startswith(TEACHER_LAYER) else self.tokens
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
            told = torch.cat(rows)
            batch[name] = told.new_zeros(*mask.shape, *told.shape[1:])
            batch[name][mask.bool()] = told
        return batch


class Padded:
    """A collator of transformers that gets the teacher's own columns padded, of which it knows nothing.

    A column of sequences is padded to its longest row: token ids with the teacher's padding token, everything else
    (masks, types) with 0.

    Args:
        collate: The collator.
        pad: The teacher's padding token, where it has one.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], pad: int | None) -> None:
        self.collate, self.pad = collate, pad

    def __call__(self, items: list[Any]) -> Any:
        ids, mask = f"{TEACHER}input_ids", f"{TEACHER}attention_mask"
        own = [name for name in items[0] if name.startswith(TEACHER)] if isinstance(items[0], Mapping) else []
        ragged = [name for name in own if len({_length(item[name]) for item in items}) > 1]
        if not ragged:
            return self.collate(items)
        rows = [{**item, **{name: torch.as_tensor(item[name]).tolist() for name in ragged}} for item in items]
        if ids in ragged and self.pad is None:
            raise DistillError(
                f"Expected a teacher whose configuration has a pad_token_id, to pad the column {ids} with: set"
                " teacher.config.pad_token_id, or give a data_collator that pads it."
            )
        if ids in ragged and mask not in own:
            ragged.append(mask)
            for row in rows:
                row[mask] = [1] * len(row[ids])
        for name in ragged:
            longest, fill = max(len(row[name]) for row in rows), self.pad if name == ids else 0
            for row in rows:
                row[name] = row[name] + [fill] * (longest - len(row[name]))
        return self.collate(rows)


def _length(value: Any) -> int:
    """Of a sequence of numbers; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return 0 if value and isinstance(value[0], (list, tuple)) else len(value)
    return len(value) if getattr(value, "ndim", 0) == 1 else 0


class Indexed:
    """A collator that carries row numbers past another one."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        index = torch.tensor([item[INDEX] for item in items])
        batch = self.collate([{k: v for k, v in item.items() if k != INDEX} for item in items])
        return {**batch, INDEX: index}


def with_index(item: Any, row: int) -> Any:
    """An item with its row number."""
    return {**item, INDEX: row}
