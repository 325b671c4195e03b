"""Groups of parameters that optimizers of ours move, beside the student's optimizer that the user made."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_plugins.authors import overrides
from kd_plugins.averaging import distributed
from kd_plugins.binding import agree, bound
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError, did_you_mean, told
from kd_plugins.reading.nets import Nets


@dataclass(eq=False)
class Group:
    """Parameters that one optimizer of ours moves.

    Attributes:
        name: What the turns call it.
        parameters: Its parameters.
        optimizer: Its optimizer.
        spec: How its learning rate runs and its gradient is clipped; None follows the student's optimizer.
        clip: Clips the gradients in the parameters' `.grad`; hosts that clip the student's set it for peers.
    """

    name: str
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    spec: OptimSpec | None = None
    clip: Callable[[list[nn.Parameter]], Any] | None = None

    def __post_init__(self) -> None:
        if self.spec is not None and self.spec.clip is not None:
            self.clip = partial(nn.utils.clip_grad_norm_, max_norm=self.spec.clip)

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
        with self.holding(gradients):
            self.update(student)

    @contextmanager
    def holding(self, gradients: Iterable[Tensor | None]) -> Iterator[None]:
        """Puts gradients into `.grad` for the time of a step."""
        before = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        yield
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient

    def update(self, student: Optimizer) -> None:
        """Updates the parameters by what is in `.grad`."""
        self.follow(student)
        if self.clip is not None:
            self.clip(self.parameters)
        self.optimizer.step()


class Grouped:
    """What a `Run` moves: the student's optimizer, and our groups beside it.

    These are made when they are first asked for, after the method has built its parts. For the arguments see `Run`.
    """

    def __init__(self, distiller: Distiller, optimizer: Any, nets: Nets | None, max_grad_norm: float | None) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise DistillError(f"Expected the student's optimizer, a torch.optim.Optimizer, got {optimizer!r}.")
        self.distiller = distiller
        self.nets = nets if nets is not None else bound(distiller)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._groups: dict[str, Group] | None = None

    @property
    def plain_optimizer(self) -> Optimizer:
        """The student's optimizer, without what a host has wrapped around it."""
        inner: Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    @property
    def student(self) -> list[nn.Parameter]:
        """The parameters of the student's optimizer."""
        return [p for group in self.plain_optimizer.param_groups for p in group["params"] if p.requires_grad]

    @property
    def groups(self) -> dict[str, Group]:
        """Our groups by name: `"own"`, the peers, extra and shared groups."""
        if self._groups is None:
            if not self.distiller.ready and overrides(self.distiller, "setup"):
                raise DistillError(
                    f"{self.distiller.name} has no parts to train before it is set up: bind(..., batch=one batch)."
                )
            self._groups = make_groups(self.distiller, self.plain_optimizer, self.nets)
            if self.joined and self.nets is not None and not self.nets.student.averaged:
                agree(self.distiller, self.nets)
            if self.max_grad_norm is not None:
                self.clip_peers(partial(nn.utils.clip_grad_norm_, max_norm=self.max_grad_norm))
        return self._groups

    @property
    def own(self) -> Group | None:
        """The method's parts that are stepped with the student."""
        return self.groups.get("own")

    @property
    def clip_parameters(self) -> list[nn.Parameter]:
        """The group `"own"`, which a host clips jointly with the student."""
        return self.own.parameters if self.own else []

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

    def clip_peers(self, clip: Callable[[list[nn.Parameter]], Any]) -> None:
        """Has the gradient of each peer clipped, as the host clips the student's."""
        for name, group in self.groups.items():
            if name.startswith("peer"):
                group.clip = clip

    @property
    def joined(self) -> bool:
        """Whether several processes train one student."""
        return distributed() and self.nets is not None and self.nets.student.averaged


def make_groups(distiller: Distiller, optimizer: Optimizer, nets: Nets | None) -> dict[str, Group]:
    """The groups of a distillation: `"own"`, the peers, extra and shared groups.

    `"own"` and the peers get an optimizer of the student's class, hyper-parameters and learning-rate curve; extra and
    shared groups get what the method and the user's overrides say. Where the student's optimizer has several parameter
    groups, `"own"` is like the largest, and a peer's parameter like the student's of its name, else like most of its
    kind (weights, or vectors such as biases and norms).

    Args:
        distiller: The method, set up.
        optimizer: The student's optimizer.
        nets: The networks, where the method trains peers or shares parameters of a network.
    """
    made: dict[str, Group] = {}
    own = distiller.own_parameters()
    if own:
        made["own"] = Group("own", own, like(optimizer, {largest(optimizer): own}))
    peers = nets.peers if nets else ()
    for i, peer in enumerate(peers[1:], 1):
        split = like_student(optimizer, peers[0].module, peer.module)
        # In the network's order, by which adaptive clipping knows the classifier.
        parameters = [p for p in peer.module.parameters() if p.requires_grad]
        made[f"peer{i}"] = Group(f"peer{i}", parameters, like(optimizer, split))
    extra = {name: list(module.parameters()) for name, module in distiller.extras().items()}
    if overrides(distiller, "shared"):
        if nets is None:
            raise DistillError(f"{distiller.name} shares parameters of a network: make_optimizers(..., nets=nets).")
        for name, parameters in distiller.shared(nets).items():
            extra[name] = [*extra.get(name, []), *parameters]
    specs = distiller.optimizers()
    unknown = set(distiller.optim_overrides) - set(extra)
    if unknown:
        name = sorted(unknown)[0]
        hint = did_you_mean(name, extra)
        raise DistillError(
            f"Options were given for the group {name!r}, but {distiller.name} has"
            f" {sorted(extra) or 'no extra groups'}{f'.{hint}' if hint else ': leave them out.'}"
        )
    for name, given in extra.items():
        parameters = [p for p in given if p.requires_grad] or given
        spec = override(specs.get(name, OptimSpec()), distiller.optim_overrides.get(name, {}), name)
        made[name] = Group(name, parameters, make(spec, parameters), spec)
    student = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) in student for p in own):
        raise DistillError("Parts of the distiller are in the student's optimizer: build it of the student alone.")
    return made


def largest(optimizer: Optimizer) -> int:
    """The parameter group that holds most of the weights: hosts put biases and norms apart, without weight decay.

    timm's layer decay slows a group by its `lr_scale`: one at the full rate is taken.
    """
    sizes = [(group.get("lr_scale", 1.0), sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
    return sizes.index(max(sizes))


def like_student(optimizer: Optimizer, student: nn.Module, peer: nn.Module) -> dict[int, list[nn.Parameter]]:
    """A peer's parameters by the number of the group of the student's optimizer that they are to be treated as."""
    number = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    of_name = {name: p for name, p in student.named_parameters() if id(p) in number}
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
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
            kind = [(scales[g], size, g) for (matrix, g), size in sizes.items() if matrix == (p.dim() > 1)]
            group = max(kind)[-1] if kind else largest(optimizer)
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
    # With what is no argument of the optimizer, too (timm's Muon leaves groups with `use_fallback` to AdamW), but for
    # what it counts itself: the other begins.
    counted = {"param_names", "step", *optimizer.defaults} - set(names)
    kept = [{k: v for k, v in group.items() if k not in counted} for group in groups]
    made = [{**kept[i], "params": list(part), "follows": i} for i, part in split.items()]
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
    known = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
    if spec.optimizer not in known:
        hint = did_you_mean(spec.optimizer, known)
        raise DistillError(f"Expected the name of an optimizer in torch.optim, got {spec.optimizer!r}.{hint}")
    with told(f"The optimizer {spec} cannot be made", TypeError, ValueError, AttributeError):
        return known[spec.optimizer](list(parameters), lr=spec.lr, weight_decay=spec.weight_decay, **spec.options)


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
