"""The networks as a method sees them: callables that give a view of one forward."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Forward, Network
from kd_plugins.reading.tap import Replacement
from kd_plugins.reading.view import Batch, Features, Reads, TopK, View, check_batch

_logger = logging.getLogger(__name__)

Transform = Callable[[Tensor], Tensor]


class Net:
    """One network of a distillation: called with a batch, it gives a view of one forward.

    Args:
        network: How the network is called and read.
        reads: What the method reads of it now, where a call does not say.
        frozen: A teacher: evaluation mode, no gradient.
        forward: The callable that a host has wrapped around the network; by default the network itself.
        transform: Turns the student's images into this network's (its own mean, std and size).
        order: This network's class numbers in the student's order, where they differ.
        number: Which of the teachers it is.

    Attributes:
        averaged: Whether a bare loop averages the gradients over the processes, since the network came wrapped in
            DistributedDataParallel.
    """

    averaged = False

    def __init__(
        self,
        network: Network,
        reads: Callable[[], Reads],
        *,
        frozen: bool = False,
        forward: Forward | None = None,
        transform: Transform | None = None,
        order: Sequence[int] | None = None,
        number: int = 0,
    ) -> None:
        self.network = network
        self.frozen = frozen
        self.forward = forward
        self.transform = transform
        self.order = order
        self.number = number
        self._reads = reads
        self._before: Callable[[Batch], None] | None = None

    @property
    def module(self) -> nn.Module:
        """The network itself, unwrapped."""
        return self.network.module

    @property
    def reads(self) -> Reads:
        """What the method reads of this network now, where a call does not say."""
        return self._reads()

    def __call__(
        self,
        batch: Batch,
        *,
        reads: Reads | None = None,
        replace: Mapping[str, Replacement] | None = None,
        input_grad: bool = False,
        dropout: bool = False,
    ) -> View:
        """One forward.

        Args:
            batch: What to ask the network with.
            reads: What to read; by default what the method declared.
            replace: Tensors to put in place of modules' outputs, or what makes them of these, by module path.
            input_grad: Let a gradient reach the input through a frozen network.
            dropout: Leave the dropout of a frozen network on.
        """
        self.begin(batch)
        reads = self.reads if reads is None else reads
        if not self.frozen:
            return self.network.read(batch, reads, forward=self.forward, replace=replace)
        if self.module.training:
            self.module.eval()
        known = None if replace or input_grad or dropout else self._known(batch, reads)
        if known is not None:
            view = known
        else:
            with torch.set_grad_enabled(input_grad and torch.is_grad_enabled()), _dropout(self.module, dropout):
                view = self.network.read(self._translate(batch), reads, forward=self.forward, replace=replace)
        if self.order is not None and view._logits is not None:
            # As in `class_scores`: of tokens the classes are the last axis, of images and maps the second.
            axis = -1 if batch.task in ("token", "causal-lm", "ctc") else 1
            view._logits = view._logits.index_select(axis, torch.tensor(self.order, device=view._logits.device))
        elif self.order is not None and view.top is not None:
            place = torch.tensor(self.order, device=view.top.classes.device).argsort()
            view.top = dataclasses.replace(view.top, classes=place[view.top.classes])
        return view

    def _known(self, batch: Batch, reads: Reads) -> View | None:
        """What no forward is needed for: nothing, or what the teacher said when it was asked before the training."""
        if not (reads.logits or reads.taps):
            return View(labels=batch.labels)
        told, features = batch.teacher_logits, dict(enumerate(batch.teacher_features)).get(self.number, {})
        if told is None or reads.hidden or reads.attentions or not features.keys() >= set(reads.features):
            return None
        each = told if isinstance(told, tuple) else (told,)
        if self.number >= len(each):
            raise DistillError(
                f"Expected what each teacher says, got that of {len(each)} and a teacher number {self.number + 1}: give"
                " Batch.of(..., teacher_logits=(first, second, ...))."
            )
        mine = each[self.number]
        top = mine if isinstance(mine, TopK) else None
        read = Features({name: features[name] for name in reads.features})
        return View(None if top is not None else mine, read, labels=batch.labels, top=top)

    def begin(self, batch: Batch) -> None:
        """Sets the method up, where the first forward is to do that; refuses what is no batch."""
        check_batch(batch)
        if self._before is not None:
            self._before(batch)

    def layers(self, batch: Batch) -> int:
        """The number of transformer layers, found by one forward of a real batch."""
        with torch.no_grad():
            return self.network.layers(self._translate(batch) if self.frozen else batch)

    def _translate(self, batch: Batch) -> Batch:
        """The batch as this teacher takes it: its own normalisation and size, its own columns."""
        if self.transform is not None and batch.inputs is not None:
            batch = batch.with_inputs(self.transform(batch.inputs))
        if batch.teacher_kwargs:
            own = dict(batch.teacher_kwargs)
            if batch.name is not None and batch.name in own:
                # Other tokens have other masks and types: nothing of the student's goes with them but what a decoder
                # reads, which both have in common.
                shared = {k: v for k, v in batch.kwargs.items() if k.startswith("decoder_")}
                inputs, own = own.pop(batch.name), {**shared, **own}
            else:
                inputs, own = batch.inputs, {**batch.kwargs, **own}
            batch = dataclasses.replace(batch, inputs=inputs, mask=batch.teacher_mask, kwargs=own)
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if weight is None or torch.is_autocast_enabled(weight.device.type):
            return batch

        def cast(x: Any) -> Any:
            return x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        kwargs = {name: cast(value) for name, value in batch.kwargs.items()}
        return dataclasses.replace(batch, inputs=cast(batch.inputs), kwargs=kwargs)


class Nets:
    """The networks of a distillation.

    Args:
        student: The student, the first of the peers.
        teachers: Frozen networks.
        others: The peers that are trained together with the student.
    """

    def __init__(self, student: Net, teachers: Sequence[Net] = (), others: Sequence[Net] = ()) -> None:
        self.student = student
        self.teachers = tuple(teachers)
        self.peers = (student, *others)

    @property
    def teacher(self) -> Net:
        """The only teacher, or the first."""
        if not self.teachers:
            raise DistillError("This method reads a teacher, and none was given: pass one.")
        return self.teachers[0]

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Student and peers by the names of their groups: `student`, `peer1`, ..."""
        return {group_name(i): peer.module for i, peer in enumerate(self.peers)}

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The teachers by name: `teacher`, `teacher1`, ..."""
        return {f"teacher{i}" if i else "teacher": teacher.module for i, teacher in enumerate(self.teachers)}

    @property
    def device(self) -> torch.device:
        """Where the student's weights are."""
        return next((p.device for p in self.student.module.parameters()), torch.device("cpu"))

    def __iter__(self) -> Iterator[Net]:
        return iter((*self.peers, *self.teachers))


def group_name(number: int) -> str:
    """The group of a network that trains, by its number among the peers, the student being the first."""
    return f"peer{number}" if number else "student"


def begun(turns: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A method's `turns` that find it set up, whatever they look at before they ask a network."""

    @wraps(turns)
    def after_set_up(distiller: Any, nets: Nets, batch: Batch) -> Iterator[Any]:
        nets.student.begin(batch)
        given = turns(distiller, nets, batch)
        if not isinstance(given, Iterable):
            raise DistillError(
                f"Expected turns() of {distiller.name} to yield {{group: {{term: loss}}}}, got {given!r}: write yield."
            )
        return given

    return after_set_up


@contextmanager
def _dropout(module: nn.Module, on: bool) -> Iterator[None]:
    """Leaves the dropout of a network on, and everything else in evaluation mode."""
    layers = [m for m in module.modules() if on and _drops(m)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _drops(module: nn.Module) -> bool:
    """Whether a module's own mode switches dropout: a layer of it, or what has a rate, or a layer's, for a function.

    Attention and recurrent layers drop out in a function, and so do timm's networks before their classifier. Skipped
    paths (`drop_prob`) and layers are no dropout.
    """
    if isinstance(module, (_DropoutNd, _NormBase)):
        return isinstance(module, _DropoutNd)
    own = {**vars(type(module)), **vars(module), **module._modules}
    rates = [getattr(x, "p", None) if isinstance(x, _DropoutNd) else x for name, x in own.items() if _RATE.search(name)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


_RATE = re.compile("^(?!drop_prob|drop_path|layerdrop).*drop")


def check_unlike(trained: Mapping[str, nn.Module]) -> None:
    """Refuses networks that begin as copies and would stay the same; warns where they nearly do.

    Args:
        trained: Networks that are trained together, by name.
    """
    for (first, ours), (second, theirs) in combinations(trained.items(), 2):
        share = _same(ours, theirs)
        if share == 1:
            raise DistillError(
                f"{first} and {second} have the same architecture and weights and would stay the same:"
                " initialise them differently."
            )
        if share > 0.5:
            _logger.warning(
                "%s and %s start with the same weights but for %.1f %%: networks that are alike have little to teach"
                " each other.",
                *(first, second, 100 * (1 - share)),
            )


def _same(a: nn.Module, b: nn.Module) -> float:
    """The share of two networks' weights that are equal; 0 for different architectures."""
    ours, theirs = list(a.parameters()), list(b.parameters())
    if [p.shape for p in ours] != [q.shape for q in theirs]:
        return 0.0
    pairs = zip(ours, theirs, strict=True)
    # Vectors start as constants in every network.
    weights = [(p.numel(), p.device == q.device and torch.equal(p, q)) for p, q in pairs if p.dim() > 1]
    if not weights:
        return float(all(torch.equal(p, q.to(p.device)) for p, q in zip(ours, theirs, strict=True)))
    return sum(n for n, equal in weights if equal) / sum(n for n, _ in weights)
