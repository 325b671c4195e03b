"""Lets one process run Accelerate several times."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState, PartialState


def fresh_accelerate() -> None:
    """Forgets Accelerate's state of the process, so that the next run may have another precision."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
