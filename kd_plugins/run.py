"""The one engine: what lies between a method's turns and the optimizers, in every host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_plugins.authors import check_made
from kd_plugins.averaging import average_buffers, average_gradients
from kd_plugins.distiller import Distiller, Turn
from kd_plugins.errors import DistillError
from kd_plugins.groups import Group
from kd_plugins.reading.nets import Nets
from kd_plugins.reading.view import Batch
from kd_plugins.saving import Saving
from kd_plugins.stages import Stage
from kd_plugins.terms import check_terms


class Run(Saving):
    """Plays a method's turns: takes every gradient before any optimizer moves a weight, the student's last.

    A bare loop plays turn by turn (`play`) or step by step (`step`). A host that owns the student's backward and
    optimizer calls the three parts of a step:

    1. `forward(batch)` plays the auxiliary turns, holds the extra gradients of the last one, and returns the student's
       loss, whose backward is the host's;
    2. `after_backward()` leaves every `.grad` with the student's loss alone, averages it over the processes at the
       accumulation boundary where the host does not, and steps the extra groups;
    3. `after_update()`, after the host has clipped (`clip_parameters`) and stepped, steps the group `"own"` and counts.

    Args:
        distiller: The method.
        optimizer: The student's optimizer.
        nets: The networks; by default those that the method was last bound to.
        max_grad_norm: Largest norm of the student's and the own group's joint gradient in `step`, and of each peer's
            gradient; None does not clip.

    Attributes:
        accumulation: How many micro-batches share an update, which a host says; in a bare loop each has its own.
        initial: The student's first weights, where a stage begins with them anew.
        watch: Stops the training where its loss stays NaN or infinite; `watch.stops = False` lets it go on.
    """

    def __init__(
        self, distiller: Distiller, optimizer: Any, nets: Nets | None = None, *, max_grad_norm: float | None = None
    ) -> None:
        check_made(distiller)
        super().__init__(distiller, optimizer, nets, max_grad_norm)
        self.accumulation = 1
        self._held: dict[tuple[int, str], list[Tensor | None]] = {}
        self._turn = 0
        self._last: list[str] = []
        self._turns: Iterator[Turn] | None = None

    # What a host changes

    @property
    def sync(self) -> bool:
        """Whether the current micro-batch closes an accumulation window."""
        return True

    @property
    def by_hand(self) -> bool:
        """Whether the student's gradients are averaged here, and not by a reducer in the backward."""
        return self.joined

    def autocast(self) -> AbstractContextManager[Any]:
        """What surrounds the forwards of a turn."""
        return nullcontext()

    def unreduced(self) -> AbstractContextManager[Any]:
        """What surrounds a step whose gradients are averaged by hand."""
        return nullcontext()

    def scaled(self, group: Group, loss: Tensor) -> Tensor:
        """A group's loss, in the scale that its gradient is taken in."""
        return loss

    def step_group(self, group: Group, gradients: Sequence[Tensor | None]) -> None:
        """Updates a group by gradients that are not in `.grad`."""
        group.step(gradients, self.plain_optimizer)

    def update_own(self, own: Group) -> None:
        """Updates the group `"own"` by what is in `.grad`."""
        own.update(self.plain_optimizer)

    def backward(self, loss: Tensor) -> None:
        """Puts the gradient of the student's loss into the `.grad` of student and own parts, and into no other."""
        parameters = [*self.student, *self.clip_parameters]
        if not loss.requires_grad:
            raise DistillError(
                f"The student's loss of {self.distiller.name} has no gradient: compute its terms from the student's"
                " view, outside no_grad."
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def clip(self, norm: float) -> None:
        """Clips the joint gradient of the student and the own parts."""
        nn.utils.clip_grad_norm_([*self.student, *self.clip_parameters], norm)

    # A step

    def step(self, batch: Batch) -> Tensor:
        """One step, or within an accumulation window one micro-step; returns the student's loss."""
        loss = self.forward(batch)
        self._play_student(loss)
        return loss.detach()

    def play(self, turn: Turn) -> None:
        """One turn of a step."""
        loss = self._take(turn)
        if loss is None:
            self._step_held(turn)
        else:
            self._play_student(loss)
            self.enter_stage()

    def _play_student(self, loss: Tensor) -> None:
        self.backward(loss)
        self.after_backward()
        if self.sync and self.max_grad_norm is not None:
            self.clip(self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.sync:
            self.after_update()

    def forward(self, batch: Batch) -> Tensor:
        """Plays the turns of one micro-batch up to the last, and returns the student's loss (not divided).

        In a stage that ends its steps with another group's turn the loss is a constant 0, and no `.grad` comes of it.
        """
        distiller = self.distiller
        if self.accumulation > 1 and not distiller.accumulation:
            raise DistillError(
                f"{distiller.name} does not fit gradient accumulation: use a larger batch and 1 accumulation step."
            )
        if self.nets is None:
            raise DistillError("A step needs the networks: make_optimizers(distiller, optimizer, nets).")
        if not self._held:
            self.enter_stage()
        self._turns, self._turn = iter(distiller.turns(self.nets, batch)), 0
        with self.unreduced() if self.by_hand else nullcontext():
            while (turn := self._advance()) is not None:
                loss = self._take(turn)
                if loss is not None:
                    return loss
                self._step_held(turn)
        raise DistillError(f"{distiller.name} yields no turn with the group {self._ends_with!r}.")

    def after_backward(self) -> None:
        """Sorts out the gradients after the host's backward of the student's loss."""
        student = {id(p) for p in self.student}
        for group in self:
            if group.name != "own":
                for parameter in group.parameters:
                    if id(parameter) not in student:
                        parameter.grad = None
        if not self.sync:
            self._finish()
            return
        self._step_held(self._last)
        if self.joined:
            for parameters in (self.student if self.by_hand else [], self.clip_parameters):
                averaged = average_gradients([p.grad for p in parameters], parameters)
                for parameter, gradient in zip(parameters, averaged, strict=True):
                    parameter.grad = gradient

    def after_update(self) -> None:
        """Steps the group `"own"` after the host's update of the student, and counts the step."""
        own = self.own
        if own is not None:
            self.update_own(own)
            own.optimizer.zero_grad(set_to_none=True)
        self._finish()
        self._held.clear()
        self._turn, self._last = 0, []
        progress = self.distiller.progress
        self.distiller.after_update()
        progress.at(progress.step + 1)
        steps = progress.table.epoch if progress.table is not None else None
        self.watch.update(progress.step, progress.step / steps if steps else progress.epoch)

    def _advance(self) -> Turn | None:
        with self.autocast():
            return next(self._turns, None) if self._turns is not None else None

    def _finish(self) -> None:
        """Runs what follows the last turn."""
        if self._turns is not None and self._advance() is not None:
            raise DistillError(
                f"{self.distiller.name} yields a turn after the student's: {self._ends_with!r} must be in the last."
            )
        self._turns = None

    @property
    def _ends_with(self) -> str:
        progress = self.distiller.progress
        return progress.table.stages[progress.stage].ends_with if progress.table is not None else "student"

    def _take(self, turn: Turn) -> Tensor | None:
        """Holds the gradients of a turn's extra groups; returns the student's loss if the turn is the last."""
        if not isinstance(turn, Mapping):
            raise DistillError(
                f"Expected a turn of {self.distiller.name} as terms by group, {{'student': {{...}}}}, got"
                f" {type(turn).__name__}: yield a dict."
            )
        extras = [name for name in turn if name != "student"]
        last = self._ends_with in turn
        for k, name in enumerate(extras):
            self._hold(name, turn[name], keep="student" in turn or k + 1 < len(extras))
        loss = total(turn["student"], "student") if "student" in turn else None
        self._count(turn)
        if not last:
            return None
        self._last = extras
        if loss is not None:
            return loss
        return torch.zeros((), device=next(iter(turn[extras[0]].values())).device, requires_grad=True)

    def _hold(self, name: str, terms: Mapping[str, Tensor], keep: bool) -> None:
        """Adds the gradient of one group's terms to what is held for its update in this turn."""
        group = self[name]
        loss = self.scaled(group, total(terms, name) / self.accumulation)
        gradients = torch.autograd.grad(loss, group.parameters, retain_graph=keep, allow_unused=True)
        if all(g is None for g in gradients):
            raise DistillError(
                f"The terms {list(terms)} of the group {name!r} reach none of its {len(group.parameters)} parameters:"
                " compute them from the group's own modules, outside no_grad."
            )
        held = self._held.get((self._turn, name), [None] * len(gradients))
        self._held[self._turn, name] = [_add(a, b) for a, b in zip(held, gradients, strict=True)]

    def _step_held(self, names: Any) -> None:
        """Updates the extra groups of a turn by what is held for them, at the accumulation boundary."""
        if self.sync:
            for name in names:
                if name != "student":
                    group, gradients = self[name], self._held.pop((self._turn, name))
                    if self.joined:
                        gradients = average_gradients(gradients, group.parameters)
                    self.step_group(group, gradients)
        self._turn += 1

    # Stages, processes, logs

    def enter_stage(self) -> Stage | None:
        """Enters the stage that the current step belongs to: fresh optimizer state, fresh student, as it says."""
        stage = self.distiller.progress.next_stage()
        if stage is None:
            return None
        if stage.fresh_student:
            if self.initial is None or self.nets is None:
                raise DistillError("A stage starts with a fresh student: make_optimizers(..., nets=nets).")
            self.nets.student.module.load_state_dict(self.initial)
        if stage.fresh_optimizer:
            for optimizer in (self.plain_optimizer, *(group.optimizer for group in self)):
                optimizer.state.clear()
        self.distiller.progress.enter()
        self.distiller.begin_stage(stage)
        return stage

    def end_epoch(self, epoch: float | None = None, unit: int = 1) -> bool:
        """Asks the method whether its stage is done, and lets the next one begin with the next step if so.

        Args:
            epoch: Passes over the training set so far.
            unit: Steps that the later stages begin with, such as those of an epoch.

        Returns:
            Whether the stages have changed; learning-rate curves that follow them then need to be looked up anew.
        """
        progress = self.distiller.progress
        if epoch is not None:
            progress.epoch = epoch
        if not self.distiller.stage_done() or progress.table is None or progress.next_stage() is not None:
            return False
        progress.table.end_stage(progress.step, unit)
        progress.at(progress.step)
        return True

    def average_buffers(self) -> None:
        """Averages the batch statistics of student, peers and own parts, before they are evaluated or saved."""
        peers = self.nets.peers if self.nets else ()
        for module in (*(peer.module for peer in peers), self.distiller):
            average_buffers(module)

    def _count(self, turn: Turn) -> None:
        seen: dict[str, Tensor] = {}
        for name, terms in turn.items():
            for term, value in terms.items():
                key = f"distill/{term}" if name == "student" else f"distill/{name}/{term}"
                old, n = self._sums.get(key, (None, 0))
                new = seen[key] = value.detach().float().reshape(())
                self._sums[key] = (new if old is None else old + new, n + 1)
        self.watch.see(seen)

    def logs(self) -> dict[str, float]:
        """Means of the loss terms since the last call, over steps and processes; nothing else waits for them."""
        if not self._sums:
            return {}
        self.watch.look()
        keys = sorted(self._sums)
        means = torch.stack([self._sums[key][0] / self._sums[key][1] for key in keys])
        self._sums = {}
        if self.joined:
            means = self.distiller.host.mean(means)
        return dict(zip(keys, means.tolist(), strict=True))


def make_optimizers(
    distiller: Distiller, optimizer: Optimizer, nets: Nets | None = None, *, max_grad_norm: float | None = None
) -> Run:
    """The optimizers that a bare loop plays turns with: the student's, and those of the method's own parts.

    Args:
        distiller: The method, bound to its networks.
        optimizer: The student's optimizer, of the student's parameters alone.
        nets: What `bind` gave; by default the networks that the method was last bound to.
        max_grad_norm: Largest norm of the gradient in an update, as `Run` has it; None does not clip.

    Returns:
        A `Run`: `play` takes it, and it saves, loads and logs.

    Raises:
        DistillError: What is given is no optimizer, or the method one without `super().__init__()`.
    """
    return Run(distiller, optimizer, nets, max_grad_norm=max_grad_norm)


def play(turn: Turn, optimizers: Run) -> None:
    """Plays one turn in a bare loop: takes every gradient before any optimizer moves a weight, the student last.

    Args:
        turn: What `distiller.turns(nets, batch)` gives, loss terms by group; all turns of a step, in their order.
        optimizers: What `make_optimizers` made.

    Raises:
        DistillError: A term that is no tensor of one number, or has no gradient; a group that the method has not
            declared; a loss that stays NaN or infinite.

    >>> import kd_plugins
    >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> distiller = kd_plugins.create_distiller("kd")
    >>> nets = kd_plugins.bind(distiller, student, teacher)
    >>> optimizers = kd_plugins.make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1))
    >>> batch = kd_plugins.Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> for turn in distiller.turns(nets, batch):
    ...     kd_plugins.play(turn, optimizers)
    """
    optimizers.play(turn)


def total(terms: Any, group: str) -> Tensor:
    """The sum of a group's loss terms."""
    check_terms(terms, f"the group {group!r}")
    if not terms:
        raise DistillError(f"The turn for the group {group!r} holds no loss terms: leave the group out or give it one.")
    return sum(term.reshape(()) for term in terms.values())  # type: ignore[return-value]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
