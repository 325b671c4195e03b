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
    """A transformers model: layers and attention by number, and stages.

    Stages are those of a backbone; of a model with one stack of layers these, from 0. Of a model with adapters (PEFT)
    module paths are those of the model in it. A model for question answering has two rows of scores, start and end,
    `[B, 2, L]`; one for depth estimation the depth of each pixel, `[B, H, W]`.
    """

    attention_taps = AttentionTaps

    def __init__(self, module: nn.Module) -> None:
        super().__init__(base(module))
        self.module = module

    def stages(self) -> list[str]:
        """The children of the first list of stages, or else of the only list of layers that is in no other."""
        lists: dict[str, list[str]] = {}
        for path, module in base(self.module).named_modules():
            name, inner = path.rpartition(".")[2], [f"{path}.{child}" for child, _ in module.named_children()]
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{x}.") for x in lists):
                continue
            if name in ("stages", "stage"):
                return inner
            if name in ("layer", "layers", "h", "block", "blocks") and inner:
                lists[path] = inner
        only = next(iter(lists.values())) if len(lists) == 1 else []
        # A list of lists does not run.
        if only and not isinstance(base(self.module).get_submodule(only[0]), nn.ModuleList):
            return only
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
