"""ResNet, Wide ResNet, VGG and LeNet-5 for images of 32 x 32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_timm.models.staged import StagedNet


def _conv3x3(in_chs: int, out_chs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)


def _groups(
    make: Callable[[int, int, int], nn.Module], depth: int, rest: int, widths: Sequence[int]
) -> Iterator[nn.Sequential]:
    """The three stages after the stem, in a network of 6n + `rest` layers; their first blocks change width and size."""
    blocks, left = divmod(depth - rest, 6)
    if left or blocks < 1:
        raise DistillError(f"Expected a depth of 6n+{rest}, got {depth}: take {6 * max(blocks, 1) + rest}.")
    for in_chs, out_chs, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
        yield nn.Sequential(make(in_chs, out_chs, stride), *(make(out_chs, out_chs, 1) for _ in range(blocks - 1)))


class PadShortcut(nn.Module):
    """Shortcut A of He et al.: subsamples, and pads new channels with zeros on both sides; no parameters."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_chs - in_chs) // 2
        self.padding = (0, 0, 0, 0, before, out_chs - in_chs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with the ReLU after the sum."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_chs, out_chs, stride)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU()
        self.conv2 = _conv3x3(out_chs, out_chs)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.downsample = (
                PadShortcut(in_chs, out_chs, stride)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chs))
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(out + self.downsample(x))


class CifarResNet(StagedNet):
    """ResNet for 32 x 32 images, with 6n+2 layers.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2;
    with wider stages as in Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv
    1910.10699. Stages: the stem after its ReLU, `layer1`, `layer2`, `layer3`.

    Args:
        depth: Layers, 6n+2.
        widths: Channels of the stem and of the three stages.
        shortcut: `"A"` pads with zeros, as He et al. on CIFAR; `"B"` is a 1x1 convolution with norm, as Tian et al.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool`, `drop_rate`, as in `StagedNet.finish`.
    """

    # https://github.com/akamaster/pytorch_resnet_cifar10
    renamed = ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample."))

    def __init__(
        self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), shortcut: str = "A", in_chans: int = 3, **head: Any
    ) -> None:
        super().__init__(in_chans)
        if shortcut not in ("A", "B"):
            raise DistillError(f"Expected shortcut 'A' or 'B', got {shortcut!r}: pad (A) or convolve (B).")
        self.conv1 = _conv3x3(in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU()
        block = partial(BasicBlock, shortcut=shortcut)
        self.layer1, self.layer2, self.layer3 = _groups(block, depth, 2, widths)
        stages = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",))
        self.finish(stages, widths, (1, 1, 2, 4), **head)


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; a 1x1 convolution where the width changes."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU()
        self.conv1 = _conv3x3(in_chs, out_chs, stride)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()
        self.conv2 = _conv3x3(out_chs, out_chs)
        widens = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        before = self.act1(self.bn1(x))
        out = self.conv2(self.act2(self.bn2(self.conv1(before))))
        return out + (x if self.shortcut is None else self.shortcut(before))


class WideResNet(StagedNet):
    """Wide residual network, with 6n+4 layers.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146. Stages: the stem's convolution,
    `block1`, `block2`, `block3`, all before a norm and ReLU; `norm=True` gives the last one after them.

    Departures: no dropout inside blocks, which the distillation literature leaves out too.

    Args:
        depth: Layers, 6n+4.
        widen_factor: Width of the stages over 16/32/64.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool`, `drop_rate`, as in `StagedNet.finish`.
    """

    # https://github.com/HobbitLong/RepDistiller
    renamed = ((r"^(block\d)\.layer\.", r"\1."), (r"\.convShortcut\.", ".shortcut."), (r"^bn1\.", "norm.0."))

    def __init__(self, depth: int, widen_factor: int = 1, in_chans: int = 3, **head: Any) -> None:
        super().__init__(in_chans)
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)

        self.conv1 = _conv3x3(in_chans, widths[0])
        self.block1, self.block2, self.block3 = _groups(PreActBlock, depth, 4, widths)
        norm = nn.Sequential(nn.BatchNorm2d(widths[3]), nn.ReLU())
        stages = (("conv1",), ("block1",), ("block2",), ("block3",))
        self.finish(stages, widths, (1, 1, 2, 4), norm=norm, **head)


class CifarVGG(StagedNet):
    """VGG with batch norm and one linear layer, for 32 x 32 images.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv
    1409.1556, as reduced by the benchmark of Tian et al., ICLR 2020, arXiv 1910.10699. Stages: `block0` to `block4`,
    after the ReLU and before the pooling.

    Departures: the benchmark pools a fourth time where images are 64 x 64; here the last two stages share their
    resolution at every size.

    Args:
        layers: Convolutions in each of the five blocks.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool`, `drop_rate`, as in `StagedNet.finish`.
    """

    # https://github.com/HobbitLong/RepDistiller
    renamed = ((r"^classifier\.", "fc."),)
    checkpoint_every = 3  # convolution, norm and ReLU

    def __init__(self, layers: int, in_chans: int = 3, **head: Any) -> None:
        super().__init__(in_chans)
        widths = (64, 128, 256, 512, 512)

        def block(in_chs: int, out_chs: int) -> nn.Sequential:
            modules: list[nn.Module] = []
            for i in range(layers):
                conv = nn.Conv2d(out_chs if i else in_chs, out_chs, 3, padding=1)
                modules += [conv, nn.BatchNorm2d(out_chs), nn.ReLU()]
            return nn.Sequential(*modules)

        for i, (in_chs, out_chs) in enumerate(zip((in_chans, *widths[:-1]), widths, strict=True)):
            self.add_module(f"block{i}", block(in_chs, out_chs))
        for i in range(3):
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
        stages = (("block0",), ("pool0", "block1"), ("pool1", "block2"), ("pool2", "block3"), ("block4",))
        self.finish(stages, widths, (1, 2, 4, 8, 8), **head)


class LeNet5(StagedNet):
    """LeNet-5 with ReLU and max pooling, for 32 x 32 images.

    LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of the
    IEEE 1998, as used in Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, arXiv 1904.01186, with a
    student of half the width. Stages: the three convolutions after their ReLU. They have no padding: `reduction` counts
    strides, and the maps are 28, 10 and 1 pixels wide. Images of 28 x 28 need to be enlarged or padded by 2 pixels.

    Args:
        widths: Channels of the three convolutions, and of the hidden layer.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool`, `drop_rate`, as in `StagedNet.finish`.
    """

    # https://github.com/huawei-noah/Data-Efficient-Model-Compression
    renamed = ((r"^fc1\.", "neck.0."), (r"^fc2\.", "fc."))

    def __init__(self, widths: Sequence[int] = (6, 16, 120, 84), in_chans: int = 1, **head: Any) -> None:
        super().__init__(in_chans)
        *channels, hidden = widths
        self.conv1, self.act1 = nn.Conv2d(in_chans, channels[0], 5), nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2, self.act2 = nn.Conv2d(channels[0], channels[1], 5), nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3, self.act3 = nn.Conv2d(channels[1], channels[2], 5), nn.ReLU()
        neck = nn.Sequential(nn.Linear(channels[2], hidden), nn.ReLU())
        stages = (("conv1", "act1"), ("pool1", "conv2", "act2"), ("pool2", "conv3", "act3"))
        self.finish(stages, channels, (1, 2, 4), neck=neck, head_hidden_size=hidden, **head)
