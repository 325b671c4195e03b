"""What judges feature maps, and what makes maps of different networks alike enough to be judged together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kd_plugins.functional._common import no_autocast


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


class SelfAttention(nn.Module):
    """Adds to each position of a map `[B, C, H, W]` what it finds at all others, at first nothing.

    Zhang, Goodfellow, Metaxas, Odena, "Self-Attention Generative Adversarial Networks", ICML 2019, arXiv 1805.08318:
    `x + gamma * v softmax(q^T k)`. It can be differentiated twice, which fused attention cannot. The keys have no bias,
    to which the softmax is blind.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.value = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        return x + self.gamma * (v @ (q.mT @ k).softmax(-1).mT).view_as(x)


class Critic(nn.Module):
    """Scores how well a map `[B, C, H, W]` of any size goes with an image: a number for each example, `[B]`.

    The critic of Liu et al., TPAMI 2020, arXiv 1903.04197, as in the released code: four convolutions of stride 2 under
    spectral normalisation, each followed by a leaky ReLU, self-attention after the third and fourth, and a last plain
    convolution of 4x4, averaged. It treats each example on its own (without `norm`), in float32, and can be
    differentiated twice.

    Departures: maps whose smaller side is below 32 are enlarged to that, and a last map below 4x4 is padded by zeros,
    where the released code needs maps of 64 and more. No bias in the last convolution, which no difference of scores
    depends on.

    Args:
        channels: C.
        condition: Channels of the image, 0 for none.
        width: Channels of the first convolution; each further one has twice as many.
        norm: Batch-normalise the map, as the released code does.
    """

    def __init__(self, channels: int, condition: int = 0, width: int = 64, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        widths = [channels + condition, *(width * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.1)]
            layers += [SelfAttention(after)] if number >= 2 else []
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(widths[-1], 1, 4, bias=False)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        with no_autocast(x):
            x = self.norm(x.to(self.last.weight.dtype))
            if image is not None:
                image = F.interpolate(image.to(x.dtype), x.shape[2:], mode="bilinear", antialias=True)
                x = torch.cat([image, x], 1)
            smaller = min(x.shape[2:])
            if smaller < 32:
                x = F.interpolate(x, [-(-n * 32 // smaller) for n in x.shape[2:]], mode="bilinear")
            x = self.layers(x)
            height, width = (max(0, 4 - n) for n in x.shape[2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            return self.last(x).mean((1, 2, 3))


def probability(scores: Tensor) -> Tensor:
    """The sigmoid, in float32: in half precision it rounds to 0 and 1, where it has no slope."""
    return scores.float().sigmoid()


def transfer_layer(channels: int, width: int) -> nn.Module:
    """Maps `[B, channels, H, W]` to `[B, width, H, W]`: 1x1 convolution, batch norm, ReLU; nothing where they agree."""
    if channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
