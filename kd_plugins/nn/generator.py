"""What makes images of noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.errors import DistillError

__all__ = ["Generator"]


class Generator(nn.Module):
    """Makes images `[B, C, H, W]` of noise `[B, latent]`: a linear layer, then enlargements and convolutions.

    That of Chen et al., ICCV 2019, as in the released code: 128 channels, 64 after the last enlargement, and a last
    batch norm without weights, so that images have mean 0 and variance 1 in each channel, as normalised images have.
    In training mode always: its statistics are those of the batch.

    Departures: images above 32 pixels begin at 8 pixels or less, by further enlargements; the released code has two
    at every size, which for 224 pixels is a linear layer to 56 x 56 positions.

    Args:
        latent: Length of the noise.
        shape: `(C, H, W)` of the images; 28, 32, 64 and 224 pixels are what it was tried with.
        width: Channels before the last enlargement; half of them after it.
    """

    def __init__(self, latent: int, shape: Sequence[int], width: int = 128) -> None:
        super().__init__()
        channels, *size = shape
        doublings = next(n for n in range(2, 32) if max(size) <= 8 * 2**n)
        if min(size) < 1 or any(s % 2**doublings for s in size):
            raise DistillError(
                f"The generator makes images whose sides are multiples of {2**doublings}, got {size}: take an input"
                " size such as 28, 32, 64 or 224."
            )
        half = max(width // 2, 1)
        self.size = [s // 2**doublings for s in size]
        self.project = nn.Linear(latent, width * self.size[0] * self.size[1])
        self.first = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        for i in range(doublings):
            out = half if i == doublings - 1 else width
            # 0.8 stands where the released code has the epsilon of these norms.
            block = [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out, eps=0.8), nn.LeakyReLU(0.2)]
            blocks += [nn.Upsample(scale_factor=2), *block]
        last = [nn.Conv2d(half, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)]
        self.blocks = nn.Sequential(*blocks, *last)

    def forward(self, z: Tensor) -> Tensor:
        """Noise to images."""
        return self.blocks(self.first(self.project(z).unflatten(1, (-1, *self.size))))
