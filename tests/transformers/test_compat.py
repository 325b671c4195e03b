"""Every private name of transformers and of what lies under it is still there, and still what `compat` takes it for."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from datasets import Dataset, Features, Value
from torch.optim.lr_scheduler import LambdaLR
from trainer_kit import CHECKPOINTING, Texts, bert, trainer
from transformers import Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kd_transformers import compat

# The arguments that a hook of ours gets, or that we call a helper with.
METHODS = {
    "_get_dataloader": ["dataset", "is_training"],
    "_set_signature_columns_if_needed": [],
    "_clip_grad_norm": ["model"],
    "_hp_search_setup": ["trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_from_checkpoint": ["model"],
    "_load_best_model": [],
    "_issue_warnings_after_load": ["load_result"],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_inner_training_loop": [],
    "_run_epoch": [],
    "_finalize_training": [],
    "_remove_unused_columns": ["dataset", "description"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_prepare_inputs": ["inputs"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "set_initial_training_values": ["args", "dataloader"],
}


@pytest.mark.parametrize("name", METHODS)
def test_trainers_methods(name: str) -> None:
    assert set(METHODS[name]) <= set(inspect.signature(getattr(Trainer, name)).parameters)


def test_trainers_attributes(tmp_path: Path) -> None:
    run = trainer(tmp_path, None, cls=Trainer)
    assert run._signature_columns is None
    assert run._train_batch_size == 4
    assert run._created_lr_scheduler is False
    assert run.model_accepts_loss_kwargs is True


def test_a_made_scheduler_is_dropped_after_the_training(tmp_path: Path) -> None:
    """Else a second training would go on with the curve of the first."""
    run = trainer(tmp_path, "internal", {}, max_steps=3)
    run.train()
    first = run.lr_scheduler
    assert run._created_lr_scheduler is True
    run.train()
    assert run.lr_scheduler is not first


def test_attention_is_chosen_by_the_config() -> None:
    """A copy of the config names our function, and the model's own does not change."""
    config = bert().config
    tapped = compat.tapped(config, "ours", 3)
    assert (compat.attention_name(tapped), tapped.ours) == ("ours", 3)
    assert compat.attention_name(config) == "sdpa"
    assert "ours" not in vars(config)
    layer = bert().bert.encoder.layer[0].attention.self
    assert compat.chosen_attention(layer, config) is ALL_ATTENTION_FUNCTIONS["sdpa"]
    eager = bert(attn_implementation="eager").config
    assert compat.chosen_attention(layer, eager) is sys.modules[type(layer).__module__].eager_attention_forward
    assert compat.chosen_mask(config) is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_seen(reentrant: bool) -> None:
    model = bert()
    enable = getattr(model, f"{CHECKPOINTING}_checkpointing_enable")
    enable(**{f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    assert any(map(compat.is_reentrant, model.modules())) is reentrant


class Averaging(evaluate.Metric):  # type: ignore[misc]
    """A metric of `evaluate` as its modules define them."""

    def _info(self) -> evaluate.MetricInfo:
        value = Value("int32")
        return evaluate.MetricInfo(
            description="", citation="", features=Features({"predictions": value, "references": value})
        )

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        return {"given": float(average == "macro")}


def test_what_lies_under_it() -> None:
    metric = Averaging(keep_in_memory=True)
    assert compat.averages(metric)
    assert metric.compute(predictions=[1], references=[1], average="macro") == {"given": 1.0}
    rows = Dataset.from_dict({"a": [1, 2]})
    assert compat.rows_id(rows) == compat.rows_id(copy.deepcopy(rows)) != compat.rows_id(rows.select([0]))
    scheduler = LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 1.0)
    compat.rates_are(scheduler, [0.5])
    assert scheduler.get_last_lr() == [0.5]


def test_columns_are_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=Texts())
    run.get_train_dataloader()
    assert {"labels", "teacher_input_ids", "teacher_logits", "kd_index"} <= set(run._signature_columns)
