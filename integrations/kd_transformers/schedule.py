"""Learning-rate curves: one for each stage of a distillation, and whether there can be the one that is asked for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from kd_plugins.errors import DistillError, told
from kd_plugins.stages import StageTable
from kd_transformers.compat import rates_are

# Those that take any parameters; others ask for a model, or packages of their own.
_PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def staged_scheduler(args: TrainingArguments, optimizer: Any, table: StageTable) -> LambdaLR:
    """The curve that `args` ask for, over every stage anew, warmup included.

    One curve over the whole training would leave the last stage, the classification, a rate near 0.

    Args:
        args: The curve: `lr_scheduler_type`, warmup, `lr_scheduler_kwargs`.
        optimizer: The student's optimizer.
        table: The stages; read at every step, so that a stage that ends early is followed.
    """

    @lru_cache
    def curve(steps: int) -> Any:
        scheduler = _curve(args, torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), steps)
        if not isinstance(scheduler, LambdaLR):
            raise DistillError(
                f"The learning-rate schedule {args.lr_scheduler_type} cannot start anew with every stage: choose"
                " linear, cosine, constant, or another that is a function of the step."
            )
        return scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        start, end = table.bounds(table.index(min(step, table.total - 1)))
        return float(curve(end - start)(step - start))

    return LambdaLR(optimizer, factor)


def refresh(scheduler: Any) -> None:
    """Sets the rates of the coming step anew, after the stages have changed under a `staged_scheduler`."""
    if isinstance(scheduler, LambdaLR):
        groups = scheduler.optimizer.param_groups
        for group, rate, curve in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * curve(scheduler.last_epoch)
        rates_are(scheduler, [group["lr"] for group in groups])


def check_recipe(training: TrainingArguments) -> None:
    """Makes optimizer and schedule of one parameter, so that what is wrong with them is said before any training."""
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise DistillError("--use_liger_kernel needs a package that is not here: pip install liger-kernel.")
    with told("Optimizer and schedule cannot be made with these arguments", Exception):
        made: torch.optim.Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
        if training.optim in _PLAIN_OPTIMIZERS:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(training)
            made = cls([torch.nn.Parameter(torch.zeros(1))], **options)
        _curve(training, made, 10)


def _curve(args: TrainingArguments, optimizer: Any, steps: int) -> Any:
    """The curve that `args` ask for, over so many steps."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=min(args.get_warmup_steps(steps), steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
