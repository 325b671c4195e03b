"""What must hold between teacher, student and method before any training time is spent."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.auto import modeling_auto as auto

from kd_plugins import Distiller, DistillError

__all__ = [
    "check_checkpointing",
    "check_fit",
    "check_host",
    "check_vocabulary",
    "class_order",
    "inputs_of",
    "same_class_order",
    "task_of",
]

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


def task_of(model: nn.Module, labels: Any = None) -> str:
    """What a model's logits are: `"classification"`, `"multilabel"`, `"regression"`, `"token"`, `"causal-lm"`, ...

    A model that is no transformers model counts as a classifier, one of a kind that is not known here as `"other"`. A
    classifier without a `problem_type` is multi-label if its labels are floats, which transformers sees by them, too.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return "classification"
    cls: Any = type(model)
    task = _family(cls)
    if task != "classification":
        return task
    kind = getattr(config, "problem_type", None)
    if kind is None and config.num_labels == 1:
        return "regression"
    floats = isinstance(labels, Tensor) and labels.is_floating_point()
    if kind == "multi_label_classification" or (kind is None and floats):
        return "multilabel"
    return "regression" if kind == "regression" else "classification"


@lru_cache
def _family(cls: Any) -> str:
    """The task of a class of transformers models, or of one that inherits from it."""
    for task, mappings in _TASKS.items():
        if any(_listed(cls, mapping) for mapping in mappings):
            return task
    return "other"


def _listed(cls: Any, mapping: Any) -> bool:
    names = {n for name in mapping.values() for n in ((name,) if isinstance(name, str) else name)}
    return any(base.__name__ in names for base in cls.__mro__)


@lru_cache
def _parameters(cls: Any) -> frozenset[str]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names that a transformers model's forward takes; empty for other models, which do not tell."""
    cls: Any = type(model)
    return _parameters(cls) if isinstance(model, PreTrainedModel) else frozenset()


def check_host(args: TrainingArguments, *, fsdp: bool, deepspeed: bool) -> None:
    """Refuses ways of training that taps and turns do not survive."""
    if args.n_gpu > 1:
        raise DistillError(
            "Expected one GPU for each process, got DataParallel, which replicates the student in every step, so that"
            " taps read nothing: start one process for each GPU (torchrun, accelerate launch) or make one GPU visible."
        )
    if fsdp or deepspeed:
        raise DistillError(
            f"Distillation under {'FSDP' if fsdp else 'DeepSpeed'} is not supported yet: taps and turns need whole"
            " parameters. Use DDP (torchrun, accelerate launch), or train without a distiller."
        )


def check_checkpointing(model: nn.Module) -> None:
    """Refuses reentrant activation checkpointing, under which nothing that is read inside a layer has a gradient."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise DistillError(
                "Expected activation checkpointing that is not reentrant, got use_reentrant=True, which hides the"
                " gradients of what a method reads inside the student: set"
                " activation_checkpointing_kwargs={'use_reentrant': False}."
            )


def check_fit(distiller: Distiller, task: str, model: nn.Module) -> None:
    """Refuses a method that does not fit the task."""
    if task not in distiller.tasks:
        raise DistillError(
            f"{distiller.name} fits {', '.join(distiller.tasks)}, and {type(model).__name__} is a model for {task}:"
            " choose a method that fits (kd-plugins list)."
        )


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses networks that read the same token ids but do not share a vocabulary."""
    ours, theirs = (getattr(m, "config", None) for m in (student, teacher))
    for what, name in (("vocab_size", "a vocabulary of {} tokens"), ("pad_token_id", "token {} as padding")):
        a, b = getattr(ours, what, None), getattr(theirs, what, None)
        if isinstance(a, int) and isinstance(b, int) and a != b:
            raise DistillError(
                f"Expected networks that share a tokenizer, got a student with {name.format(a)} and a"
                f" {type(teacher).__name__} with {b}: use one with the student's tokenizer, or give a teacher columns"
                " of its own (teacher_input_ids, teacher_attention_mask)."
            )


def class_order(student: nn.Module, teacher: nn.Module) -> Sequence[int] | None:
    """The teacher's class numbers in the student's order; None where they are the same.

    Raises:
        DistillError: Other classes, or another number of classes.
    """
    ours, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    if _scores_tokens(student) and _scores_tokens(teacher):
        what, n_s, n_t = "tokens to choose from", getattr(ours, "vocab_size", None), getattr(theirs, "vocab_size", None)
        names_s = names_t = None
    else:
        what, n_s, n_t = "classes", getattr(ours, "num_labels", None), getattr(theirs, "num_labels", None)
        names_s, names_t = _class_names(ours), _class_names(theirs)
    if n_s is not None and n_t is not None and n_s != n_t:
        raise DistillError(
            f"Expected a teacher that scores the same {what}, got {n_s} in the student and {n_t} in"
            f" {type(teacher).__name__}: use a teacher that was trained on the student's."
        )
    if names_s is None or names_t is None or names_s == names_t:
        return None
    if sorted(names_s) != sorted(names_t):
        raise DistillError(
            f"Student and teacher name their {n_s} classes differently, {names_s} and {names_t}, so they cannot be"
            " matched: give both configurations the same label2id."
        )
    return [names_t.index(name) for name in names_s]


def same_class_order(student: nn.Module, peer: nn.Module) -> None:
    """Refuses a peer, which learns from the student's labels, whose classes are numbered in another order."""
    if class_order(student, peer) is not None:
        raise DistillError(
            "Expected peers that number their classes as the student does, got the same classes in another order: give"
            " all configurations the same label2id."
        )


def _scores_tokens(model: nn.Module) -> bool:
    """Whether a model's logits are scores of the vocabulary."""
    lists = (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return any(_listed(type(model), names) for names in lists)


def _class_names(config: Any) -> list[str] | None:
    """Class names in the order of the logits; None where a model only has transformers' placeholders."""
    id2label = getattr(config, "id2label", None) or {}
    names = [str(id2label.get(i, id2label.get(str(i), ""))) for i in range(len(id2label))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
