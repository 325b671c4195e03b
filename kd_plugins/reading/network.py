"""How one kind of network is called and read: the adapter between a view and a host's networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.tap import Reached, Seen, Tap
from kd_plugins.reading.view import Batch, Features, Reads, View

__all__ = ["Network", "adapt"]

Forward = Callable[..., Any]


class Network:
    """Calls a network with a batch and reads what a method asked for.

    This base class fits any `nn.Module` that returns scores, a tuple or a mapping with `logits`; activations are read
    by module path. Adapters for other kinds of networks (stages of a timm model, layers and attention of a transformer)
    subclass it and are found through the entry-point group `kd_plugins.networks`, whose keys are the top-level packages
    that the networks' classes come from.

    Args:
        module: The network, unwrapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tap = Tap(module)

    def read(
        self,
        batch: Batch,
        reads: Reads,
        *,
        forward: Forward | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> View:
        """One forward of the network that reads what is asked for and runs no deeper than that needs.

        Args:
            batch: What to call the network with.
            reads: What to read.
            forward: The callable to go through, where a host has wrapped the network; by default the network itself.
            replace: Tensors to put in place of modules' outputs, by path.
        """
        paths = self._paths(reads)
        keys = list(dict.fromkeys(key for expanded in paths.values() for key in expanded))
        output = None
        with self.tap.record(keys, stop=bool(keys) and not reads.logits, replace=replace) as seen:
            try:
                output = self.call(self.module if forward is None else forward, batch)
            except Reached:
                pass
        logits, missing = None, ""
        if reads.logits:
            try:
                logits = self.logits(output)
            except DistillError as error:
                # A criterion reads the output itself, and may need no scores: a detector in training returns losses.
                if batch.criterion is None:
                    raise
                missing = str(error)
        features = self._features(paths, seen)
        return View(_logits=logits, features=features, output=output, labels=batch.labels, missing=missing)

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
        if found is None and isinstance(output, (tuple, list)):
            found = next((x for x in output if isinstance(x, Tensor) and x.dim() > 0), None)
        if not isinstance(found, Tensor):
            raise DistillError(
                f"Expected {type(self.module).__name__} to return its scores as a tensor, a tuple or a mapping with"
                f" 'logits', got {type(output).__name__}: wrap it in a module that does."
            )
        return found

    def layers(self, batch: Batch) -> int:
        """The number of transformer layers that `Reads.hidden` and `Reads.attentions` count, found by one forward."""
        raise DistillError(
            f"{type(self.module).__name__} has no transformer layers whose attention is known here: use a transformers"
            " model or a timm vision transformer, or a method that reads feature maps or logits."
        )

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
                f" {type(self.module).__name__}: choose a convolution's output, or a stage number."
            )

    def install(self, reads: Reads) -> None:
        """Makes everything in `reads` readable now, before the network is compiled; raises for what does not exist."""
        self._paths(reads)

    def _paths(self, reads: Reads) -> dict[str | int, list[str]]:
        """Installed module paths behind each name in `reads.features`."""
        if reads.hidden or reads.attentions:
            raise DistillError(
                f"{type(self.module).__name__} is read by module path only: it gives no numbered hidden states or"
                " attention. Use a transformers model or a timm vision transformer, or taps (features) instead."
            )
        return {
            name: self.tap.install(self.stage(name) if isinstance(name, int) else name)
            if isinstance(name, int) or name not in self.tap._handles
            else [name]
            for name in reads.features
        }

    def _features(self, paths: Mapping[str | int, list[str]], seen: Seen) -> Features:
        features = Features()
        for name, expanded in paths.items():
            if len(expanded) == 1:
                features[name] = seen[expanded[0]]
            else:
                features.globs[name] = expanded
                features.update({key: seen[key] for key in expanded})
        return features


@lru_cache
def _parameters(cls: Any) -> tuple[frozenset[str], str | None, bool]:
    """The names that a network's forward takes, the first that may be given by position, whether it takes any other."""
    parameters = [*inspect.signature(cls.forward).parameters.values()][1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    rest = any(p.kind == p.VAR_KEYWORD for p in parameters)
    by_position = any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters[:1])
    return frozenset(names), names[0] if by_position else None, rest


@lru_cache(maxsize=1)
def _adapters() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group="kd_plugins.networks")}


def adapt(module: nn.Module) -> Network:
    """The adapter for a network: by the packages its class and base classes come from, else the plain one.

    >>> type(adapt(nn.Linear(2, 2))).__name__
    'Network'
    """
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)
    adapters = _adapters()
    for cls in type(module).__mro__:
        entry = adapters.get(cls.__module__.partition(".")[0])
        if entry is not None:
            return entry.load()(module)
    return Network(module)
