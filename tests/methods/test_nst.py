"""NST: what it refuses before a training; its values are in tests/functional."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kd_plugins import Batch, DistillError, bind, create_distiller
from kd_plugins.testing import TinyNet, tiny_batches


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"d": 0}, {"bandwidth": 0.0}])
def test_options_that_do_not_work(options):
    with pytest.raises(DistillError, match="weight from 0, d from 1 and bandwidth above 0"):
        create_distiller("nst", **options)


def test_maps_of_one_position_have_no_distribution():
    class Pooled(TinyNet):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.layer2.append(nn.AdaptiveAvgPool2d(1))

    with pytest.raises(DistillError, match=r"'layer2' of Pooled has one position, \[.*, 1, 1\]: choose an earlier"):
        bind(create_distiller("nst", layers=("layer2",)), Pooled(4), Pooled(6), batch=tiny_batches(1)[0])


def test_globs_of_other_numbers_of_layers():
    def net(blocks: int) -> nn.Module:
        layers = [nn.Sequential(nn.Conv2d(3, 3, 1)) for _ in range(blocks)]
        return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    batch = Batch(torch.randn(2, 3, 4, 4), torch.zeros(2).long())
    for name in ("nst", "quest"):
        distiller = create_distiller(name, layers=("0.*",))
        with pytest.raises(DistillError, match=r"got 2 for '0\.\*' in the student and 3 .* one by one"):
            bind(distiller, net(2), net(3), batch=batch, batches=[batch])


@pytest.mark.parametrize("name", ["nst", "quest", "afd", "pkt"])
def test_layers_that_keep_their_channels_last_are_read_by_number(name):
    def swin(width: int) -> nn.Module:
        options = {"embed_dim": width, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, **options)

    batch = Batch(torch.randn(3, 3, 32, 32), torch.zeros(3).long())
    own = {"words": 4} if name == "quest" else {}
    layers = {"layer": "layers.0"} if name == "afd" else {"layers": ("layers.0",)}
    with pytest.raises(DistillError, match=r"keep their channels last, got \[3, 8, 8, .*by its number"):
        bind(create_distiller(name, **own, **layers), swin(8), swin(16), batch=batch, batches=[batch])
    number = {"layer": 0} if name == "afd" else {"layers": (0,)}
    bind(create_distiller(name, **own, **number), swin(8), swin(16), batch=batch, batches=[batch])
