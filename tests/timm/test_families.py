"""A small model of every family of timm as student, as teacher and as peer, in one step on two images."""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import kd_plugins
from kd_plugins import Batch, DistillError
from kd_plugins.binding import connect, schedule, set_up
from kd_timm.network import TimmNetwork

SMALL = (
    "test atto femto pico nano micro 050 xxs xxt zero tiny mini xs xt t0 n0 s0 b0 a0 m0 18 s small 26 b base".split()
)
QUICK = ["byobnet", "convnext", "efficientnet", "mambaout", "mlp_mixer", "nfnet", "resnet", "swin_transformer"]
QUICK += ["vision_transformer"]
# What makes the models of the quick families small that are not so by name.
SIZES = {
    "swin_tiny_patch4_window7_224": dict(embed_dim=32, depths=(1, 1), num_heads=(1, 2), window_size=4),
    "mixer_s32_224": {},
}
FAMILIES = [name for name in timm.list_modules() if timm.list_models(module=name)]


def smallest(family: str) -> str:
    """The model of a family that is made small, or whose name says most clearly that it is."""

    def rank(name: str) -> tuple[int, int, str]:
        words = name.split(".")[0].split("_")
        found = [i for i, word in enumerate(SMALL) if any(w == word or w.endswith(word) for w in words)]
        return min(found, default=len(SMALL)), len(name), name

    names = timm.list_models(module=family)
    return next((name for name in names if name in SIZES), min(names, key=rank))


def make(name: str) -> tuple[nn.Module, int]:
    """The model, of two layers where it can be, and the side of the smallest images that it takes."""
    cfg = timm.get_pretrained_cfg(name)
    default = cfg.input_size[-1] if cfg else 224
    for given in ({"depth": 2}, SIZES.get(name, {}), {}):
        for side, sized in product((64, 128, 126, default), (True, False)):
            with suppress(Exception):
                model = timm.create_model(name, num_classes=10, **given, **({"img_size": side} if sized else {}))
                with torch.no_grad():
                    model.eval()(torch.zeros(1, model.pretrained_cfg.get("input_size", (3,))[0], side, side))
                return model.train(), side
    raise AssertionError(f"{name} takes no images of {default}")


def step(method: str, student: nn.Module, teacher: nn.Module | None, peers: list, batch: Batch) -> str:
    """Sets a method up and plays one step, if it reads scores alone; what it says against the networks, or "fits"."""
    distiller = kd_plugins.create_distiller(method)
    before = [p.detach().clone() for p in student.parameters()]
    try:
        teachers = [] if teacher is None else [TimmNetwork(teacher)]
        nets = connect(distiller, TimmNetwork(student), teachers, [TimmNetwork(peer) for peer in peers])
        set_up(distiller, nets, batch)
        schedule(distiller, 10, epoch=1)
    except DistillError as error:
        return str(error)
    if method in ("nst", "dfa"):
        return "fits"
    optimizers = kd_plugins.make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=1e-3), nets=nets)
    for turn in distiller.turns(nets, batch):
        kd_plugins.play(turn, optimizers)
    trained = list(student.parameters())
    assert all(p.isfinite().all() for p in trained)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    return "fits"


def walk(family: str) -> tuple[str, dict[str, str]]:
    """The model of a family, and what each method says of it."""
    torch.manual_seed(0)
    name = smallest(family)
    (student, side), (other, _) = (make(name) for _ in range(2))
    channels = student.pretrained_cfg.get("input_size", (3,))[0]
    batch = Batch.of(torch.randn(2, channels, side, side), torch.tensor([1, 2]))
    found = {method: step(method, student, other, [], batch) for method in ("kd", "nst", "dfa", "internal")}
    return name, found | {"peers": step("timm_distillers:Pair", student, None, [other.requires_grad_(True)], batch)}


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_model_of_each_family(family, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name, found = walk(family)
    print(f"{family} | {name} | {found}")
    assert found["kd"] == found["peers"] == "fits"
    for told in (found["nst"], found["dfa"], found["internal"]):
        assert told == "fits" or (told.endswith(".") and "\n" not in told)
    if family in ("swin_transformer", "vision_transformer", "mlp_mixer"):
        assert "does not fit" in found["dfa"]
        assert "name layers" not in found["dfa"]
