"""Several methods at once: `kd+nst`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from kd_plugins.authors import needs_of, overrides
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.distiller import Distiller, Terms, Turn
from kd_plugins.errors import DistillError
from kd_plugins.picture import Picture
from kd_plugins.reading.nets import Net, Nets
from kd_plugins.reading.view import Batch, Needs, View
from kd_plugins.stages import Stage


class Composite(Distiller):
    """The sum of several methods' terms over one task loss.

    At most one part plays turns of its own; the terms of the others join its student turn, computed on the views that
    it took and on the batch that it asked the student with. Every part gets every teacher. The weight of the task loss
    is the product of the parts' weights.

    Args:
        parts: The methods by name, in the order they were written.

    Raises:
        DistillError: Parts that cannot share a training: two that play turns of their own or have stages, peers beside
            a method that knows no peers.
    """

    def __init__(self, parts: Mapping[str, Distiller] | None = None) -> None:
        super().__init__()
        parts = dict(parts or {})
        self.parts = nn.ModuleDict(parts)
        self.name = "+".join(parts)
        leads = [name for name, part in parts.items() if overrides(part, "turns") or part.peers or not part.data]
        staged = [name for name, part in parts.items() if len(part.stages()) > 1]
        looking = [name for name, part in parts.items() if overrides(part, "prepare")]
        dreaming = [name for name, part in parts.items() if not part.data]
        if looking and dreaming:
            raise DistillError(
                f"{looking[0]} looks at the training set before the training and {dreaming[0]} makes its own data: take"
                " one of them."
            )
        for found, what in ((leads, "play turns of their own"), (staged, "have stages")):
            if len(found) > 1:
                raise DistillError(f"{' and '.join(found)} both {what} and cannot be combined: take one of them.")
        if leads and staged and leads != staged:
            raise DistillError(f"{leads[0]} plays turns of its own and cannot follow the stages of {staged[0]}.")
        self._lead = leads[0] if leads else None
        self._staged = staged[0] if staged else None
        counts = [part.teachers for part in parts.values()]
        numbers = [count for count in counts if isinstance(count, int)]
        self.teachers = max(numbers, default=0) or ("many" if "many" in counts else max(map(str, counts), default=0))
        self.peers = any(part.peers for part in parts.values())
        self.data = all(part.data for part in parts.values())
        self.accumulation = all(part.accumulation for part in parts.values())
        tasks = [part.tasks for part in parts.values()]
        self.tasks = tuple(t for t in tasks[0] if all(t in other for other in tasks)) if tasks else ()
        self.progress = self.progress

    def __setattr__(self, name: str, value: Any) -> None:
        owners = [part for part, method in getattr(self, "parts", {}).items() if name in method.config]
        if owners and not hasattr(type(self), name):
            raise DistillError(
                f"{name} is an option of {' and '.join(owners)}, parts of {self.name}, which has none itself: set it"
                f" there, distiller.methods[{owners[0]!r}].{name}."
            )
        super().__setattr__(name, value)

    @property
    def methods(self) -> dict[str, Distiller]:
        """The parts by name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Distiller)}

    def needs(self) -> Needs:
        first, *others = self.methods.values()
        needs = needs_of(first)
        for part in others:
            needs = needs | needs_of(part)
        return needs

    def extras(self) -> dict[str, nn.Module]:
        return self._merge("extra group", {name: part.extras() for name, part in self.methods.items()})

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        return self._merge("shared group", {name: part.shared(nets) for name, part in self.methods.items()})

    def optimizers(self) -> dict[str, OptimSpec]:
        return self._merge("optimizer", {name: part.optimizers() for name, part in self.methods.items()})

    @staticmethod
    def _merge(what: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        owner: dict[str, str] = {}
        for part, items in given.items():
            for name in items:
                if owner.setdefault(name, part) != part:
                    raise DistillError(
                        f"{owner[name]} and {part} both have the {what} {name!r} and cannot be combined: take one."
                    )
        return {name: given[part][name] for name, part in owner.items()}

    def stages(self) -> list[Stage]:
        return self.methods[self._staged].stages() if self._staged else super().stages()

    def setup(self, nets: Nets, batch: Batch) -> None:
        shown = batch
        if not self.data and batch.shape:
            # The other parts read the shapes of activations, of any images.
            weight = next(nets.student.module.parameters())
            noise = torch.randn(batch.size, *batch.shape, device=weight.device)
            shown = batch.with_inputs(noise.to(weight.dtype))
        for part in self.methods.values():
            part.setup(nets, shown if part.data else batch)
            part.ready = True

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        for part in self.methods.values():
            part.prepare(nets, batches)

    def taught(self, student: View, teachers: Sequence[View], batch: Batch) -> Terms:
        return self._joined({}, self.methods, student, teachers, batch)

    def _joined(
        self, terms: Terms, parts: Mapping[str, Distiller], student: View, teachers: Sequence[View], batch: Batch
    ) -> Terms:
        """The parts' terms after `terms`; of two of one name the later has its part's name before it."""
        joined = dict(terms)
        for name, part in parts.items():
            for term, value in part.taught(student, teachers, batch).items():
                joined[term if term not in joined else f"{name}_{term}"] = value
        return joined

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        weight = 1.0
        for name, part in self.methods.items():
            weight *= 1.0 if name == self._lead else part.task_weight
        if self._lead is None:
            self.task_weight = weight
            yield from super().turns(nets, batch)
            return
        others = {name: part for name, part in self.methods.items() if name != self._lead}
        turn_number = [0]
        student, *teachers = (_Recorder(net, turn_number) for net in (nets.student, *nets.teachers))
        recorded = Nets(cast(Net, student), cast(list[Net], teachers), nets.peers[1:])
        for turn in self.methods[self._lead].turns(recorded, batch):
            if "student" not in turn:
                yield turn
                turn_number[0] += 1
                continue
            seen = student.last or _Asked(student(batch), batch, turn_number[0])
            views = [teacher.beside(seen) for teacher in teachers]
            own = {k: weight * v if k == "task" else v for k, v in turn["student"].items() if k != "task" or weight}
            yield {**turn, "student": self._joined(own, others, seen.view, views, seen.batch)}

    def after_update(self) -> None:
        for part in self.methods.values():
            part.after_update()

    def pictures(self) -> list[Picture]:
        return [picture for part in self.methods.values() for picture in part.pictures()]

    def export(self, folder: str | Path) -> None:
        for part in self.methods.values():
            part.export(folder)

    def begin_stage(self, stage: Stage) -> None:
        for part in self.methods.values():
            part.begin_stage(stage)

    def stage_done(self) -> bool:
        return self._staged is not None and self.methods[self._staged].stage_done()


class _Asked(NamedTuple):
    view: View
    batch: Batch
    turn: int


class _Recorder:
    """A network whose last view is kept, with the batch and the turn that it belongs to.

    Further terms so need no further forward, and see what the lead has made of the batch.
    """

    def __init__(self, net: Net, turn: list[int]) -> None:
        self.net, self.turn = net, turn
        self.last: _Asked | None = None

    def __call__(self, batch: Batch, **options: Any) -> View:
        if options.get("reads") is not None:
            options["reads"] = options["reads"] | self.net.reads
        self.last = _Asked(self.net(batch, **options), batch, self.turn[0])
        return self.last.view

    def beside(self, student: _Asked) -> View:
        """The view that goes with one of the student: of the same batch, or asked for together with it."""
        last = self.last
        if last is not None and (last.batch is student.batch or last.turn == student.turn):
            return last.view
        return self(student.batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)
