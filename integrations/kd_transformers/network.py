"""How a transformers model is called and read, and what its inputs hold beside its main one.

These are labels under other names, the decoder's inputs, masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Network
from kd_plugins.reading.view import Batch
from kd_transformers.attention import AttentionTaps
from kd_transformers.checks import base, called, inputs_of, kind_of
from kd_transformers.compat import frames_of, hears, shifted

_POSITIONS = ("start_positions", "end_positions")


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
            f"{called(self.module)} has no numbered stages: give module paths, or use a method that reads"
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
                    f"{called(self.module)} takes {name or ', '.join(sorted(taken))}, and the batch has"
                    f" {batch.name}: give the data columns of its own (teacher_{name})."
                )
            args, kwargs = (), {k: v for k, v in batch.kwargs.items() if k in taken}
        else:
            args, kwargs = super().arguments(batch)
        # With a cache of keys a decoder no longer sees by the positions where packed texts begin.
        return args, {"use_cache": False, **kwargs} if "use_cache" in taken else kwargs


def labels_of(model: nn.Module, inputs: dict[str, Any], name: str = "labels") -> tuple[Any, Tensor | None]:
    """Takes the labels out of a model's inputs; with them the mask of what is scored, where it is not the inputs' own.

    Of question answering they are the positions of start and end `[B, 2]`, -100 where the answer is not in the text.
    """
    kind, labels, mask = kind_of(model), inputs.pop(name, None), inputs.get("attention_mask")
    if kind == "question answering" and all(name in inputs for name in _POSITIONS):
        labels = torch.stack([inputs.pop(name).reshape(-1) for name in _POSITIONS], 1).clamp_min(0)
        return labels.masked_fill(labels >= _length(inputs), -100), torch.ones_like(labels)
    if kind == "sequence to sequence" and isinstance(labels, Tensor):
        return labels, inputs.get("decoder_attention_mask", torch.ones_like(labels))
    if isinstance(mask, Tensor) and (kind == "ctc" or hears(base(model))):
        return labels, frames_of(base(model), mask)
    if kind == "multiple choice" and isinstance(mask, Tensor):
        return labels, mask.flatten(0, 1)  # A model reads every choice as a row of its own.
    return labels, None


def with_labels(model: nn.Module, inputs: Mapping[str, Any], labels: Any, name: str = "labels") -> dict[str, Any]:
    """A model's inputs with labels as `labels_of` gave them, under the names that the model has for them."""
    if labels is None:
        return dict(inputs)
    if kind_of(model) != "question answering":
        return {**inputs, name: labels}
    # A position beyond the text is what transformers leaves out.
    positions = labels.masked_fill(labels < 0, _length(inputs)).unbind(1)
    return {**inputs, **dict(zip(_POSITIONS, positions, strict=True))}


def decoder_inputs(model: nn.Module, inputs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """What student and teacher both give their decoder: the labels one token later, where the data has nothing else."""
    given = any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or kind_of(model) != "sequence to sequence":
        return {}
    ids = None if labels is None else shifted(base(model), labels)
    if ids is None:
        raise DistillError(
            f"The decoders of student and teacher need the same tokens, and {called(model)} does not tell"
            " how to make them of labels, or there are none: give the data a column decoder_input_ids."
        )
    return {"decoder_input_ids": ids}


def _length(inputs: Mapping[str, Any]) -> int:
    return next(value.shape[1] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1)
