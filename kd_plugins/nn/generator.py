"""What makes images of noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Generator(nn.Module):
    """Images of noise: `[B, Z]` to `[B, C, H, W]`, of mean 0 and variance 1 in each channel of the batch.

    The generator of Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, as in the released code (after
    DCGAN): a linear layer makes maps of a quarter of the size, each of two blocks doubles it (nearest neighbour) and
    convolves, and a last convolution with tanh is normalised without affine parameters, so that the images are like
    those that a teacher was trained on. The normalisation is that of each batch: it is used in training mode.

    Departures: images above 64 pixels get more blocks, until the first maps have at most 16 pixels (224: 14, four
    blocks; the released code's two would begin at 56, with 401 million weights at 1,000 numbers of noise). Sizes that
    are no multiple of the first maps' are met by the blocks' upsampling.

    Args:
        latent: Z.
        shape: Of the images, `(C, H, W)`.
        width: Channels of the first maps; 128 in the released code.
    """

    def __init__(self, latent: int, shape: Sequence[int], width: int = 128) -> None:
        super().__init__()
        channels, *size = shape
        doublings = 2
        while max(size) > 16 << doublings:
            doublings += 1
        sizes = [tuple(-(-side // (1 << left)) for side in size) for left in reversed(range(doublings + 1))]
        self.first = (width, *sizes[0])
        self.project = nn.Linear(latent, width * sizes[0][0] * sizes[0][1])
        layers: list[nn.Module] = [nn.BatchNorm2d(width)]
        for i, larger in enumerate(sizes[1:]):
            out = width if i < doublings - 1 else max(width // 2, 1)
            # 0.8 is eps in the released code, whose author may have meant the momentum.
            layers += [nn.Upsample(larger), nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out, eps=0.8)]
            layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(out, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise `[B, Z]` to images `[B, C, H, W]`."""
        return self.layers(self.project(noise).unflatten(1, self.first))
