"""The true attention distributions of a transformers network, read only in the layers that are asked for.

`output_attentions=True` gives nothing under the default attention (sdpa), and under eager attention the probabilities
after dropout, on which a KL divergence is wrong or infinite. Here a tapped attention module gets, for the time of one
forward, a shallow copy of its config that names an attention function of ours. The network's own config, its masks and
its other layers stay as they are, nothing reaches config.json, and the user's choice of attention is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from kd_plugins.errors import DistillError
from kd_plugins.reading.attention import AttentionCall, AttentionTap, BaseAttentionTaps, Trace
from kd_transformers.compat import attention_name, chosen_attention, chosen_mask, tapped

_NAME = "kd_plugins_tap"


class AttentionTaps(BaseAttentionTaps):
    """The attention of one transformers network, read where asked.

    Layers are found by structure, in one forward: modules that call transformers' attention interface, and modules that
    compute their probabilities themselves and pass them through an `nn.Dropout` (MPNet, DeBERTa). Of a layer with
    self- and cross-attention the first is read.

    Departures: layers found by their `nn.Dropout` give the logarithm of their probabilities as scores, which equals the
    scores up to a constant in each row.

    Args:
        model: The network, unwrapped (without DDP or torch.compile around it).
    """

    _nothing_found = (
        "Its attention neither goes through transformers' AttentionInterface nor passes its probabilities through an"
        " nn.Dropout: distill its hidden states or logits instead."
    )

    @contextmanager
    def _listen(self, trace: Trace) -> Iterator[None]:
        taps = [_ConfigTap(module) for module in self.model.modules() if _owns_config(module)]
        try:
            for tap in taps:
                tap.listen(trace)
            yield
        finally:
            for tap in taps:
                tap.stop()


def _owns_config(module: nn.Module) -> bool:
    # By its own attributes: a wrapper may answer for what it wraps (PEFT), and is no attention module.
    return isinstance(vars(module).get("config"), PretrainedConfig) and not isinstance(module, PreTrainedModel)


class _ConfigTap(AttentionTap):
    """Intercepts the attention of one module through a copy of its config."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.trace: Trace | None = None
        self.config: Any = module.config

    @property
    def delegate(self) -> Callable[..., Any]:
        """The attention function that the module would have called."""
        found = chosen_attention(self.module, self.config)
        if found is None:
            raise DistillError(
                f"Expected to know the attention function of {type(self.module).__name__}, got"
                f" {attention_name(self.config)!r}, which is not in transformers' AttentionInterface: load the model"
                " with attn_implementation='sdpa'."
            )
        return found

    def start(self, calls: Collection[int], share: bool) -> None:
        self._swap()
        super().start(calls, share)

    def listen(self, trace: Trace) -> None:
        """Tells `trace` when the module's attention runs."""
        self.trace = trace
        self._swap()

    def stop(self) -> list[Any]:
        self.trace = None
        self.module.config = self.config
        return super().stop()

    def _swap(self) -> None:
        if "kd_plugins_tap" in vars(self.module.config):
            raise DistillError(f"The attention of {type(self.module).__name__} is being captured already: do not nest.")
        self.config = self.module.config
        self.module.config = tapped(self.config, _NAME, self)

    def call(
        self, query: Tensor, key: Tensor, mask: Any, scaling: float | None, extra: dict[str, Any]
    ) -> AttentionCall:
        """The call, with the flags that the chosen implementation goes by when it gets no full mask."""
        chosen = attention_name(self.config) or "eager"
        if mask is not None and not isinstance(mask, Tensor):
            raise DistillError(
                f"Expected an attention mask that is a tensor, got {type(mask).__name__} from {chosen!r} attention:"
                " load the model with attn_implementation='sdpa' to read its attention."
            )
        if extra.get("cu_seq_lens_q") is not None:
            raise DistillError(
                "Expected padded sequences, got packed ones (cu_seq_lens_q): attention is read of padded batches only."
            )
        causal = False
        if mask is None or mask.dim() == 2:
            flag = extra.get("is_causal")
            causal = bool(getattr(self.module, "is_causal", True) if flag is None else flag)
            causal = causal and chosen != "eager" and query.shape[2] > 1
            window = extra.get("sliding_window") if "flash" in chosen else None
            if mask is not None or window is not None:
                mask, causal = _full_mask(query, key, mask, causal, window), False
        return AttentionCall(query, key, scaling, mask, causal, extra.get("position_bias"), extra.get("softcap"))


def _full_mask(query: Tensor, key: Tensor, padding: Tensor | None, causal: bool, window: int | None) -> Tensor:
    """What flash attention does with padding `[B, L]` and its flags, as a mask; padded queries see nothing."""
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    far = rows - torch.arange(key.shape[2], device=query.device)
    allowed = far.abs() < (window or key.shape[2])
    allowed = (allowed & (far >= 0) if causal else allowed)[None, None]
    if padding is not None:
        allowed = allowed & padding.bool()[:, None, None, :]
        if query.shape[2] == key.shape[2]:
            allowed = allowed & padding.bool()[:, None, :, None]
    return allowed


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of tapped modules."""
    tap: _ConfigTap = module.config.kd_plugins_tap
    if tap.trace is None and not tap.wanted:
        tap.records.append(None)
        return tap.delegate(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    call = tap.call(query, key, attention_mask, scaling, kwargs)
    if tap.trace is None and tap.share:
        output, attention = call.attend(value, dropout)
        tap.records.append(attention)
        eager = attention_name(tap.config) == "eager"
        return output.transpose(1, 2).contiguous(), attention.probs if eager else None
    result = tap.delegate(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if tap.trace is None:
        tap.records.append(call)
    else:
        tap.trace.seen(tap, call, value, result[0].transpose(1, 2))
    return result


def _mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask of a module that builds its own: as the user's choice of attention wants it."""
    config = config.kd_plugins_tap.config
    return chosen_mask(config)(*args, config=config, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
