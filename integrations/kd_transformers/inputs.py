"""What a model's inputs hold beside its main one: labels under other names, the decoder's inputs, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins import DistillError
from kd_transformers.checks import base, kind_of
from kd_transformers.compat import frames_of, hears, shifted

_POSITIONS = ("start_positions", "end_positions")


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
            f"The decoders of student and teacher need the same tokens, and {type(base(model)).__name__} does not tell"
            " how to make them of labels, or there are none: give the data a column decoder_input_ids."
        )
    return {"decoder_input_ids": ids}


def _length(inputs: Mapping[str, Any]) -> int:
    return next(value.shape[1] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1)
