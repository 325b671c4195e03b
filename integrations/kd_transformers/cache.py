"""Pays the teacher once: its logits as a column of the data set, for inputs that are the same in every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_plugins.errors import DistillError
from kd_transformers.columns import TEACHER_LOGITS
from kd_transformers.compat import rows_id

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TEACHER_LOGITS", "cache_teacher", "check_cache"]


def cache_teacher(
    dataset: Dataset,
    teacher: nn.Module,
    data_collator: Any = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Dataset:
    """Runs a classifier over a data set once and adds its logits `[K]`, float32, as the column `teacher_logits`.

    `DistillationTrainer` takes the column in place of the teacher's forward wherever a method reads the teacher's
    logits alone (`kd`, and the last phase of `internal`); a step then costs what training without a teacher costs.
    Give it the same `teacher_model` as well: it compares one batch before the training, and runs the teacher where a
    method reads more than logits or changes the inputs.

    The column lies in a memory-mapped Arrow file of `datasets`, beside the data set's own, under a fingerprint of the
    rows and of the teacher's class and weights: asked again with the same ones, nothing runs. Only for inputs that are
    the same in every epoch. Images that are augmented while they are loaded would be paired with the logits of other
    crops, so a data set with a transform is refused.

    Args:
        dataset: Tokenized rows, as for `Trainer`; columns that the teacher does not take are left out.
        teacher: A classifier whose output has `logits` `[B, K]`.
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

    from kd_transformers.checks import inputs_of

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
    collate = data_collator or default_data_collator
    device = torch.device(device) if device is not None else next(teacher.parameters()).device
    taken = inputs_of(teacher) or set(dataset.column_names)
    columns = [c for c in dataset.column_names if c in taken and c != TEACHER_LOGITS and not c.startswith("label")]
    teacher, training = teacher.to(device), teacher.training
    teacher.eval()

    def logits(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        items = [dict(zip(columns, values, strict=True)) for values in zip(*(rows[c] for c in columns), strict=True)]
        found = []
        with torch.no_grad():
            for batch in DataLoader(items, batch_size=batch_size, collate_fn=collate):  # type: ignore[arg-type]
                output = teacher(**{name: value.to(device) for name, value in batch.items()}).logits
                if output.dim() != 2:
                    raise DistillError(
                        f"Expected a teacher with logits [B, K], got {list(output.shape)}: the cache holds one vector"
                        " for each row; train without it."
                    )
                found.append(output.float().cpu())
        return {TEACHER_LOGITS: torch.cat(found).numpy()}

    plain = dataset.with_format(None)
    if TEACHER_LOGITS in plain.column_names:
        plain = plain.remove_columns(TEACHER_LOGITS)
    try:
        return plain.map(
            logits,
            batched=True,
            batch_size=16 * batch_size,
            new_fingerprint=_fingerprint(plain, teacher),
            desc="Asking the teacher",
        ).with_format(dataset.format["type"])
    finally:
        teacher.train(training)


def _fingerprint(dataset: Any, teacher: nn.Module) -> str:
    """Changes with the rows, and with the teacher's class, configuration and weights."""
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    hasher.update([rows_id(dataset), type(teacher).__qualname__, str(getattr(teacher, "config", ""))])
    for name, value in teacher.state_dict().items():
        hasher.update(
            [name, str(value.dtype), value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()]
        )
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
