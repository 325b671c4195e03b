"""Pays the teacher once: its logits as a column of the data set, for inputs that are the same in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_plugins import Batch, DistillError, Net, Reads
from kd_plugins.reading.network import adapt
from kd_transformers.checks import base, inputs_of
from kd_transformers.columns import TEACHER, TEACHER_LOGITS, with_padding
from kd_transformers.compat import rows_id

if TYPE_CHECKING:
    from datasets import Dataset


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
    the teacher where a method reads more than logits or changes the inputs.

    The column lies in a memory-mapped Arrow file of `datasets`, beside the data set's own, under a fingerprint of the
    rows and of the teacher's class and weights: asked again with the same ones, nothing runs. Only for inputs that are
    the same in every epoch. Images that are augmented while they are loaded would be paired with the logits of other
    crops, so a data set with a transform is refused.

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
            anything but `[B, K]`.
    """
    from datasets import Dataset
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
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    modes = [t.training for t in teachers]
    device = torch.device(device) if device is not None else next(teachers[0].parameters()).device
    nets = [Net(adapt(t.to(device)), Reads, frozen=True) for t in teachers]
    collate = with_padding(data_collator or default_data_collator, teachers)
    taken = set().union(*map(inputs_of, teachers)) or set(dataset.column_names)
    names = [c for c in dataset.column_names if c != TEACHER_LOGITS and not c.startswith("label")]
    columns = [c for c in names if c in taken or c.startswith(TEACHER)]
    name = getattr(base(teachers[0]), "main_input_name", None)

    def logits(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        items = [dict(zip(columns, values, strict=True)) for values in zip(*(rows[c] for c in columns), strict=True)]
        found = []
        for inputs in DataLoader(items, batch_size=batch_size, collate_fn=collate):  # type: ignore[arg-type]
            theirs = {k.removeprefix(TEACHER): v for k, v in inputs.items() if k.startswith(TEACHER)}
            own = {k: v for k, v in inputs.items() if not k.startswith(TEACHER)}
            batch = Batch.of(own, name=name, teacher_kwargs=theirs).to(device)
            scores = [net(batch).logits.float().cpu() for net in nets]
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
    try:
        return plain.map(
            logits,
            batched=True,
            batch_size=16 * batch_size,
            new_fingerprint=_fingerprint(plain, teachers),
            desc="Asking the teacher",
        ).with_format(dataset.format["type"])
    finally:
        for t, training in zip(teachers, modes, strict=True):
            t.train(training)


def _fingerprint(dataset: Any, teachers: Sequence[nn.Module]) -> str:
    """Changes with the rows, and with the teachers' classes, configurations and weights."""
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    hasher.update(rows_id(dataset))
    for teacher in teachers:
        hasher.update([type(teacher).__qualname__, str(getattr(teacher, "config", ""))])
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
