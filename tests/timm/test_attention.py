"""Captured attention of timm's vision transformers equals what the attention computes when it is not fused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_timm.attention import AttentionTaps

DEPTH, HEADS = 3, 3
ARCHS = ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
EVERY = pytest.mark.parametrize("arch", ARCHS)
BOTH = pytest.mark.parametrize("mode", ["share", "record"])
FUSED = pytest.mark.parametrize("fused", [True, False])


def network(arch: str, fused: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(arch, img_size=32, patch_size=8, depth=DEPTH, num_classes=5, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn" in name and p.dim() == 2:
                p.mul_(6)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tapped(arch: str, fused: bool = True, **options: Any) -> tuple[nn.Module, AttentionTaps]:
    model = network(arch, fused, **options)
    taps = AttentionTaps(model)
    assert taps.probe(images()) == DEPTH
    return model, taps


@contextmanager
def maps_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """What attention that is not fused puts into its dropout."""
    maps: list[Tensor] = []
    drops = [m for name, m in model.named_modules() if name.endswith("attn_drop")]
    handles = [m.register_forward_pre_hook(lambda module, args: maps.append(args[0])) for m in drops]
    yield maps
    for handle in handles:
        handle.remove()


@EVERY
@FUSED
def test_probe_finds_every_block(arch: str, fused: bool) -> None:
    model = network(arch, fused).train()
    model.blocks[1].eval()
    flags, rng = [m.training for m in model.modules()], torch.get_rng_state()
    taps = AttentionTaps(model)
    assert taps.layers == []
    assert taps.probe(images()) == taps.probe(images()) == DEPTH
    assert AttentionTaps(model).probe(x=images()) == DEPTH
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert [layer.layer for layer in taps.layers] == [f"blocks.{i}" for i in range(DEPTH)]
    assert [layer.attention for layer in taps.layers] == [f"blocks.{i}.attn" for i in range(DEPTH)]
    assert {(layer.heads, layer.call, layer.mode) for layer in taps.layers} == {(HEADS, 0, "share")}
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == DEPTH


@EVERY
@FUSED
@BOTH
def test_equals_unfused_attention(arch: str, fused: bool, mode: str) -> None:
    model, taps = tapped(arch, fused)
    reference = network(arch, fused=False)
    with torch.no_grad(), maps_of(reference) as maps:
        expected = reference(images())
    assert len(maps) == DEPTH
    with torch.no_grad():
        plain = model(images())
        with taps.capture([1, 3], mode=mode) as seen:
            logits = model(images())
    assert sorted(seen) == [1, 3]
    torch.testing.assert_close(logits, plain, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    if mode == "record" or not fused:
        assert torch.equal(logits, plain)
    for number, (scores, probs) in seen.items():
        assert scores.dtype == torch.float32
        assert (probs is None) == (fused and mode == "record")
        assert maps[number - 1].max() > 1.5 / scores.shape[-1], "attention is too uniform to test anything"
        torch.testing.assert_close(scores.softmax(-1), maps[number - 1], atol=2e-6, rtol=0)
        if probs is not None:
            torch.testing.assert_close(probs, maps[number - 1], atol=2e-6, rtol=0)


@FUSED
@BOTH
def test_attention_of_a_training_step_is_before_dropout(fused: bool, mode: str) -> None:
    model, taps = tapped(ARCHS[0], fused, attn_drop_rate=0.5)
    with taps.capture([1]) as still:
        model(images())
    model.train()
    torch.manual_seed(3)
    plain = model(images())
    torch.manual_seed(3)
    with taps.capture([1, 2], mode=mode) as seen:
        logits = model(images())
    torch.testing.assert_close(seen[1].scores.softmax(-1), still[1].scores.softmax(-1), atol=1e-6, rtol=0)
    assert seen[2].scores.requires_grad
    if mode == "record" or not fused:
        assert torch.equal(logits, plain)
    else:
        with taps.capture([1, 2, 3]):
            assert not torch.allclose(logits, model(images())), "dropout does not act in a shared block"


def loss_of(scores: list[Tensor]) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return sum(
        (torch.randn(s.shape, generator=draw).softmax(-1) * -s.log_softmax(-1)).sum() / s.shape[-1] for s in scores
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@EVERY
@FUSED
@BOTH
def test_gradients_equal_unfused_attention(arch: str, fused: bool, mode: str) -> None:
    """In float64: the class token is nearly constant, so its norm magnifies rounding."""
    model, reference = network(arch, fused).double(), network(arch, fused=False).double()
    taps, x = AttentionTaps(model), images().double()
    taps.probe(x)
    with maps_of(reference) as maps:
        reference(x)
    loss_of([maps[0].log(), maps[2].log()]).backward()
    expected = gradients(reference)
    with taps.capture([1, 3], mode=mode) as seen:
        model(x)
    assert seen[1].scores.dtype == torch.float64
    loss_of([seen[1].scores, seen[3].scores]).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@FUSED
def test_checkpointing(fused: bool) -> None:
    model, taps = tapped(ARCHS[0], fused)
    model.train()
    with taps.capture([2], mode="record") as seen:
        model(images())
    loss_of([seen[2].scores]).backward()
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    with taps.capture([2]) as seen:
        model(images())
    loss_of([seen[2].scores]).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-5)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(DistillError, match="use_reentrant=False"), taps.capture([2]):
            model(images().requires_grad_())
    finally:
        timm.layers.set_reentrant_ckpt(False)


@FUSED
def test_compiled(fused: bool) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, taps = tapped(ARCHS[0], fused)
    for mode in ("share", "record"):
        with taps.capture([1, 3], mode=mode) as eager:
            model(images())
        loss_of([eager[1].scores, eager[3].scores]).backward()
        expected = gradients(model)
        counters.clear()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            with taps.capture([1, 3], mode=mode) as seen:
                compiled(images())
        assert counters["stats"]["unique_graphs"] <= 1
        assert not counters["graph_break"]
        loss_of([seen[1].scores, seen[3].scores]).backward()
        got = gradients(model)
        torch.testing.assert_close(seen[3].scores, eager[3].scores, atol=1e-5, rtol=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4)


@EVERY
def test_block_output_is_the_intermediate_feature(arch: str) -> None:
    model, taps = tapped(arch)
    outputs = []
    for layer in taps.layers:
        model.get_submodule(layer.layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(images())
        features = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
    for ours, expected in zip(outputs, features, strict=False):
        assert torch.equal(ours[:, -expected.shape[1] :], expected)


@FUSED
def test_copies_of_the_network_are_not_captured(fused: bool) -> None:
    model, taps = tapped(ARCHS[0], fused)
    twin, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        with taps.capture([1]) as seen:
            twin(-images())
            revived(-images())
            model(images())
        with taps.capture([1]) as alone:
            model(images())
    assert torch.equal(seen[1].scores, alone[1].scores)


def test_networks_without_attention_are_refused() -> None:
    with pytest.raises(DistillError, match=r"got ResNet, where none was found.*vision transformer"):
        AttentionTaps(timm.create_model("resnet18")).probe(images())


@FUSED
def test_misuse(fused: bool) -> None:
    model = network(ARCHS[0], fused)
    taps = AttentionTaps(model)
    with pytest.raises(DistillError, match="probe"), taps.capture([1]):
        pass
    taps.probe(images())
    with pytest.raises(DistillError, match="layers 1 to 3"), taps.capture([4]):
        pass
    with pytest.raises(DistillError, match="did not run"), taps.capture([1]):
        pass
    other = AttentionTaps(model)
    other.probe(images())
    with taps.capture([1]) as seen:
        with pytest.raises(DistillError, match="do not nest"), other.capture([1]):
            pass
        model(images())
    assert sorted(seen) == [1]


def test_a_block_that_stops_being_fused_is_not_mistaken_for_the_next() -> None:
    model, taps = tapped(ARCHS[0])
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(DistillError, match="layer 1 .*did not run"), taps.capture([1]):
        model(images())
    model.blocks[0].attn.fused_attn = True
    with taps.capture([1]) as seen:
        model(images())
    assert sorted(seen) == [1]


def test_two_attentions_in_one_module_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attend = nn.functional.scaled_dot_product_attention
            return (attend(q, k, v) - attend(k, q, v)).transpose(1, 2).reshape(2, 4, 8)

    model = nn.Sequential(Twice(), Twice())
    taps = AttentionTaps(model)
    assert taps.probe(torch.randn(2, 4, 8)) == 2
    with pytest.raises(DistillError, match="no plain softmax"), taps.capture([1]):
        pass
