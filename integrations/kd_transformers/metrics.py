"""Metrics of the training script: scikit-learn's and SciPy's, which need no network, or `evaluate`'s by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import special, stats
from sklearn import metrics
from transformers import EvalPrediction
from transformers.utils import logging

from kd_plugins.errors import DistillError, did_you_mean, told
from kd_transformers.compat import averages

logger = logging.get_logger(__name__)

_LOCAL: dict[str, Callable[[Any, Any, str], Any]] = {
    "accuracy": lambda truth, guess, average: metrics.accuracy_score(truth, guess),
    "f1": lambda truth, guess, average: metrics.f1_score(truth, guess, average=average),
    "matthews_correlation": lambda truth, guess, average: metrics.matthews_corrcoef(truth, guess),
    "pearsonr": lambda truth, guess, average: correlation(stats.pearsonr, truth, guess),
    "spearmanr": lambda truth, guess, average: correlation(stats.spearmanr, truth, guess),
}
# Those that score other problems than one class of several.
_FITTING = {"regression": {"pearsonr", "spearmanr"}, "multi_label_classification": {"accuracy", "f1"}}
# As GLUE scores its tasks; the others by accuracy.
_GLUE = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearsonr", "spearmanr"],
}


def local_metrics() -> list[str]:
    """Names of the metrics that need no network."""
    return sorted(_LOCAL)


def default_metrics(problem: str, task_name: str | None = None) -> list[str]:
    """The metrics of a GLUE task, or of a kind of problem.

    >>> default_metrics("single_label_classification"), default_metrics("single_label_classification", "cola")
    (['accuracy', 'f1'], ['matthews_correlation'])
    """
    if task_name is not None:
        return _GLUE.get(task_name, ["accuracy"])
    return ["pearsonr", "spearmanr"] if problem == "regression" else ["accuracy", "f1"]


def build_metrics(names: Sequence[str], problem: str, classes: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """What `Trainer` takes as `compute_metrics`.

    Metrics that can average over classes do so: `macro` over three classes or more, `micro` over the labels of a
    multi-label problem; with two classes, class 1 is the positive one.

    Args:
        names: Of those that need no network, of modules on the hub, or paths of modules.
        problem: transformers' name of the kind of problem.
        classes: Number of classes.

    Raises:
        DistillError: A metric does not fit the problem, or cannot be loaded.
    """
    fitting = _FITTING.get(problem, set(_LOCAL))
    if unfit := [name for name in names if name in _LOCAL and name not in fitting]:
        raise DistillError(
            f"--metric {', '.join(unfit)} does not score a {problem.replace('_', ' ')} problem, which the labels make:"
            f" expected {' or '.join(sorted(fitting))}, or a module of evaluate."
        )
    multi = problem == "multi_label_classification"
    average = "micro" if multi else "macro" if classes > 2 else "binary"
    found = [_metric(name, "multilabel" if multi else None, average) for name in dict.fromkeys(names)]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        guess, labels = decide(logits_of(prediction.predictions), problem), prediction.label_ids
        truth = labels.astype(np.int64) if multi else labels.reshape(len(labels))
        return {name: value for metric in found for name, value in metric(truth, guess).items()}

    return compute


def decide(logits: np.ndarray, problem: str) -> np.ndarray:
    """What logits `[B, classes]` say: class numbers `[B]`, zeros and ones `[B, classes]`, or numbers `[B]`."""
    if problem == "regression":
        return logits.reshape(len(logits))
    return (logits > 0).astype(np.int64) if problem == "multi_label_classification" else logits.argmax(-1)


def ensemble(told: Sequence[np.ndarray], problem: str) -> np.ndarray:
    """What several networks say together: logits of their mean probability, of a regression their mean.

    Args:
        told: Logits `[B, classes]` of each.
        problem: transformers' name of the kind of problem.
    """
    if problem == "regression":
        return np.mean(told, axis=0)
    logits = np.stack(told).astype(np.float64)
    if problem == "multi_label_classification":
        return special.logit(special.expit(logits).mean(0))
    return special.logsumexp(special.log_softmax(logits, -1), 0)


def agreement(student: np.ndarray, teacher: np.ndarray, problem: str) -> float:
    """How far two networks say the same of the same inputs.

    The share of equal decisions, or of a regression Pearson's correlation (0 where that has none).

    Args:
        student: Logits `[B, classes]`.
        teacher: Logits `[B, classes]`, classes in the same order.
        problem: transformers' name of the kind of problem.
    """
    ours, theirs = decide(student, problem), decide(teacher, problem)
    if problem == "regression":
        return correlation(stats.pearsonr, theirs, ours, names=("teacher's predictions", "student's predictions"))
    return float((ours == theirs).mean())


def correlation(
    kind: Callable[[Any, Any], Any],
    truth: np.ndarray,
    guess: np.ndarray,
    names: Sequence[str] = ("labels", "predictions"),
) -> float:
    """A correlation of numbers `[B]`; 0 with a warning where all of one side are equal, which has none."""
    flat = [who for who, values in zip(names, (truth, guess), strict=True) if np.ptp(values) == 0]
    if flat:
        told = f"All {len(truth)} {' and '.join(flat)} are equal, so no correlation is defined"
        logger.warning(f"{told}: it counts as 0.")
        return 0.0
    return float(kind(truth, guess)[0])


def logits_of(predictions: Any) -> np.ndarray:
    """The logits: some models return more."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _metric(name: str, config: str | None, average: str) -> Callable[[Any, Any], dict[str, float]]:
    """A metric of the truth and the guesses."""
    if name in _LOCAL:
        return partial(_local, name, average)
    import evaluate

    remedy = f"without a network there are {', '.join(local_metrics())}.{did_you_mean(name, local_metrics())}"
    # The loader raises errors of many libraries; each means that the metric is not to be had.
    with told(f"The metric {name} cannot be loaded", Exception, remedy=remedy):
        # Every process computes on all predictions: nothing to gather, no cache files to wait for.
        module = evaluate.load(name, config, keep_in_memory=True)
    options = {"average": average} if averages(module) else {}
    return lambda truth, guess: dict(module.compute(predictions=guess, references=truth, **options))


def _local(name: str, average: str, truth: Any, guess: Any) -> dict[str, float]:
    if guess.dtype.kind == "f":
        truth, guess = truth.astype(np.float64), guess.astype(np.float64)
    return {name: float(_LOCAL[name](truth, guess, average))}


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
