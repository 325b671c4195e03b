"""How uncertain student and teachers are of the evaluation split, and of images of another kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from kd_report.uncertainty import Answers, Doubts, uncertainty_metrics
from kd_timm.engine import TrainingRun, answers, evaluate

__all__ = ["gathered", "judge"]


@torch.inference_mode()
def judge(
    run: TrainingRun, model: nn.Module, others: Sequence[Callable[[Tensor], Tensor]], offset: float | None
) -> tuple[dict[str, float], dict[str, Any], dict[str, Doubts]]:
    """Evaluates a model on the evaluation split, and its uncertainty.

    Args:
        run: The run.
        model: What to evaluate.
        others: Teachers; several are an ensemble.
        offset: What the concentrations of the model have beside `exp(z)`; None for a softmax.

    Returns:
        What `evaluate` returns; for `student` and `teachers` what `uncertainty_metrics` tells; and what `student` and
        `teacher` say of each image.
    """
    known, other = Answers(offset), Answers(offset)

    def seen(output: Tensor, labels: Tensor | None, told: Sequence[Tensor], into: Answers = known) -> None:
        into.add("student", output, labels)
        into.ensemble(told, labels, output)

    evaluation = evaluate(run, model, others=others, seen=seen)
    if run.data.other is not None:
        for output, _, told, rows in answers(run, model, run.data.other, others):
            seen(output[:rows], None, [scores[:rows] for scores in told], other)
    whole, beside = gathered(known), gathered(other)
    names = {"student": "student", "teacher": "teachers"}
    uncertain = {names[name]: uncertainty_metrics(found, beside.get(name)) for name, found in whole.items()}
    return evaluation, uncertain, whole


def gathered(answers: Answers) -> dict[str, Doubts]:
    """All examples of all processes, by network; must be called on every process."""
    answers.parts = {name: gather_object(parts) for name, parts in answers.parts.items()}
    return answers.found()
