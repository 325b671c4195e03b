"""Pays the teacher once: its logits as a column of the data set, for inputs that are the same in every epoch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_plugins import Batch, DistillError, Net, Reads
from kd_plugins.reading.network import Network, adapt
from kd_transformers.checks import base, class_names, inputs_of
from kd_transformers.columns import TEACHER, TEACHER_LOGITS, with_padding
from kd_transformers.compat import rows_id
from kd_transformers.playing import listed

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

_BLOCK = 4096
_ASIDE = ("problem_type", "_name_or_path", "transformers_version")


def cache_teacher(
    dataset: Dataset,
    teacher: nn.Module | Sequence[nn.Module],
    data_collator: Any = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Dataset:
    """Runs a classifier over a data set once and adds its logits `[K]`, float32, as the column `teacher_logits`.

    Of several teachers the column holds all logits, `[teachers, K]`, in their order.

    `DistillationTrainer` takes the column in place of the teacher's forward wherever a method reads the teacher's
    logits alone (`kd`, and the last phase of `internal`); a step then costs what training without a teacher costs. Give
    it the same `teacher_model` as well, several in the same order: it compares one batch before the training, and runs
    the teacher where a method reads more than logits or changes the inputs. Without a `teacher_model` the teacher need
    not be loaded: its classes are noted in the data set's description, which `save_to_disk` keeps. Nothing is compared
    then, so the inputs of the rows must be left as they are.

    The column lies in memory-mapped Arrow files of `datasets`, beside the data set's own, one for each 4096 rows, under
    a fingerprint of the rows and of the teacher's class, configuration and weights: asked again with the same ones,
    nothing runs, an interrupted pass goes on where it was, and a file that is damaged is made anew. Only for inputs
    that are the same in every epoch. Images that are augmented while they are loaded would be paired with the logits of
    other crops, so a data set with a transform is refused.

    Args:
        dataset: Tokenized rows, as for `Trainer`; columns that the teacher does not take are left out. Columns of its
            own (`teacher_input_ids`, ...) are given to it in place of the student's.
        teacher: A classifier with scores `[B, K]`, or several.
        data_collator: Makes a batch of rows; by default `transformers`' own, which needs rows of one length.
        batch_size: Rows in a forward. Padding follows the batch, so logits agree with those of another batch size to
            rounding only.
        device: Where the teacher runs; by default where it is.

    Returns:
        The data set with the column.

    Raises:
        DistillError: A data set that is not of `datasets` or that is transformed on access; a teacher that gives
            anything but `[B, K]`, or two answers to one question.
    """
    from datasets import Dataset, concatenate_datasets
    from transformers import default_data_collator

    if not isinstance(dataset, Dataset):
        raise DistillError(
            f"Expected a datasets.Dataset, whose rows are the same in every epoch, got {type(dataset).__name__}:"
            " make one with Dataset.from_list, or train without a cache."
        )
    if dataset.format["type"] == "custom":
        raise DistillError(
            "Expected rows that are the same in every epoch, got a data set with a transform (set_transform):"
            " cached logits would belong to other inputs. Apply it once with map, or train without a cache."
        )
    teachers = listed("teacher", teacher)
    if not teachers:
        raise DistillError("Expected at least one teacher to ask, got none.")
    modes = [t.training for t in teachers]
    device = torch.device(device) if device is not None else next(teachers[0].parameters()).device
    nets = [Net(adapt(t.to(device)), Reads, frozen=True) for t in teachers]
    collate = with_padding(data_collator or default_data_collator, teachers)
    taken = set().union(*map(inputs_of, teachers)) or set(dataset.column_names)
    names = [c for c in dataset.column_names if c != TEACHER_LOGITS and not c.startswith("label")]
    columns = [c for c in names if c in taken or c.startswith(TEACHER)]
    name = getattr(base(teachers[0]), "main_input_name", None)

    asked = False

    def logits(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        nonlocal asked
        items = [dict(zip(columns, values, strict=True)) for values in zip(*(rows[c] for c in columns), strict=True)]
        found = []
        for inputs in DataLoader(items, batch_size=batch_size, collate_fn=collate):  # type: ignore[arg-type]
            theirs = {k.removeprefix(TEACHER): v for k, v in inputs.items() if k.startswith(TEACHER)}
            own = {k: v for k, v in inputs.items() if not k.startswith(TEACHER)}
            batch = Batch.of(own, name=name, teacher_kwargs=theirs).to(device)
            scores = [net(batch).logits.float().cpu() for net in nets]
            if not asked:
                _check_twice(scores, [net(batch).logits.float().cpu() for net in nets])
                asked = True
            shapes = [list(x.shape) for x in scores]
            if scores[0].dim() != 2 or any(shape != shapes[0] for shape in shapes):
                raise DistillError(
                    f"Expected a teacher with logits [B, K], got {', '.join(map(str, shapes))}: the cache holds one"
                    " vector of each teacher for each row; train without it."
                )
            found.append(scores[0] if isinstance(teacher, nn.Module) else torch.stack(scores, 1))
        return {TEACHER_LOGITS: torch.cat(found).numpy()}

    plain = dataset.with_format(None)
    if TEACHER_LOGITS in plain.column_names:
        plain = plain.remove_columns(TEACHER_LOGITS)
    if not len(plain):
        raise DistillError("Expected at least one row to ask the teacher about, got an empty data set.")
    known, blocks = _fingerprint(plain, teachers), []
    folder = Path(plain.cache_files[0]["filename"]).parent if plain.cache_files else None
    try:
        for start in range(0, len(plain), _BLOCK):
            end = min(start + _BLOCK, len(plain))
            file = None if folder is None else folder / f"teacher-{known}-{start}.arrow"
            if file is not None:
                _drop_damaged(file)
            blocks.append(
                plain.select(range(start, end)).map(
                    logits,
                    batched=True,
                    batch_size=16 * batch_size,
                    cache_file_name=None if file is None else str(file),
                    new_fingerprint=f"{known}-{start}",
                    remove_columns=plain.column_names,
                    desc=f"Asking the teacher, rows {start} to {end} of {len(plain)}",
                )
            )
            if file is not None:
                _sum_file(file).write_text(_sum(file))
        # The logits alone are written; the rows stay where they are.
        whole = concatenate_datasets([plain, concatenate_datasets(blocks)], axis=1)
        whole.info.description = _noted(plain.info.description, teachers, whole[0][TEACHER_LOGITS])
        return whole.with_format(dataset.format["type"])
    finally:
        for t, training in zip(teachers, modes, strict=True):
            t.train(training)


class Absent(nn.Module):
    """A teacher that is not loaded, since what it says is in the data.

    Args:
        stands_for: The class of the teacher.
        classes: Its classes in the order of the logits; None where they have no names.
        scores: How many scores it gives.
    """

    def __init__(self, stands_for: str, classes: Sequence[str] | None, scores: int) -> None:
        super().__init__()
        self.stands_for = stands_for
        self.config = SimpleNamespace(num_labels=scores, id2label=dict(enumerate(classes or ())))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise DistillError(
            f"The method reads more of the teacher than the column {TEACHER_LOGITS} holds, and the {self.stands_for}"
            " that wrote it is not loaded: give teacher_model."
        )


class AbsentNetwork(Network):
    """Refuses whatever is read of a teacher that is not loaded."""

    def read(self, batch: Batch, reads: Reads, **options: Any) -> Any:
        return self.module()

    def layers(self, batch: Batch) -> int:
        return int(self.module())


def absent_teachers(dataset: Any) -> list[Absent]:
    """Stand-ins for the teachers whose logits a data set has."""
    if TEACHER_LOGITS not in (getattr(dataset, "column_names", None) or ()):
        return []
    lines = (getattr(getattr(dataset, "info", None), "description", None) or "").splitlines()
    noted = next((line for line in lines if line.startswith(_NOTE)), None)
    if noted is None:
        raise DistillError(
            f"The data set does not say which teacher wrote its column {TEACHER_LOGITS}, so that its classes are not"
            " known: give teacher_model, or make the column anew with cache_teacher."
        )
    return [Absent(**facts) for facts in json.loads(noted.removeprefix(_NOTE))]


_NOTE = f"{TEACHER_LOGITS}: "


def _noted(description: str | None, teachers: Sequence[nn.Module], logits: Any) -> str:
    """A data set's description with what its column is."""
    scores = torch.as_tensor(logits).shape[-1]
    facts = [
        {
            "stands_for": type(base(teacher)).__name__,
            "classes": class_names(getattr(base(teacher), "config", None)),
            "scores": scores,
        }
        for teacher in teachers
    ]
    others = [line for line in (description or "").splitlines() if not line.startswith(_NOTE)]
    return "\n".join([*others, _NOTE + json.dumps(facts)])


def _check_twice(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Refuses a teacher whose answers to one question differ."""
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(first, second, strict=True)):
        raise DistillError(
            "Expected a teacher that says the same of the same rows, got one whose two forwards differ in evaluation"
            " mode: it draws random numbers, so train without a cache."
        )


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sum_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _drop_damaged(file: Path) -> None:
    """Removes a cached file that is not what was written."""
    known = _sum_file(file)
    if file.is_file() and not (known.is_file() and known.read_text() == _sum(file)):
        logger.warning("%s is damaged or unfinished: its rows are asked for anew.", file)
        file.unlink()


def _fingerprint(dataset: Any, teachers: Sequence[nn.Module]) -> str:
    """Changes with the rows, and with the teachers' classes, configurations and weights."""
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    hasher.update(rows_id(dataset))
    for teacher in teachers:
        config: Any = getattr(teacher, "config", None)
        facts = config.to_dict() if hasattr(config, "to_dict") else {}
        # A forward with labels writes the type of problem into the configuration; where a model is from says nothing.
        hasher.update([type(teacher).__qualname__, {k: v for k, v in facts.items() if k not in _ASIDE}])
        for name, value in teacher.state_dict().items():
            # Flat first: the bytes of a tensor without an axis cannot be viewed.
            bits = value.detach().cpu().flatten().contiguous().view(torch.uint8)
            hasher.update([name, str(value.dtype), bits.numpy().tobytes()])
    return hasher.hexdigest()


def check_cache(cached: Tensor, logits: Tensor) -> None:
    """Refuses a column that another teacher wrote, or the same teacher for other rows.

    Args:
        cached: The column's logits of one batch.
        logits: What the teacher says of this batch now.
    """
    if cached.shape != logits.shape or not torch.allclose(cached.float(), logits.float(), rtol=2e-2, atol=2e-2):
        raise DistillError(
            f"The column {TEACHER_LOGITS} is not what teacher_model says of these rows: make it anew with"
            " cache_teacher(dataset, teacher), or remove the column."
        )
