"""The one abstraction: a distillation method as a sequence of turns within a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd_plugins.catalog.attributes import check_attributes
from kd_plugins.catalog.options import OptimSpec, check_set, constructed
from kd_plugins.catalog.paper import Paper
from kd_plugins.errors import DistillError
from kd_plugins.host import Host
from kd_plugins.picture import Picture
from kd_plugins.reading.nets import Nets, begun
from kd_plugins.reading.view import Batch, Needs, View
from kd_plugins.stages import Progress, Stage
from kd_plugins.terms import Terms, Turn, check_taught

# What an author imports from here: typed code takes from a module what it defines or names in this list.
__all__ = ["Distiller", "Terms", "Turn"]

_GIVEN = {"generator": "generator", "randn": "randn", "mean_over_processes": "mean"}  # what the host gives, in short


class Distiller(nn.Module):
    """A distillation method.

    It holds its own parts only (connectors, critics, codebooks) and never a network. Plain methods override `loss`;
    those that need more than one update a step override `turns`. The constructor's keyword-only, annotated, defaulted
    arguments are the options everywhere, checked and attributes before `__init__` runs, and its `Args` their help.

    Class attributes:
        paper: What to cite.
        networks: The networks it reads: `"any"`, or `"transformer"` where it reads numbered layers or attention.
        tasks: The tasks it fits; hosts refuse others.
        teachers: 0, 1, `"many"` (at least one; `loss` is averaged over them), or `"or peers"` (one, or peers instead).
        peers: Whether it trains several networks together.
        data: False when it makes its own inputs.
        accumulation: False when gradient accumulation would change what the method is.
        untrained: Parameters that get no gradient on purpose, as globs (`"student.head.*"`), for `check_distiller`.
        example: Options with which `check_distiller` tries the method on its small networks, beside the defaults.
        task_weight: Weight of the task loss in the default turn; 0 drops the term.

    Attributes:
        config: The options, as they were given.
        progress: How far the training is; the host keeps it current.
        host: Random streams (`generator`, `randn`), and means over processes (`mean`).
    """

    paper: ClassVar[Paper | None] = None
    example: ClassVar[Mapping[str, Any]] = {}
    tasks: tuple[str, ...] = ("classification",)
    networks: ClassVar[str] = "any"
    teachers: int | str = 1
    peers: bool = False
    data: bool = True
    accumulation: bool = True
    untrained: tuple[str, ...] = ()
    name: str = ""
    task_weight: float = 1.0
    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_attributes(cls)
        if "turns" in vars(cls):
            cls.turns = begun(cls.turns)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **options: Any) -> Distiller:
        self = super().__new__(cls)
        self.__dict__["config"] = constructed(cls, args, options)
        self.__dict__.update((name, value) for name, value in self.config.items() if name not in _HOOKS)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has what it was copied from, and no option of `__new__` in front of a part of the same name.
        self.__dict__.clear()
        super().__setstate__(state)

    def __init__(self) -> None:
        super().__init__()
        self.name = self.name or type(self).__name__.lower()
        self.progress, self.host = Progress(), Host()
        self.optim_overrides: dict[str, dict[str, Any]] = {}
        self.ready = False

    def needs(self) -> Needs:
        """What the method reads of each network now; it may follow `self.progress`."""
        return Needs()

    def extras(self) -> dict[str, nn.Module]:
        """Own parts that have an optimizer of their own, by group: `{"critic": self.critic}`."""
        return {}

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        """Groups that move parameters of a network beside its own updates; with its part, one that is in `extras()`."""
        return {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """The optimizer of each group in `extras()` and `shared()`; Adam at 1e-3 where nothing is said."""
        return {}

    def stages(self) -> list[Stage]:
        """The stages of the training; one by default."""
        return [Stage("distill")]

    def setup(self, nets: Nets, batch: Batch) -> None:
        """Refuses what cannot work, and builds parts of one real batch; called once, without gradient, at the start."""

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        """Passes over the training data before the training (a codebook), without gradient, on one process alone."""

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        """The distillation terms of the student's loss, weighted."""
        raise DistillError(f"{type(self).__name__} has neither loss() nor turns(): write what it teaches in one.")

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        """The updates of one training step: groups and their loss terms; what follows a yield sees the new weights.

        `"student"` is in the last turn and only there (or what `Stage.ends_with` names).
        """
        student = nets.student(batch)
        teachers = [teacher(batch) for teacher in nets.teachers]
        yield {"student": {**self.task(student, batch), **self.taught(student, teachers, batch)}}

    def taught(self, student: View, teachers: Sequence[View], batch: Batch) -> Terms:
        """The terms of `loss`, in the mean over the teachers; without a teacher, the student in its place."""
        given = [self.loss(student, teacher, batch) for teacher in teachers or [student]]
        for terms in given:
            check_taught(terms, self.name)
        if len(given) == 1:
            return given[0]
        return {name: torch.stack([terms[name] for terms in given]).mean() for name in given[0]}

    def task(self, student: View, batch: Batch) -> Terms:
        """The weighted task loss, or nothing when its weight is 0."""
        return {"task": self.task_weight * batch.task_loss(student)} if self.task_weight else {}

    def after_update(self) -> None:
        """Called after every update of the student: a moving average, a memory bank."""

    def begin_stage(self, stage: Stage) -> None:
        """Called when a stage after the first begins: parts that start afresh with it."""

    def stage_done(self) -> bool:
        """Whether the stage may end now, asked after every epoch; the same on every process (`self.host.mean`)."""
        return False

    def pictures(self) -> list[Picture]:
        """What the method has to show in the report of a run; asked at the end, on one process."""
        return []

    def export(self, folder: str | Path) -> None:
        """Writes what another run may start from into a run's folder; called at the end, on one process."""

    @property
    def kind(self) -> str:
        """`"offline"` from a teacher, `"online"` with peers, `"data-free"` without a training set."""
        return "data-free" if not self.data else "online" if self.peers else "offline"

    @property
    def methods(self) -> dict[str, Distiller]:
        """The methods by name: this one, or the parts of a composition."""
        return {self.name: self}

    def own_parameters(self) -> list[nn.Parameter]:
        """Trainable parts that are in no extra group: the group `"own"`, stepped with the student."""
        extra = {id(p) for module in self.extras().values() for p in module.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in extra]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOOKS or (name in _DECLARED and isinstance(value, (nn.Module, Tensor))):
            raise DistillError(
                f"{type(self).__name__}.{name} means something to Distiller, so that self.{name} = ... would hide it or"
                f" be hidden by it: choose another name, such as self.own_{name}."
            )
        check_set(type(self), name, value)
        if isinstance(value, (nn.Module, Tensor)) and "_modules" not in self.__dict__:
            raise DistillError(f"{type(self).__name__} sets self.{name} before super().__init__(): call that first.")
        super().__setattr__(name, value)
        if name == "progress":
            for part in (module for module in self.modules() if isinstance(module, Distiller)):
                part.__dict__["progress"] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _GIVEN:
                raise
            return getattr(self.host, _GIVEN[name])


_HOOKS = {name for name, value in vars(Distiller).items() if callable(value) or isinstance(value, property)}
_DECLARED = {name for name in (*vars(Distiller), *Distiller.__annotations__) if not name.startswith("_")} - _HOOKS
