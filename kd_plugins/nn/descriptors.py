"""What squeezes layers to vectors, and what judges logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.functional._common import counted, no_autocast, unit
from kd_plugins.functional.ksanc import squeeze


class AttentionEstimator(nn.Module):
    """Squeezes a layer, a map `[B, C, H, W]` or tokens `[B, L, C]`, to one vector `[B, D]`, with an eye on the logits.

    With the vectors `F_n` of the positions, projected to D, and the logits g: `V = sum_n softmax(M)_n F_n`, where
    `M_n = w . tanh(F_n + U g)`, divided by its length. All in float32.

    Args:
        channels: C.
        classes: K, the length of the logits.
        dim: D.

    >>> AttentionEstimator(8, 10, 4)(torch.zeros(2, 8, 3, 3), torch.zeros(2, 10)).shape
    torch.Size([2, 4])
    """

    def __init__(self, channels: int, classes: int, dim: int) -> None:
        super().__init__()
        self.local = nn.Linear(channels, dim)
        self.overall = nn.Linear(classes, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, features: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vector; `mask` `[B, L]` are the tokens that count, of a map it says nothing.

        Raises:
            DistillError: Features that have no row for each row of logits, or no token for each of the mask.
        """
        mask = mask.bool() if mask is not None and features.dim() == 3 else None
        if len(features) != len(logits) or (mask is not None and mask.shape != features.shape[:2]):
            raise DistillError(
                f"Expected a row of logits for each row of a layer, and a mask of its tokens, got {list(logits.shape)}"
                f" and {None if mask is None else list(mask.shape)} of a layer {list(features.shape)}: choose a layer"
                " with a vector for each token of the input."
            )
        dtype = self.score.weight.dtype
        vectors = features.flatten(2).mT if features.dim() == 4 else features
        with no_autocast(features):
            local = self.local(counted(vectors.to(dtype), mask))
            scores = self.score((local + self.overall(logits.to(dtype)).unsqueeze(1)).tanh())
            return unit(squeeze(local, scores.squeeze(-1), mask=mask))


class LogitDiscriminator(nn.Sequential):
    """Judges logits `[B, K]`, in float32: linear layers with ReLU, without batch statistics.

    Args:
        classes: K.
        hidden: Widths between.
        outputs: Length of what it says `[B, outputs]`.

    >>> LogitDiscriminator(10, (128, 256, 128), 11)(torch.zeros(2, 10)).shape
    torch.Size([2, 11])
    """

    def __init__(self, classes: int, hidden: Sequence[int], outputs: int) -> None:
        widths = [classes, *hidden, outputs]
        layers = [x for a, b in zip(widths, widths[1:], strict=False) for x in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers[:-1])

    def forward(self, logits: Tensor) -> Tensor:
        """The scores, before sigmoid and softmax."""
        with no_autocast(logits):
            return super().forward(logits.float())

    def norms(self) -> tuple[Tensor, Tensor]:
        """The sum of the absolute values of all parameters, and of their squares."""
        everything = torch.cat([p.flatten() for p in self.parameters()])
        return everything.abs().sum(), everything.square().sum()
