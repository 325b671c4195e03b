"""Tiny networks and data for the tests of DistillationTrainer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd_transformers import DistillationTrainer

CLASSES = 3
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "num_labels": CLASSES,
}
CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Texts(torch.utils.data.Dataset):
    """Random token ids of different lengths, padded to `length`, as dicts."""

    def __init__(self, rows: int = 16, length: int = 10, extra: Mapping[str, Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, TINY["vocab_size"], (rows, 10), generator=generator)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.ids, self.mask = torch.zeros(2, rows, length, dtype=torch.long)
        for i in range(rows):
            size = 5 + i % 6
            self.ids[i, :size], self.mask[i, :size] = ids[i, :size], 1
        self.extra = extra or {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        own = {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}
        return {**own, **{name: value[i] for name, value in self.extra.items()}}

    def batch(self) -> dict[str, Tensor]:
        """All rows at once."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}


def bert(layers: int = 2, seed: int = 0, dropout: bool = False, **options: Any) -> Any:
    """A BERT classifier whose weights, attention included, are far from uniform."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **{**TINY, "num_hidden_layers": layers, **({} if dropout else NO_DROPOUT), **options}
    )
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(8)
    return model


def teacher(**options: Any) -> Any:
    """A deeper BERT."""
    return bert(4, seed=1, **options)


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """Settings that are quick, silent and deterministic: rows in their order."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**{**defaults, **options})


def trainer(
    folder: Any,
    distiller: Any = "kd",
    options: Mapping[str, Any] | None = None,
    *,
    student: Any = None,
    of: Any = None,
    data: Any = None,
    cls: type = DistillationTrainer,
    given: Mapping[str, Any] | None = None,
    **args: Any,
) -> Any:
    """A trainer of a tiny student with a tiny teacher.

    Args:
        folder: Of the output.
        distiller: As for DistillationTrainer; None makes a plain run.
        options: Of the distiller.
        student: The model; a BERT of 2 layers.
        of: The teacher; a BERT of 4 layers.
        data: The training set.
        cls: The class of the trainer.
        given: Further arguments of the trainer.
        **args: TrainingArguments.
    """
    given = dict(given or {})
    if "model_init" not in given:
        given["model"] = bert() if student is None else student
    if distiller is not None:
        given |= {"teacher_model": teacher() if of is None else of, "distiller": distiller, "distiller_args": options}
        given.setdefault("record", False)
    given = {"train_dataset": Texts() if data is None else data, **given}
    return cls(args=arguments(folder, **args), **given)


def plain(folder: Any, **args: Any) -> Trainer:
    """The stock Trainer on the same."""
    return trainer(folder, None, cls=Trainer, **args)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of weights with the same names."""
    assert sorted(a) == sorted(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def moved(before: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The parameters that differ from an earlier copy."""
    after = dict(model.named_parameters())
    return [name for name in after if not torch.equal(before[name], after[name])]


def logged(run: Any, name: str) -> list[float]:
    """The values of one entry of the log."""
    return [entry[name] for entry in run.state.log_history if name in entry]


def shifted(model: Any, by: float = 1.0) -> Any:
    """The same network with other weights, as a fresh process would have."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    return model


def parts(folder: str | Path) -> set[str]:
    """The names of the files in a folder."""
    return {path.name for path in Path(folder).iterdir()}


@contextmanager
def calls(modules: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, int]]:
    """Counts how often modules are called."""
    items = dict(modules)
    counts = dict.fromkeys(items, 0)

    def count(name: str) -> None:
        counts[name] += 1

    handles = [m.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, m in items.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class At(TrainerCallback):
    """Calls functions at events of a training: `At(on_step_end=lambda state: ...)`."""

    def __init__(self, **functions: Any) -> None:
        for event, function in functions.items():
            setattr(self, event, lambda args, state, control, *, f=function, **kwargs: f(state) and None)
