"""A learning-rate curve for each stage of a distillation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from kd_plugins import DistillError
from kd_plugins.stages import StageTable
from kd_transformers.compat import rates_are


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
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=min(args.get_warmup_steps(steps), steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
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
