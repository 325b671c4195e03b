"""What the methods that compare pairs of layers have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Net, Nets, Reads, View
from kd_plugins.catalog.values import NonNegative
from kd_plugins.nn.connectors import as_weights
from kd_plugins.reading.view import tokens_first
from kd_plugins.terms import Terms, check_terms

# Of any length to a type checker: a method that has these may be overridden with fewer.
FEATURE_TASKS: tuple[str, ...] = (
    "classification",
    "multilabel",
    "segmentation",
    "depth",
    "detection",
    "regression",
    "other",
)
"""The tasks of a method that reads maps and no scores."""
DENSE_TASKS: tuple[str, ...] = ("segmentation", "depth", "detection")
"""The tasks of a method of dense prediction, whose scores are maps."""


class Pair(NamedTuple):
    """An activation of the student and the teacher's that it learns from, and how both were asked for."""

    student: Tensor
    teacher: Tensor
    layer: str | int
    teacher_layer: str | int


class LayerDistiller(Distiller):
    """Compares layers of the student with layers of the teacher: `task + weight * sum over the pairs of a distance`.

    A method gives `distance`, and `connect` where a pair has a trained part. The term has the method's name.

    Class attributes:
        maps: Whether both activations must be maps `[B, C, H, W]`; where they need not, those of four axes are maps.
        examples: The smallest batch of one process and forward that the method can learn from.
        optional: Whether there may be no layers, since the method has another term.

    Args:
        weight: Weight of the sum over the pairs of layers.
        layers: Student layers: stage numbers (-1 is the last stage) or module paths.
        teacher_layers: Teacher layers, in the same order; the same names by default.
    """

    tasks: tuple[str, ...] = FEATURE_TASKS
    maps: bool = True
    examples: int = 1
    optional: bool = False
    weight: float
    layers: tuple[str | int, ...]
    teacher_layers: tuple[str | int, ...]

    def __init__(
        self,
        *,
        weight: NonNegative = 1.0,
        layers: tuple[str | int, ...] = (-1,),
        teacher_layers: tuple[str | int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.teacher_layers = self.layers if teacher_layers is None else teacher_layers
        if len(self.layers) != len(self.teacher_layers) or not (self.layers or self.optional):
            raise DistillError(
                f"Expected as many teacher_layers as layers, got {list(self.layers)} and {list(self.teacher_layers)}."
            )
        self.connectors = nn.ModuleList()
        self.connected: list[int] = []  # the pair that each is of; some may have none

    def needs(self) -> Needs:
        student = Reads(bool(self.task_weight), features=self.layers)
        return Needs(student, Reads(logits=False, features=self.teacher_layers))

    def setup(self, nets: Nets, batch: Batch) -> None:
        if batch.size < self.examples:
            raise DistillError(
                f"{self.name} compares the examples of a batch with each other, and one of {batch.size} has too few:"
                f" give each process at least {self.examples} at a time."
            )
        student = nets.student(batch)
        for number, net in enumerate(nets.teachers):
            for place, pair in enumerate(self.pairs(student, net(batch))):
                self._check(nets.student, pair.layer, pair.student, batch, batch.mask)
                self._check(net, pair.teacher_layer, pair.teacher, batch, batch.teacher_mask)
                self.check_pair(pair)
                part = self.connect(pair.student, pair.teacher)
                if part is not None and number:
                    raise DistillError(f"{self.name} trains parts for the layers of one teacher: leave the others out.")
                if part is not None:
                    self.connectors.append(part)
                    self.connected.append(place)

    def _check(self, net: Net, layer: str | int, x: Tensor, batch: Batch, mask: Tensor | None) -> None:
        if self.maps or x.dim() == 4:
            net.network.check_map(self.name, layer, x)
        elif x.dim() == 3 and mask is not None and x.shape[:2] != mask.shape:
            # Some models have fewer tokens than the input.
            raise DistillError(
                f"{self.name} reads tokens [B, L, C] of the mask {list(mask.shape)}, got {list(x.shape)} at the layer"
                f" {layer!r}: choose one with a vector for each of those tokens (the decoder's, where a model has one)."
            )
        elif tokens_first(x, batch):
            raise DistillError(
                f"{self.name} reads tokens [B, L, C], got {list(x.shape)} at the layer {layer!r}, tokens first: choose"
                " one that has the examples first (batch_first=True)."
            )

    def check_pair(self, pair: Pair) -> None:
        """Refuses a pair that the method cannot compare."""

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        """The trained part of one pair, or None."""
        return None

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        """The term of one pair, a scalar.

        Args:
            student: The student's activation.
            teacher: The teacher's.
            part: What `connect` made for this pair; None where it made nothing.
            batch: The batch of both.
        """
        raise DistillError(f"{type(self).__name__} has no distance(): write what the term of one pair of layers is.")

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        pairs = self.pairs(student, teacher)
        made = dict(zip(self.connected, self.connectors, strict=True))
        parts = [made.get(place) for place in range(len(pairs))]
        terms = [
            self.distance(as_weights(part, pair.student), as_weights(part, pair.teacher), part, batch)
            for pair, part in zip(pairs, parts, strict=True)
        ]
        check_terms(dict(enumerate(terms)), f"distance() of {self.name}")
        return {self.name: self.weight * torch.stack(terms).sum()}

    def pairs(self, student: View, teacher: View) -> list[Pair]:
        """The activations that are compared, in order; a glob's with a glob's.

        Raises:
            DistillError: A glob stands for other numbers of modules in student and teacher.
        """
        pairs = []
        for layer, teacher_layer in zip(self.layers, self.teacher_layers, strict=True):
            ours, theirs = student.features.select(layer), teacher.features.select(teacher_layer)
            if len(ours) != len(theirs):
                raise DistillError(
                    f"Expected as many teacher layers as student layers, got {len(ours)} for {layer!r} in the student"
                    f" and {len(theirs)} for {teacher_layer!r} in the teacher: name them one by one."
                )
            pairs += [Pair(f_s, f_t, layer, teacher_layer) for f_s, f_t in zip(ours, theirs, strict=True)]
        return pairs
