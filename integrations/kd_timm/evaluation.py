"""One pass of evaluation: what a network answers, its metrics, and how uncertain it and its teachers are."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator, evaluation_sample_limit
from timm.utils import AverageMeter
from torch import Tensor, nn

from kd_plugins import DistillError
from kd_plugins.evaluation import Answers, Doubts, uncertainty_metrics
from kd_plugins.finite import check_loss
from kd_timm.batches import batches
from kd_timm.engine import TrainingRun
from kd_timm.network import one_head

Seen = Callable[[Tensor, Tensor, list[Tensor]], None]
"""Takes a batch of a model's scores `[B, K]`, targets and what others say."""


def _two_classes(scores: Tensor) -> Tensor:
    """Scores `[B, K]`; one logit `[B, 1]` as the two classes between which its sign decides."""
    return F.pad(scores, (1, 0)) if scores.shape[-1] == 1 else scores


def answers(
    run: TrainingRun, model: nn.Module, loader: Any, others: Sequence[Callable[[Tensor], Tensor]] = ()
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """What a model says of each batch of a loader: scores, targets, the scores of others.

    The rows that come last and only fill up this process's share are left out.
    """
    limit, done, average = evaluation_sample_limit(loader), 0, run.args.tta
    dtype = next((p.dtype for p in model.parameters()), None)
    model.eval()
    for inputs, targets in batches(loader):
        inputs, targets = run.images(inputs, dtype), targets.to(run.accelerator.device)
        with run.autocast():
            found = [one_head(model(inputs), model), *(other(inputs) for other in others)]
            if average > 1:
                if len(targets) % average:
                    raise DistillError(
                        f"--tta {average} averages the scores of {average} rows, and a batch has {len(targets)}: let"
                        " --validation-batch-size and the evaluation split be multiples."
                    )
                found = [scores.unfold(0, average, average).mean(dim=2) for scores in found]
                targets = targets[: len(targets) : average]
            output, *told = found if run.args.task == "multilabel" else map(_two_classes, found)
        rows = None if limit is None else max(0, limit - done)
        done += len(output)
        yield output[:rows], targets[:rows], [scores[:rows] for scores in told]


def _beside(name: str, value: float, mean: float) -> str:
    """A number of a batch and the mean so far, as timm's script tells them of an evaluation."""
    words = {"loss": "Loss", "top1": "Acc@1", "top5": "Acc@5"}
    return f"{words[name]}: {value:>7.3f} ({mean:>{6 if name == 'loss' else 7}.3f})"


def listed(metrics: Mapping[str, float]) -> str:
    """Metrics as a log line has them."""
    return "  ".join(f"{name}: {value:.4f}" for name, value in metrics.items())


def evaluator(args: argparse.Namespace, device: torch.device | None = None) -> ClassificationEvaluator:
    """What counts and measures the answers of a network, by the task."""
    if args.task == "multilabel":
        return MultiLabelClassificationEvaluator(device, threshold=args.multilabel_threshold)
    return ClassificationEvaluator(device)


@torch.inference_mode()
def evaluate(
    run: TrainingRun,
    model: nn.Module,
    *,
    others: Sequence[Callable[[Tensor], Tensor]] = (),
    seen: Seen | None = None,
    label: str = "",
) -> dict[str, float]:
    """Evaluates a model on the evaluation split.

    Args:
        run: The run.
        model: What to evaluate, called with normalised images.
        others: Teachers; the share of images on which the model and the i-th of them choose the same class is reported
            as `agreement` (`agreement1`, ... from the second on).
        seen: What is to see the scores as well.
        label: What the log lines of timm's script begin with; empty for none.

    Returns:
        Loss, top-1 and top-5 accuracy in percent over all processes, and the agreements; of several labels an image
        loss, mean average precision and F1.
    """
    accelerator, loader = run.accelerator, run.data.evaluation
    measured = evaluator(run.args, accelerator.device)
    agree = torch.zeros(len(others) + 1, dtype=torch.float64, device=accelerator.device)
    taken, last, begun = AverageMeter(), len(loader) - 1, time.monotonic()
    for number, (output, targets, told) in enumerate(answers(run, model, loader, others)):
        for i, scores in enumerate(told):
            agree[i] += (scores.argmax(-1) == output.argmax(-1)).sum()
        agree[-1] += len(output)
        measured.update(output, targets)
        if seen is not None:
            seen(output, targets, told)
        taken.update(time.monotonic() - begun)
        begun = time.monotonic()
        if label and (number % run.args.log_interval == 0 or number == last):
            here = evaluator(run.args, accelerator.device)
            here.update(output, targets)
            means = measured.summary()
            numbers = [_beside(name, value, means[name]) for name, value in here.summary().items()]
            time_ = f"Time: {taken.val:.3f} ({taken.avg:.3f})"
            run.reporter.line("  ".join([f"{label}: [{number:>4d}/{last}]", time_, *numbers]))
    distributed = accelerator.num_processes > 1
    metrics = dict(measured.compute(distributed=distributed))
    if not run.args.allow_nonfinite:
        check_loss(metrics["loss"])
    if label and (distributed or run.args.task == "multilabel"):
        run.reporter.line(f"{label}: {listed(metrics)}")
    if others:
        agree = accelerator.reduce(agree)
        shares = (100 * agree[:-1] / agree[-1].clamp(min=1)).tolist()
        metrics |= {f"agreement{i or ''}": share for i, share in enumerate(shares)}
    return metrics


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
        for output, _, told in answers(run, model, run.data.other, others):
            seen(output, None, told, other)
    whole, beside = gathered(known), gathered(other)
    names = {"student": "student", "teacher": "teachers"}
    uncertain = {names[name]: uncertainty_metrics(found, beside.get(name)) for name, found in whole.items()}
    return evaluation, uncertain, whole


def gathered(kept: Answers) -> dict[str, Doubts]:
    """All examples of all processes, by network; must be called on every process."""
    kept.parts = {name: gather_object(parts) for name, parts in kept.parts.items()}
    return kept.found()
