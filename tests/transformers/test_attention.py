"""Captured attention equals eager attention, in every kind of network, mask, mode of training and compilation."""

from __future__ import annotations

import copy
import json
import pickle
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.attention import AttentionCall
from kd_plugins.reading.tap import Reached
from kd_transformers.attention import AttentionTaps

N, HEADS, LENGTH = 3, 4, 9
COMMON = {"num_hidden_layers": N, "num_attention_heads": HEADS, "hidden_size": 32, "intermediate_size": 48}
TEXT = {**COMMON, "vocab_size": 60, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}

# name: (configuration, the argument that is the dropout of attention, attention as the module computes it)
CONFIGS: dict[str, tuple[Any, str]] = {
    "bert": (lambda **k: transformers.BertConfig(**TEXT, **NO_DROPOUT, **k), "attention_probs_dropout_prob"),
    "roberta": (lambda **k: transformers.RobertaConfig(**TEXT, **NO_DROPOUT, **k), "attention_probs_dropout_prob"),
    "distilbert": (
        lambda **k: transformers.DistilBertConfig(
            dim=32, n_layers=N, n_heads=HEADS, hidden_dim=48, vocab_size=60, dropout=0.0, num_labels=3, **k
        ),
        "attention_dropout",
    ),
    "electra": (
        lambda **k: transformers.ElectraConfig(**TEXT, **NO_DROPOUT, embedding_size=16, **k),
        "attention_probs_dropout_prob",
    ),
    "albert": (
        lambda **k: transformers.AlbertConfig(**TEXT, **NO_DROPOUT, embedding_size=16, **k),
        "attention_probs_dropout_prob",
    ),
    "mpnet": (lambda **k: transformers.MPNetConfig(**TEXT, **NO_DROPOUT, **k), "attention_probs_dropout_prob"),
    "deberta-v2": (
        lambda **k: transformers.DebertaV2Config(**TEXT, **NO_DROPOUT, **DISENTANGLED, **k),
        "attention_probs_dropout_prob",
    ),
    "modernbert": (
        lambda **k: transformers.ModernBertConfig(
            **TEXT, cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2, **k
        ),
        "attention_dropout",
    ),
    "gpt2": (
        lambda **k: transformers.GPT2Config(**TEXT, resid_pdrop=0.0, embd_pdrop=0.0, **k),
        "attn_pdrop",
    ),
    "vit": (
        lambda **k: transformers.ViTConfig(**COMMON, **NO_DROPOUT, image_size=16, patch_size=8, num_labels=3, **k),
        "attention_probs_dropout_prob",
    ),
}
ARCHS = list(CONFIGS)
OWN_DROPOUT = ("mpnet", "deberta-v2")
MODES = ["share", "record"]
BOTH = pytest.mark.parametrize("mode", MODES)
EVERY = pytest.mark.parametrize("arch", ARCHS)


@lru_cache
def weights(arch: str) -> dict[str, Tensor]:
    """Weights with attention far from uniform."""
    torch.manual_seed(0)
    state = network_of(config_of(arch)).state_dict()
    return {k: v * 8 if v.dim() == 2 and "embeddings." not in k else v for k, v in state.items()}


def config_of(arch: str, dropout: float = 0.0) -> Any:
    make, name = CONFIGS[arch]
    return make(**{name: dropout})


def network_of(config: Any, implementation: str | None = None) -> Any:
    cls = transformers.AutoModelForSequenceClassification
    if config.model_type == "vit":
        cls = transformers.AutoModelForImageClassification
    return cls.from_config(config, **({"attn_implementation": implementation} if implementation else {}))


def network(arch: str, implementation: str | None = None, dropout: float = 0.0) -> Any:
    model = network_of(config_of(arch, dropout), implementation).eval()
    model.load_state_dict(weights(arch))
    return model


def inputs(arch: str, padded: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    if arch == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    ids = torch.randint(3, 60, (2, LENGTH), generator=draw)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tapped(arch: str, **kwargs: Any) -> tuple[Any, AttentionTaps, dict[str, Tensor]]:
    model, given = network(arch, **kwargs), inputs(arch)
    taps = AttentionTaps(model)
    assert taps.probe(**given) == N
    return model, taps, given


@EVERY
def test_probe_finds_every_layer_and_leaves_the_network_alone(arch: str) -> None:
    model, given = network(arch), inputs(arch)
    model.train()
    next(iter(model.children())).eval()
    flags, rng = [m.training for m in model.modules()], torch.get_rng_state()
    configs = [getattr(m, "config", None) for m in model.modules()]
    taps = AttentionTaps(model)
    assert taps.layers == []
    assert taps.probe(**given) == taps.probe(**given) == N
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(getattr(m, "config", None) is c for m, c in zip(model.modules(), configs, strict=True))
    assert [layer.heads for layer in taps.layers] == [HEADS] * N
    assert {layer.mode for layer in taps.layers} == {"share"}
    shared = arch == "albert"
    assert [layer.call for layer in taps.layers] == ([0, 1, 2] if shared else [0, 0, 0])
    assert len({layer.attention for layer in taps.layers}) == (1 if shared else N)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert hooks == (N if arch in OWN_DROPOUT else 0)


@EVERY
@BOTH
@pytest.mark.parametrize("padded", [True, False])
def test_equals_eager(arch: str, mode: str, padded: bool) -> None:
    model, taps, _ = tapped(arch)
    given = inputs(arch, padded)
    with torch.no_grad():
        eager = network(arch, "eager")(**given, output_attentions=True)
        plain = model(**given).logits
        with taps.capture([1, 2, 3], mode=mode) as seen:
            assert seen == {}
            logits = model(**given).logits
    assert sorted(seen) == [1, 2, 3]
    assert len(eager.attentions) == N
    torch.testing.assert_close(logits, plain, atol=2e-5, rtol=1e-5)
    if mode == "record":
        assert torch.equal(logits, plain)
    real = given.get("attention_mask", torch.ones(2, eager.attentions[0].shape[-1])).bool()
    for number, expected in enumerate(eager.attentions, 1):
        scores, probs = seen[number]
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
        assert (probs is None) == (mode == "record" and arch not in OWN_DROPOUT)
        ours = scores.softmax(-1)
        if probs is not None:
            torch.testing.assert_close(probs, ours, atol=1e-6, rtol=0)
        # Padded queries are compared where they attend to something: a window may leave them nothing.
        torch.testing.assert_close(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=2e-6, rtol=0)
        padding = (real[:, None, :, None] & ~real[:, None, None, :]).expand_as(scores)
        assert (scores[padding] < -80).all()
        assert expected.max() > 1.5 / expected.shape[-1], "attention is too uniform to test anything"
    if arch == "gpt2":
        assert (seen[1].scores.triu(1)[seen[1].scores.triu(1) != 0] < -80).all()


@EVERY
def test_hidden_state_is_the_output_of_the_layer(arch: str) -> None:
    model, taps, given = tapped(arch)
    outputs: dict[str, list[Tensor]] = {}
    entered: list[Tensor] = []
    handles = []
    for path in {layer.layer for layer in taps.layers}:
        module = model.get_submodule(path)

        def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            outputs.setdefault(path, []).append(output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(keep))
        handles.append(module.register_forward_pre_hook(lambda module, args: entered.append(args[0])))
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True).hidden_states
    assert len(expected) == N + 1
    assert torch.equal(entered[0], expected[0])
    ours = [outputs[layer.layer][layer.layer_call] for layer in taps.layers]
    for layer in range(N - 1):
        assert torch.equal(ours[layer], expected[layer + 1])
    # GPT-2 and ModernBERT give their last hidden state after the final norm.
    last = {"gpt2": "transformer.ln_f", "modernbert": "model.final_norm"}.get(arch)
    final = model.get_submodule(last)(ours[-1]) if last else ours[-1]
    assert torch.equal(final, expected[N])


@EVERY
@BOTH
def test_attention_of_a_training_step_is_before_dropout(arch: str, mode: str) -> None:
    model, taps, given = tapped(arch, dropout=0.5)
    with taps.capture([1]) as still:
        model(**given)
    model.train()
    torch.manual_seed(3)
    plain = model(**given).logits
    torch.manual_seed(3)
    with taps.capture([1, 3], mode=mode) as seen:
        logits = model(**given).logits
    probs = seen[1].scores.softmax(-1)
    torch.testing.assert_close(probs, still[1].scores.softmax(-1), atol=1e-6, rtol=0)
    assert seen[3].scores.requires_grad
    if mode == "record" or arch in OWN_DROPOUT:
        assert torch.equal(logits, plain)
    else:
        with taps.capture([1, 3]):
            assert not torch.allclose(logits, model(**given).logits), "dropout does not act in a shared layer"
        with taps.capture([1, 2, 3]) as seen:
            model(**given)
        torch.testing.assert_close(seen[2].probs.sum(-1), torch.ones(seen[2].probs.shape[:-1]))


def kl(scores: dict[int, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Distance of attention to some fixed other attention, over real queries."""
    draw = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for layer in sorted(scores):
        log_p = scores[layer].log_softmax(-1)
        target = (scores[layer].detach() + torch.randn(log_p.shape, generator=draw)).log_softmax(-1)
        rows = (target.exp() * (target - log_p)).sum(-1)
        total = total + (rows * given.get("attention_mask", torch.ones(2, rows.shape[-1]))[:, None]).sum() / 9
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@EVERY
@BOTH
def test_gradients_equal_eager(arch: str, mode: str) -> None:
    model, taps, given = tapped(arch)
    eager = network(arch, "eager")
    model.train(), eager.train()
    maps = eager(**given, output_attentions=True).attentions
    kl({i: maps[i - 1].clamp_min(1e-38).log() for i in (1, 3)}, given).backward()
    expected = gradients(eager)
    with taps.capture([1, 3], mode=mode) as seen:
        model(**given)
    loss = kl({i: a.scores for i, a in seen.items()}, given)
    loss.backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-4
    for name, grad in expected.items():
        torch.testing.assert_close(
            got[name] / scale, grad / scale, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def checkpoint(model, **kwargs):
    """Checkpoints activations, under the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


@pytest.mark.parametrize("arch", ["bert", "deberta-v2", "gpt2", "vit"])
def test_checkpointing(arch: str) -> None:
    model, taps, given = tapped(arch)
    model.train()
    with taps.capture([2], mode="record") as seen:
        model(**given)
    kl({2: seen[2].scores}, given).backward()
    expected = gradients(model)
    checkpoint(model, use_reentrant=False)
    with taps.capture([2], mode="share") as seen:
        model(**given)
    kl({2: seen[2].scores}, given).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-5)

    checkpoint(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(DistillError, match="use_reentrant=False"), taps.capture([2]):
        model(**given)
    with torch.no_grad(), taps.capture([2]) as seen:
        model(**given)
    assert not seen[2].scores.requires_grad
    for p in model.parameters():
        p.requires_grad_(False)
    with taps.capture([2]) as seen:
        model(**given)
    assert not seen[2].scores.requires_grad, "a frozen layer has no gradient, and that is no error"


@pytest.mark.parametrize("arch", ["bert", "albert", "deberta-v2"])
def test_compiled(arch: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, taps, given = tapped(arch)
    for mode in MODES:
        with taps.capture([1, 3], mode=mode) as seen:
            model(**given)
        kl({i: a.scores for i, a in seen.items()}, given).backward()
        expected, maps = gradients(model), {i: a.scores for i, a in seen.items()}
        counters.clear()
        # What a graph is made of does not hang on the backend; one kind goes through autograd's tracing too.
        compiled = torch.compile(model, backend="aot_eager" if arch == "bert" else "eager")
        for _ in range(3):
            with taps.capture([1, 3], mode=mode) as seen:
                compiled(**given)
            graphs = counters["stats"]["unique_graphs"]
        assert graphs <= 1
        assert not counters["graph_break"]
        kl({i: a.scores for i, a in seen.items()}, given).backward()
        got = gradients(model)
        for layer, scores in maps.items():
            torch.testing.assert_close(seen[layer].scores, scores, atol=1e-5, rtol=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-4)
    with pytest.raises(DistillError, match="did not run"), taps.capture([1]):
        pass


def test_nothing_reaches_the_config(tmp_path: Any) -> None:
    model, taps, given = tapped("bert")
    for mode in MODES:
        with taps.capture([1, 2, 3], mode=mode):
            model(**given)
            model.save_pretrained(tmp_path)
            assert model.config._attn_implementation == "sdpa"
    assert "kd_plugins" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert all("kd_plugins_tap" not in vars(m.config) for m in model.modules() if hasattr(m, "config"))
    with pytest.raises(RuntimeError, match="from inside"), taps.capture([1]):
        raise RuntimeError("from inside")
    assert all("kd_plugins_tap" not in vars(m.config) for m in model.modules() if hasattr(m, "config"))


def register(name: str, function: Any, masks_like: str = "sdpa") -> str:
    transformers.AttentionInterface.register(name, function)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[masks_like]
    transformers.AttentionMaskInterface.register(name, masks)
    return name


def sdpa(*args: Any, **kwargs: Any) -> Any:
    return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def test_the_users_attention_is_kept() -> None:
    called: list[int] = []

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(module.layer_idx)
        return sdpa(module, *args, **kwargs)

    model, taps, given = tapped("gpt2", implementation=register("test_spy", spy))
    for mode, expected in {"record": [0, 1, 2], "share": [0, 2]}.items():
        called.clear()
        with taps.capture([2], mode=mode):
            model(**given)
        assert called == expected


def test_falls_back_to_recording_and_refuses_other_functions() -> None:
    def rounded(*args: Any, **kwargs: Any) -> Any:
        return (sdpa(*args, **kwargs)[0].bfloat16().float(), None)

    def cosine(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return sdpa(module, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, mask, **kwargs)

    model, taps, given = tapped("bert", implementation=register("test_rounded", rounded))
    assert {layer.mode for layer in taps.layers} == {"record"}
    plain = model(**given).logits
    with taps.capture([1, 2]) as seen:
        assert torch.equal(model(**given).logits, plain)
    assert seen[1].probs is None

    model, taps, given = tapped("bert", implementation=register("test_cosine", cosine))
    with pytest.raises(DistillError, match="no plain softmax"), taps.capture([1]):
        model(**given)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_two_dimensions_and_windows(causal: bool) -> None:
    """What flash attention is called with: padding as `[B, L]`, causality and windows as flags."""

    def flash_like(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sliding_window: int | None = None, **kw: Any
    ) -> Any:
        assert mask.dim() == 2
        allowed = mask.bool()[:, None, None, :] & mask.bool()[:, None, :, None]
        far = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        if causal:
            allowed = allowed & (far >= 0)
        if sliding_window:
            allowed = allowed & (far.abs() < sliding_window)
        return sdpa(module, q, k, v, allowed, is_causal=False, scaling=kw["scaling"])

    def padding(*args: Any, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        return attention_mask

    arch = "gpt2" if causal else "modernbert"
    name = f"test_flash_{causal}"
    transformers.AttentionInterface.register(name, flash_like)
    transformers.AttentionMaskInterface.register(name, padding)
    model, given = network(arch), inputs(arch)
    with torch.no_grad():
        expected = network(arch, "eager")(**given, output_attentions=True).attentions
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = name
    taps = AttentionTaps(model)
    taps.probe(**given)
    with torch.no_grad(), taps.capture([1, 2, 3]) as seen:
        model(**given)
    real = given["attention_mask"].bool()
    for number in (1, 2, 3):
        ours = seen[number].scores.softmax(-1).transpose(1, 2)[real]
        torch.testing.assert_close(ours, expected[number - 1].transpose(1, 2)[real], atol=2e-6, rtol=0)


@BOTH
def test_scores_are_float32_under_autocast(mode: str) -> None:
    model, taps, given = tapped("bert")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**given).logits
        with taps.capture([1], mode=mode) as seen:
            logits = model(**given).logits
    torch.testing.assert_close(logits, plain, atol=2e-2, rtol=2e-2)
    scores = seen[1].scores
    assert scores.dtype == torch.float32
    assert (scores.bfloat16().float() != scores)[scores > -100].float().mean() > 0.5


def test_eager_choice_still_returns_its_maps() -> None:
    model, taps, given = tapped("bert", implementation="eager")
    with taps.capture([2]) as seen:
        out = model(**given, output_attentions=True)
    assert len(out.attentions) == N
    assert torch.equal(out.attentions[1], seen[2].probs)


@pytest.mark.parametrize("arch", ["mpnet", "bert"])
def test_copies_of_the_network_are_not_captured(arch: str) -> None:
    model, taps, given = tapped(arch)
    twin = copy.deepcopy(model)
    revived = pickle.loads(pickle.dumps(model))
    with taps.capture([1]) as seen:
        twin(**{**given, "input_ids": given["input_ids"].flip(1)})
        model(**given)
    with taps.capture([1]) as alone:
        model(**given)
    assert torch.equal(seen[1].scores, alone[1].scores)
    revived(**given)


@BOTH
def test_a_forward_that_is_stopped_early_gives_what_it_reached(mode: str) -> None:
    def stop(*_: Any) -> None:
        raise Reached

    model, taps, given = tapped("bert")
    with taps.capture([2]) as full:
        model(**given)
    model.get_submodule(taps.layers[1].layer).register_forward_hook(stop)
    with pytest.raises(Reached), taps.capture([2], mode=mode) as seen:
        model(**given)
    torch.testing.assert_close(seen[2].scores, full[2].scores)
    with pytest.raises(DistillError, match="layer 3 .*did not run"), taps.capture([3], mode=mode):
        model(**given)


def test_layer_without_attention() -> None:
    class Skip(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            return hidden, None

    model = network("bert")
    model.bert.encoder.layer[1].attention.self = Skip()
    with pytest.raises(DistillError, match=r"all 3 layers .* got 2, none in bert\.encoder\.layer\.1"):
        AttentionTaps(model).probe(**inputs("bert"))


def test_networks_without_attention_are_refused() -> None:
    config = transformers.FNetConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(DistillError, match=r"FNetModel.*none was found.*hidden states or logits"):
        AttentionTaps(transformers.FNetModel(config)).probe(input_ids=inputs("bert")["input_ids"])


def test_misuse() -> None:
    model, given = network("bert"), inputs("bert")
    taps = AttentionTaps(model)
    with pytest.raises(DistillError, match="probe"), taps.capture([1]):
        pass
    taps.probe(**given)
    for wrong in (0, 4, -1):
        with pytest.raises(DistillError, match="layers 1 to 3"), taps.capture([wrong]):
            pass
    with pytest.raises(DistillError, match="'share' or 'record'"), taps.capture([1], mode="both"):  # type: ignore[arg-type]
        pass
    with pytest.raises(DistillError, match="did not run"), taps.capture([1]):
        pass
    other = AttentionTaps(model)
    other.probe(**given)
    with taps.capture([1]) as seen:
        for inner in (taps, other):
            with pytest.raises(DistillError, match="do not nest"), inner.capture([1]):
                pass
        model(**given)
    assert sorted(seen) == [1]
    with taps.capture([]) as seen:
        model(**given)
    assert seen == {}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "dead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attend_equals_fused_attention(mask: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=draw, dtype=dtype)
    k, v = (torch.randn(2, 2, 6, 8, generator=draw, dtype=dtype) for _ in range(2))
    given: Tensor | None = torch.rand(2, 1, 6, 6, generator=draw) > 0.3
    given[..., 0] = True
    if mask == "dead":
        given[1, :, 4:] = False
    if mask == "float":
        given = torch.randn(2, 1, 6, 6, generator=draw, dtype=dtype).masked_fill(~given, float("-inf"))
    elif mask in ("none", "causal"):
        given = None
    call = AttentionCall(q, k, 0.3, given, causal=mask == "causal")
    output, attention = call.attend(v)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=given, scale=0.3, is_causal=mask == "causal", enable_gqa=True
    )
    torch.testing.assert_close(output, expected)
    assert attention.scores.dtype == dtype
    assert attention.scores.isfinite().all()


def test_bias_and_softcap() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 4, generator=draw) for _ in range(2))
    bias = torch.randn(1, 2, 5, 5, generator=draw)
    plain = AttentionCall(q, k).scores()
    torch.testing.assert_close(AttentionCall(q, k, bias=bias).scores(), plain + bias)
    torch.testing.assert_close(AttentionCall(q, k, softcap=2.0).scores(), 2.0 * (plain / 2.0).tanh())
