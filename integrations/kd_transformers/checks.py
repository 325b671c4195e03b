"""What must hold between teacher, student and method before any training time is spent."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.auto import modeling_auto as auto

from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads
from kd_plugins.binding import needs_of_stages, untouched
from kd_plugins.errors import told
from kd_transformers.compat import is_reentrant

# The kinds of models: the task of their scores, and transformers' names for them. The choices of multiple choice are
# classes; the start and the end of an answer are two rows of positions.
_CLASSIFIERS = [f"{what}_CLASSIFICATION" for what in ("SEQUENCE", "IMAGE", "AUDIO", "VIDEO")]
_TOKENS = ["TOKEN_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION"]
_KINDS = {
    "classification": ("classification", _CLASSIFIERS),
    "token classification": ("token", _TOKENS),
    "sequence to sequence": ("token", ["SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"]),
    "masked language modelling": ("token", ["MASKED_LM"]),
    "causal-lm": ("causal-lm", ["CAUSAL_LM"]),
    "question answering": ("token", ["QUESTION_ANSWERING"]),
    "multiple choice": ("classification", ["MULTIPLE_CHOICE"]),
    "segmentation": ("segmentation", ["SEMANTIC_SEGMENTATION"]),
    "depth": ("depth", ["DEPTH_ESTIMATION"]),
    "detection": ("detection", ["OBJECT_DETECTION"]),
    "ctc": ("ctc", ["CTC"]),
    "other": ("other", []),
}
# What transformers calls the problem of a classifier.
PROBLEMS = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
_VOCABULARY = ("sequence to sequence", "masked language modelling", "causal-lm", "ctc")
TASKS = ("classification", "multilabel", "regression", "token", "causal-lm", "segmentation", "depth", "detection")


def base(model: nn.Module) -> nn.Module:
    """The transformers model in one with adapters (PEFT)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def called(model: nn.Module) -> str:
    """The name of a model's class, also of a teacher that is not loaded."""
    return str(getattr(base(model), "stands_for", type(base(model)).__name__))


def config_of(model: nn.Module) -> Any:
    """A model's configuration; None where it has none."""
    return getattr(base(model), "config", None)


def stated(model: nn.Module, what: str) -> Any:
    """What a model's configuration says of something; None where it says nothing."""
    return getattr(config_of(model), what, None)


def kind_of(model: nn.Module) -> str:
    """What a model is for, by its class: `"classification"`, `"question answering"`, `"causal-lm"`, ...

    A model that is no transformers model counts as a classifier, one of a kind that is not known here as `"other"`.
    """
    model, config = base(model), config_of(model)
    if not hasattr(config, "to_dict"):
        return str(getattr(model, "absent_kind", None) or "classification")
    cls: Any = getattr(model, "absent_class", None) or type(model)
    kind = _kind(cls)
    # Among transformers' models from sequence to sequence are decoders of sound, whose labels are one token ahead.
    return "other" if kind == "sequence to sequence" and not config.is_encoder_decoder else kind


def task_of(model: nn.Module, labels: Any = None, *, own_loss: bool = False) -> str:
    """What a model's logits are: `"classification"`, `"multilabel"`, `"regression"`, `"token"`, `"causal-lm"`, ...

    A classifier without a `problem_type` is multi-label if its labels are floats, which transformers sees by them, too.
    Of another model they may be soft labels, several classes or a number, which its class does not tell: `"other"`. So
    may the one score of a loss that is not the model's own, a number or the logit of a sigmoid.
    """
    kind = kind_of(model)
    config = config_of(model)
    floats = isinstance(labels, Tensor) and labels.is_floating_point()
    if kind != "classification" or not hasattr(config, "to_dict"):
        return "other" if floats and kind == "classification" else _KINDS[kind][0]
    guess = "regression" if config.num_labels == 1 else "multi_label_classification" if floats else ""
    problem = stated(model, "problem_type")
    if own_loss and isinstance(labels, Tensor) and config.num_labels == 1 and not problem:
        return "other"
    return PROBLEMS.get(problem or guess, kind)


@lru_cache
def _kind(cls: Any) -> str:
    """The kind of a class of transformers models, or of one that inherits from it."""
    for kind, (_, heads) in _KINDS.items():
        found = [name for head in heads for name in getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES").values()]
        names = {n for name in found for n in ((name,) if isinstance(name, str) else name)}
        if any(parent.__name__ in names for parent in cls.__mro__):
            return kind
    return "other"


@lru_cache
def _parameters(cls: Any) -> frozenset[str]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names that a transformers model's forward takes; empty for other models, which do not tell."""
    cls: Any = getattr(base(model), "absent_class", None) or type(base(model))
    return _parameters(cls) if issubclass(cls, PreTrainedModel) else frozenset()


def scores_tokens(models: Sequence[nn.Module]) -> bool:
    """Whether all of some models score each token of their inputs, so that padding among the scores is known."""
    kinds = ("token classification", "masked language modelling", "causal-lm")
    return all(kind_of(model) in kinds for model in models)


def counted_as(model: nn.Module) -> str:
    """What a model's configuration calls the number of its classes."""
    return "vocab_size" if kind_of(model) in _VOCABULARY else "num_labels"


def check_host(args: TrainingArguments) -> None:
    """Refuses ways of training that taps do not survive."""
    if args.n_gpu > 1:
        raise DistillError(
            "Expected one GPU for each process, got DataParallel, which replicates the student in every step, so that"
            " taps read nothing: start one process for each GPU (torchrun, accelerate launch) or make one GPU visible."
        )


def check_checkpointing(model: nn.Module) -> None:
    """Refuses reentrant activation checkpointing, under which nothing that is read inside a layer has a gradient."""
    for module in model.modules():
        if is_reentrant(module):
            raise DistillError(
                "Expected activation checkpointing that is not reentrant, got use_reentrant=True, which hides the"
                " gradients of what a method reads inside the student: set"
                " activation_checkpointing_kwargs={'use_reentrant': False}."
            )


def check_labels(peer: nn.Module, name: str, *, own_loss: bool) -> None:
    """Refuses a peer whose forward gives no task loss."""
    parameters = inspect.signature(peer.forward).parameters
    if not (own_loss or name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        raise DistillError(
            f"Expected a peer whose forward takes {name}, as its task loss needs them, got {type(peer).__name__}: take"
            " a model of transformers (of timm's, TimmWrapperForImageClassification), or give compute_loss_func."
        )


def check_fit(distiller: Distiller, task: str, model: nn.Module) -> None:
    """Refuses a method that does not fit the task."""
    if task in distiller.tasks:
        return
    kind = kind_of(model)
    meant = kind if _KINDS[kind][0] == task else task
    name = called(model)
    reason = f"{name} is a model for {meant}: choose a method that fits (kd-plugins list)."
    if task == "other":
        reason = f"the class {name} does not tell what its scores are: say it with task=..., one of {', '.join(TASKS)}."
    raise DistillError(f"{distiller.name} fits {', '.join(distiller.tasks)}, and {reason}")


_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def special_tokens(model: nn.Module) -> dict[str, Any]:
    """The special tokens that a model's configuration names."""
    return {name: stated(model, name) for name in _SPECIAL}


def follow_tokens(models: Sequence[nn.Module], student: nn.Module, before: Mapping[str, Any]) -> None:
    """Gives models the special tokens that the student has come to have, where they had those it had before."""
    for name, token in special_tokens(student).items():
        for model in models:
            if token != before[name] == stated(model, name) and hasattr(base(model), "config"):
                setattr(config_of(model), name, token)


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses networks that read the same token ids but do not share a vocabulary."""
    for what, name in (
        ("vocab_size", "a vocabulary of {} tokens"),
        ("pad_token_id", "token {} as padding"),
        ("decoder_start_token_id", "token {} as the decoder's first"),
    ):
        a, b = stated(student, what), stated(teacher, what)
        if isinstance(a, int) and isinstance(b, int) and a != b:
            raise DistillError(
                f"Expected networks that share a tokenizer, got a student with {name.format(a)} and a"
                f" {called(teacher)} with {b}:"
                f" {_resize(a, b) if what == 'vocab_size' else ''}use one with the student's tokenizer, or give a"
                " teacher columns of its own (teacher_input_ids, teacher_attention_mask)."
            )


def _resize(student: int, teacher: int) -> str:
    """The remedy where one of two vocabularies is the other with rows of padding after it."""
    larger, smaller = "teacher" if teacher > student else "student", min(student, teacher)
    return f"where the rows beyond are padding, {larger}.resize_token_embeddings({smaller}) drops them; else "


def class_order(student: nn.Module, teacher: nn.Module) -> Sequence[int] | None:
    """The teacher's class numbers in the student's order; None where they are the same.

    Raises:
        DistillError: Other classes, or another number of classes.
    """
    kind, other, name = kind_of(student), kind_of(teacher), called(teacher)
    if kind in ("question answering", "multiple choice"):
        if other != kind:
            raise DistillError(f"Expected a teacher for {kind}, as the student is, got {name}, for {other}.")
        return None
    tokens = kind in _VOCABULARY and other in _VOCABULARY
    ours, theirs = (stated(m, "vocab_size" if tokens else "num_labels") for m in (student, teacher))
    if ours is not None and theirs is not None and ours != theirs:
        what, remedy = "classes", "use a teacher that was trained on the student's"
        if tokens:
            what, remedy = "tokens to choose from", _resize(ours, theirs) + remedy
        else:
            remedy += ", or a method that reads no scores of the teacher (nst)"
        raise DistillError(
            f"Expected a teacher that scores the same {what}, got {ours} in the student and {theirs} in {name}:"
            f" {remedy}."
        )
    names, other_names = (class_names(config_of(m)) for m in (student, teacher))
    if tokens or names is None or other_names is None or names == other_names:
        return None
    if sorted(names) != sorted(other_names):
        raise DistillError(
            f"Student and teacher name their {ours} classes differently, {names} and {other_names}, so they cannot be"
            " matched: give both configurations the same label2id."
        )
    return [other_names.index(name) for name in names]


def check_problem(teacher: nn.Module, task: str) -> None:
    """Refuses a teacher whose configuration says that its scores are others than they would be read as."""
    problem = stated(teacher, "problem_type")
    theirs = task_of(teacher) if problem and kind_of(teacher) == "classification" else task
    if theirs != task:
        raise DistillError(
            f"Expected a teacher for {task}, as the student and the labels are, got {called(teacher)} with"
            f" problem_type={problem!r}: use one that was trained on such labels, or set problem_type of the"
            " configuration that is wrong."
        )


def same_class_order(student: nn.Module, peer: nn.Module) -> None:
    """Refuses a peer, which learns from the student's labels, whose classes are numbered in another order."""
    if class_order(student, peer) is not None:
        raise DistillError(
            "Expected peers that number their classes as the student does, got the same classes in another order: give"
            " all configurations the same label2id."
        )


def class_names(config: Any) -> list[str] | None:
    """Class names in the order of the logits; None where a model only has transformers' placeholders."""
    id2label = getattr(config, "id2label", None) or {}
    names = [str(id2label.get(i, id2label.get(str(i), ""))) for i in range(len(id2label))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def reads_scores(distiller: Distiller, teacher: int = 0) -> bool:
    """Whether a method reads the scores of a teacher in any of its stages."""
    return any(needs.of_teacher(teacher).logits for needs in needs_of_stages(distiller))


_IGNORED = ("semantic_loss_ignore_index", "loss_ignore_index")


def ignored_label(model: nn.Module) -> int:
    """The label that a model's loss leaves out; UperNet has another name for it."""
    return next((int(stated(model, name)) for name in _IGNORED if hasattr(config_of(model), name)), -100)


def check_ignored(scores: Tensor, batch: Batch, model: nn.Module) -> None:
    """Refuses labels that are neither a class nor the ignored label, which the task loss has left out nevertheless."""
    labels, axis = batch.labels, {"segmentation": 1, "token": -1, "causal-lm": -1}.get(batch.task)
    if axis is None or not isinstance(labels, Tensor) or labels.is_floating_point() or scores.shape[axis] < 2:
        return
    other = labels[(labels != batch.ignore_index) & ((labels < 0) | (labels >= scores.shape[axis]))]
    if other.numel():
        config = config_of(model)
        name = next((name for name in _IGNORED if hasattr(config, name)), _IGNORED[-1])
        told = f".{name} = {int(other[0])}" if config else f" = types.SimpleNamespace({name}={int(other[0])})"
        raise DistillError(
            f"Expected labels of the {scores.shape[axis]} classes that are scored, or {batch.ignore_index} where there"
            f" is none, got {int(other[0])}: if the task loss leaves it out, say so for the soft labels too,"
            f" model.config{told}; else mend the labels."
        )


def check_aligned(distiller: Distiller, nets: Nets, batch: Batch) -> None:
    """Refuses a teacher of other images, and scores per token of one that reads other tokens, or others before them."""
    if batch.name == "pixel_values" and batch.teacher_logits is None:
        _check_images(distiller, nets, batch)
    if batch.task not in ("token", "causal-lm", "ctc") or not reads_scores(distiller):
        return
    if not batch.aligned:
        raise DistillError(
            f"{distiller.name} compares scores token by token, and the column teacher_{batch.name} holds other"
            " tokens than the student's: use a teacher with the student's tokenizer."
        )
    with untouched(nets):
        apart = [_sees_apart(net, batch) for net in nets]
    for net, alone in zip(nets, apart, strict=True):
        if alone is not None and alone != apart[0]:
            ours, theirs = (called(n.module) for n in (nets.student, net))
            one, other = (ours, theirs) if apart[0] else (theirs, ours)
            raise DistillError(
                f"The batch has packed texts (position_ids begin anew), which {one} sees apart and {other} as one: pad"
                " the texts in its place, or take networks that see alike."
            )


def _check_images(distiller: Distiller, nets: Nets, batch: Batch) -> None:
    """Refuses teachers that do not take the images.

    Where only layers are read, a forward ends with the last, and what comes behind may take more than images (texts).
    """
    # With a criterion, a network without scores is read, too.
    batch = dataclasses.replace(batch, criterion=lambda view, labels: view.logits)
    for net in (n for i, n in enumerate(nets.teachers) if reads_scores(distiller, i)):
        what = f"The teacher {called(net.module)} does not take the images"
        remedy = "give the data a column teacher_pixel_values, of its size and its normalisation."
        with told(what, ValueError, AssertionError, remedy=remedy), untouched(nets):
            net(batch, reads=Reads())


def _sees_apart(net: Net, batch: Batch) -> bool | None:
    """Whether a network begins anew with the last of several texts in a row; None where there is one.

    Not every network that takes `position_ids` makes its mask of them, so it is asked about that text alone, too.
    """
    positions, inputs = batch.kwargs.get("position_ids"), batch.inputs
    if not isinstance(positions, Tensor) or not isinstance(inputs, Tensor) or positions.shape != inputs.shape[:2]:
        return None
    begins = (positions.diff() != 1).nonzero()
    if batch.mask is not None or not len(begins) or batch.teacher_logits is not None:
        return None
    row, end = begins[-1].tolist()
    here = slice(row, row + 1), slice(end + 1, None)
    text = Batch(inputs=inputs[here], kwargs={"position_ids": positions[here]}, name=batch.name, task=batch.task)
    packed, alone = (net(asked, reads=Reads()).logits for asked in (batch, text))
    # Of the first token, which has nothing before it, it shows most.
    return not differ(packed[here][:, 0], alone[:, 0])


def differ(seen: Tensor, alone: Tensor) -> bool:
    """Whether scores are others: on their scale, and all in all, as half precision rounds single ones."""
    return bool((seen - alone).abs().mean() > 5e-2 * alone.std(-1).mean())
