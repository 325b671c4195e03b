"""The networks and the tokenizer of the training script: from checkpoints, from a teacher's layers, or from nothing."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertTokenizer
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from kd_accelerate.cached import files_id
from kd_plugins.errors import DistillError, told
from kd_plugins.finite import check_weights
from kd_plugins.reading.depth import uniform
from kd_transformers.checks import class_names, class_order
from kd_transformers.compat import commit_of
from kd_transformers.data import Labels
from kd_transformers.told import Absent

logger = logging.get_logger(__name__)

# What configurations call the size of a feed-forward layer.
_FEED_FORWARD = (
    *("intermediate_size", "hidden_dim", "d_inner", "n_inner", "d_ff"),
    *("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
)
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Of a vocabulary that is trained: scripts of many thousand characters would leave no room for words.
_LETTERS = 1000


def from_checkpoint(name: str, labels: Labels, *, fresh_head: bool, **hub: Any) -> Any:
    """A sequence classifier from a checkpoint.

    Args:
        name: On the hub, or a path.
        labels: What it classifies. Without `fresh_head` the checkpoint's own names of the classes stay.
        fresh_head: Whether weights that the checkpoint lacks, or has for other classes, may start at random; else they
            are an error.
        hub: Options of `from_pretrained`.
    """
    settings = labels.config if fresh_head else {"problem_type": labels.problem}
    unfit = f"The checkpoint {name} cannot be loaded as a sequence classifier"
    with told(unfit, Exception):
        config = AutoConfig.from_pretrained(name, **hub)
    if not fresh_head:
        _check_classes(name, config, labels)
    # Classes that the checkpoint numbers otherwise than the labels do: the rows of its head follow.
    numbers = {class_name.lower(): i for i, class_name in enumerate(class_names(config) or ())}
    order = [numbers.get(class_name.lower(), -1) for class_name in labels.names or ()] if fresh_head else []
    config.update(settings)
    with told(unfit, Exception):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=fresh_head, **hub
        )
    _check_weights(name, info["missing_keys"], fresh_head)
    check_weights({f"The checkpoint {name}": model}, "take weights that were trained to their end.")
    if order and sorted(order) == list(range(len(numbers))):
        for parameter in map(model.get_parameter, _head(model, len(order))):
            parameter.data = parameter.data[order]
    return model


def load_teacher(name: str, checkpoint: str | None, labels: Labels, **hub: Any) -> Any:
    """A trained teacher, every weight of which is loaded.

    Args:
        name: On the hub, or a path.
        checkpoint: Weights in place of those of `name`, a folder or a file, safetensors or a state dict.
        labels: What it classifies.
        hub: Options of `from_pretrained`.
    """
    if not checkpoint or (Path(checkpoint) / "config.json").is_file():
        return from_checkpoint(checkpoint or name, labels, fresh_head=False, **hub)
    model = from_configuration(name, labels, hub)
    with told(f"The weights {checkpoint} do not fit the teacher {name}", Exception):
        outcome = model.load_state_dict(_read_weights(Path(checkpoint)), strict=False)
    _check_weights(checkpoint, set(outcome.missing_keys), False)
    return model.eval()


def absent_teacher(name: str, checkpoint: str | None, labels: Labels, **hub: Any) -> Absent:
    """What `load_teacher` loads, of which the configuration alone is read until it is asked.

    Its identity is a hash of the checkpoint's files; of one on the hub, its commit.
    """
    own = bool(checkpoint) and not (Path(str(checkpoint)) / "config.json").is_file()
    source = name if own or not checkpoint else checkpoint
    with told(f"The configuration {source} cannot be loaded", Exception):
        config = AutoConfig.from_pretrained(source, **hub)
        if own:
            config.update(labels.config)
        _check_classes(source, config, labels)
        config.problem_type = labels.problem
        with torch.device("meta"):
            cls = type(AutoModelForSequenceClassification.from_config(config))
    paths = [path for path in (name, checkpoint) if path and Path(path).exists()]
    commit = commit_of(config)
    if commit is None and not paths:
        raise DistillError(f"The files of the teacher {source} cannot be told: leave out --cache_teacher.")
    identity = f"{commit} {files_id(*paths)}"
    return Absent(cls, config, identity, lambda: load_teacher(name, checkpoint, labels, **hub))


def from_configuration(name: str, labels: Labels, hub: Mapping[str, Any], **options: Any) -> Any:
    """A sequence classifier of a checkpoint's kind and size, with random weights."""
    with told(f"The configuration {name} cannot be loaded", Exception):
        config = AutoConfig.from_pretrained(name, **hub)
    config.update(labels.config)
    return AutoModelForSequenceClassification.from_config(config, **options)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DistillError(f"--teacher-checkpoint: there are no weights at {path}.")
    return {name: weight for file in files for name, weight in load_state_dict(str(file)).items()}


def _check_weights(name: str, missing: Any, fresh_head: bool) -> None:
    if not missing:
        return
    few = ", ".join(sorted(missing)[:4]) + (", ..." if len(missing) > 4 else "")
    if fresh_head:
        logger.warning(f"{name} has no weights for {few}: they start at random.")
        return
    raise DistillError(
        f"{name} has no weights for {few}, which would be random: give a checkpoint that was trained on this task, or"
        " train it first with --train_teacher."
    )


def _check_classes(name: str, config: Any, labels: Labels) -> None:
    if config.num_labels != labels.count:
        raise DistillError(
            f"{name} has {config.num_labels} classes and the data {labels.count}: use a checkpoint that was trained on"
            " these classes, or add --train_teacher to fine-tune it."
        )
    if config.problem_type not in (None, labels.problem):
        raise DistillError(
            f"{name} was trained on a {config.problem_type.replace('_', ' ')} problem, and the labels of the data make"
            f" a {labels.problem.replace('_', ' ')} problem: use a checkpoint that was trained on such labels."
        )


def match_names(labels: Labels, teachers: list[Any]) -> Labels:
    """The labels with the teacher's names for the classes, where the data has none or spells them in another case.

    Without names in the data a class is a number, and the teacher's output of that number is its class.
    """
    for teacher in teachers:
        names = class_names(teacher.config)
        if names is None or len(names) != labels.count:
            continue
        if labels.names is None:
            return replace(labels, names=tuple(names))
        spelled = {name.lower(): name for name in names}
        if len(spelled) == len(names) and set(spelled) == {name.lower() for name in labels.names}:
            return replace(labels, names=tuple(spelled[name.lower()] for name in labels.names))
    return labels


def in_order_of(labels: Labels, model: Any) -> Labels:
    """The labels numbered as a trained model numbers its classes, where both have names for them."""
    labels = match_names(labels, [model])
    named = class_names(model.config)
    if labels.names is None or named is None or tuple(named) == labels.names:
        return labels
    theirs = tuple(named)
    if set(theirs) != set(labels.names):
        raise DistillError(
            f"The model has the classes {', '.join(theirs[:8])} and the data {', '.join(labels.names[:8])}: use a"
            " checkpoint that was trained on these classes."
        )
    order, encode = [labels.names.index(name) for name in theirs], labels.encode

    def reordered(value: Any) -> Any:
        number = encode(value)
        return [number[i] for i in order] if isinstance(number, list) else order.index(number)

    return replace(labels, names=theirs, encode=reordered)


def from_scratch(labels: Labels, tokenizer: Any, length: int, layers: int, hidden_size: int, heads: int) -> Any:
    """A BERT with random weights.

    Args:
        labels: What it classifies.
        tokenizer: Whose tokens it reads.
        length: Longest input in tokens.
        layers: Number of layers.
        hidden_size: Size of a token's vector; the feed-forward layers are twice as wide, half of BERT's.
        heads: Attention heads.
    """
    _check_heads(hidden_size, heads)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=length,
        pad_token_id=tokenizer.pad_token_id,
        **labels.config,
    )
    return AutoModelForSequenceClassification.from_config(config)


def _check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise DistillError(f"Expected a hidden size that {heads} heads divide, got {hidden_size}.")


def shrink(
    teacher: Any, labels: Labels, layers: int | None = None, hidden_size: int | None = None, heads: int | None = None
) -> Any:
    """A network of the teacher's kind with fewer layers, or smaller ones, and random weights.

    Args:
        teacher: The teacher.
        labels: What the student classifies.
        layers: Number of layers; None takes half of the teacher's.
        hidden_size: Size of a token's vector; the feed-forward layers shrink as it does. None keeps the teacher's.
        heads: Attention heads. None keeps the teacher's.
    """
    config, whole = copy.deepcopy(teacher.config), teacher.config.num_hidden_layers
    chosen = layers or max(1, whole // 2)
    if chosen > whole:
        raise DistillError(f"--student_layers: expected at most the teacher's {whole}, got {chosen}.")
    kept = uniform(chosen, whole)
    config.num_hidden_layers = chosen
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[kept[i] - 1] for i in range(1, chosen + 1)]
    if hidden_size is not None:
        for name in _FEED_FORWARD:
            if getattr(config, name, None):
                setattr(config, name, max(1, getattr(config, name) * hidden_size // config.hidden_size))
        config.hidden_size = hidden_size
    if heads is not None:
        config.num_attention_heads = heads
    _check_heads(config.hidden_size, config.num_attention_heads)
    config.update(labels.config)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def copy_layers(student: Any, teacher: Any) -> dict[int, int]:
    """Starts a student from its teacher: embeddings, head, and for each student layer the teacher layer it stands for.

    As in the method `internal`, a student layer is a block of teacher layers, and takes the block's last.

    Returns:
        The teacher layer of each student layer, from 1.
    """
    kept = uniform(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    path = _layer_list(teacher)
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)\.")

    def origin(name: str) -> str:
        return pattern.sub(lambda match: f"{path}.{kept[int(match[1]) + 1] - 1}.", name)

    source = teacher.state_dict()
    weights = {name: source[origin(name)] for name in student.state_dict()}
    order = class_order(student, teacher)
    if order is not None:
        weights |= {name: weights[name][list(order)] for name in _head(student, len(order)) if name in weights}
    student.load_state_dict(weights)
    return kept


def _layer_list(model: nn.Module) -> str:
    """The path of the list that holds the layers."""
    count = model.config.num_hidden_layers
    lists = [p for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise DistillError(
            f"The layers of {type(model).__name__} cannot be told from its other parts, so that a student cannot take"
            " them: use --student_init scratch, or give a student with --model_name_or_path."
        )
    return lists[0]


def _head(model: nn.Module, classes: int) -> list[str]:
    """Names of the parameters of the last layer, whose rows are the classes."""
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return [f"{last}.{name}" for name, p in model.get_submodule(last).named_parameters() if len(p) == classes]


# Tokenizers


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096, max_length: int = 512) -> BertTokenizer:
    """Trains a lower-casing WordPiece tokenizer with BERT's special tokens and template.

    Schuster and Nakajima, "Japanese and Korean Voice Search", ICASSP 2012; the texts alone decide the vocabulary, so
    the same texts give the same tokenizer.

    Args:
        texts: The training split; nothing else, or the vocabulary knows what it should not.
        vocab_size: Size of the vocabulary, at most.
        max_length: What the tokenizer says its model reads.
    """
    tokenizer, texts = BertWordPieceTokenizer(), list(texts)
    counts = Counter(char for text in texts for char in tokenizer.normalize(text) if not char.isspace())
    letters = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:_LETTERS])
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        min_frequency=2,
        # Ties between merges go by token number, and letters within words get theirs in the order of a hash map, which
        # changes from run to run, unless they are there from the start.
        special_tokens=[*_SPECIAL_TOKENS, *letters, *(f"##{char}" for char in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=max_length)


def load_tokenizer(name: str, **hub: Any) -> Any:
    """A tokenizer from a checkpoint, or of a WordPiece vocabulary with one token a line."""
    path = Path(name)
    if path.suffix == ".txt":
        if not path.is_file():
            raise DistillError(f"--tokenizer_name: there is no file {name}.")
        with told(f"--tokenizer_name {name} cannot be read", OSError, ValueError):
            lines = path.read_text(encoding="utf-8").split("\n")
        words = lines[:-1] if lines[-1] == "" else lines
        return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)
    with told(f"The tokenizer of {name} cannot be loaded", Exception):
        return AutoTokenizer.from_pretrained(name, **hub)


def check_tokenizers(tokenizer: Any, others: Mapping[str, Any]) -> None:
    """Refuses networks that would read the same token numbers as different words.

    Args:
        tokenizer: The one that the data is tokenized with.
        others: Those of the networks, by the networks' names.
    """
    vocabulary = tokenizer.get_vocab()
    for name, other in others.items():
        theirs = other.get_vocab()
        if theirs == vocabulary:
            continue
        strange = sum(theirs.get(word) != number for word, number in vocabulary.items())
        raise DistillError(
            f"Expected one tokenizer, got another one of {name}: {strange or len(theirs) - len(vocabulary)} of"
            f" {len(vocabulary)} tokens differ. Use a teacher with the student's tokenizer, or start the student from"
            " the teacher (--student_layers)."
        )


def check_length(model: Any, length: int, tokenizer: Any) -> int:
    """The longest input that a network and its tokenizer take, at most `length`."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    # RoBERTa and its kin count from behind the number of their padding; XLNet says -1, which is no limit.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return min(length, positions if positions > 0 else length, tokenizer.model_max_length)
