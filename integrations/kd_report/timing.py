"""What a training step spends its time on, measured on a few real steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kd_accelerate.player import TurnPlayer

__all__ = ["StepTimer"]

_TERMS, _REST = "distillation terms", "data and the rest"


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
        for net in player.nets:
            name = "teacher" if net.frozen else "student" if net is player.nets.student else "peers"
            self._wrap(net.network, "read", _TERMS, f"{name} forward")
        self._wrap(player, "forward", _REST, _TERMS)
        self._wrap(player, "after_backward", "backward", "optimizer")
        self._wrap(player, "after_update", "optimizer", "optimizer", last=True)

    @property
    def steps(self) -> int:
        """Steps measured so far."""
        return max(len(self.rows) - 1 - self.skip, 0)

    def medians(self) -> dict[str, float]:
        """Median seconds of each part of a step."""
        rows = self.rows[self.skip : -1]
        names = dict.fromkeys(name for row in rows for name in row)
        last = (_TERMS, "backward", "optimizer", _REST)
        order = [*(name for name in names if name not in last), *(name for name in last if name in names)]
        return {name: statistics.median([row.get(name, 0.0) for row in rows]) for name in order}

    def stop(self) -> None:
        """Gives the methods back."""
        while self._undo:
            self._undo.pop()()

    def _ends(self, part: str) -> None:
        """Adds the time since the last call to a part."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._mark is not None:
            self.rows[-1][part] = self.rows[-1].get(part, 0.0) + now - self._mark
        self._mark = now

    def _wrap(self, owner: Any, method: str, before: str, part: str, *, last: bool = False) -> None:
        """Times a method as `part`, and what lies between the method before it and its start as `before`."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._ends(before)
            result = original(*args, **kwargs)
            self._ends(part)
            if last:
                self.rows.append({})
                if self.steps >= self.wanted:
                    self.stop()
            return result

        setattr(owner, method, timed)
        self._undo.append(lambda: delattr(owner, method))
