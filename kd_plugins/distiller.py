"""The one abstraction: a distillation method as a sequence of turns within a training step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_plugins.reading.view import Batch, Needs, View
from kd_plugins.stages import Progress, Stage, StageTable

if TYPE_CHECKING:
    from kd_plugins.catalog.paper import Paper
    from kd_plugins.picture import Picture
    from kd_plugins.reading.nets import Nets

__all__ = ["Distiller", "OptimSpec", "Terms", "Turn"]

Terms = dict[str, Tensor]
"""Loss terms by name; they are summed, and logged under their names."""
Turn = Mapping[str, Mapping[str, Tensor]]
"""Loss terms of each group of parameters that one turn updates."""


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer of one extra group; every field can be overridden, `--distill-args critic.lr=2e-5`.

    Attributes:
        optimizer: Name of a class in `torch.optim`.
        lr: Learning rate.
        weight_decay: Weight decay.
        options: Other arguments of the optimizer, such as `{"betas": (0.5, 0.9)}`.
        schedule: `"constant"`, or `"student"` to follow the relative curve of the student's learning rate.
        clip: Largest norm of the group's gradient; None does not clip.
    """

    optimizer: str = "Adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Literal["constant", "student"] = "constant"
    clip: float | None = None


class Distiller(nn.Module):
    """A distillation method.

    It holds its own parts only (connectors, critics, codebooks) and never stores a network, so that its `state_dict()`
    is small and the exported student clean. Plain methods override `loss`; methods that need more than one update a
    step override `turns`. The keyword-only, annotated and defaulted arguments of the constructor are the method's
    options, on the command line and in configurations; the `Args` section of the docstring is their help.

    Class attributes:
        paper: What to cite.
        kind: `"offline"`, `"online"`, `"data-free"`, ...
        hosts: The hosts it fits, for `kd-plugins list`.
        tasks: The tasks it fits; hosts refuse others.
        teachers: Number of teachers: 0, 1 or `"many"`.
        peers: Whether it trains several networks together.
        data: False when it makes its own inputs.
        accumulation: False when gradient accumulation would change what the method is.
        untrained: Parameters that get no gradient on purpose, as globs over their names (`"student.head.*"`), for
            `kd_plugins.testing.check_distiller`.
    """

    paper: ClassVar[Paper | None] = None
    kind: ClassVar[str] = "offline"
    hosts: ClassVar[tuple[str, ...]] = ("timm", "transformers", "accelerate", "bare loop")
    tasks: tuple[str, ...] = ("classification",)
    teachers: int | str = 1
    peers: bool = False
    data: bool = True
    accumulation: bool = True
    untrained: tuple[str, ...] = ()

    name: str = ""
    task_weight: float = 1.0
    """Weight of the task loss in the default turn; 0 drops the term."""
    config: dict[str, Any]
    """The constructor's arguments, as they were given."""
    optim_overrides: dict[str, dict[str, Any]]
    """Overrides of the groups' `OptimSpec`s, by group and field."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Distiller:
        self = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        self.__dict__["config"] = dict(bound.arguments)
        return self

    def __init__(self) -> None:
        super().__init__()
        self.name = self.name or type(self).__name__.lower()
        self.progress = Progress()
        self.table: StageTable | None = None
        self.optim_overrides = {}
        self.ready = False
        self._seed: int | None = None
        self._generators: dict[str, torch.Generator] = {}

    # What a method declares

    def needs(self) -> Needs:
        """What the method reads of each network now; it may follow `self.progress`."""
        return Needs()

    def extras(self) -> dict[str, nn.Module]:
        """Own parts that have an optimizer of their own, by group: `{"critic": self.critic}`."""
        return {}

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        """Groups that move parameters of a network by an optimizer of their own, beside the network's own updates.

        A group that is in `extras()` too moves both: a network's features together with a layer on top of them.
        """
        return {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """The optimizer of each group in `extras()` and `shared()`; Adam at 1e-3 where nothing is said."""
        return {}

    def stages(self) -> list[Stage]:
        """The stages of the training; one by default."""
        return [Stage("distill")]

    # What a method does

    def setup(self, nets: Nets, batch: Batch) -> None:
        """Builds the parts whose shape follows the networks; called once, without gradient, with one real batch."""

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        """Passes over the training data before the training (a codebook); called once, without gradient.

        What it leaves in parameters and buffers comes from one process, which may be alone in calling it: no means over
        processes here.
        """

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        """The distillation terms of the student's loss, weighted."""
        return {}

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        """The updates of one training step.

        Each yield names the groups to update and their loss terms; what follows it sees the updated weights.
        `"student"` is in the last turn and only there.
        """
        student = nets.student(batch)
        teacher = nets.teacher(batch) if self.teachers else student
        yield {"student": {**self.task(student, batch), **self.loss(student, teacher, batch)}}

    def task(self, student: View, batch: Batch) -> Terms:
        """The weighted task loss, or nothing when its weight is 0."""
        return {"task": self.task_weight * batch.task_loss(student)} if self.task_weight else {}

    def after_update(self) -> None:
        """Called after every update of the student: a moving average, a memory bank."""

    def begin_stage(self, stage: Stage) -> None:
        """Called when a stage after the first begins: parts that start afresh with it."""

    def stage_done(self) -> bool:
        """Asked at the end of every epoch: whether the current stage may end before its share of steps is used up.

        Must answer the same on every process; `mean_over_processes` helps.
        """
        return False

    def pictures(self) -> list[Picture]:
        """What the method has to show in the report of a run; asked at the end, on one process."""
        return []

    def export(self, folder: str | Path) -> None:
        """Writes what another run may start from into a run's folder; called at the end, on one process."""

    def networks_given(self, teachers: int, peers: int) -> None:
        """Told how many teachers and other peers there are, before their number is checked.

        A method that works with either sets its own `teachers` and `peers` here.
        """

    def check(self, nets: Nets) -> None:
        """Refuses networks that the method cannot work with; called before `setup`, before any training time."""

    # What the host gives

    def mean_over_processes(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all processes, through which gradients flow."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return x
        if not x.requires_grad:
            x = x.clone()
            dist.all_reduce(x)
            return x / dist.get_world_size()
        return _MeanOverProcesses.apply(x)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """This process's own random stream, saved in checkpoints."""
        return self._stream("own", device)

    def randn(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal noise `[rows, *shape]` that is the same however many processes share the batch.

        Every process draws the rows of all processes from one common stream and keeps its own.
        """
        generator = self._stream("common", device)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        noise = torch.randn(rows * world, *shape, generator=generator, device=device)
        return noise[_rank() * rows : (_rank() + 1) * rows]

    def _stream(self, kind: str, device: torch.device | str) -> torch.Generator:
        key = f"{kind}:{torch.device(device).type}"
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed_of(kind))
        return self._generators[key]

    def _seed_of(self, kind: str) -> int:
        seed = torch.initial_seed() if self._seed is None else self._seed
        return (seed + (_rank() if kind == "own" else 0)) % 2**63

    def seed_streams(self, seed: int) -> None:
        """Starts the random streams of this distiller and of its parts anew, from a seed that all processes share.

        Hosts of several processes call it before the training: these often seed torch differently on each.
        """
        for part in self.modules():
            if isinstance(part, Distiller):
                part._seed = seed
        self.load_random_state({})

    def random_state(self) -> dict[str, Tensor]:
        """States of the random streams of this distiller and of its parts, for a checkpoint of this process."""
        return {
            f"{prefix or '.'}|{key}": generator.get_state()
            for prefix, part in self.named_modules()
            if isinstance(part, Distiller)
            for key, generator in part._generators.items()
        }

    def load_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the random streams of a checkpoint; those that it does not have start anew."""
        parts = dict(self.named_modules())
        for part in parts.values():
            if isinstance(part, Distiller):
                for key, generator in part._generators.items():
                    generator.manual_seed(part._seed_of(key.partition(":")[0]))
        for name, value in state.items():
            prefix, key = name.split("|")
            part = parts["" if prefix == "." else prefix]
            if isinstance(part, Distiller):
                kind, _, device = key.partition(":")
                part._stream(kind, device).set_state(value)

    # Groups and schedule

    @property
    def methods(self) -> dict[str, Distiller]:
        """The methods by name: this one, or the parts of a composition."""
        return {self.name: self}

    def own_parameters(self) -> list[nn.Parameter]:
        """Trainable parts that are in no extra group: the group `"own"`, stepped with the student."""
        extra = {id(p) for module in self.extras().values() for p in module.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in extra]

    def schedule(self, total: int, *, epoch: int | None = None) -> StageTable:
        """Resolves the stages over a training of `total` steps, `epoch` steps each epoch, and starts from step 0."""
        self.table = StageTable.resolve(
            self.stages(), total, epoch=epoch, whole_epochs=bool(self.needs().streams) and len(self.stages()) > 1
        )
        self.progress = Progress(total=total)
        self.at(0)
        return self.table

    def at(self, step: int, epoch: float | None = None) -> None:
        """Sets the progress; the stage changes only through `enter_stage`."""
        progress = self.progress
        progress.step = step
        progress.epoch = progress.epoch if epoch is None else epoch
        if self.table is not None:
            progress.total = self.table.total
            progress.stage_start, progress.stage_end = self.table.bounds(progress.stage)

    def needs_in(self, stage: int) -> Needs:
        """What the method needs in another stage than the current one."""
        current, self.progress.stage = self.progress.stage, stage
        try:
            return self.needs()
        finally:
            self.progress.stage = current

    def next_stage(self) -> Stage | None:
        """The stage that the current step belongs to, when the training has not entered it yet."""
        if self.table is None or self.table.index(self.progress.step) == self.progress.stage:
            return None
        return self.table.stages[self.table.index(self.progress.step)]

    def enter_stage(self) -> None:
        """Enters the stage that the current step belongs to."""
        stage = self.next_stage()
        if stage is not None and self.table is not None:
            self.progress.stage = self.table.index(self.progress.step)
            self.at(self.progress.step)
            self.begin_stage(stage)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "progress":
            for part in self.children():
                for module in part.modules():
                    if isinstance(module, Distiller):
                        module.__dict__["progress"] = value


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _MeanOverProcesses(torch.autograd.Function):
    """Mean over processes whose gradient, averaged over processes as gradients are, is that of the global mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.detach().clone()
        dist.all_reduce(y)
        return y / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def overrides(distiller: Distiller, name: str) -> bool:
    """Whether a method, or any part of a composition, has its own implementation of a function of `Distiller`."""
    return any(getattr(type(part), name) is not getattr(Distiller, name) for part in distiller.methods.values())


def overrides_turns(distiller: Distiller) -> bool:
    """Whether a method plays turns of its own."""
    return overrides(distiller, "turns")
