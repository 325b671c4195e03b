"""What a training step spends its time on, measured on a few real steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from kd_accelerate.player import TurnPlayer

__all__ = ["StepTimer"]

_SKIP, _STEPS = 3, 25
_TERMS, _REST = "distillation terms", "data and the rest"


class StepTimer:
    """Measures the parts of a few steps of a `TurnPlayer`, without the first ones, then takes itself out of the way.

    The parts of one update, accumulation included: the forwards of student, teachers and peers; `distillation terms`
    (what the turns do beside those forwards, updates of critics included); `backward` of the student's loss;
    `optimizer` (gradients of groups, clipping, updates); `data and the rest` (between two steps). On a GPU every part
    ends with a synchronisation, so that a measured step takes a little longer than the others; numbers do not change.
    """

    def __init__(self, player: TurnPlayer) -> None:
        self.rows: list[dict[str, float]] = [{}]
        self._wrapped: list[tuple[Any, str]] = []
        self._mark: float | None = None
        self._cuda = player.accelerator.device.type == "cuda"
        for net in player.nets:
            name = "teacher" if net.frozen else "student" if net is player.nets.student else "peers"
            self._wrap(net.network, "read", _TERMS, f"{name} forward")
        self._wrap(player, "forward", _REST, _TERMS)
        self._wrap(player, "after_backward", "backward", "optimizer")
        self._wrap(player, "after_update", "optimizer", "optimizer")

    def stop(self) -> dict[str, float]:
        """Gives the methods back; the median seconds of each part of a step, empty where none was measured."""
        while self._wrapped:
            delattr(*self._wrapped.pop())
        rows = self.rows[_SKIP:-1]
        names = dict.fromkeys(name for row in rows for name in row)
        last = (_TERMS, "backward", "optimizer", _REST)
        order = [*(name for name in names if name not in last), *(name for name in last if name in names)]
        return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in order}

    def _ends(self, part: str) -> None:
        """Adds the time since the last call to a part."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._mark is not None:
            self.rows[-1][part] = self.rows[-1].get(part, 0.0) + now - self._mark
        self._mark = now

    def _wrap(self, owner: Any, method: str, before: str, part: str) -> None:
        """Times a method as `part`, and what lies between the method before it and its start as `before`."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._ends(before)
            result = original(*args, **kwargs)
            self._ends(part)
            if method == "after_update":
                self.rows.append({})
                if len(self.rows) > _SKIP + _STEPS:
                    self.stop()
            return result

        setattr(owner, method, timed)
        self._wrapped.append((owner, method))
