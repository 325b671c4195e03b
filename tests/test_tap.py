"""Reading and replacing activations by path, and the traps that would give wrong numbers in silence."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_plugins import Batch, DistillError, Network, Reads, Tap
from kd_plugins.reading.tap import Reached, untraced


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)
        self.act = nn.Tanh()
        self.calls = 0

    def forward(self, x, scale=None):
        self.calls += 1
        return x + self.act(self.mlp(self.norm1(x))) * (1 if scale is None else scale)


class Net(nn.Module):
    """A stem, three blocks that count their calls, a head."""

    def __init__(self, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class InPlace(nn.Module):
    def __init__(self, *, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Linear(3, 4)
        self.act = nn.ReLU(inplace=not residual)
        self.residual = residual

    def forward(self, x):
        x = self.conv(x)
        if self.residual:
            x += 1
            return x
        return self.act(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(5, 3)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_outputs_and_inputs_are_those_of_the_forward(x):
    net = Net()
    with Tap(net, ["blocks.1", "blocks.2:in", "head:in", "head"]) as seen:
        out = net(x)
    manual = net.blocks[1](net.blocks[0](net.stem(x)))
    assert torch.equal(seen["blocks.1"], manual)
    assert seen["blocks.2:in"] is seen["blocks.1"]
    assert torch.equal(seen["head"], out)
    assert torch.equal(seen["head:in"], net.blocks[2](manual))
    assert list(seen) == ["blocks.1", "blocks.2:in", "head:in", "head"]
    assert len(seen) == 4


def test_globs_match_one_level_in_the_order_of_the_network(x):
    net = Net()
    tap = Tap(net, ["blocks.*.norm1", "blocks.[02]:in"])
    assert tap.paths == ("blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "blocks.0:in", "blocks.2:in")
    assert Tap(net, ["blocks.*"]).paths == ("blocks.0", "blocks.1", "blocks.2")
    with pytest.raises(DistillError, match=r"No module of Net matches 'layers\.\*'"):
        Tap(net, ["layers.*"])


def test_an_input_may_be_given_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x=x, scale=2.0)

    net = Keyword()
    x = torch.randn(2, 4)
    with Tap(net, ["block:in"]) as seen:
        net(x)
    assert seen["block:in"] is x


def test_the_first_tensor_of_a_tuple_or_mapping_is_the_activation(x):
    class Two(nn.Module):
        def forward(self, x):
            return {"none": None, "pair": (x + 1, x + 2)}

    net = nn.Sequential(Two())
    with Tap(net, ["0"]) as seen:
        net(x)
    assert torch.equal(seen["0"], x + 1)

    class Nothing(nn.Module):
        def forward(self, x):
            return None

    net = nn.Sequential(Nothing())
    with (
        pytest.raises(DistillError, match="Expected a tensor at '0', got NoneType: tap another module"),
        Tap(net, ["0"]),
    ):
        net(x)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("block.1", r"no module 'block\.1'.*Did you mean .*blocks\.1"),
        ("blocks.1.norm2", r"no module 'blocks\.1\.norm2'.*Under 'blocks\.1' there are: norm1, mlp, act"),
        ("zzz", r"Under the network there are: stem, blocks, head"),
        ("blocks.1:out", "with ':in' for its input, got 'blocks.1:out'"),
    ],
)
def test_an_unknown_path_comes_with_suggestions(path, message):
    with pytest.raises(DistillError, match=message):
        Tap(Net(), [path])


def test_what_is_not_tapped_or_not_called_is_an_error(x):
    net = Net()
    with Tap(net, ["blocks.1"]) as seen:
        pass
    with pytest.raises(DistillError, match=r"'head' is not tapped; tapped are \['blocks.1'\]"):
        seen["head"]
    with pytest.raises(DistillError, match=r"Nothing was captured at 'blocks.1' of Net: the module was not called"):
        seen["blocks.1"]


def test_a_module_called_twice_has_no_single_activation(x):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x):
            return self.f(self.f(x))

    net = Twice()
    with Tap(net, ["f"]) as seen:
        out = net(x)
    with pytest.raises(DistillError, match=r"'f' of Twice was called 2 times.*use .all\('f'\)"):
        seen["f"]
    first, second = seen.all("f")
    assert torch.equal(first, net.f(x))
    assert torch.equal(second, out)
    tap = Tap(net, ["f"])
    with pytest.raises(Reached), tap.record(["f"], stop=True, calls={"f": 2}) as seen:
        net(x)
    assert len(seen.all("f")) == 2


def test_hooks_are_silent_outside_a_recording_and_gone_after_close(x):
    net = Net()
    tap = Tap(net, ["blocks.*"])
    tap.install("blocks.1")
    assert sum(len(m._forward_hooks) for m in net.modules()) == 3
    with tap.record(["blocks.0"]) as seen:
        net(x)
    net(x + 1)
    assert len(seen.all("blocks.0")) == 1
    with pytest.raises(DistillError, match="taps do not nest"), tap.record(["blocks.0"]), tap.record(["blocks.1"]):
        pass
    with tap.record(["blocks.0"]):  # an error inside leaves the tap usable
        pass
    tap.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# --- overwritten in place ---------------------------------------------------------------------------------------------


def test_an_in_place_activation_names_the_module_to_tap(x):
    net = nn.Sequential()
    net.add_module("body", InPlace())
    with Tap(net, ["body.conv"]) as seen:
        net(x)
    with pytest.raises(DistillError, match=r"modified in place.*tap 'body\.act' instead, or Tap\(\.\.\., clone=True\)"):
        seen["body.conv"]
    with Tap(net, ["body.act"]) as seen:
        out = net(x)
    assert torch.equal(seen["body.act"], out)


def test_in_place_arithmetic_is_seen_too(x):
    net = InPlace(residual=True)
    with Tap(net, ["conv"]) as seen:
        net(x)
    with pytest.raises(DistillError, match="tap the module that overwrites it instead"):
        seen["conv"]


def test_a_clone_keeps_the_activation_and_its_gradient(x):
    net = InPlace()
    with Tap(net, ["conv"], clone=True) as seen:
        net(x)
    assert torch.equal(seen["conv"], net.conv(x))
    seen["conv"].sum().backward()
    assert net.conv.weight.grad is not None


def test_inference_mode_can_be_read(x):
    net = Net()
    with torch.inference_mode(), Tap(net, ["blocks.1"]) as seen:
        net(x)
        assert seen["blocks.1"].shape == (5, 4)


# --- activation checkpointing -----------------------------------------------------------------------------------------


def test_reentrant_checkpointing_is_refused(x):
    net = Net(reentrant=True)
    with pytest.raises(DistillError, match=r"'blocks\.1' of Net has no gradient.*use_reentrant=False"):
        with Tap(net, ["blocks.1"]):
            net(x)
    with torch.no_grad(), Tap(net, ["blocks.1"]) as seen:  # evaluation needs no gradient
        net(x)
    assert seen["blocks.1"].shape == (5, 4)


@pytest.mark.parametrize("path", ["blocks.1.act", "blocks.1.act:in", "blocks.1.mlp:in"])
def test_reentrant_checkpointing_is_refused_for_inputs_and_activations(x, path):
    net = Net(reentrant=True)
    with pytest.raises(DistillError, match="has no gradient.*use_reentrant=False"), Tap(net, [path]):
        net(x)


def test_what_is_frozen_may_have_no_gradient(x):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)
            self.backbone.requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    net = Frozen()
    with Tap(net, ["backbone.0", "backbone.1", "backbone.1:in", "head:in"]) as seen:
        net(x)
    assert not any(seen[key].requires_grad for key in seen)
    net = Net()
    net.stem.requires_grad_(False)
    with Tap(net, ["stem", "stem:in"]) as seen:
        net(x)
    assert not seen["stem"].requires_grad


def test_checkpointing_without_reentry_is_exact(x):
    plain = Net()
    checkpointed = Net(reentrant=False)
    checkpointed.load_state_dict(plain.state_dict())
    gradients = []
    for net in (plain, checkpointed):
        with Tap(net, ["blocks.1", "blocks.0.mlp"]) as seen:
            out = net(x)
        # The recomputation of the backward calls the modules again; nothing more may be captured then.
        (out.sum() + seen["blocks.1"].pow(2).sum() + seen["blocks.0.mlp"].pow(3).sum()).backward()
        assert len(seen.all("blocks.1")) == 1
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chain():
    """A network without Python state, which would be a reason to compile it anew."""
    torch._dynamo.reset()
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tap_before_compile_works(x, chain, backend):
    tap = Tap(chain, ["1", "1:in"])
    compiled = torch.compile(chain, backend=backend)
    for _ in range(2):
        with tap.record(tap.paths) as seen:
            compiled(x)
        assert torch.allclose(seen["1"], chain[:2](x))
        assert torch.allclose(seen["1:in"], chain[0](x))
    seen["1"].sum().backward()
    assert chain[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["1", "1:in"])
def test_hooks_after_the_first_compiled_call_are_an_error(x, chain, path):
    compiled = torch.compile(chain, backend="eager")
    compiled(x)
    with Tap(chain, [path]) as seen:
        compiled(x)
    with pytest.raises(
        DistillError, match="compiled before it was tapped.*Tap a module that runs, before torch.compile"
    ):
        seen[path]


def test_early_stop_of_a_compiled_network(x, chain):
    network, reads = Network(chain), Reads(logits=False, features=("0",))
    network.install(reads)
    compiled = torch.compile(chain, backend="aot_eager")
    for _ in range(3):
        view = network.read(Batch.of(x), reads, forward=compiled)
        assert torch.allclose(view.features["0"], chain[0](x))
    view.features["0"].sum().backward()
    assert chain[0].weight.grad is not None
    assert chain[1].weight.grad is None


def test_a_compiled_network_gives_the_activation_before_it_is_overwritten(x):
    torch._dynamo.reset()
    net = InPlace()
    tap = Tap(net, ["conv"])
    compiled = torch.compile(net, backend="aot_eager")
    with tap.record(["conv"]) as seen:
        compiled(x)
    assert torch.allclose(seen["conv"], net.conv(x))
    assert (seen["conv"] < 0).any()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_recording_breaks_no_graph_and_compiles_once(x):
    torch._dynamo.reset()
    network = Network(Chain())
    network.install(Reads(features=("blocks.*",)))
    graphs = []

    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(network.module, backend=backend, fullgraph=True)
    phases = [Reads(), Reads(features=("blocks.0", "blocks.2"))]
    for reads in phases * 3:
        view = network.read(Batch.of(x), reads, forward=compiled)
        assert len(view.features) == len(reads.features)
    assert len(graphs) == 2  # one each phase, however many steps it has


def test_stages_of_growing_depth_do_not_compile_anew_in_every_step(x):
    torch._dynamo.reset()
    network = Network(Chain())
    network.install(Reads(features=("blocks.*",)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(network.module, backend=backend)
    stages = [*(Reads(False, features=(f"blocks.{i}",)) for i in range(4)), Reads(features=("blocks.*",)), Reads()]
    counts = []
    for _ in range(3):
        for reads in stages:
            view = network.read(Batch.of(x), reads, forward=compiled)
            expected = x
            for i, block in enumerate(network.module.blocks):
                expected = block(expected)
                if f"blocks.{i}" in view.features:
                    assert torch.allclose(view.features[f"blocks.{i}"], expected)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[0] == counts[1] == counts[2]


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_the_network_does_not_write_into_the_originals_tap(x, duplicate):
    net = Net()
    tap = Tap(net, ["blocks.1", "head:in"])
    ema = duplicate(net)
    with tap.record(tap.paths) as seen:
        net(x)
        ema(x + 1)
    assert torch.equal(seen["head:in"], net.blocks[2](seen["blocks.1"]))
    assert torch.allclose(ema(x), net(x))


# --- depth, replacement, cut ------------------------------------------------------------------------------------------


def test_no_module_above_the_last_needed_one_runs(x):
    net = Net()
    network = Network(net)
    view = network.read(Batch.of(x), Reads(logits=False, features=("blocks.0", "stem")))
    assert [block.calls for block in net.blocks] == [1, 0, 0]
    assert view.output is None
    with pytest.raises(DistillError, match="logits were not asked for"):
        _ = view.logits
    network.read(Batch.of(x), Reads(features=("blocks.0",)))
    assert [block.calls for block in net.blocks] == [2, 1, 1]


def test_the_stop_passes_except_exception(x):
    class Swallows(Net):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception:
                return "swallowed"

    net = Swallows()
    view = Network(net).read(Batch.of(x), Reads(logits=False, features=("blocks.0",)))
    assert view.output is None
    assert net.blocks[1].calls == 0


def test_a_replaced_output_is_what_follows_sees(x):
    net = Net()
    network = Network(net)
    other = torch.randn(5, 4, requires_grad=True)
    view = network.read(Batch.of(x), Reads(features=("blocks.1", "blocks.2:in")), replace={"blocks.1": other})
    assert view.features["blocks.1"] is other
    assert view.features["blocks.2:in"] is other
    assert torch.equal(view.logits, net.head(net.blocks[2](other)))
    (gradient,) = torch.autograd.grad(view.logits.sum(), other)
    assert gradient.abs().sum() > 0
    assert torch.equal(network.read(Batch.of(x), Reads()).logits, net(x))
    with pytest.raises(DistillError, match="Only a module's output can be replaced"):
        network.read(Batch.of(x), Reads(), replace={"blocks.1:in": other})


def test_the_rest_of_a_replaced_tuple_stays(x):
    class Pair(nn.Module):
        def forward(self, x):
            return x, "state"

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            y, state = self.pair(x)
            assert state == "state"
            return y

    view = Network(Outer()).read(Batch.of(x), Reads(), replace={"pair": x + 1})
    assert torch.equal(view.logits, x + 1)


def test_no_gradient_flows_back_through_a_cut(x):
    net = Net()
    tap = Tap(net, ["blocks.0", "blocks.1"])
    with tap.record(tap.paths, cut=["blocks.0"]) as seen:
        out = net(x)
    out.sum().backward()
    assert net.stem.weight.grad is None
    assert net.blocks[0].mlp.weight.grad is None
    assert net.blocks[1].mlp.weight.grad is not None
    assert torch.equal(out, net(x))
    assert seen["blocks.0"].requires_grad  # its own loss may still train what is below


def test_a_look_needs_no_random_stream_of_a_device(monkeypatch):
    """Torch has no module for XLA, which would give its stream."""
    network = nn.Dropout()
    monkeypatch.setattr(network, "parameters", lambda: iter([SimpleNamespace(device=torch.device("xla:0"))]))
    before = torch.get_rng_state()
    with untraced(network):
        torch.rand(1)
        assert not network.training
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
