"""A method meets its networks: numbers are checked, teachers frozen, and the method set up on one real batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kd_plugins.authors import check_made, needs_of, overrides, parts
from kd_plugins.averaging import broadcast, distributed
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError
from kd_plugins.finite import check_weights
from kd_plugins.reading.nets import Net, Nets, Transform
from kd_plugins.reading.network import Forward, Network, adapt
from kd_plugins.reading.tap import untraced
from kd_plugins.reading.view import Batch, Needs, Reads, check_batch
from kd_plugins.stages import Progress, StageTable

_BOUND: weakref.WeakKeyDictionary[Distiller, weakref.ref[Nets]] = weakref.WeakKeyDictionary()


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

    A student in DistributedDataParallel is read past its wrapper, and `play` averages its gradients and those of the
    method's parts over the processes. A compiled student runs compiled.

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
        DistillError: The number of teachers or peers does not fit the method, networks share parameters, or the method
            wants a pass over the training set.
    """
    teachers = listed("teacher", teacher)
    trained = [*listed("student", [student]), *listed("peer", peers)]
    if batch is not None:
        check_batch(batch)
    nets = connect(
        distiller,
        adapt(student),
        [adapt(t) for t in teachers],
        [adapt(p) for p in trained[1:]],
        forwards=[_compiled(module) for module in trained],
    )
    for net, module in zip(nets.peers, trained, strict=True):
        net.averaged = isinstance(module, nn.parallel.DistributedDataParallel)
    _BOUND[distiller] = weakref.ref(nets)
    if needs_pass(distiller) and batches is None:
        raise DistillError(
            f"{distiller.name} looks at the training set before the training: give one pass over it, an iterable of"
            " Batch objects, bind(..., batches=...)."
        )

    def start(batch: Batch) -> None:
        for net in nets:
            net._before = None
        with torch.autocast(nets.device.type, enabled=False):
            set_up(distiller, nets, batch)
            if needs_pass(distiller) and batches is not None:
                prepare(distiller, nets, batches)
        if nets.student.averaged:
            agree(distiller, nets)
        if total_steps is not None:
            schedule(distiller, total_steps, epoch=epoch_steps)
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


def listed(kind: str, given: Any, remedy: str = "make it first: timm.create_model(NAME, pretrained=True)") -> list[Any]:
    """One network or several, as a list; refuses what is none.

    Args:
        kind: What they are for, in words.
        given: A network, several, or None.
        remedy: How a network is come by.
    """
    many = isinstance(given, Iterable) and not isinstance(given, (nn.Module, str))
    networks = list(given) if many else [] if given is None else [given]
    for network in networks:
        if not isinstance(network, nn.Module):
            raise DistillError(f"Expected a network (torch.nn.Module) as {kind}, got {network!r}: {remedy}.")
    return networks


def bound(distiller: Distiller) -> Nets | None:
    """The networks that a method was last bound to, as long as they are in use."""
    kept = _BOUND.get(distiller)
    return None if kept is None else kept()


def _compiled(module: nn.Module) -> Forward | None:
    """What a bare loop calls for a network: itself, or its compiled form."""
    if isinstance(getattr(module, "_orig_mod", None), nn.parallel.DistributedDataParallel):
        raise DistillError(
            "Expected a compiled network in DistributedDataParallel, got it the other way round, whose gradients nobody"
            " would average: DistributedDataParallel(torch.compile(student))."
        )
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    return inner if hasattr(inner, "_orig_mod") else None


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
    check_made(distiller)
    for part in distiller.methods.values():
        _check_numbers(part, len(teachers), len(peers), alone=len(distiller.methods) == 1)
    if peers and not distiller.peers:
        raise DistillError(f"{distiller.name} trains one student, got {len(peers)} peers beside it: leave them out.")
    _check_apart([student, *peers], teachers)
    remedy = "it teaches nothing; take weights that were trained to their end."
    check_weights({_called("The teacher", i, teachers): t.module for i, t in enumerate(teachers)}, remedy)
    for network in teachers:
        network.module.requires_grad_(False).eval()

    def trained(number: int) -> Reads:
        needs = needs_of(distiller)
        return needs.peer(number - 1) if number else needs.student

    def taught_by(number: int) -> Reads:
        return needs_of(distiller).of_teacher(number)

    def beside(networks: Sequence[Network], *given: Sequence[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Networks with their numbers and what was given for each, None where the rest was left out."""
        rest = ([*each, *[None] * (len(networks) - len(each))] for each in given)
        return enumerate(zip(networks, *rest, strict=True))

    made = [Net(n, partial(trained, i), forward=f) for i, (n, f) in beside([student, *peers], forwards)]
    frozen = [
        Net(network, partial(taught_by, i), frozen=True, transform=transform, order=order, number=i)
        for i, (network, transform, order) in beside(teachers, transforms, orders)
    ]
    return Nets(made[0], frozen, made[1:])


def _called(who: str, number: int, others: Sequence[Any]) -> str:
    return who if len(others) == 1 else f"{who} {number}"


def _check_numbers(part: Distiller, teachers: int, peers: int, *, alone: bool) -> None:
    expected = part.teachers
    if expected == "or peers":
        if not teachers and not peers:
            raise DistillError(
                f"{part.name} trains the student together with others, or from a frozen teacher: give at least one"
                " --peer NAME (peer_models=..., peers=...), or a --teacher NAME (teacher_model=..., teacher=...)."
            )
        expected = 0 if peers else 1
    elif part.peers and not peers:
        raise DistillError(f"{part.name} trains several networks together: give at least one more (--peer NAME).")
    if expected == 0 and not alone:
        return
    if not (teachers >= 1 if expected == "many" else teachers == expected):
        wanted = {0: "no teacher", 1: "one teacher", "many": "at least one teacher"}.get(
            expected, f"{expected} teachers"
        )
        raise DistillError(
            f"{part.name} needs {wanted}, got {teachers}:"
            f" {'give one (--teacher NAME, teacher_model=...)' if teachers == 0 else 'leave the others out'}."
        )


def _check_apart(trained: Sequence[Network], teachers: Sequence[Network]) -> None:
    """Refuses networks that are one, or share parameters: freezing one would freeze them in the other."""
    owners: dict[int, tuple[str, str]] = {}
    named = [(f"peer {i}" if i else "the student", network) for i, network in enumerate(trained)]
    for who, network in named:
        for name, parameter in network.module.named_parameters():
            other, theirs = owners.setdefault(_place(parameter), (who, name))
            if other != who:
                raise DistillError(
                    f"Expected networks of their own, got {other} and {who} sharing parameters ({theirs}): give one of"
                    " them a copy, copy.deepcopy(...)."
                )
    for number, network in enumerate(teachers):
        who = f"teacher {number}" if len(teachers) > 1 else "the teacher"
        shared = [owners[place] for place in map(_place, network.module.parameters()) if place in owners]
        if shared:
            other, name = shared[0]
            raise DistillError(
                f"Expected a student with parameters of its own, got {len(shared)} that {other} shares with {who}"
                f" ({name}, ...), which would be frozen with the teacher or would move it: build it of copies,"
                " copy.deepcopy(layer)."
            )
    for who, network in named:
        parameters = list(network.module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise DistillError(
                f"Expected something to train in {who}, got a {type(network.module).__name__} whose parameters are all"
                " frozen, as a former teacher's are: call requires_grad_(True) on it first."
            )


def _place(parameter: nn.Parameter) -> int:
    """Where a parameter's numbers lie: two of one place are one, as load_state_dict(assign=True) makes them."""
    try:
        return parameter.data_ptr() or id(parameter)
    except (RuntimeError, ValueError):  # a tensor that is made of others, or not yet, has no place of its own
        return id(parameter)


def schedule(distiller: Distiller, total: int, *, epoch: int | None = None) -> StageTable:
    """Resolves the stages over a training of `total` steps, `epoch` steps each epoch, and starts from step 0."""
    for what, steps in (("training", total), ("epoch", epoch)):
        if not isinstance(steps, int | None) or steps is not None and steps < 1:
            raise DistillError(f"The length of the {what} is a number of steps, at least 1; got {steps!r}.")
    stages = distiller.stages()
    whole = bool(needs_of(distiller).streams) and len(stages) > 1
    table = StageTable.resolve(stages, total, epoch=epoch, whole_epochs=whole)
    distiller.progress = Progress(total=total, table=table)
    distiller.progress.at(0)
    return table


def needs_in(distiller: Distiller, stage: int) -> Needs:
    """What a method needs in another stage than the current one."""
    progress = distiller.progress
    current, progress.stage = progress.stage, stage
    try:
        return needs_of(distiller)
    finally:
        progress.stage = current


def needs_of_stages(distiller: Distiller) -> list[Needs]:
    """What a method needs in each of its stages."""
    return [needs_in(distiller, stage) for stage in range(len(distiller.stages()))]


def needs_pass(distiller: Distiller) -> bool:
    """Whether a method passes over the training data before the training."""
    return overrides(distiller, "prepare")


@contextmanager
def untouched(nets: Nets, distiller: Distiller | None = None) -> Iterator[None]:
    """No gradient, evaluation mode, and no trace in any random stream: what a pass before the training may leave."""
    methods = parts(distiller).values() if distiller is not None else ()
    hosts = [(part.host, part.host.state()) for part in methods]
    try:
        with untraced(*(net.module for net in nets)):
            yield
    finally:
        for host, state in hosts:
            host.load(state)


def set_up(distiller: Distiller, nets: Nets, batch: Batch) -> None:
    """Lets the method check the networks and build its parts on one real batch, leaving the networks untouched."""
    if distiller.ready:
        return
    with untouched(nets, distiller):
        distiller.setup(nets, batch)
        for net in nets:
            net.network.install(net.reads)
    distiller.to(nets.device)
    distiller.ready = True


def prepare(distiller: Distiller, nets: Nets, batches: Iterable[Batch]) -> None:
    """Lets the method pass over the training data before the training, leaving the networks untouched."""
    with untouched(nets, distiller):
        distiller.prepare(nets, _checked(batches))


def agree(distiller: Distiller, nets: Nets) -> None:
    """Gives every process the parts, peers and random streams of the first, before any of them is asked."""
    if distributed():
        broadcast([*distiller.parameters(), *distiller.buffers()])
        for peer in nets.peers[1:]:
            broadcast(peer.module.state_dict().values())
        seed = [torch.initial_seed()]
        dist.broadcast_object_list(seed)
        for part in parts(distiller).values():
            part.host.seed(seed[0])


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = True
    for batch in batches:
        check_batch(batch)
        empty = False
        yield batch
    if empty:
        raise DistillError("The pass over the training set gives no batch: is the data set empty, or used up before?")
