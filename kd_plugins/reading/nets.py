"""The networks as a method sees them: callables that give a view of one forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Distiller, overrides
from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Forward, Network, adapt
from kd_plugins.reading.view import Batch, Reads, View

__all__ = ["Net", "Nets", "bind", "prepare", "set_up"]

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
    """

    def __init__(
        self,
        network: Network,
        reads: Callable[[], Reads],
        *,
        frozen: bool = False,
        forward: Forward | None = None,
        transform: Transform | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.network = network
        self.frozen = frozen
        self.forward = forward
        self.transform = transform
        self.order = order
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
        replace: Mapping[str, Tensor] | None = None,
        input_grad: bool = False,
    ) -> View:
        """One forward.

        Args:
            batch: What to ask the network with.
            reads: What to read; by default what the method declared.
            replace: Tensors to put in place of modules' outputs, by module path.
            input_grad: Let a gradient reach the input through a frozen network.
        """
        if self._before is not None:
            self._before(batch)
        reads = self.reads if reads is None else reads
        if not self.frozen:
            return self.network.read(batch, reads, forward=self.forward, replace=replace)
        if self.module.training:
            self.module.eval()
        if batch.teacher_logits is not None and not (reads.taps or replace or input_grad):
            view = View(batch.teacher_logits, labels=batch.labels)
        else:
            with torch.set_grad_enabled(input_grad and torch.is_grad_enabled()):
                view = self.network.read(self._translate(batch), reads, forward=self.forward, replace=replace)
        if self.order is not None and view._logits is not None:
            view._logits = view._logits[..., list(self.order)]
        return view

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
                # Other tokens have other masks and types: nothing of the student's goes with them.
                inputs, mask = own.pop(batch.name), own.get("attention_mask")
            else:
                inputs, mask, own = batch.inputs, own.get("attention_mask", batch.mask), {**batch.kwargs, **own}
            batch = dataclasses.replace(batch, inputs=inputs, mask=mask, kwargs=own)
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

    def __iter__(self) -> Iterator[Net]:
        return iter((*self.peers, *self.teachers))


def bind(
    distiller: Distiller,
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    *,
    peers: Sequence[nn.Module] = (),
    batch: Batch | None = None,
    batches: Iterable[Batch] | None = None,
    total_steps: int | None = None,
    epoch_steps: int | None = None,
) -> Nets:
    """Makes the callables through which a method sees its networks; teachers are frozen and put in evaluation mode.

    Args:
        distiller: The method.
        student: The network to train.
        teacher: The frozen network, or several, where the method reads any.
        peers: The other networks that are trained together with the student.
        batch: One real batch to set the method up with; without it the first forward does.
        batches: One pass over the training set, for methods that look at it before the training (a codebook).
        total_steps: Length of the training, for methods with a schedule or with stages.
        epoch_steps: Length of one epoch, where stages are to begin with one or are given in epochs.

    Raises:
        DistillError: The number of teachers or peers does not fit the method, or it wants a pass over the training set.
    """
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    nets = connect(distiller, adapt(student), [adapt(t) for t in teachers], [adapt(p) for p in peers])
    if needs_pass(distiller) and batches is None:
        raise DistillError(
            f"{distiller.name} looks at the training set before the training: give one pass over it, an iterable of"
            " Batch objects, bind(..., batches=...)."
        )

    def start(batch: Batch) -> None:
        for net in nets:
            net._before = None
        weight = next(nets.student.module.parameters(), None)
        with torch.autocast("cpu" if weight is None else weight.device.type, enabled=False):
            set_up(distiller, nets, batch)
            if needs_pass(distiller) and batches is not None:
                prepare(distiller, nets, batches)
        if total_steps is not None:
            distiller.schedule(total_steps, epoch=epoch_steps)
        elif len(distiller.stages()) > 1:
            raise DistillError(
                f"{distiller.name} trains in {len(distiller.stages())} stages and needs to know how long the training"
                " is: bind(..., total_steps=n)."
            )

    if batch is not None or not distiller.data:
        start(batch or Batch())
    else:
        for net in nets:
            net._before = start
    return nets


def connect(
    distiller: Distiller,
    student: Network,
    teachers: Sequence[Network] = (),
    peers: Sequence[Network] = (),
    *,
    forwards: Sequence[Forward | None] = (),
    transforms: Sequence[Transform | None] = (),
    orders: Sequence[Sequence[int] | None] = (),
) -> Nets:
    """`bind` for hosts, of adapters: checks the numbers, freezes the teachers, and gives the networks.

    Args:
        distiller: The method.
        student: The student's adapter.
        teachers: The teachers' adapters.
        peers: The adapters of the other peers.
        forwards: The wrapped callables of student and peers, in this order.
        transforms: How each teacher's images are made of the student's.
        orders: Each teacher's class numbers in the student's order, where they differ.
    """
    distiller.networks_given(len(teachers), len(peers))
    expected = distiller.teachers
    fits = len(teachers) >= 1 if expected == "many" else len(teachers) == expected
    if not fits:
        wanted = {0: "no teacher", 1: "one teacher", "many": "at least one teacher"}.get(
            expected, f"{expected} teachers"
        )
        raise DistillError(
            f"{distiller.name} needs {wanted}, got {len(teachers)}:"
            f" {'give one (--teacher NAME, teacher_model=...)' if len(teachers) == 0 else 'leave the others out'}."
        )
    if distiller.peers and not peers:
        raise DistillError(f"{distiller.name} trains several networks together: give at least one more (--peer NAME).")
    if peers and not distiller.peers:
        raise DistillError(f"{distiller.name} trains one student, got {len(peers)} peers beside it: leave them out.")
    for network in teachers:
        network.module.requires_grad_(False).eval()
    forwards = [*forwards, *[None] * (1 + len(peers) - len(forwards))]
    transforms = [*transforms, *[None] * (len(teachers) - len(transforms))]
    orders = [*orders, *[None] * (len(teachers) - len(orders))]

    def student_reads() -> Reads:
        return distiller.needs().student

    def peer_reads(number: int) -> Reads:
        return distiller.needs().peer(number)

    def teacher_reads() -> Reads:
        return distiller.needs().teacher

    return Nets(
        Net(student, student_reads, forward=forwards[0]),
        [
            Net(network, teacher_reads, frozen=True, transform=transform, order=order)
            for network, transform, order in zip(teachers, transforms, orders, strict=True)
        ],
        [
            Net(network, partial(peer_reads, i), forward=forward)
            for i, (network, forward) in enumerate(zip(peers, forwards[1:], strict=True))
        ],
    )


@contextmanager
def _untouched(distiller: Distiller, nets: Nets) -> Iterator[None]:
    """No gradient, evaluation mode, and no trace in any random stream: what a pass before the training may leave."""
    modes = [(m, m.training) for net in nets for m in net.module.modules()]
    random = distiller.random_state()
    devices = sorted({p.device.index or 0 for net in nets for p in net.module.parameters() if p.device.type == "cuda"})
    try:
        for net in nets:
            net.module.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        distiller.load_random_state(random)


def set_up(distiller: Distiller, nets: Nets, batch: Batch) -> None:
    """Checks the networks and lets the method build its parts on one real batch, leaving the networks untouched."""
    if distiller.ready:
        return
    with _untouched(distiller, nets):
        distiller.check(nets)
        distiller.setup(nets, batch)
        needs = distiller.needs()
        nets.student.network.install(needs.student)
        for i, net in enumerate(nets.peers[1:]):
            net.network.install(needs.peer(i))
        for net in nets.teachers:
            net.network.install(needs.teacher)
    reference = next(nets.student.module.parameters(), None)
    if reference is not None:
        distiller.to(reference.device)
    distiller.ready = True


def prepare(distiller: Distiller, nets: Nets, batches: Iterable[Batch]) -> None:
    """Lets the method pass over the training data before the training, leaving the networks untouched."""
    with _untouched(distiller, nets):
        distiller.prepare(nets, _checked(batches))


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if not isinstance(batch, Batch):
            raise DistillError(
                f"The pass over the training set is of Batch objects, got {type(batch).__name__}: make them with"
                " Batch.of(inputs, labels)."
            )
        yield batch


def needs_pass(distiller: Distiller) -> bool:
    """Whether a method passes over the training data before the training."""
    return overrides(distiller, "prepare")


def describe(nets: Nets) -> dict[str, Any]:
    """Names and sizes of the networks, for reports and error messages."""

    def size(net: Net) -> int:
        return sum(p.numel() for p in net.module.parameters())

    return {
        "student": {"class": type(nets.student.module).__name__, "parameters": size(nets.student)},
        "teachers": [{"class": type(t.module).__name__, "parameters": size(t)} for t in nets.teachers],
        "peers": [{"class": type(p.module).__name__, "parameters": size(p)} for p in nets.peers[1:]],
    }
