"""What judges feature maps, and what makes maps of different networks alike enough to be judged together."""

from __future__ import annotations

from torch import nn

__all__ = ["Discriminator", "transfer_layer"]


class Discriminator(nn.Sequential):
    """Judges feature maps: `[B, C, H, W]` to scores `[B, K]`, before sigmoid or softmax.

    Convolution, strided convolution, 1x1 convolution, mean over the positions. Each example is normalised on its own
    (group normalisation), so that real and fake maps, processes, and batches of one are all treated alike.

    Args:
        channels: C.
        hidden: Channels between the convolutions.
        outputs: K.
    """

    def __init__(self, channels: int, hidden: int, outputs: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, hidden),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, outputs, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def transfer_layer(channels: int, width: int) -> nn.Module:
    """Maps `[B, channels, H, W]` to `[B, width, H, W]`: 1x1 convolution, batch norm, ReLU; nothing where they agree."""
    if channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
