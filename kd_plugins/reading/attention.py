"""Reading the attention of a network: the arithmetic, and one forward that finds which modules make it.

What is common to every host. How an attention is intercepted is the host's: see `kd_transformers.attention` and
`kd_timm.attention`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.tap import Hook, Reached, untraced
from kd_plugins.reading.view import Attention

MASKED = -1e4
"""Score of a key that may not be attended to: finite, so that differences of scores stay finite."""

Mode = Literal["share", "record"]

_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_OTHER_FUNCTION = 5e-2


class Layer(NamedTuple):
    """One layer of a transformer, in the order in which the layers run.

    Attributes:
        attention: Path of the module whose attention is read.
        layer: Path of the transformer layer around it, whose output is the hidden state; None where the network keeps
            its layers in no list.
        heads: Number of heads.
        call: Which call of the attention module in one forward, from 0: above 0 where layers share their weights.
        layer_call: Which call of the layer module, from 0.
        mode: `"share"`: the scores can be computed once, for the layer's own output and for us. `"record"`: rounding
            differs, so the layer is left alone and the scores are computed beside it. `"other"`: this is not
            `softmax(scale * q k^T + bias) v`, and cannot be read.
    """

    attention: str
    layer: str | None
    heads: int
    call: int
    layer_call: int
    mode: Literal["share", "record", "other"]


class AttentionCall(NamedTuple):
    """What an attention function was called with.

    Attributes:
        query: `[B, heads, Lq, D]`.
        key: `[B, key heads, Lk, D]`; fewer key heads are shared by groups of query heads.
        scaling: Factor on the products; None is `D ** -0.5`.
        mask: Broadcastable to `[B, heads, Lq, Lk]`; boolean (True may be attended to) or additive.
        causal: No query sees a later key.
        bias: Added to the scaled products.
        softcap: Scores are squashed into (-softcap, softcap) by a tanh, before the mask.
    """

    query: Tensor
    key: Tensor
    scaling: float | None = None
    mask: Tensor | None = None
    causal: bool = False
    bias: Tensor | None = None
    softcap: float | None = None

    def scores(self) -> Tensor:
        """Scaled and masked scores `[B, heads, Lq, Lk]` in float32 (float64 stays), whatever the autocast.

        >>> q = torch.ones(1, 1, 2, 4)
        >>> AttentionCall(q, q, causal=True).scores()
        tensor([[[[ 2.0000e+00, -1.0000e+04],
                  [ 2.0000e+00,  2.0000e+00]]]])
        """
        query, key = _exact(self.query), _exact(_like_heads(self.key, self.query))
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        with torch.autocast(query.device.type, enabled=False):
            scores = (query * scaling) @ key.transpose(-2, -1)
            if self.bias is not None:
                scores = scores + self.bias.to(scores.dtype)
            if self.softcap is not None:
                scores = (scores / self.softcap).tanh() * self.softcap
            # In place from here on: no backward of the operations above needs their result.
            if self.mask is not None and self.mask.is_floating_point():
                scores.add_(self.mask.to(scores.dtype)).masked_fill_(self.mask <= MASKED, MASKED)
            elif self.mask is not None:
                scores.masked_fill_(~self.mask.bool(), MASKED)
            if self.causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores.masked_fill_(later, MASKED)
        return scores

    def attend(self, value: Tensor, dropout: float = 0.0) -> tuple[Tensor, Attention]:
        """The layer's output `[B, heads, Lq, D]` and the attention behind it, with one computation of the scores.

        Args:
            value: `[B, key heads, Lk, D]`.
            dropout: Share of the probabilities that are dropped for the output; the attention is that before dropout.
        """
        scores = self.scores()
        probs = scores.softmax(-1)
        kept = F.dropout(probs, dropout) if dropout > 0 else probs
        output = kept.to(value.dtype) @ _like_heads(value, self.query)
        if self.mask is not None and not self.mask.is_floating_point():
            # A query without any key: fused attention gives 0, the softmax of equal scores would give a mean.
            output = output.masked_fill(~self.mask.bool().any(-1, keepdim=True), 0.0)
        return output, Attention(scores, probs)

    def mode(self, value: Tensor, output: Tensor) -> Literal["share", "record", "other"]:
        """How this attention can be read, by comparing our output with the one `[B, heads, Lq, D]` of the network."""
        ours, scale = self.attend(value)[0], output.abs().max().clamp_min(torch.finfo(output.dtype).tiny)
        if ours.shape != output.shape:
            return "other"
        error = float((ours - output).abs().max() / scale)
        if error <= _TOLERANCE.get(output.dtype, 1e-5):
            return "share"
        return "record" if error <= _OTHER_FUNCTION else "other"


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like_heads(x: Tensor, query: Tensor) -> Tensor:
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _from_record(record: Attention | AttentionCall | Tensor) -> Attention:
    if not isinstance(record, Tensor):
        return Attention(record.scores()) if isinstance(record, AttentionCall) else record
    probs = _exact(record)
    return Attention(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), probs)


class AttentionTap:
    """What is kept of the attention of one module while a forward is captured."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.on = False
        self.share = False
        self.calls: frozenset[int] = frozenset()
        self.records: list[Any] = []

    def start(self, calls: Collection[int], share: bool) -> None:
        """Begins to keep the given calls of the module."""
        if self.on:
            raise DistillError(f"The attention of {type(self.module).__name__} is being captured already: do not nest.")
        self.calls, self.share, self.records, self.on = frozenset(calls), share, [], True

    def stop(self) -> list[Any]:
        """Ends it and gives what was kept, by call."""
        records, self.records, self.on = self.records, [], False
        return records

    @property
    def wanted(self) -> bool:
        """Whether the call that runs now is to be kept."""
        return len(self.records) in self.calls


class _DropoutHook(Hook):
    def __init__(self, tap: DropoutTap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.tap.on:
            self.tap.records.append(args[0] if self.tap.wanted else None)


class DropoutTap(AttentionTap):
    """The attention of a module that computes its probabilities itself: what enters its `nn.Dropout`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        module.register_forward_pre_hook(_DropoutHook(self))

    @classmethod
    def of(cls, module: nn.Module) -> DropoutTap:
        """The tap that a dropout has already, or a new one."""
        hooks = (h.tap for h in module._forward_pre_hooks.values() if isinstance(h, _DropoutHook))
        return next(hooks, None) or cls(module)


def _is_distribution(x: Any) -> bool:
    """Whether a tensor looks like attention: `[B, heads, L, L]`, not negative, rows that sum to 1."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != x.shape[-2] or not x.is_floating_point():
        return False
    sums = _exact(x).sum(-1)
    return bool((x >= 0).all()) and bool(((sums - 1).abs() <= max(1e-4, 8 * torch.finfo(x.dtype).eps)).all())


class _Found(NamedTuple):
    stack: tuple[tuple[str, int], ...]
    tap: AttentionTap
    heads: int
    mode: Literal["share", "record", "other"]


class Trace:
    """Which modules run inside which, in one forward, and where attention was seen."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules = dict(root.named_modules())
        self.open: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.entered: list[tuple[str, int]] = []
        self.found: list[_Found] = []

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Follows the modules, and sees attention that enters an `nn.Dropout`."""
        handles = []
        for path, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(lambda module, args, path=path: self._enter(path, args)))
            handles.append(module.register_forward_hook(lambda module, args, output: self._leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, args: tuple[Any, ...]) -> None:
        self.open.append((path, self.calls[path]))
        self.entered.append(self.open[-1])
        self.calls[path] += 1
        module = self.modules[path]
        if isinstance(module, nn.Dropout) and args and _is_distribution(args[0]):
            self.found.append(_Found(tuple(self.open[:-1]), DropoutTap.of(module), args[0].shape[1], "share"))

    def _leave(self) -> None:
        self.open.pop()

    def seen(self, tap: AttentionTap, call: AttentionCall, value: Tensor, output: Tensor) -> None:
        """Notes attention in the module that runs now."""
        self.found.append(_Found(tuple(self.open), tap, call.query.shape[1], call.mode(value, output)))

    def layers(self) -> list[tuple[Layer, AttentionTap]]:
        """What was found, one attention for each layer: the first in a layer that has cross-attention too."""
        intercepted = {found.stack[-1] for found in self.found if not isinstance(found.tap, DropoutTap)}
        layers: dict[Any, tuple[Layer, AttentionTap]] = {}
        calls: Counter[AttentionTap] = Counter()
        attentions: set[tuple[str, int]] = set()
        for found in self.found:
            if isinstance(found.tap, DropoutTap) and intercepted.intersection(found.stack):
                continue
            attention, _ = found.stack[-1]
            call, calls[found.tap] = calls[found.tap], calls[found.tap] + 1
            path, layer_call = self._layer(found.stack) or (None, 0)
            layer = Layer(attention, path, found.heads, call, layer_call, found.mode)
            key = (path, layer_call) if path is not None else (attention, found.stack[-1][1], None)
            if found.stack[-1] in attentions and key in layers:
                # Two attentions in one call of one module (differential attention): neither is the layer's.
                layers[key] = (layers[key][0]._replace(mode="other"), layers[key][1])
            attentions.add(found.stack[-1])
            layers.setdefault(key, (layer, found.tap))
        listed = [item for item in layers.values() if item[0].layer is not None]
        self._check(listed)
        return listed or list(layers.values())

    def _layer(self, stack: tuple[tuple[str, int], ...]) -> tuple[str, int] | None:
        """The transformer layer: the innermost child of a list that has siblings of its class."""
        children = [entry for entry in stack if self._siblings(entry[0])]
        repeated = [entry for entry in children if len(self._siblings(entry[0])) > 1]
        return repeated[-1] if repeated else children[0] if children else None

    def _siblings(self, path: str) -> list[nn.Module]:
        """Modules of one class in the list that holds a module, itself included; empty outside lists."""
        parent = self.modules.get(path.rpartition(".")[0]) if path else None
        if not isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return []
        return [m for m in parent._modules.values() if type(m) is type(self.modules[path])]

    def _check(self, layers: list[tuple[Layer, AttentionTap]]) -> None:
        """Every layer that ran must have been found, or the layers' numbers would be wrong."""
        found = {(layer.layer, layer.layer_call) for layer, _ in layers}
        kinds = {(path.rpartition(".")[0], type(self.modules[path])) for path, _ in found if path is not None}
        ran = [(p, call) for p, call in self.entered if (p.rpartition(".")[0], type(self.modules[p])) in kinds]
        missing = [path for path, call in ran if (path, call) not in found]
        if missing:
            raise DistillError(
                f"Expected to find the attention of all {len(ran)} layers of {type(self.root).__name__} that run, got"
                f" {len(ran) - len(missing)}, none in {', '.join(missing)}: distill hidden states or logits."
            )


class BaseAttentionTaps:
    """The attention of one network, read where asked; hosts say how it is intercepted.

    `probe` runs the network once and numbers its layers 1 to n; `capture` then reads the layers asked for in the
    forward that runs inside it. Probe before the first call of a compiled network: hooks that come later are ignored.

    Args:
        model: The network, unwrapped (without DDP or torch.compile around it).
    """

    _nothing_found = "Distill its hidden states or logits instead."

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self._taps: list[AttentionTap] = []

    def probe(self, *args: Any, **inputs: Any) -> int:
        """Runs the network once, in evaluation mode and without gradient, and finds the attention of its layers.

        Args:
            *args: Inputs of the network, by position.
            **inputs: Inputs of the network, by keyword.

        Returns:
            The number n of layers; `layers` describes them.

        Raises:
            DistillError: Nothing that can be read was found, or not in every layer.
        """
        trace, eager = Trace(self.model), torch.compiler.set_stance("force_eager")
        with untraced(self.model), eager, trace.listen(), self._listen(trace):
            self.model(*args, **inputs)
        found = trace.layers()
        if not found:
            raise DistillError(
                f"Expected a transformer whose attention can be read, got {type(self.model).__name__}, where none was"
                f" found. {self._nothing_found}"
            )
        self.layers = [layer for layer, _ in found]
        self._taps = [tap for _, tap in found]
        return len(self.layers)

    @property
    def modes(self) -> list[str]:
        """How each layer is read, as `probe` has found with the weights of that moment."""
        return [layer.mode for layer in self.layers]

    def keep(self, modes: Sequence[Any]) -> None:
        """Goes on reading the layers as `modes` told before: other weights may fall on the other side of rounding."""
        if len(modes) == len(self.layers):
            self.layers = [layer._replace(mode=mode) for layer, mode in zip(self.layers, modes, strict=True)]

    @contextmanager
    def capture(self, layers: Collection[int], *, mode: Mode = "share") -> Iterator[dict[int, Attention]]:
        """Reads the attention of some layers in the one forward that runs inside.

        Args:
            layers: Layer numbers, 1 to n.
            mode: `"share"` computes scores and probabilities once, for the layer's output and for the caller; the layer
                then draws its dropout in its own way. `"record"` leaves the layers as they are and computes the scores
                beside them; taken by itself where activations are checkpointed, and for layers whose rounding differs.

        Yields:
            A dict that holds the attention by layer number once the context has ended.

        Raises:
            DistillError: Not probed; no such layer; a layer that did not run; reentrant activation checkpointing.
        """
        if mode not in ("share", "record"):
            raise DistillError(f"Expected mode 'share' or 'record', got {mode!r}.")
        numbers = list(dict.fromkeys(layers))
        for number in numbers:
            if self.layer(number).mode == "other":
                raise DistillError(
                    f"The attention of layer {number} ({self.layer(number).attention}) of {type(self.model).__name__}"
                    " is no plain softmax(scale * q k^T + mask) v, so its distribution cannot be read: distill hidden"
                    " states instead."
                )
        checkpointed = torch.is_grad_enabled() and any(map(_checkpoints, self.model.modules()))
        wanted: dict[AttentionTap, list[int]] = {}
        for number in numbers:
            wanted.setdefault(self._taps[number - 1], []).append(number)
        captured: dict[int, Attention] = {}
        whole, started = False, []
        try:
            for tap, which in wanted.items():
                share = mode == "share" and not checkpointed and all(self.layers[n - 1].mode == "share" for n in which)
                tap.start([self.layers[n - 1].call for n in which], share)
                started.append(tap)
            with self._around(any(not isinstance(tap, DropoutTap) for tap in wanted)):
                yield captured
            whole = True
        except Reached:
            whole = True
            raise
        finally:
            records = {tap: tap.stop() for tap in started}
            if whole:
                for number in numbers:
                    captured[number] = self._attention(number, records[self._taps[number - 1]], checkpointed)

    def _attention(self, number: int, records: list[Any], checkpointed: bool) -> Attention:
        layer = self.layers[number - 1]
        if layer.call >= len(records):
            raise DistillError(
                f"Nothing was captured of the attention of layer {number} ({layer.attention}) of"
                f" {type(self.model).__name__}: the layer did not run in this forward, or the network was compiled and"
                " called before it was probed. Probe first, and run the network inside capture()."
            )
        attention = _from_record(records[layer.call])
        trained = any(p.requires_grad for p in self.model.get_submodule(layer.attention).parameters())
        if checkpointed and trained and not attention.scores.requires_grad:
            raise DistillError(
                f"The attention of layer {number} of {type(self.model).__name__} has no gradient although its weights"
                " are being trained: reentrant activation checkpointing hides it. Use use_reentrant=False"
                " (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        return attention

    def layer(self, number: int) -> Layer:
        """The layer of a number, 1 to n."""
        name = type(self.model).__name__
        if not self.layers:
            raise DistillError(f"The attention of {name} was not looked for: call probe(...) with one batch first.")
        if not 1 <= number <= len(self.layers):
            raise DistillError(f"Expected layers 1 to {len(self.layers)} of {name}, got {number}.")
        return self.layers[number - 1]

    def _listen(self, trace: Trace) -> AbstractContextManager[None]:
        """Tells `trace` of every attention that runs while this context is open."""
        raise NotImplementedError

    def _around(self, intercepted: bool) -> AbstractContextManager[Any]:
        """A context around a captured forward, in which the taps that were started see their attention."""
        return nullcontext()


def _checkpoints(module: nn.Module) -> bool:
    """Whether a module runs its forward again in the backward pass."""
    return module.training and bool(
        getattr(module, "gradient_checkpointing", False)
        or getattr(module, "grad_checkpointing", False)
        or "_checkpoint_wrapped_module" in module._modules
    )
