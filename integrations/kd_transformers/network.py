"""How a transformers model is called and read."""

from __future__ import annotations

from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Network
from kd_transformers.attention import AttentionTaps

__all__ = ["TransformersNetwork"]


class TransformersNetwork(Network):
    """A transformers model: layers and attention by number, stages of a convolutional backbone by number."""

    attention_taps = AttentionTaps

    def stages(self) -> list[str]:
        """The children of the backbone's list of stages: the first `ModuleList` or `Sequential` named so."""
        for path, module in self.module.named_modules():
            if path.rpartition(".")[2] in ("stages", "stage") and isinstance(module, (nn.ModuleList, nn.Sequential)):
                return [f"{path}.{name}" for name, _ in module.named_children()]
        raise DistillError(
            f"{type(self.module).__name__} has no numbered stages: give module paths, or use a method that reads layers"
            " of a transformer."
        )
