"""What is tried before anything is trained, since Trainer would fail at it in the training or after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available, logging

from kd_plugins.errors import DistillError, told

__all__ = ["check_best", "check_recipe"]

logger = logging.get_logger(__name__)

# Those that take any parameters; others ask for a model, or packages of their own.
_PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def check_recipe(training: TrainingArguments) -> None:
    """Makes optimizer and schedule of one parameter, so that what is wrong with them is said before any training."""
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise DistillError("--use_liger_kernel needs a package that is not here: pip install liger-kernel.")
    with told("Optimizer and schedule cannot be made with these arguments", Exception):
        made: torch.optim.Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
        if training.optim in _PLAIN_OPTIMIZERS:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(training)
            made = cls([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            training.lr_scheduler_type,
            made,
            num_warmup_steps=training.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )


def check_best(
    metric: str | None, measure: Callable[[EvalPrediction], Mapping[str, Any]], labels: Sequence[Any], classes: int
) -> None:
    """Refuses a metric for the best model that no evaluation will measure.

    Args:
        metric: Its name; the loss without one.
        measure: Trainer's `compute_metrics`.
        labels: Of a few rows.
        classes: Number of classes.
    """
    scores = np.random.default_rng(0).normal(size=(len(labels), classes))
    measured = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    try:
        measured |= set(measure(EvalPrediction(predictions=scores, label_ids=np.asarray(labels))))
    except Exception as error:  # noqa: BLE001
        logger.warning(f"What the metrics are called cannot be told from eight rows: {error}")
        return
    best = str(metric or "loss").removeprefix("eval_")
    if best not in measured:
        raise DistillError(
            f"--metric_for_best_model {best} is not measured, which are {', '.join(sorted(measured))}: name one, or add"
            " --metric."
        )
