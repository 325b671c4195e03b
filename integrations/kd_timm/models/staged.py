"""What the networks share: a chain of stages with timm's interface to features and head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_timm.compat import feature_take_indices


class StagedNet(nn.Module):
    """A chain of stages, a norm and a classifier, with timm's interface to features and head.

    A subclass makes its modules, then calls `finish`. Stages are numbered from 0, the stem.

    Attributes:
        feature_info: Channels, reduction and module of every stage, as in timm's models.
        renamed: Patterns of parameter names in checkpoints of other code, and what they are called here.
        checkpoint_every: Modules of a stage between which gradient checkpointing keeps the activation.
    """

    renamed: ClassVar[Sequence[tuple[str, str]]] = ()
    checkpoint_every: ClassVar[int] = 1
    global_pool: nn.Module

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.grad_checkpointing = False

    def finish(
        self,
        stages: Sequence[Sequence[str]],
        channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm: nn.Module | None = None,
        neck: nn.Module | None = None,
        head_hidden_size: int | None = None,
    ) -> None:
        """Adds what all networks have and starts the convolutions.

        Args:
            stages: Names of the modules of every stage, in order; the output of the last one is the stage's.
            channels: Channels of every stage.
            reductions: Product of the strides up to every stage.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: timm's name of the pooling.
            drop_rate: Dropout before the classifier.
            norm: What follows the last stage.
            neck: What stands between pooling and classifier.
            head_hidden_size: Width that the classifier gets; that of the last stage without a neck.
        """
        self.stages = [tuple(names) for names in stages]
        self.feature_info = [
            dict(num_chs=c, reduction=r, module=names[-1])
            for c, r, names in zip(channels, reductions, stages, strict=True)
        ]
        self.num_features = channels[-1]
        self.head_hidden_size = head_hidden_size or self.num_features
        self.norm = norm or nn.Identity()
        self.neck = neck or nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """The classifier: `Linear`, or `Identity` without classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: timm's name of the pooling, `""` for none; the present one if None.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes and not pool:
            raise DistillError(
                f"Expected global pooling before a classifier, got {num_classes} classes: name a pooling."
            )
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.head_hidden_size, num_classes, pool_type=pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass instead of keeping their activations."""
        if enable and not any(isinstance(getattr(self, names[-1]), nn.Sequential) for names in self.stages):
            raise DistillError(f"{type(self).__name__} has no blocks to checkpoint: leave gradient checkpointing off.")
        self.grad_checkpointing = enable

    def _stage(self, number: int, x: Tensor) -> Tensor:
        for name in self.stages[number]:
            module = getattr(self, name)
            if self.grad_checkpointing and isinstance(module, nn.Sequential):
                x = checkpoint_seq(module, x, every=self.checkpoint_every)
            else:
                x = module(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, and the final features for `forward_head`.

        Args:
            x: Images `[B, C, H, W]`.
            indices: The last n stages (int), all (None), or these.
            norm: Normalizes the map of the last stage, where the network has a norm there.
            stop_early: Stops after the last stage that is asked for.
            output_fmt: `"NCHW"`.
            intermediates_only: Returns the maps alone.

        Returns:
            The final features `[B, C, H, W]` and the list of maps, in the order of the stages.
        """
        if output_fmt != "NCHW":
            raise DistillError(f"Expected output_fmt 'NCHW', got {output_fmt!r}: these networks have no other.")
        taken, last = feature_take_indices(len(self.stages), indices)
        run = last + 1 if stop_early else len(self.stages)
        maps = []
        for number in range(run):
            x = self._stage(number, x)
            final = number == len(self.stages) - 1
            if number in taken:
                maps.append(self.norm(x) if norm and final else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if run == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what these stages do not need; returns their numbers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = self.stages[last + 1 :]
        self.stages = self.stages[: last + 1]
        for name in (name for names in cut for name in names):
            delattr(self, name)
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut or prune_head:
            self.neck = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """The final map `[B, C, H, W]`, normalized."""
        for number in range(len(self.stages)):
            x = self._stage(number, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, classes]` of a final map, or with `pre_logits` what the classifier gets."""
        x = self.global_pool(x)
        # A neck works on vectors; a network without pooling gives its map.
        x = self.neck(x) if self.global_pool.pool_type else x
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        renamed = checkpoint_filter_fn({key[len(prefix) :]: value for key, value in own.items()}, self)
        state_dict.update({prefix + key: value for key, value in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: StagedNet) -> dict[str, Any]:
    """Translates the parameter names of a checkpoint of other code; names of these networks stay.

    Args:
        state_dict: Parameters by name.
        model: The network that they are for.

    Returns:
        The same parameters by the names of this module.
    """

    def name(key: str) -> str:
        for pattern, replacement in model.renamed:
            key = re.sub(pattern, replacement, key)
        return key

    return {name(key): value for key, value in state_dict.items()}
