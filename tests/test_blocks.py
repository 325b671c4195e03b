"""Stages, blocks and layer groups, found in networks of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import kd_timm.models  # noqa: F401
from kd_plugins import Batch, DistillError, Net, Reads
from kd_plugins.reading.network import adapt
from kd_plugins.reading.trunk import find_groups, find_trunk


def net(module: nn.Module) -> Net:
    return Net(adapt(module.eval()), Reads)


def images(size: int = 32, **fields: Any) -> Batch:
    return Batch.of(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)), **fields)


def paths(name: str, size: int = 32, **options: Any) -> tuple[list[str], list[str]]:
    trunk = find_trunk(net(timm.create_model(name, **options)), images(size))
    return [b.path for b in trunk.stages], [b.path for b in trunk.blocks]


def test_blocks_of_timm_models() -> None:
    small = {"channels": (8, 8, 16, 16)}
    stages, blocks = paths("resnet18", **small)
    assert stages == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert blocks == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    # A stage of one block whose shortcut is a list of its own.
    assert paths("resnet10t", **small, stem_width=8)[1] == [f"layer{i}.0" for i in (1, 2, 3, 4)]
    assert paths("cifar_resnet20")[1] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    depths = {"depths": (2, 3, 1, 1), "dims": (8, 16, 16, 16)}
    blocks = ["stages.0.blocks.0", "stages.0.blocks.1", *(f"stages.1.blocks.{j}" for j in range(3))]
    assert paths("convnext_atto", **depths)[1][:5] == blocks
    # Blocks that are in no list.
    assert paths("regnetx_002")[1][:3] == ["s1.b1", "s2.b1", "s3.b1"]
    assert paths("mobilenetv3_small_100", 64)[1] == [f"blocks.{i}.{j}" for i, j in ((0, 0), (1, 0), (1, 1), (3, 0))] + [
        "blocks.3.1",
        "blocks.5.0",
    ]
    # No stage has blocks: each is one.
    assert paths("lenet5", in_chans=3) == (["act1", "act2", "act3"],) * 2


def test_a_stage_that_is_passed_on_is_the_one_that_made_it() -> None:
    """RepVGG names an identity behind its last stage."""
    stages, blocks = paths("repvgg_a0", 64)
    assert stages[-1] == "stages.3"
    assert blocks[-1] == "stages.3.0"


def test_channels_and_sizes() -> None:
    trunk = find_trunk(net(timm.create_model("cifar_resnet20")), images())
    assert [b.channels for b in trunk.stages] == [16, 16, 32, 64]
    assert [b.size for b in trunk.stages] == [(32, 32), (32, 32), (16, 16), (8, 8)]
    assert str(trunk.blocks[-1]) == "layer3.2 (64 x 8 x 8)"


def test_maps_with_the_channels_last_are_none() -> None:
    for name, options in (
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}),
        ("vit_tiny_patch16_224", {"img_size": 56, "depth": 1, "patch_size": 14}),
    ):
        with pytest.raises(DistillError, match=r"(has no stages that give|modules give no) maps"):
            find_trunk(net(timm.create_model(name, **options)), images(56))


def classifier(depths: list[int], widths: list[int], kind: str) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=depths, layer_type=kind, num_labels=3)
    return ResNetForImageClassification(config)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_blocks_of_transformers_models(kind: str) -> None:
    batch = Batch.of({"pixel_values": images().inputs})
    trunk = find_trunk(net(classifier([2, 3], [8, 16], kind)), batch)
    assert [b.path for b in trunk.stages] == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    assert [b.path for b in trunk.blocks] == [
        f"resnet.encoder.stages.{i}.layers.{j}" for i, n in ((0, 2), (1, 3)) for j in range(n)
    ]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Plain(nn.Module):
    """Lists at the top, one of which is only a container; ReLUs in place; one module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.second = nn.ModuleList([Residual(4), nn.Sequential(Residual(4), nn.AvgPool2d(2)), Residual(4)])
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for module in self.second:
            x = module(x)
        return self.head(self.twice(self.twice(x)))


def test_networks_without_named_stages() -> None:
    module = Plain()
    module(images(8).inputs)
    trunk = find_trunk(net(module), images(8))
    assert [b.path for b in trunk.stages] == ["first", "second.0", "second.1", "second.2"]
    # first.0 is overwritten by the ReLU behind it; a residual block is not taken apart, and twice runs twice.
    assert [b.path for b in trunk.blocks] == ["first.1", "first.2", "second.0", "second.1.0", "second.1.1", "second.2"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_groups_are_of_one_size_and_one_width() -> None:
    teacher, student = timm.create_model("wrn_16_2"), timm.create_model("cifar_resnet8")
    found = find_groups(net(student), net(teacher), images())
    assert [(g.student, g.teacher) for g in found] == [
        ("layer1", ("block1.0", "block1.1")),
        ("layer2", ("block2.0", "block2.1")),
        ("layer3", ("block3.0", "block3.1")),
    ]
    mixed = find_groups(net(student), net(teacher), images(), None, ["conv1+block1.*", 2])
    assert [(g.student, g.teacher) for g in mixed] == [
        ("layer1", ("block1.0", "block1.1")),
        ("layer2", ("block2.0", "block2.1")),
    ]
    assert mixed[0].left_out == ("conv1 (16 x 32 x 32)",)


def test_named_groups() -> None:
    teacher, student = timm.create_model("cifar_resnet20"), timm.create_model("lenet5", in_chans=3)
    with pytest.raises(DistillError, match=r"no maps of one spatial size.*act2 \(16 x 10 x 10\).*Name the layers"):
        find_groups(net(student), net(teacher), images())
    found = find_groups(net(student), net(teacher), images(), [1, "act3"], ["layer2.*", "layer3.0+layer3.2"])
    assert [(g.student, g.teacher) for g in found] == [
        ("act2", ("layer2.0", "layer2.1", "layer2.2")),
        ("act3", ("layer3.0", "layer3.2")),
    ]
    with pytest.raises(DistillError, match=r"one group of teacher layers for each of \['act2'\], got 2"):
        find_groups(net(student), net(teacher), images(), [1], [2, 3])
    with pytest.raises(DistillError, match=r"has no module 'layer9.0'"):
        find_groups(net(student), net(teacher), images(), [1], ["layer9.0"])
    with pytest.raises(DistillError, match=r"Expected a map \[B, C, H, W\] at 'fc', got \[2, 10\]"):
        find_groups(net(student), net(teacher), images(), ["fc"])


def test_a_named_layer_is_not_left_out_without_a_word() -> None:
    names = ("cifar_resnet8", "cifar_resnet20", "resnet18")
    student, teacher, other = (net(timm.create_model(name)) for name in names)
    # Two layers of one size, of the student or of the teacher; one of a size that the other network has not.
    for of, layers, teacher_layers in (
        (teacher, (0, "layer1"), None),
        (teacher, None, ("layer1.0", "layer1.1")),
        (other, ("layer2", "layer3"), None),
    ):
        with pytest.raises(DistillError, match=r"a group for each of the layers .*with the other's by their size"):
            find_groups(student, of, images(), layers, teacher_layers)
    for of, glob in ((teacher, "layer1.*"), (other, "layer*.*")):
        with pytest.raises(DistillError, match="a group for each of the layers"):
            find_groups(student, of, images(), None, ("layer1.0", glob))
    assert [g.student for g in find_groups(student, teacher, images(), ("layer3", "layer2"))] == ["layer3", "layer2"]


def test_a_glob_for_layers_of_several_sizes_is_a_group_of_each() -> None:
    student, teacher = (net(timm.create_model(f"cifar_resnet{depth}")) for depth in (8, 20))
    whole = find_groups(student, teacher, images())
    assert len(whole) == 3
    assert find_groups(student, teacher, images(), None, ("layer*.*",)) == whole
    assert find_groups(student, teacher, images(), None, ("layer1.*+layer2.*", "layer3.*")) == whole


def test_cached_logits_do_not_stand_for_the_forward() -> None:
    module = net(timm.create_model("cifar_resnet8"))
    module.frozen = True
    batch = images(teacher_logits=torch.zeros(2, 10))
    assert len(find_trunk(module, batch).blocks) == 3
