"""What must hold between teacher, student and method before any training time is spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto as auto

from kd_plugins import Distiller, DistillError

__all__ = ["check_fit", "check_vocabulary", "class_order", "task_of"]

_TASKS = {
    "classification": (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "causal-lm": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
    "segmentation": (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,),
    "depth": (auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,),
}


def task_of(model: nn.Module) -> str:
    """What a model's logits are: `"classification"`, `"multilabel"`, `"regression"`, `"token"`, `"causal-lm"`, ...

    A model that is no transformers model counts as a classifier, one of a kind that is not known here as `"other"`.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return "classification"
    names = {cls.__name__ for cls in type(model).__mro__}
    found = (task for task, mappings in _TASKS.items() if any(names & _flat(m.values()) for m in mappings))
    task = next(found, "other")
    if task != "classification":
        return task
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification":
        return "multilabel"
    return "regression" if kind == "regression" or (kind is None and config.num_labels == 1) else "classification"


def _flat(names: Any) -> set[str]:
    return {n for name in names for n in ((name,) if isinstance(name, str) else name)}


def check_fit(distiller: Distiller, task: str, model: nn.Module) -> None:
    """Refuses a method that does not fit the task."""
    if task not in distiller.tasks:
        raise DistillError(
            f"{distiller.name} fits {', '.join(distiller.tasks)}, and {type(model).__name__} is a model for {task}:"
            " choose a method that fits (kd-plugins list)."
        )


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses networks that read the same token ids but do not share a vocabulary."""
    ours, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, teacher))
    if ours is not None and theirs is not None and ours != theirs:
        raise DistillError(
            f"The student reads {ours} token ids and the teacher {theirs}, so they do not share a tokenizer: use a"
            " teacher with the student's tokenizer, or give the teacher columns of its own (teacher_input_ids,"
            " teacher_attention_mask)."
        )


def class_order(student: nn.Module, teacher: nn.Module) -> Sequence[int] | None:
    """The teacher's class numbers in the student's order; None where they are the same.

    Raises:
        DistillError: Other classes, or another number of classes.
    """
    ours, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    n_s, n_t = (getattr(config, "num_labels", None) for config in (ours, theirs))
    vocabularies = [getattr(config, "vocab_size", None) for config in (ours, theirs)]
    if task_of(student) in ("token", "causal-lm") and vocabularies[0] == vocabularies[1] is not None:
        return None
    if n_s is None or n_t is None:
        return None
    if n_s != n_t:
        raise DistillError(
            f"The student has {n_s} classes and the teacher {n_t}: use a teacher that was trained on the same classes."
        )
    names_s, names_t = _class_names(ours), _class_names(theirs)
    if names_s is None or names_t is None or names_s == names_t:
        return None
    if sorted(names_s) != sorted(names_t):
        raise DistillError(
            f"Student and teacher name their {n_s} classes differently, {names_s} and {names_t}, so they cannot be"
            " matched: give both configurations the same label2id."
        )
    return [names_t.index(name) for name in names_s]


def _class_names(config: Any) -> list[str] | None:
    """Class names in the order of the logits; None where a model only has transformers' placeholders."""
    id2label = getattr(config, "id2label", None) or {}
    names = [str(id2label.get(i, id2label.get(str(i), ""))) for i in range(len(id2label))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
