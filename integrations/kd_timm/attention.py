"""The true attention distributions of a timm vision transformer, read only in the blocks that are asked for.

timm's fused attention never forms its probabilities. While a forward is captured, `F.scaled_dot_product_attention` is
intercepted (a `TorchFunctionMode`), and hooks on the blocks' attention modules, installed once, say which block runs.
Attention that is not fused (`fused_attn` False) passes its probabilities through the dropout `attn_drop`: read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kd_plugins.reading.attention import AttentionCall, AttentionTap, BaseAttentionTaps, Trace
from kd_plugins.reading.tap import Hook


class AttentionTaps(BaseAttentionTaps):
    """The attention of one timm vision transformer, read where asked.

    Departures: attention that is not fused gives the logarithm of its probabilities as scores, which equals the scores
    up to a constant in each row. Attention in windows (Swin) has the windows in its batch dimension.

    Args:
        model: The network, unwrapped (without DDP or torch.compile around it).
    """

    _nothing_found = (
        "Its blocks neither call scaled_dot_product_attention nor pass probabilities through an nn.Dropout: take a"
        " vision transformer (vit_*, deit_*), or distill features or logits instead."
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        entries = (h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, _Entry))
        self._fused = next((entry.fused for entry in entries), None) or _FusedAttention()

    @contextmanager
    def _listen(self, trace: Trace) -> Iterator[None]:
        def seen(call: AttentionCall, value: Tensor, output: Tensor) -> None:
            if trace.open and call.query.dim() == 4:
                trace.seen(_FusedTap.of(trace.modules[trace.open[-1][0]], self._fused), call, value, output)

        with _FusedAttention(seen):
            yield

    @contextmanager
    def _around(self, intercepted: bool) -> Iterator[None]:
        # The mode costs a little for every operation, so it is left out where no tap needs it.
        with self._fused if intercepted else nullcontext():
            try:
                yield
            finally:
                self._fused.current = None


class _FusedTap(AttentionTap):
    """The fused attention of one module."""

    def __init__(self, module: nn.Module, fused: _FusedAttention) -> None:
        super().__init__(module)
        module.register_forward_pre_hook(_Entry(self, fused))

    @classmethod
    def of(cls, module: nn.Module, fused: _FusedAttention) -> AttentionTap:
        """The tap that a module has already, or a new one."""
        taps = (h.tap for h in module._forward_pre_hooks.values() if isinstance(h, _Entry))
        return next(taps, None) or cls(module, fused)


class _Entry(Hook):
    """Says that a tapped attention module begins to run."""

    def __init__(self, tap: AttentionTap, fused: _FusedAttention) -> None:
        self.tap, self.fused = tap, fused

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.tap.on:
            self.fused.current = self.tap
        elif self.fused.current is not None:
            self.fused.current = None


class _FusedAttention(TorchFunctionMode):
    """Intercepts `F.scaled_dot_product_attention` of the module that runs now."""

    def __init__(self, seen: Callable[[AttentionCall, Tensor, Tensor], None] | None = None) -> None:
        super().__init__()
        self.seen = seen
        self.current: AttentionTap | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (self.seen is None and self.current is None):
            return func(*args, **kwargs)
        call, value, dropout = _read(*args, **kwargs)
        tap, self.current = self.current, None
        if tap is not None and tap.wanted and tap.share:
            output, attention = call.attend(value, dropout)
            tap.records.append(attention)
            return output
        if tap is not None:
            tap.records.append(call if tap.wanted else None)
        output = func(*args, **kwargs)
        if self.seen is not None:
            self.seen(call, value, output)
        return output


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[AttentionCall, Tensor, float]:
    """What fused attention was called with."""
    return AttentionCall(query, key, scale, attn_mask, is_causal), value, dropout_p
