"""What goes into a network and what is read of it: Batch, View, and the declarations Reads and Needs."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.errors import DistillError, did_you_mean


class Attention(NamedTuple):
    """The attention of one layer, before dropout.

    Attributes:
        scores: Scaled and masked pre-softmax scores `[B, heads, Lq, Lk]`, float32; masked keys hold a very negative
            number.
        probs: `softmax(scores)`, where the layer computed it anyway.
    """

    scores: Tensor
    probs: Tensor | None = None


@dataclass(frozen=True)
class TopK:
    """A teacher's k highest scores, and all other classes as one, as `functional.top_k` makes them.

    Attributes:
        scores: `[B, ..., k + 1]`.
        classes: Class numbers `[B, ..., k]`.
        temperature: That of the loss which reads them.
    """

    scores: Tensor
    classes: Tensor
    temperature: float = 1.0

    def to(self, *args: Any, **options: Any) -> TopK:
        """The same on another device."""
        return TopK(self.scores.to(*args, **options), self.classes.to(*args, **options), self.temperature)


_LAYERS = ("features", "hidden", "attentions", "cut")


@dataclass(frozen=True)
class Reads:
    """What a method reads of one network in one forward; the network runs no deeper than this needs.

    Attributes:
        logits: Whether the network's own output is wanted.
        features: Module paths (`"layer4"`, `"layer3:in"`, globs such as `"blocks.*.norm1"`) or stage numbers
            (`-1` is the last stage of a staged network).
        hidden: Layer outputs of a transformer by number, 0 for the embeddings, 1 to n for the layers.
        attentions: Attention distributions of a transformer by layer number, 1 to n.
        cut: Transformer layers, 0 for the embeddings, through whose output no gradient flows back.
        softened: The temperature of a loss that compares the scores in one softmax and asks nothing else of them, so
            that the highest, with the rest as one class, will do (`class_scores(..., temperature)`).
    """

    logits: bool = True
    features: tuple[str | int, ...] = ()
    hidden: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    softened: float | None = None

    def __post_init__(self) -> None:
        for name in _LAYERS:
            kinds = (str, int) if name == "features" else int
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(item, kinds) for item in given):
                raise DistillError(f"Expected Reads({name}=...) to be a tuple of layers, got {given!r}: ('layer4',).")

    def __or__(self, other: Reads) -> Reads:
        layers = {name: tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name)))) for name in _LAYERS}
        softened = {reads.softened for reads in (self, other) if reads.logits}
        return Reads(self.logits or other.logits, **layers, softened=softened.pop() if len(softened) == 1 else None)

    @property
    def taps(self) -> bool:
        """Whether anything but the network's own output is read."""
        return bool(self.features or self.hidden or self.attentions)


@dataclass(frozen=True)
class Needs:
    """What a method needs now; it may change with the distiller's progress.

    Attributes:
        student: Reads of the student, and of every other peer.
        teacher: Reads of each teacher.
        streams: Extra streams of batches by name, with the share of the training set that is held out for each:
            `{"search": 0.5}` gives `batch.stream("search")` half of the training set and `batch` the other half.
        index: Whether `batch.index`, the row numbers in the data set, is needed.
        peers: Reads of the other peers in their order, where these are not the student's.
        teachers: Reads of the teachers in their order, where these are not `teacher`.
    """

    student: Reads = Reads()
    teacher: Reads = Reads()
    streams: Mapping[str, float] = field(default_factory=dict)
    index: bool = False
    peers: tuple[Reads, ...] = ()
    teachers: tuple[Reads, ...] = ()

    def __post_init__(self) -> None:
        for reads in (self.student, self.teacher, *self.peers, *self.teachers):
            if not isinstance(reads, Reads):
                raise DistillError(
                    f"Expected Reads for each network in Needs(...), got {reads!r}: Reads(features=...)."
                )

    def peer(self, number: int) -> Reads:
        """What is read of the other peer with this number, counted from 0."""
        return self.peers[number] if number < len(self.peers) else self.student

    def of_teacher(self, number: int) -> Reads:
        """What is read of the teacher with this number."""
        return self.teachers[number] if number < len(self.teachers) else self.teacher

    def __or__(self, other: Needs) -> Needs:
        peers = range(max(len(self.peers), len(other.peers)))
        teachers = range(max(len(self.teachers), len(other.teachers)))
        return Needs(
            self.student | other.student,
            self.teacher | other.teacher,
            {**self.streams, **other.streams},
            self.index or other.index,
            tuple(self.peer(i) | other.peer(i) for i in peers),
            tuple(self.of_teacher(i) | other.of_teacher(i) for i in teachers),
        )


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, (Tensor, TopK)):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        moved = (_move(v, device) for v in value)
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


_MAIN_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")


@dataclass(frozen=True)
class Batch:
    """One batch as every host hands it to a method.

    Attributes:
        inputs: The main input: images `[B, C, H, W]` (normalised), token ids `[B, L]`, whatever else the networks take
            (a detector's list of images); None for a method that makes its own data.
        labels: Targets, as the host's task loss takes them.
        kwargs: The networks' other inputs by name (`attention_mask`, ...).
        name: Keyword of the main input; None passes it by position.
        teacher_kwargs: Inputs that a teacher gets in place of the student's.
        teacher_logits: What the teacher says of these inputs, where it was asked before the training: its logits
            `[B, K]`, `[B, L, K]` per token, or the highest of them; of several teachers a tuple with those of each.
        teacher_features: What layers of each teacher give with these logits, by the name in `Reads.features`.
        mask: `[B, L]`, 1 for a real token, 0 for padding, of a decoder's where there is one; None: nothing is padded.
        mean: Per-channel mean that the images were normalised with.
        std: Per-channel standard deviation that the images were normalised with.
        index: Row numbers in the data set `[B]`.
        rows: Number of rows in the data set; 0 where it is not known.
        size: Number of examples; by default those of the inputs, or of the labels.
        shape: Shape of one input `[C, H, W]`, for methods that make their own.
        classes: Number of classes, for methods that make their own data.
        task: What the logits are: `"classification"`, `"multilabel"`, `"token"` (labels per token), `"causal-lm"`
            (labels one token ahead), `"ctc"` (labels not aligned), `"regression"`, `"segmentation"`, `"depth"`,
            `"detection"`.
        ignore_index: The label that the host's task loss leaves out.
        criterion: The host's task loss of a view and the labels; by default the cross entropy of exclusive classes.
        streams: Batches of the other streams that the method asked for.
    """

    inputs: Tensor | None = None
    labels: Any = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    teacher_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_logits: Tensor | TopK | tuple[Tensor | TopK, ...] | None = None
    teacher_features: tuple[Mapping[str | int, Tensor], ...] = ()
    mask: Tensor | None = None
    mean: Any = None
    std: Any = None
    index: Tensor | None = None
    rows: int = 0
    size: int = 0
    shape: tuple[int, ...] = ()
    classes: int = 0
    task: str = "classification"
    ignore_index: int = -100
    criterion: Callable[[View, Any], Tensor] | None = None
    streams: Mapping[str, Batch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.inputs if isinstance(self.inputs, Tensor) else self.labels
        if not self.size and isinstance(source, Tensor) and source.dim():
            object.__setattr__(self, "size", len(source))

    @classmethod
    def of(cls, inputs: Tensor | Mapping[str, Any] | None = None, labels: Any = None, **fields: Any) -> Batch:
        """Makes a batch of a tensor, or of the mapping that a tokenizer or an image processor returns.

        Args:
            inputs: The main input, or all inputs by keyword; `labels` in a mapping are the labels.
            labels: Targets.
            **fields: Any other attribute of `Batch`.

        >>> batch = Batch.of({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, torch.tensor([0, 1]))
        >>> batch.name, batch.size, sorted(batch.kwargs)
        ('input_ids', 2, ['attention_mask'])
        """
        if isinstance(inputs, Mapping):
            given = dict(inputs)
            if labels is None:
                labels = given.pop("labels", None)
            # The first of all, where none has a name that is known.
            name = next((n for n in (fields.pop("name", None), *_MAIN_INPUTS, *given) if n in given), None)
            if name is None:
                raise DistillError("Expected a mapping with at least one input, got an empty one.")
            inputs = given.pop(name)
            fields.update(name=name, kwargs={**given, **fields.pop("kwargs", {})})
        if fields.get("mask") is None:
            own = fields.get("kwargs", {})
            mask, decoded = own.get("attention_mask"), own.get("decoder_input_ids")
            if isinstance(decoded, Tensor):
                # What is scored are the decoder's tokens, of which the encoder's mask says nothing.
                mask = own.get("decoder_attention_mask", torch.ones_like(decoded))
            if isinstance(mask, Tensor) and mask.dim() == 2:
                fields["mask"] = mask
        return cls(inputs=inputs, labels=labels, **fields)

    def with_inputs(self, inputs: Tensor) -> Batch:
        """The same batch with another main input."""
        return dataclasses.replace(self, inputs=inputs, size=len(inputs), teacher_logits=None, teacher_features=())

    def with_labels(self, labels: Any) -> Batch:
        """The same batch with other targets; where the host's loss is in its forward, ask with this one."""
        return dataclasses.replace(self, labels=labels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: _move(getattr(self, f.name), device) for f in dataclasses.fields(self) if f.name != "streams"}
        return Batch(**moved, streams={k: b.to(device) for k, b in self.streams.items()})

    @property
    def teacher_mask(self) -> Tensor | None:
        """The mask of what a teacher reads: of its own columns; none of the student's goes with tokens of its own."""
        own = self.teacher_kwargs
        return own.get("attention_mask", None if self.name is not None and self.name in own else self.mask)

    @property
    def aligned(self) -> bool:
        """Whether a teacher reads the student's tokens, or inputs that are no tokens."""
        own = self.teacher_kwargs.get(self.name or "")
        tokens = isinstance(own, Tensor) and not own.is_floating_point()
        return not tokens or (isinstance(self.inputs, Tensor) and torch.equal(own, self.inputs))

    def stream(self, name: str) -> Batch:
        """The batch of another stream, drawn from training rows that are held out for it."""
        if name not in self.streams:
            raise DistillError(
                f"This method reads the stream {name!r} but the host gave {sorted(self.streams) or 'no streams'}:"
                f" declare it in needs().streams, or in a bare loop pass Batch.of(..., streams={{{name!r}: batch}})."
            )
        return self.streams[name]

    def task_loss(self, view: View) -> Tensor:
        """The host's own loss of a view: with its label smoothing, mixup, class weights and ignored labels."""
        if view.loss is not None:
            if view.labels is not self.labels:
                raise DistillError(
                    "The host computes its loss inside the network's forward, which saw other labels: ask the network"
                    " with the relabelled batch, nets.student(batch.with_labels(labels))."
                )
            return view.loss
        if self.labels is None:
            raise DistillError(
                "The task loss needs labels, but the batch has none: give labels (a Trainer is told their name,"
                " TrainingArguments(label_names=[...])) or drop the task term."
            )
        if self.criterion is not None:
            return self.criterion(view, self.labels)
        scores = view.logits
        if self.task not in ("classification", "segmentation") or scores.shape[1:2] in ((), (1,)):
            raise DistillError(
                "The task loss is the cross entropy of a softmax over axis 1 where the batch has no other, and for"
                f" scores {list(scores.shape)} of the task {self.task} that may not be meant: give"
                " Batch.of(..., criterion=function), called with the view and the labels, or drop the task term."
            )
        labels = torch.as_tensor(self.labels)
        soft = labels.is_floating_point()
        if soft and labels.shape != scores.shape:
            raise DistillError(
                f"Expected class numbers as integers, or shares of the classes {list(scores.shape)}, got {labels.dtype}"
                f" {list(labels.shape)}: give labels.long(), or task='regression' and a criterion."
            )
        ignored = -100 if soft else self.ignore_index
        return F.cross_entropy(scores, labels if soft else labels.long(), ignore_index=ignored)

    def pixels(self, noise: Tensor) -> Tensor:
        """Turns noise in pixel units (images in [0, 1]) into noise of the normalised inputs, `noise / std`."""
        if self.std is None:
            raise DistillError(
                "Noise in pixel space needs the mean and std that the inputs were normalised with, and the batch has"
                " none: pass Batch.of(..., mean=..., std=...), one number per channel; a Trainer reads them of an image"
                " processor (processing_class=...)."
            )
        std = torch.as_tensor(self.std, dtype=noise.dtype, device=noise.device)
        if std.numel() not in (1, noise.shape[1]):
            raise DistillError(
                f"Expected a std of each channel, got {std.numel()} for images {list(noise.shape)}: give the batch,"
                " or the image processor, one number for each channel."
            )
        return noise / std.view(1, -1, *[1] * (noise.dim() - 2))


def tokens_first(x: Tensor, batch: Batch) -> bool:
    """Whether an activation of three axes is `[L, B, C]`, as XLNet's layers give it; where L is B, nobody can tell."""
    ids = batch.inputs if isinstance(batch.inputs, Tensor) and not batch.inputs.is_floating_point() else None
    # Each choice of an example is a row of its own.
    rows = batch.size if ids is None else ids.shape[:-1].numel()
    return x.dim() == 3 and x.shape[1] == rows != len(x)


def check_batch(batch: Any) -> None:
    """Refuses what is no batch, or one without a row."""
    if not isinstance(batch, Batch):
        raise DistillError(f"Expected a Batch, got {type(batch).__name__}: make it with Batch.of(inputs, labels).")
    if isinstance(batch.inputs, Tensor) and batch.inputs.dim() and not len(batch.inputs):
        raise DistillError("A batch has no rows: leave it out, or drop the last one of the loader (drop_last=True).")


class Features(dict[Any, Tensor]):
    """Activations by the name they were asked for.

    Attributes:
        globs: The keys behind each name that stands for several, in the order of the network.
    """

    def __init__(self, activations: Mapping[Any, Tensor] = types.MappingProxyType({})) -> None:
        super().__init__(activations)
        self.globs: dict[str | int, list[str]] = {}

    def __missing__(self, key: Any) -> Tensor:
        raise DistillError(
            f"Nothing was read at {key!r}; this forward read {list(self)}.{did_you_mean(str(key), map(str, self))}"
            " Declare it in needs()."
        )

    def select(self, name: str | int) -> list[Tensor]:
        """All activations that a name or a glob stands for."""
        return [self[key] for key in self.globs.get(name, [name])]


@dataclass
class View:
    """What one forward of one network gave.

    Attributes:
        features: Activations by the name in `Reads.features`.
        hidden: Layer outputs `[B, L, H]` by number.
        attentions: Attention by layer number.
        output: The network's raw output; None when the forward stopped early.
        loss: The task loss, where the host's forward computes it.
        labels: The labels of the batch that was asked with.
        missing: Why the output has no scores, where it has none.
        top: The highest scores, where no others are known.
    """

    _logits: Tensor | None = None
    features: Features = field(default_factory=Features)
    hidden: Features = field(default_factory=Features)
    attentions: Mapping[int, Attention] = field(default_factory=dict)
    output: Any = None
    loss: Tensor | None = None
    labels: Any = None
    missing: str = ""
    top: TopK | None = None

    @property
    def logits(self) -> Tensor:
        """The network's output scores: `[B, K]`, `[B, L, K]` per token, `[B, K, H, W]` per pixel."""
        if self._logits is None:
            if self.top is not None:
                raise DistillError(
                    f"The cache holds the {self.top.classes.shape[-1]} highest of the teacher's scores, which kd can"
                    " read, and this needs all of them: make the cache without top k."
                )
            if self.missing:
                raise DistillError(self.missing)
            raise DistillError(
                "The logits were not asked for (Reads(logits=False)), so the network did not run so far: declare"
                " Reads(logits=True) in needs(), or drop the term that reads them (task_weight = 0 for the task loss)."
            )
        return self._logits
