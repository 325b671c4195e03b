"""Groups of parameters and their optimizers, and the ten lines that play a turn."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_plugins.distiller import Distiller, OptimSpec, Turn, overrides
from kd_plugins.errors import DistillError, did_you_mean
from kd_plugins.reading.nets import Nets
from kd_plugins.stages import Stage

__all__ = ["Group", "Groups", "make_optimizers", "play", "total"]


class Group:
    """Parameters that one optimizer of ours moves.

    Args:
        name: What the turns call it.
        parameters: Its parameters.
        optimizer: Its optimizer.
        spec: How its learning rate runs and its gradient is clipped; None follows the student's optimizer.

    Attributes:
        clip: Clips the gradients in the parameters' `.grad`; hosts that clip the student's set it for peers.
    """

    def __init__(
        self, name: str, parameters: Sequence[nn.Parameter], optimizer: Optimizer, spec: OptimSpec | None
    ) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.spec = spec
        self.clip: Callable[[list[nn.Parameter]], Any] | None = None
        if spec is not None and spec.clip is not None:
            self.clip = partial(nn.utils.clip_grad_norm_, max_norm=spec.clip)

    def follow(self, student: Optimizer) -> None:
        """Sets the learning rate for the coming update."""
        if self.spec is None:
            for group in self.optimizer.param_groups:
                group["lr"] = student.param_groups[group["follows"]]["lr"]
            return
        lr, main = self.spec.lr, student.param_groups[largest(student)]
        if self.spec.schedule == "student":
            lr *= float(main["lr"]) / max(float(main["initial_lr"]), 1e-30)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, gradients: Iterable[Tensor | None], student: Optimizer) -> None:
        """Updates the parameters by gradients that are not in `.grad`, and leaves `.grad` as it was."""
        before = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.update(student)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient

    def update(self, student: Optimizer) -> None:
        """Updates the parameters by what is in `.grad`."""
        self.follow(student)
        if self.clip is not None:
            self.clip(self.parameters)
        self.optimizer.step()


class Groups:
    """The optimizers of a distillation: the student's, which the user made, and ours beside it.

    Ours are made when they are first asked for, after the method has built its parts. `"own"` and the peers get an
    optimizer of the student's class, hyper-parameters and learning-rate curve; extra and shared groups get what the
    method and the user's overrides say. Where the student's optimizer has several parameter groups, `"own"` is like the
    largest, and a peer's parameter like the student's of its name, else like most of its kind (weights, or vectors such
    as biases and norms).

    Args:
        distiller: The method.
        optimizer: The student's optimizer.
        nets: The networks, where the method trains peers, shares parameters of a network, or has stages.
    """

    def __init__(self, distiller: Distiller, optimizer: Optimizer, nets: Nets | None = None) -> None:
        self.distiller = distiller
        self.optimizer = optimizer
        self.nets = nets
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._groups: dict[str, Group] | None = None
        self.initial: dict[str, Tensor] | None = None
        if nets is not None and any(stage.fresh_student for stage in distiller.stages()):
            self.initial = {k: v.detach().cpu().clone() for k, v in nets.student.module.state_dict().items()}

    @property
    def student(self) -> list[nn.Parameter]:
        """The parameters of the student's optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    @property
    def groups(self) -> dict[str, Group]:
        """Our groups: `"own"`, extra groups, shared groups, peers."""
        if self._groups is None:
            self._groups = self._make()
        return self._groups

    @property
    def own(self) -> Group | None:
        """The distiller's parts that are stepped with the student."""
        return self.groups.get("own")

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups.values())

    def __getitem__(self, name: str) -> Group:
        try:
            return self.groups[name]
        except KeyError:
            raise DistillError(
                f"{self.distiller.name} yields a turn for the group {name!r}, but its groups are"
                f" {['student', *self.groups]}.{did_you_mean(name, self.groups)} Declare it in extras() or shared()."
            ) from None

    def _make(self) -> dict[str, Group]:
        distiller, student = self.distiller, {id(p) for p in self.student}
        made: dict[str, Group] = {}
        own = distiller.own_parameters()
        if own:
            made["own"] = Group("own", own, like(self.optimizer, {largest(self.optimizer): own}), None)
        nets = self.nets.peers if self.nets else ()
        for i, peer in enumerate(nets[1:], 1):
            split = like_student(self.optimizer, nets[0].module, peer.module)
            parameters = [p for part in split.values() for p in part]
            made[f"peer{i}"] = Group(f"peer{i}", parameters, like(self.optimizer, split), None)
        extra = {name: list(module.parameters()) for name, module in distiller.extras().items()}
        if overrides(distiller, "shared"):
            if self.nets is None:
                raise DistillError(f"{distiller.name} shares parameters of a network: make_optimizers(..., nets=nets).")
            for name, parameters in distiller.shared(self.nets).items():
                extra[name] = [*extra.get(name, []), *parameters]
        specs = distiller.optimizers()
        unknown = set(distiller.optim_overrides) - set(extra)
        if unknown:
            name = sorted(unknown)[0]
            raise DistillError(
                f"Options were given for the group {name!r}, but {distiller.name} has"
                f" {sorted(extra) or 'no extra groups'}.{did_you_mean(name, extra)}"
            )
        for name, parameters in extra.items():
            spec = override(specs.get(name, OptimSpec()), distiller.optim_overrides.get(name, {}), name)
            made[name] = Group(name, parameters, make(spec, parameters), spec)
        if any(id(p) in student for p in own):
            raise DistillError("Parts of the distiller are in the student's optimizer: build it of the student alone.")
        return made

    def enter_stage(self) -> Stage | None:
        """Enters the stage that the current step belongs to: fresh optimizer state, fresh student, as it says."""
        stage = self.distiller.next_stage()
        if stage is None:
            return None
        if stage.fresh_student:
            if self.initial is None or self.nets is None:
                raise DistillError("A stage starts with a fresh student: make_optimizers(..., nets=nets).")
            self.nets.student.module.load_state_dict(self.initial)
        if stage.fresh_optimizer:
            for optimizer in (self.optimizer, *(group.optimizer for group in self)):
                optimizer.state.clear()
        self.distiller.enter_stage()
        return stage

    def end_step(self) -> None:
        """What follows an update of the student."""
        progress = self.distiller.progress
        self.distiller.after_update()
        self.distiller.at(progress.step + 1)
        self.enter_stage()


def largest(optimizer: Optimizer) -> int:
    """The parameter group that holds most of the weights: hosts put biases and norms apart, without weight decay."""
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return sizes.index(max(sizes))


def like_student(optimizer: Optimizer, student: nn.Module, peer: nn.Module) -> dict[int, list[nn.Parameter]]:
    """A peer's parameters by the number of the group of the student's optimizer that they are to be treated as."""
    number = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    of_name = {name: p for name, p in student.named_parameters() if id(p) in number}
    sizes: Counter[tuple[bool, int]] = Counter()
    for p in of_name.values():
        sizes[p.dim() > 1, number[id(p)]] += p.numel()
    split: dict[int, list[nn.Parameter]] = {}
    for name, p in peer.named_parameters():
        if not p.requires_grad:
            continue
        same = of_name.get(name)
        if same is not None and same.dim() == p.dim():
            group = number[id(same)]
        else:
            kind = [(size, group) for (matrix, group), size in sizes.items() if matrix == (p.dim() > 1)]
            group = max(kind)[1] if kind else largest(optimizer)
        split.setdefault(group, []).append(p)
    return split


def like(optimizer: Optimizer, split: Mapping[int, Sequence[nn.Parameter]]) -> Optimizer:
    """Another optimizer of the same class.

    Args:
        optimizer: The optimizer.
        split: The other's parameters, by the number of the group whose hyper-parameters they get; each group of the
            other keeps that number as `follows`.
    """
    cls = type(optimizer)
    accepted = inspect.signature(cls).parameters
    groups, names = optimizer.param_groups, [k for k in optimizer.defaults if k in accepted]
    made = [
        {"params": list(part), "follows": i, **{k: groups[i][k] for k in names if k in groups[i]}}
        for i, part in split.items()
    ]
    first = groups[largest(optimizer)]
    try:
        return cls(made, **{k: first[k] for k in names if k in first})
    except (TypeError, AttributeError) as error:
        raise DistillError(
            f"Peers and the distiller's own parts get an optimizer like the student's, and a {cls.__name__} cannot be"
            f" made of parameters alone ({error}): choose another optimizer."
        ) from error


def make(spec: OptimSpec, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """The optimizer that a spec describes."""
    cls = getattr(torch.optim, spec.optimizer, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)]
        hint = did_you_mean(spec.optimizer, known)
        raise DistillError(f"Expected the name of an optimizer in torch.optim, got {spec.optimizer!r}.{hint}")
    return cls(list(parameters), lr=spec.lr, weight_decay=spec.weight_decay, **spec.options)


def override(spec: OptimSpec, changes: dict[str, Any], group: str) -> OptimSpec:
    """A spec with the user's changes."""
    known = [f.name for f in fields(OptimSpec)]
    for name in changes:
        if name not in known:
            raise DistillError(
                f"The optimizer of the group {group!r} has no option {name!r}; it has {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    return replace(spec, **changes)


def make_optimizers(distiller: Distiller, optimizer: Optimizer, nets: Nets | None = None) -> Groups:
    """The optimizers that a bare loop plays turns with; see `Groups`."""
    return Groups(distiller, optimizer, nets)


def total(terms: Any, group: str) -> Tensor:
    """The sum of a group's loss terms."""
    if not terms:
        raise DistillError(f"The turn for the group {group!r} holds no loss terms: leave the group out or give it one.")
    return sum(terms.values())  # type: ignore[no-any-return]


def play(turn: Turn, optimizers: Groups) -> None:
    """Plays one turn in a bare loop: takes every gradient before any optimizer moves a weight, the student last.

    >>> import kd_plugins
    >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> distiller = kd_plugins.create_distiller("kd")
    >>> nets = kd_plugins.bind(distiller, student, teacher)
    >>> optimizers = kd_plugins.make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1))
    >>> batch = kd_plugins.Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> for turn in distiller.turns(nets, batch):
    ...     kd_plugins.play(turn, optimizers)
    """
    names = [*(name for name in turn if name != "student"), *(["student"] if "student" in turn else [])]
    own = optimizers.own
    gradients = {}
    for i, name in enumerate(names):
        parameters = optimizers[name].parameters if name != "student" else optimizers.student
        if name == "student" and own:
            parameters = [*parameters, *own.parameters]
        loss, keep = total(turn[name], name), i + 1 < len(names)
        gradients[name] = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    for name in names:
        if name != "student":
            optimizers[name].step(gradients[name], optimizers.optimizer)
            continue
        for parameter, gradient in zip(optimizers.student, gradients[name], strict=False):
            parameter.grad = gradient
        if own:
            own.step(gradients[name][len(optimizers.student) :], optimizers.optimizer)
        optimizers.optimizer.step()
        optimizers.optimizer.zero_grad(set_to_none=True)
        optimizers.end_step()
