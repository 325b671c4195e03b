"""Transformers: networks whose layers are numbered, with hidden states and attention to read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.attention import BaseAttentionTaps, Layer
from kd_plugins.reading.network import Forward, Network
from kd_plugins.reading.tap import Reached
from kd_plugins.reading.view import Attention, Batch, Features, Reads, View

__all__ = ["LayeredNetwork"]


class LayeredNetwork(Network):
    """Adds numbered hidden states and attention to what is read by module path.

    The layers are found by one forward of a real batch, by structure and not by class name. A forward that is asked for
    no logits stops after the last layer that is read.
    """

    attention_taps: ClassVar[type[BaseAttentionTaps]]

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.attention = self.attention_taps(module)

    def layers(self, batch: Batch) -> int:
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

    def read(
        self,
        batch: Batch,
        reads: Reads,
        *,
        forward: Forward | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> View:
        if not (reads.hidden or reads.attentions or reads.cut):
            return super().read(batch, reads, forward=forward, replace=replace)
        self.layers(batch)
        paths = self._paths(Reads(features=reads.features))
        calls = {key: 1 for expanded in paths.values() for key in expanded}
        for number in dict.fromkeys((*reads.hidden, *reads.attentions)):
            key, call = self._output(number)
            calls[key] = max(calls.get(key, 1), call + 1)
        capture: Any = self.attention.capture(reads.attentions) if reads.attentions else nullcontext({})
        attentions: Mapping[int, Attention]
        output = None
        record = self.tap.record(
            list(calls),
            stop=not reads.logits,
            calls=calls,
            replace=replace,
            cut=[self._single(number) for number in reads.cut],
        )
        with record as seen, capture as attentions:
            try:
                output = self.call(self.module if forward is None else forward, batch)
            except Reached:
                pass
        hidden = Features()
        for number in reads.hidden:
            key, call = self._output(number)
            hidden[number] = seen.all(key)[call]
        return View(
            _logits=self.logits(output) if reads.logits else None,
            features=self._features(paths, seen),
            hidden=hidden,
            attentions=attentions,
            output=output,
            labels=batch.labels,
        )

    def install(self, reads: Reads) -> None:
        self._paths(Reads(features=reads.features))

    def _layer(self, number: int) -> Layer:
        layers = self.attention.layers
        if not 1 <= number <= len(layers):
            raise DistillError(f"Expected layers 1 to {len(layers)} of {type(self.module).__name__}, got {number}.")
        return layers[number - 1]

    def _output(self, number: int) -> tuple[str, int]:
        """Where the hidden state of a layer is read: a tap, and which of its calls; 0 is what the first layer gets."""
        layer = self._layer(max(number, 1))
        if layer.layer is None:
            raise DistillError(
                f"{type(self.module).__name__} keeps its layers in no list, so their outputs cannot be numbered: read"
                " module paths (features) instead."
            )
        return (layer.layer + ":in", 0) if number == 0 else (layer.layer, layer.layer_call)

    def _single(self, number: int) -> str:
        key, _ = self._output(number)
        if number == 0 or sum(layer.layer == key for layer in self.attention.layers) > 1:
            raise DistillError(
                f"The gradient can be cut after a layer with weights of its own, which layer {number} of"
                f" {type(self.module).__name__} is not: leave freeze_lower out."
            )
        return key
