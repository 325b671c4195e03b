"""How a timm model is called and read: its stages through forward_intermediates, in one forward with the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.utils import unwrap_model
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.network import Forward, Network
from kd_plugins.reading.view import Batch, Reads
from kd_timm.attention import AttentionTaps


def one_head(output: Any, model: nn.Module) -> Tensor:
    """A model's scores; refuses those of two heads, as `set_distilled_training(True)` or `aux_logits=True` make."""
    if isinstance(output, (tuple, list)):
        remedy = "make it with aux_logits=False"
        if hasattr(model, "set_distilled_training"):
            remedy = "model.set_distilled_training(False) gives the mean of its heads"
        raise DistillError(
            f"{type(model).__name__} returns {len(output)} scores in training, of which one alone would be trained:"
            f" {remedy}."
        )
    return output


def image_batch(config: Mapping[str, Any], inputs: Tensor | None, labels: Any = None, **fields: Any) -> Batch:
    """A batch of images that were normalised as a data configuration says."""
    shape = tuple(config["input_size"])
    return Batch(inputs=inputs, labels=labels, mean=config["mean"], std=config["std"], shape=shape, **fields)


class StagedModel(nn.Module):
    """A timm model whose forward gives stage outputs beside the logits.

    One module is what DDP wraps and torch.compile compiles: calling `forward_intermediates` of the model inside a
    wrapper would leave gradients unreduced, and run uncompiled.

    Args:
        model: The timm model; the exported student.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, stages: tuple[int, ...] = (), logits: bool = True, **kwargs: Any) -> Any:
        """The logits; with `stages`, the pair of the logits (None where not asked for) and the stages' maps.

        Args:
            x: Images `[B, C, H, W]`.
            stages: Stage numbers, counted as `feature_info` does.
            logits: Whether the head runs; without it the model stops after the last stage.
            **kwargs: Further inputs of the model.
        """
        if not stages:
            return one_head(self.model(x, **kwargs), self.model)
        if not logits:
            kwargs |= {"intermediates_only": True, "stop_early": True}
            return None, self.model.forward_intermediates(x, indices=list(stages), **kwargs)
        final, maps = self.model.forward_intermediates(x, indices=list(stages), **kwargs)
        return one_head(self.model.forward_head(final), self.model), maps


class TimmNetwork(Network):
    """A timm model: stages by number (maps `[B, C, H, W]`, also of transformers), layers and attention of transformers.

    A stage number in `Reads.features` counts the entries of `feature_info`; anything else is a module path.
    """

    attention_taps = AttentionTaps

    def __init__(self, module: nn.Module) -> None:
        self.staged = module if isinstance(module, StagedModel) else StagedModel(module)
        super().__init__(self.staged.model)
        # Swin and its like; their stages by number are maps [B, C, H, W].
        self.channels_last = getattr(self.module, "output_fmt", None) == "NHWC"

    def stages(self) -> list[str]:
        info = getattr(self.module, "feature_info", None)
        if not info or not hasattr(self.module, "forward_intermediates"):
            return super().stages()
        return [str(entry["module"]) for entry in info]

    def classifier(self) -> str:
        made: Any = getattr(self.module, "get_classifier", lambda: None)()
        paths = {id(module): path for path, module in self.module.named_modules()}
        if not isinstance(made, nn.Module) or isinstance(made, nn.Identity) or id(made) not in paths:
            return super().classifier()
        return paths[id(made)]

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # timm's models call their images x, whatever the host calls them.
        return (batch.inputs,), dict(batch.kwargs)

    def ask(self, forward: Forward | None, batch: Batch, reads: Reads) -> tuple[Any, dict[str | int, Tensor]]:
        stages = tuple(sorted({self._number(i) for i in self._stage_numbers(reads)}))
        if not stages:
            return self.call(self.staged if forward is None else forward, batch), {}
        logits, maps = self._through(forward)(batch.inputs, stages=stages, logits=reads.logits, **batch.kwargs)
        return logits, {i: maps[stages.index(self._number(i))] for i in self._stage_numbers(reads)}

    def _stage_numbers(self, reads: Reads) -> tuple[int, ...]:
        return tuple(i for i in reads.features if isinstance(i, int))

    def check_map(self, method: str, layer: str | int, activation: Tensor) -> None:
        super().check_map(method, layer, activation)
        if isinstance(layer, str) and self.channels_last:
            raise DistillError(
                f"{method} reads maps [B, C, H, W], and the layers of {type(self.module).__name__} keep their channels"
                f" last, got {list(activation.shape)} at the layer {layer!r}: name a stage by its number."
            )

    def install(self, reads: Reads) -> None:
        for number in self._stage_numbers(reads):
            self._number(number)
        super().install(reads)

    def _through(self, forward: Forward | None) -> Forward:
        """The host's callable where it wraps a `StagedModel`, else the model's own.

        Going past DDP is sound because gradients are averaged by hand as soon as stages are read.
        """
        if forward is not None and isinstance(unwrap_model(forward), StagedModel):
            return forward
        if hasattr(forward, "_orig_mod"):
            raise DistillError(
                f"Stages by number of a compiled {type(self.module).__name__} would be read past the compiled model:"
                " name the stages by their module paths, or compile kd_timm.network.StagedModel(model)."
            )
        return self.staged

    def _number(self, stage: int) -> int:
        """A stage counted from 0; raises for one that does not exist."""
        self.stage(stage)
        return stage % len(self.stages())
