"""Stages of a distillation: parts of the training with needs, learning-rate curve and optimizer state of their own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugins.errors import DistillError


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        name: What reports and logs call it.
        share: Its part of the training steps, relative to the other stages.
        epochs: Its length in epochs, where that is fixed; the other stages then share what is left.
        fresh_optimizer: Start the stage with empty optimizer state (no momentum of the stage before).
        fresh_student: Start the stage with the student's initial weights.
        ends_with: The group whose turn is the last of a step; another one than the student's where the stage trains a
            method's own part alone.
    """

    name: str
    share: float = 1.0
    epochs: float | None = None
    fresh_optimizer: bool = True
    fresh_student: bool = False
    ends_with: str = "student"


@dataclass
class Progress:
    """How far the training is; the host keeps it current, and schedules read it.

    Attributes:
        step: Updates of the student so far.
        total: Updates in the whole training; None where nobody knows.
        epoch: Passes over the training set so far, with fraction.
        stage: Number of the current stage.
        stage_start: Step at which the current stage began.
        stage_end: Step at which the current stage ends; None where nobody knows.
        table: The stages of the training; None before they are resolved.
    """

    step: int = 0
    total: int | None = None
    epoch: float = 0.0
    stage: int = 0
    stage_start: int = 0
    stage_end: int | None = None
    table: StageTable | None = None

    def at(self, step: int, epoch: float | None = None) -> None:
        """Sets the step; the stage changes only through `enter`."""
        self.step = step
        self.epoch = self.epoch if epoch is None else epoch
        if self.table is not None:
            self.total = self.table.total
            self.stage_start, self.stage_end = self.table.bounds(self.stage)

    def next_stage(self) -> Stage | None:
        """The stage that the current step belongs to, when the training has not entered it yet."""
        if self.table is None or self.table.index(self.step) == self.stage:
            return None
        return self.table.stages[self.table.index(self.step)]

    def enter(self) -> None:
        """Enters the stage that the current step belongs to."""
        if self.table is not None:
            self.stage = self.table.index(self.step)
            self.at(self.step)

    @property
    def fraction(self) -> float:
        """Part of the training that is done, 0 to 1."""
        if self.total is None:
            raise DistillError(
                "This method follows the progress of the training, whose length is unknown: say how many updates it"
                " has, in a bare loop bind(..., total_steps=n), in train.py DistillationTask(..., total_steps=n)."
            )
        return min(self.step / max(self.total, 1), 1.0)

    def warmed(self, share: float) -> float:
        """What a weight is multiplied by that grows linearly from 0 in that share of the training; 0 has it whole."""
        return min(1.0, self.fraction / share) if share else 1.0

    @property
    def stage_fraction(self) -> float:
        """Part of the current stage that is done, 0 to 1."""
        if self.stage_end is None:
            return self.fraction
        return min((self.step - self.stage_start) / max(self.stage_end - self.stage_start, 1), 1.0)


class StageTable:
    """The steps at which each stage of a training begins.

    >>> table = StageTable.resolve([Stage("search", 1), Stage("distill", 3)], total=100)
    >>> table.starts, table.index(24), table.index(25), table.bounds(1)
    ([0, 25], 0, 1, (25, 100))
    """

    def __init__(self, stages: Sequence[Stage], starts: Sequence[int], total: int, epoch: int | None = None) -> None:
        self.stages, self.starts, self.total, self.epoch = tuple(stages), list(starts), total, epoch

    @classmethod
    def resolve(
        cls, stages: Sequence[Stage], total: int, *, epoch: int | None = None, whole_epochs: bool = False
    ) -> StageTable:
        """Turns shares into steps.

        Args:
            stages: The stages in their order.
            total: Steps in the whole training.
            epoch: Steps in one epoch; stages then begin with an epoch wherever there are enough epochs.
            whole_epochs: Insist on that, for stages that read different parts of the training set.
        """
        shares = _shares(stages, total, epoch)
        unit, units = 1, total
        if epoch and len(stages) > 1:
            if total % epoch == 0 and total // epoch >= len(stages):
                unit, units = epoch, total // epoch
            elif whole_epochs:
                raise DistillError(
                    f"Expected whole epochs, at least one for each of the {len(stages)} stages"
                    f" ({', '.join(s.name for s in stages)}), got {total} steps, which are {total / epoch:g} epochs of"
                    f" {epoch}: train for {max(len(stages), round(total / epoch)) * epoch} steps."
                )
        if units < len(stages):
            raise DistillError(
                f"Expected at least one step for each of the {len(stages)} stages"
                f" ({', '.join(s.name for s in stages)}), got {total} steps: train longer or use fewer stages."
            )
        return cls(stages, [s * unit for s in _spread(shares, units)], total, epoch)

    def index(self, step: int) -> int:
        """The stage that a step belongs to."""
        return bisect_right(self.starts, step) - 1

    def bounds(self, stage: int) -> tuple[int, int]:
        """First step of a stage, and first step after it."""
        end = self.starts[stage + 1] if stage + 1 < len(self.starts) else self.total
        return self.starts[stage], end

    def end_stage(self, step: int, unit: int = 1) -> None:
        """Lets the stage before `step` end there, and spreads the later stages over the steps that are left.

        Args:
            step: A multiple of `unit`.
            unit: Steps that a stage begins with, such as those of an epoch; with fewer units left than there are later
                stages, the table stays as it is.
        """
        current = self.index(step - 1)
        later = self.stages[current + 1 :]
        units = (self.total - step) // unit
        if later and units >= len(later):
            shares = _shares(later, self.total - step, self.epoch)
            self.starts[current + 1 :] = [step + unit * s for s in _spread(shares, units)]

    def to_json(self) -> dict[str, Any]:
        """The resolved table, for a checkpoint."""
        return {"names": [s.name for s in self.stages], "starts": list(self.starts), "total": self.total}

    def restore(self, saved: dict[str, Any]) -> bool:
        """Takes the table of a checkpoint; returns whether it differs from the one resolved now."""
        if saved["names"] != [s.name for s in self.stages]:
            raise DistillError(
                f"The checkpoint has the stages {saved['names']}, this run has {[s.name for s in self.stages]}: resume"
                " with the options that the run was started with."
            )
        changed = saved != self.to_json()
        self.starts, self.total = list(saved["starts"]), saved["total"]
        return changed


def _shares(stages: Sequence[Stage], total: int, epoch: int | None) -> list[float]:
    """Shares of all stages in steps, those of a fixed length taken out first."""
    if all(stage.epochs is None for stage in stages):
        return [stage.share for stage in stages]
    if not epoch:
        raise DistillError(
            "The stages have lengths in epochs, but the length of an epoch is unknown here: give shares instead, or"
            " call bind(..., epoch_steps=steps_per_epoch)."
        )
    fixed = {i: stage.epochs * epoch for i, stage in enumerate(stages) if stage.epochs is not None}
    left = total - sum(fixed.values())
    shared = sum(stage.share for stage in stages if stage.epochs is None)
    if left < 0 or (shared and left <= 0):
        raise DistillError(
            f"The stages of a fixed length take {sum(fixed.values()) / epoch:g} epochs of {total / epoch:g}, which"
            " leaves nothing for the others: train longer or give them fewer epochs."
        )
    return [fixed.get(i, left * stage.share / shared if shared else 0.0) for i, stage in enumerate(stages)]


def _spread(shares: Sequence[float], units: int) -> list[int]:
    """Starts of consecutive parts with the given shares, each at least one unit long."""
    if any(share <= 0 for share in shares):
        raise DistillError(f"Expected positive shares for the stages, got {list(shares)}.")
    whole, start = sum(shares), 0.0
    starts: list[int] = []
    for i, share in enumerate(shares):
        low = starts[-1] + 1 if starts else 0
        starts.append(min(max(round(start / whole * units), low), units - (len(shares) - i)))
        start += share
    return starts
