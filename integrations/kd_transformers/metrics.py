"""Metrics of the training script: `evaluate` modules that ship with this package, or modules of the hub by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction

from kd_plugins.errors import DistillError, did_you_mean

__all__ = ["agreement", "build_metrics", "decide", "default_metrics", "local_metrics"]

_FOLDER = Path(__file__).parent / "evaluate_modules"
# As GLUE scores its tasks; the others by accuracy.
_GLUE = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearsonr", "spearmanr"],
}


def local_metrics() -> list[str]:
    """Names of the metrics that need no network."""
    return sorted(path.name for path in _FOLDER.iterdir() if (path / f"{path.name}.py").is_file())


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
        names: Of shipped modules, of modules on the hub, or paths of modules.
        problem: transformers' name of the kind of problem.
        classes: Number of classes.
    """
    multi = problem == "multi_label_classification"
    metrics = [_load(name, "multilabel" if multi else None) for name in dict.fromkeys(names)]
    average = "micro" if multi else "macro" if classes > 2 else "binary"

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, references = decide(_logits(prediction.predictions), problem), prediction.label_ids
        values: dict[str, float] = {}
        for metric in metrics:
            options = {"average": average} if "average" in inspect.signature(metric._compute).parameters else {}
            given = references.astype(np.int64) if multi else np.squeeze(references)
            values |= metric.compute(predictions=predictions, references=given, **options)
        return values

    return compute


def decide(logits: np.ndarray, problem: str) -> np.ndarray:
    """What logits `[B, classes]` say: class numbers `[B]`, zeros and ones `[B, classes]`, or numbers `[B]`."""
    if problem == "regression":
        return logits.reshape(len(logits))
    return (logits > 0).astype(np.int64) if problem == "multi_label_classification" else logits.argmax(-1)


def agreement(student: np.ndarray, teacher: np.ndarray, problem: str) -> float:
    """How far two networks say the same of the same inputs.

    The share of equal decisions, or of a regression Pearson's correlation.

    Args:
        student: Logits `[B, classes]`.
        teacher: Logits `[B, classes]`, classes in the same order.
        problem: transformers' name of the kind of problem.
    """
    ours, theirs = decide(student, problem), decide(teacher, problem)
    return float(np.corrcoef(ours, theirs)[0, 1]) if problem == "regression" else float((ours == theirs).mean())


def _logits(predictions: Any) -> np.ndarray:
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _load(name: str, config: str | None) -> Any:
    path = _FOLDER / name
    try:
        # Every process computes on all predictions: nothing to gather, no cache files to wait for.
        return evaluate.load(str(path) if path.is_dir() else name, config, keep_in_memory=True)
    except Exception as error:
        # The loader raises errors of many libraries; each means that the metric is not to be had.
        raise DistillError(
            f"The metric {name} cannot be loaded ({type(error).__name__}: {error})."
            f"{did_you_mean(name, local_metrics())} Without a network there are {', '.join(local_metrics())}."
        ) from error
