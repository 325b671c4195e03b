"""What a training step spends its time on, measured on a few real steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kd_accelerate.player import TurnPlayer

__all__ = ["StepTimer"]


class StepTimer:
    """Measures the parts of a few steps of a `TurnPlayer`, then takes itself out of the way.

    The parts of one update, accumulation included: the forwards of student, teachers and peers; `distillation terms`
    (what the turns do beside those forwards, updates of critics included); `backward` of the student's loss;
    `optimizer` (gradients of groups, clipping, updates); `data and the rest` (between two steps). On a GPU every part
    ends with a synchronisation, so that a measured step takes a little longer than the others; numbers do not change.

    Args:
        player: The player; its methods are wrapped until enough steps have been seen.
        skip: First steps to leave out.
        steps: Steps to measure.
    """

    def __init__(self, player: TurnPlayer, *, skip: int = 3, steps: int = 25) -> None:
        self.wanted, self.skip = steps, skip
        self.rows: list[dict[str, float]] = [{}]
        self._undo: list[Callable[[], None]] = []
        self._mark: float | None = None
        self._cuda = player.accelerator.device.type == "cuda"
        nets = player.nets
        for net in nets or ():
            name = "teacher" if net.frozen else "student" if nets and net is nets.student else "peers"
            self._wrap(net.network, "read", f"{name} forward")
        self._wrap(player, "forward", "turns", before="data and the rest")
        self._wrap(player, "after_backward", "optimizer", before="backward")
        self._wrap(player, "after_update", "optimizer", before="optimizer", last=True)

    @property
    def steps(self) -> int:
        """Steps measured so far."""
        return max(len(self.rows) - 1 - self.skip, 0)

    def medians(self) -> dict[str, float]:
        """Median seconds of each part of a step."""
        rows = self.rows[self.skip : -1]
        names = dict.fromkeys(name for row in rows for name in row)
        medians = {name: statistics.median([row.get(name, 0.0) for row in rows]) for name in names}
        parts = {name: value for name, value in medians.items() if name.endswith("forward")}
        parts["distillation terms"] = max(medians.get("turns", 0.0) - sum(parts.values()), 0.0)
        return parts | {n: medians[n] for n in ("backward", "optimizer", "data and the rest") if n in medians}

    def stop(self) -> None:
        """Gives the methods back."""
        while self._undo:
            self._undo.pop()()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _wrap(self, owner: Any, method: str, part: str, *, before: str = "", last: bool = False) -> None:
        """Adds the time of a method to `part`, and the time since the method before it to `before`."""
        original, own = getattr(owner, method), vars(owner).get(method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            row, start = self.rows[-1], self._now()
            if before and self._mark is not None:
                row[before] = row.get(before, 0.0) + start - self._mark
            result = original(*args, **kwargs)
            end = self._now()
            row[part] = row.get(part, 0.0) + end - start
            self._mark = end if before else self._mark
            if last:
                self.rows.append({})
                if self.steps >= self.wanted:
                    self.stop()
            return result

        setattr(owner, method, timed)
        self._undo.append(lambda: delattr(owner, method) if own is None else setattr(owner, method, own))
