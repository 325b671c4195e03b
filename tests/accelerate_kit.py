"""Lets one process run Accelerate several times."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def fresh_accelerate() -> None:
    """Forgets Accelerate's state of the process, so that the next run may have another precision."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for state in (AcceleratorState, GradientState) if distributed else (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
