"""NaN and infinity are noticed: in losses without waiting for any step, in weights before they are used or saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError

# Updates in a row that may be lost: a gradient scaler skips single ones. And updates between two looks.
_PATIENCE, _EVERY = 3, 10


class Watch:
    """Stops a training whose loss stays NaN or infinite, a few steps after it began.

    What is seen stays on the device; it is looked at in every tenth step, and where a host waits for numbers anyway.

    Attributes:
        stops: Whether the training is stopped.
    """

    def __init__(self) -> None:
        self.stops = True
        self._last: dict[tuple[str, ...], Tensor] = {}
        self._now: Tensor | None = None
        self._run: Tensor | int = 0
        self._step, self._epoch = 0, 0.0

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Takes the loss terms of a part of a step, each a scalar."""
        if not self.stops or not terms:
            return
        finite = torch.stack([value.detach().float().reshape(()) for value in terms.values()]).isfinite()
        self._last[tuple(terms)] = finite
        self._now = finite.all() if self._now is None else self._now & finite.all()

    def update(self, step: int, epoch: float) -> None:
        """Says that the update number `step` has been made."""
        if self._now is None:
            return
        self._run, self._now = (self._run + 1) * ~self._now, None
        self._step, self._epoch = step, epoch
        if step % _EVERY == 0:
            self.look()

    def look(self) -> None:
        """Looks at what was seen.

        Raises:
            DistillError: No loss of the last steps was finite.
        """
        lost = int(self._run)
        if self.stops and lost >= _PATIENCE:
            seen = [pair for names, finite in self._last.items() for pair in zip(names, finite.tolist(), strict=True)]
            bad = ", ".join(name for name, finite in seen if not finite)
            raise DistillError(
                f"The loss is NaN or infinite since step {self._step - lost + 1} (epoch {self._epoch:.2f}), in {bad}:"
                " lower the learning rate or the weight of that term, clip gradients, or use bf16 in place of fp16."
                " The states written before are good."
            )


def check_weights(named: Mapping[str, nn.Module], remedy: str) -> None:
    """Refuses networks with a weight that is NaN or infinite, or a buffer (batch statistics) that is NaN.

    Args:
        named: Networks by what to call them.
        remedy: What to do.
    """
    for who, module in named.items():
        bad = _bad(module.named_parameters(), infinite=True) + _bad(module.named_buffers(), infinite=False)
        if bad:
            raise DistillError(f"{who} has a NaN or an infinity in {', '.join(bad[:3])}: {remedy}")


def check_loss(value: float) -> None:
    """Refuses the loss of an evaluation that is NaN or infinite: the weights are no use, though they are numbers."""
    if not math.isfinite(value):
        raise DistillError(
            f"The loss on the evaluation set is {value}: lower the learning rate, or clip gradients. The states written"
            " before are good."
        )


@torch.no_grad()
def _bad(tensors: Iterable[tuple[str, Tensor]], *, infinite: bool) -> list[str]:
    # Floats of one byte know neither.
    known = [(n, x) for n, x in tensors if x.is_floating_point() and x.dtype.itemsize > 1 and not x.is_meta]
    flags = [~x.isfinite().all() if infinite else x.isnan().any() for _, x in known]
    # Of all tensors at once, so that a device is waited for once.
    if not flags or not torch.stack([flag.to(flags[0].device) for flag in flags]).any():
        return []
    return [name for (name, _), bad in zip(known, flags, strict=True) if bad]
