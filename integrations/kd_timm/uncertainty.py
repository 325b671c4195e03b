"""How uncertain student and teachers are of the evaluation split, and of images of another kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from kd_report.uncertainty import Doubts, doubts, uncertainty_metrics
from kd_timm.engine import TrainingRun, answers, evaluate

__all__ = ["judge"]


@torch.inference_mode()
def judge(
    run: TrainingRun, model: nn.Module, others: Sequence[Callable[[Tensor], Tensor]], offset: float | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluates a model on the evaluation split, and its uncertainty.

    Args:
        run: The run.
        model: What to evaluate.
        others: Teachers; several are an ensemble.
        offset: What the concentrations of the model have beside `exp(z)`; None for a softmax.

    Returns:
        What `evaluate` returns, and for `student` and `teachers` what `uncertainty_metrics` tells.
    """
    known, other = _Answers(offset), None
    evaluation = evaluate(run, model, others=others, seen=known.add)
    if run.data.other is not None:
        other = _Answers(offset)
        for output, _, told, rows in answers(run, model, run.data.other, others):
            other.add(output[:rows], None, [scores[:rows] for scores in told])
    whole, beside = known.gathered(), {} if other is None else other.gathered()
    return evaluation, {name: uncertainty_metrics(found, beside.get(name)) for name, found in whole.items()}


class _Answers:
    """Collects the uncertainty of student and teachers, batch by batch."""

    def __init__(self, offset: float | None) -> None:
        self.offset = offset
        self.parts: dict[str, list[Doubts]] = {}

    def add(self, output: Tensor, labels: Tensor | None, told: Sequence[Tensor]) -> None:
        """Adds a batch: scores `[B, K]`, labels, and the teachers' scores."""
        self.parts.setdefault("student", []).append(doubts(output, labels, offset=self.offset))
        if told:
            scores, several = (torch.stack(list(told), 1), True) if len(told) > 1 else (told[0], False)
            self.parts.setdefault("teachers", []).append(doubts(scores, labels, members=several))

    def gathered(self) -> dict[str, Doubts]:
        """All examples of all processes."""
        found = {name: gather_object(parts) for name, parts in self.parts.items()}
        return {name: {key: torch.cat([p[key] for p in parts]) for key in parts[0]} for name, parts in found.items()}
