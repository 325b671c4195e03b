"""How a transformers model is called and read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Network
from kd_plugins.reading.view import Batch
from kd_transformers.attention import AttentionTaps
from kd_transformers.checks import base, inputs_of


class TransformersNetwork(Network):
    """A transformers model: layers and attention by number, stages of a convolutional backbone by number.

    Of a model with adapters (PEFT) module paths are those of the model in it. A model for question answering has two
    rows of scores, start and end, `[B, 2, L]`; one for depth estimation the depth of each pixel, `[B, H, W]`.
    """

    attention_taps = AttentionTaps

    def __init__(self, module: nn.Module) -> None:
        super().__init__(base(module))
        self.module = module

    def stages(self) -> list[str]:
        """The children of the backbone's list of stages: the first `ModuleList` or `Sequential` named so."""
        for path, module in base(self.module).named_modules():
            if path.rpartition(".")[2] in ("stages", "stage") and isinstance(module, (nn.ModuleList, nn.Sequential)):
                return [f"{path}.{name}" for name, _ in module.named_children()]
        raise DistillError(
            f"{type(base(self.module)).__name__} has no numbered stages: give module paths, or use a method that reads"
            " layers of a transformer."
        )

    def logits(self, output: Any) -> Tensor:
        start, end, depth = (getattr(output, n, None) for n in ("start_logits", "end_logits", "predicted_depth"))
        if start is not None and end is not None:
            return torch.stack([start, end], 1)
        return super().logits(output if depth is None else depth)

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken = inputs_of(self.module)
        if batch.name is not None and taken and batch.name not in taken:
            name = str(getattr(base(self.module), "main_input_name", ""))
            if name not in batch.kwargs:
                raise DistillError(
                    f"{type(base(self.module)).__name__} takes {name or ', '.join(sorted(taken))}, and the batch has"
                    f" {batch.name}: give the data columns of its own (teacher_{name})."
                )
            args, kwargs = (), {k: v for k, v in batch.kwargs.items() if k in taken}
        else:
            args, kwargs = super().arguments(batch)
        # With a cache of keys a decoder no longer sees by the positions where packed texts begin.
        return args, {"use_cache": False, **kwargs} if "use_cache" in taken else kwargs
