"""How one kind of network is called and read: the adapter between a view and a host's networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd_plugins.catalog.installed import NETWORKS, entries_by_name, load, only_entry
from kd_plugins.errors import DistillError
from kd_plugins.reading.attention import BaseAttentionTaps
from kd_plugins.reading.tap import Reached, Replacement, Seen, Tap
from kd_plugins.reading.view import Attention, Batch, Features, Reads, View, tokens_first

Forward = Callable[..., Any]


class Network:
    """Calls a network with a batch and reads what a method asked for.

    This class fits any `nn.Module` that returns scores, a tuple or a mapping with `logits`; activations are read by
    module path, all in one forward. Adapters for other kinds of networks translate names: they say which modules are
    stages, how attention is read, where the scores are. They are found through the entry-point group
    `kd_plugins.networks`, whose keys are the top-level packages that the networks' classes come from.

    Args:
        module: The network, unwrapped.
    """

    attention_taps: ClassVar[type[BaseAttentionTaps] | None] = None
    """How the attention of such networks is read; None where it is not."""
    channels_last = False
    """Whether modules keep maps as `[B, H, W, C]`."""
    whole = False
    """Whether every forward runs to its end, as a network needs whose own hooks gather and free its weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tap = Tap(module)
        self.attention = None if self.attention_taps is None else self.attention_taps(module)

    def read(
        self,
        batch: Batch,
        reads: Reads,
        *,
        forward: Forward | None = None,
        replace: Mapping[str, Replacement] | None = None,
    ) -> View:
        """One forward of the network that reads what is asked for and runs no deeper than that needs.

        Args:
            batch: What to call the network with.
            reads: What to read.
            forward: The callable to go through, where a host has wrapped the network; by default the network itself.
            replace: Tensors to put in place of modules' outputs, or what makes them of these, by path.
        """
        if reads.hidden or reads.attentions or reads.cut:
            self.layers(batch)
        paths = self._paths(reads)
        calls = {key: 1 for expanded in paths.values() for key in expanded}
        places = {number: self._output(number) for number in (*reads.hidden, *reads.attentions)}
        for key, call in places.values():
            calls[key] = max(calls.get(key, 1), call + 1)
        capture: Any = nullcontext({})
        if self.attention is not None and reads.attentions:
            capture = self.attention.capture(reads.attentions)
        attentions: Mapping[int, Attention]
        output: Any = None
        maps: dict[str | int, Tensor] = {}
        record = self.tap.record(
            list(calls),
            stop=bool(calls) and not (self.whole or reads.logits or self._stage_numbers(reads)),
            calls=calls,
            replace=replace,
            cut=[self._single(number) for number in reads.cut],
        )
        with record as seen, capture as attentions, suppress(Reached):
            output, maps = self.ask(forward, batch, reads)
        logits, missing = None, ""
        if reads.logits:
            try:
                logits = self.logits(output)
            except DistillError as error:
                # A criterion reads the output itself, and may need no scores: a detector in training returns losses.
                if batch.criterion is None:
                    raise
                missing = str(error)
        hidden = Features({n: seen.all(key)[call] for n, (key, call) in places.items() if n in reads.hidden})
        for number, x in hidden.items():
            if tokens_first(x, batch):
                raise DistillError(
                    f"Hidden states are [B, L, H], and layer {number} of {type(self.module).__name__} gives"
                    f" {list(x.shape)}, tokens first: use another network, or no hidden states (hidden_weight=0)."
                )
        features = self._features(paths, seen)
        features.update(maps)
        return View(logits, features, hidden, attentions, output, labels=batch.labels, missing=missing)

    def ask(self, forward: Forward | None, batch: Batch, reads: Reads) -> tuple[Any, dict[str | int, Tensor]]:
        """Calls the network; what it returned, and the maps of the stages that its adapter reads without taps."""
        return self.call(self.module if forward is None else forward, batch), {}

    def embeddings(self) -> list[str]:
        """The paths of the modules that make vectors of tokens: of an encoder and a decoder that share one, each."""
        found = getattr(self.tap.root, "get_input_embeddings", lambda: None)()
        weight, paths = getattr(found, "weight", None), list[str]()
        for path, module in self.tap.root.named_modules():
            same = module is found or (isinstance(module, nn.Embedding) and module.weight is weight)
            # An adapter holds the module that it adapts.
            if same and not any(path.startswith(f"{outer}.") for outer in paths):
                paths.append(path)
        if not paths:
            raise DistillError(
                f"Expected {type(self.module).__name__} to tell where its tokens become vectors: give it the function"
                " get_input_embeddings(), as transformers' models have it."
            )
        return paths

    def call(self, forward: Forward, batch: Batch) -> Any:
        """Calls the network."""
        inputs, kwargs = self.arguments(batch)
        return forward(*inputs, **kwargs)

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The network's arguments, by position and by keyword."""
        if batch.inputs is None:
            raise DistillError(f"{type(self.module).__name__} was asked with a batch that has no inputs.")
        if batch.name is None:
            return (batch.inputs,), dict(batch.kwargs)
        cls: Any = type(self.module)
        names, first, rest = _parameters(cls)
        kwargs = {k: v for k, v in batch.kwargs.items() if rest or k in names}
        if batch.name in names or first is None:
            return (), {batch.name: batch.inputs, **kwargs}
        # Another library's network has another name for its first input.
        return (batch.inputs,), {k: v for k, v in kwargs.items() if k != first}

    def logits(self, output: Any) -> Tensor:
        """The scores in what the network returned."""
        if isinstance(output, Tensor):
            return output
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(output, (tuple, list)):
            if found is None:
                found = next((x for x in output if isinstance(x, Tensor) and x.dim() > 0), None)
            alike = sum(_alike(x, found) for x in _tensors(output)) if isinstance(found, Tensor) else 0
            if found is not None and alike > 1:
                raise DistillError(
                    f"Expected {type(self.module).__name__} to return one tensor of scores, got {alike} such as"
                    f" {list(found.shape)}: switch its further heads off in training"
                    " (set_distilled_training(False), aux_logits=False), or wrap it in a module that returns one."
                )
        if not isinstance(found, Tensor):
            raise DistillError(
                f"Expected {type(self.module).__name__} to return its scores as a tensor, a tuple or a mapping with"
                f" 'logits', got {type(output).__name__}: wrap it in a module that does."
            )
        return found

    def layers(self, batch: Batch) -> int:
        """The number of transformer layers that `Reads.hidden` and `Reads.attentions` count, found by one forward."""
        if self.attention is None:
            raise DistillError(
                f"{type(self.module).__name__} has no transformer layers whose attention is known here: use a"
                " transformers model or a timm vision transformer, or a method that reads feature maps or logits."
            )
        if not self.attention.layers:
            inputs, kwargs = self.arguments(batch)
            self.attention.probe(*inputs, **kwargs)
            for layer in self.attention.layers:
                if layer.layer is not None:
                    self.tap.install(layer.layer)
            first = self.attention.layers[0].layer
            if first is not None:
                self.tap.install(first + ":in")
        return len(self.attention.layers)

    def classifier(self) -> str:
        """Path of the layer that makes the scores; `classifier() + ":in"` in `Reads.features` is what it gets.

        The last linear layer of the network.
        """
        found = [path for path, module in self.tap.root.named_modules() if isinstance(module, nn.Linear)]
        if not found:
            raise DistillError(
                f"{type(self.module).__name__} has no linear layer that makes its scores: name the layer whose input is"
                " wanted by its module path."
            )
        return found[-1]

    def stages(self) -> list[str]:
        """Module paths of the stages that an integer in `Reads.features` counts."""
        raise DistillError(
            f"{type(self.module).__name__} has no numbered stages that are known here: give module paths, such as"
            f" {', '.join(repr(n) for n, _ in list(self.module.named_children())[-3:])}."
        )

    def stage(self, number: int) -> str:
        """The module path of one stage."""
        names = self.stages()
        if not -len(names) <= number < len(names):
            raise DistillError(f"{type(self.module).__name__} has stages 0 to {len(names) - 1}, got {number}.")
        return names[number]

    def check_map(self, method: str, layer: str | int, activation: Tensor) -> None:
        """Raises for an activation that is no map `[B, C, H, W]`, for methods that read maps."""
        if activation.dim() != 4:
            raise DistillError(
                f"{method} reads maps [B, C, H, W], got {list(activation.shape)} at the layer {layer!r} of"
                f" {type(self.module).__name__}: choose a layer of maps, such as a convolution."
            )

    def install(self, reads: Reads) -> None:
        """Makes everything in `reads` readable now, before the network is compiled; raises for what does not exist."""
        self._paths(reads)

    def _stage_numbers(self, reads: Reads) -> tuple[int, ...]:
        """The numbers in `reads.features` whose maps `ask` gives."""
        return ()

    def _paths(self, reads: Reads) -> dict[str | int, list[str]]:
        """Installed module paths behind each name in `reads.features`."""
        own = self._stage_numbers(reads)
        names = [name for name in reads.features if name not in own]
        return {name: self.tap.install(self.stage(name) if isinstance(name, int) else name) for name in names}

    def _features(self, paths: Mapping[str | int, list[str]], seen: Seen) -> Features:
        features = Features()
        for name, expanded in paths.items():
            if len(expanded) == 1:
                features[name] = seen[expanded[0]]
            else:
                features.globs[name] = expanded
                features.update({key: seen[key] for key in expanded})
        return features

    # Layers of a transformer

    def _output(self, number: int) -> tuple[str, int]:
        """Where the hidden state of a layer is read: a tap, and which of its calls; 0 is what the first layer gets."""
        assert self.attention is not None  # `layers` has found it
        layer = self.attention.layer(max(number, 1))
        if layer.layer is None:
            raise DistillError(
                f"{type(self.module).__name__} keeps its layers in no list, so their outputs cannot be numbered: read"
                " module paths (features) instead."
            )
        return (layer.layer + ":in", 0) if number == 0 else (layer.layer, layer.layer_call)

    def _single(self, number: int) -> str:
        key, _ = self._output(number)
        layers = [] if self.attention is None else self.attention.layers
        if number == 0 or sum(layer.layer == key for layer in layers) > 1:
            raise DistillError(
                f"The gradient can be cut after a layer with weights of its own, which layer {number} of"
                f" {type(self.module).__name__} is not: leave freeze_lower out."
            )
        return key


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in what a network returned."""
    if isinstance(output, (tuple, list)):
        return [x for part in output for x in _tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def _alike(scores: Tensor, found: Tensor) -> bool:
    """Whether both are scores of one kind: of one shape, or maps of the same classes in any size."""
    maps = scores.dim() == found.dim() == 4
    return scores.shape[:2] == found.shape[:2] if maps else scores.shape == found.shape


@lru_cache
def _parameters(cls: Any) -> tuple[frozenset[str], str | None, bool]:
    """The names that a network's forward takes, the first that may be given by position, whether it takes any other."""
    parameters = [*inspect.signature(cls.forward).parameters.values()][1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    rest = any(p.kind == p.VAR_KEYWORD for p in parameters)
    by_position = any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters[:1])
    return frozenset(names), names[0] if by_position else None, rest


@lru_cache(maxsize=1)
def _adapters() -> dict[str, list[EntryPoint]]:
    return entries_by_name(NETWORKS)


def adapt(module: nn.Module) -> Network:
    """The adapter for a network: by the packages its class and base classes come from, else the plain one.

    >>> type(adapt(nn.Linear(2, 2))).__name__
    'Network'
    """
    if isinstance(module, nn.DataParallel):
        raise DistillError(
            "Expected a network of one process, got nn.DataParallel, which replicates it in every step, so that taps"
            " read nothing: give the network itself, and start one process for each GPU (torchrun, accelerate launch)."
        )
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)
    adapters = _adapters()
    for cls in type(module).__mro__:
        entries = adapters.get(cls.__module__.partition(".")[0])
        if entries:
            adapter: type[Network] = load(only_entry(entries), Network, "adapter of networks")
            return adapter(module)
    return Network(module)
