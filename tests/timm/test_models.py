"""The networks of the distillation literature: sizes, shapes, timm's interface, and weights of other code."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import kd_timm  # noqa: F401  (registers them)
from kd_plugins.errors import DistillError

# Parameters with 100 classes. Those of shortcut B, WRN and VGG were counted in the RepDistiller code, to the unit.
COUNTS_100 = {
    "resnet8": 83_892,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_4": 2_772_020,
    "wrn_28_2": 1_479_220,
    "wrn_28_4": 5_872_180,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
}
# With 10 classes: He et al., table 6, rounded as there; LeNet-5 with every map of a convolution connected.
COUNTS_10 = {
    "cifar_resnet20": 0.27e6,
    "cifar_resnet32": 0.46e6,
    "cifar_resnet44": 0.66e6,
    "cifar_resnet56": 0.85e6,
    "cifar_resnet110": 1.7e6,
    "lenet5": 61_706,
    "lenet5_half": 15_738,
}
NAMES = ["cifar_resnet8", *COUNTS_10, *COUNTS_100]
FAMILIES = ["cifar_resnet20", "resnet8x4", "wrn_16_2", "vgg8", "lenet5_half"]
EVERY = pytest.mark.parametrize("name", NAMES)
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def network(name: str, **options) -> nn.Module:
    """A network whose norms are not the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def images(model: nn.Module) -> Tensor:
    return torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_name_is_listed():
    assert set(timm.list_models(module="models")) == set(NAMES)


@pytest.mark.parametrize(("name", "count"), COUNTS_100.items())
def test_parameters_with_100_classes(name: str, count: int):
    with torch.device("meta"):
        model = timm.create_model(f"{name}.cifar100")
    assert parameters(model) == count


@pytest.mark.parametrize(("name", "count"), COUNTS_10.items())
def test_parameters_with_10_classes(name: str, count: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert parameters(model) == pytest.approx(count, rel=0.02 if count > 1e5 else 0)


def test_shortcut_b_adds_two_convolutions_and_norms():
    padded, convolved = (parameters(timm.create_model("cifar_resnet20", shortcut=s)) for s in "AB")
    assert convolved - padded == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def test_shortcut_a_pads_zeros_on_both_sides():
    block = timm.create_model("cifar_resnet20").layer2[0]
    x = torch.randn(1, 16, 4, 4)
    out = block.downsample(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@EVERY
@torch.no_grad()
def test_stages_head_and_forward_agree(name: str):
    model = network(name)
    x = images(model)
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda m, args, out, key=info["module"]: seen.__setitem__(key, out)
        )
        for info in model.feature_info
    ]
    logits = model(x)
    hooked = dict(seen)
    for handle in handles:
        handle.remove()
    final, maps = model.forward_intermediates(x)

    assert logits.shape == (2, 10)
    assert torch.equal(model.forward_head(final), logits)
    assert torch.equal(final, model.forward_features(x))
    assert final.shape[1:] == (model.num_features, *model.pretrained_cfg["pool_size"])
    assert model.forward_head(final, pre_logits=True).shape == (2, model.head_hidden_size)
    assert len(maps) == len(model.feature_info)
    for info, value in zip(model.feature_info, maps, strict=True):
        assert torch.equal(value, hooked[info["module"]])
        assert value.shape[1] == info["num_chs"]
        if not name.startswith("lenet"):
            assert value.shape[-2:] == (32 // info["reduction"],) * 2
    if name.startswith("lenet"):
        assert [value.shape[-1] for value in maps] == [28, 10, 1]


@EVERY
def test_configuration_names_what_is_there(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == cfg["input_size"][0]
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    config = resolve_model_data_config(model)
    assert config["input_size"] == cfg["input_size"]
    assert config["crop_pct"] == 1.0


@EACH_FAMILY
@torch.no_grad()
def test_intermediates_follow_timm(name: str):
    model = network(name)
    x = images(model)
    stages = len(model.feature_info)
    final, maps = model.forward_intermediates(x)

    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [m.shape for m in last_two] == [m.shape for m in maps[-2:]]
    assert all(torch.equal(a, b) for a, b in zip(last_two, maps[-2:], strict=True))
    chosen = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert torch.equal(chosen[0], maps[0])
    assert torch.equal(chosen[1], maps[-1])

    runs = []
    handle = model.get_submodule(model.feature_info[-1]["module"]).register_forward_hook(lambda *_: runs.append(1))
    stopped, [first] = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert not runs
    assert torch.equal(stopped, first)
    handle.remove()

    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], final)
    assert torch.equal(normed[0], maps[0])
    assert torch.equal(final, maps[-1]) == (not name.startswith("wrn"))

    with pytest.raises(DistillError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[stages])


@EACH_FAMILY
@torch.no_grad()
def test_features_only(name: str):
    whole, x = network(name), images(network(name))
    assert len(network(name, features_only=True)(x)) == len(whole.feature_info)
    getter = timm.create_model(name, features_only=True, out_indices=(0, 1)).eval()
    assert parameters(getter) < parameters(whole)
    getter.model.load_state_dict(whole.state_dict(), strict=False)
    maps = whole.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(getter(x), maps, strict=True))
    assert getter.feature_info.channels() == [m.shape[1] for m in maps]


@EACH_FAMILY
@torch.no_grad()
def test_reset_classifier(name: str):
    model = network(name)
    x = images(model)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(DistillError, match="pooling"):
        model.reset_classifier(7)
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)
    assert network(name, num_classes=0)(x).shape == (2, model.head_hidden_size)


@EACH_FAMILY
@torch.no_grad()
def test_other_channels_and_sizes(name: str):
    channels = 3 if name.startswith("lenet") else 1
    model = network(name, in_chans=channels, num_classes=4)
    assert model(torch.randn(2, channels, 40, 40)).shape == (2, 4)


def test_dropout_acts_before_the_classifier():
    model = network("cifar_resnet8", drop_rate=0.5)
    features = torch.ones(2, 64, 8, 8)
    assert torch.equal(model.forward_head(features, pre_logits=True), torch.ones(2, 64))
    dropped = model.train().forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@EACH_FAMILY
def test_checkpoint_round_trip(name: str, tmp_path: Path):
    model = network(name)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    loaded = timm.create_model(name, checkpoint_path=str(tmp_path / "model.pth")).eval()
    x = images(model)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# How the parameters are called in the code of the papers: our name on the left, theirs on the right.
FOREIGN = {
    "cifar_resnet20": [("fc.", "linear.")],
    "resnet8": [],
    "cifar_resnet20 B": [("fc.", "linear."), (".downsample.", ".shortcut.")],
    "wrn_16_2": [
        ("norm.0.", "bn1."),
        (".shortcut.", ".convShortcut."),
        *((f"block{i}.", f"block{i}.layer.") for i in "123"),
    ],
    "vgg8": [("fc.", "classifier.")],
    "lenet5": [("fc.", "fc2."), ("neck.0.", "fc1.")],
}


def foreign(key: str, renames: list[tuple[str, str]]) -> str:
    for here, there in renames:
        if key.startswith(here) or (here.startswith(".") and here in key):
            key = key.replace(here, there, 1)
    return key


@pytest.mark.parametrize(("name", "renames"), FOREIGN.items())
def test_names_of_other_code_load(name: str, renames: list[tuple[str, str]], tmp_path: Path):
    name, _, shortcut = name.partition(" ")
    options = {"shortcut": shortcut} if shortcut else {}
    model = network(name, **options)
    state = {"module." + foreign(key, renames): value for key, value in model.state_dict().items()}
    path = str(tmp_path / "theirs.th")
    torch.save({"state_dict": state, "best_prec1": 1.0}, path)
    x = images(model)
    assert torch.equal(timm.create_model(name, checkpoint_path=path, **options).eval()(x), model(x))

    # As pretrained weights timm takes the classifier off where the classes differ, and adapts the first convolution.
    overlay = dict(file=path)
    tuned = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **options)
    assert torch.equal(tuned.eval().forward_features(x), model.forward_features(x))
    grey = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=2, **options)
    assert torch.equal(grey.get_classifier().weight, model.get_classifier().weight)

    # Inside a wrapper names have a prefix.
    outer = nn.ModuleDict({"student": timm.create_model(name, **options), "other": nn.Linear(1, 1)})
    inner = {"student." + foreign(key, renames): value for key, value in model.state_dict().items()}
    given = inner | {"other." + key: value for key, value in outer["other"].state_dict().items()}
    outer.load_state_dict(given)
    assert torch.equal(outer["student"].eval()(x), model(x))
    assert "student." + foreign("fc.weight", renames) in given


def test_wrong_checkpoints_are_refused():
    model = timm.create_model("resnet8")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"linear2.weight": torch.zeros(1)})
    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("resnet8", pretrained=True)


@EACH_FAMILY
def test_gradient_checkpointing(name: str):
    model = network(name)
    x = images(model)
    if name.startswith("lenet"):
        with pytest.raises(DistillError, match="no blocks"):
            model.set_grad_checkpointing()
        model.set_grad_checkpointing(False)
        return
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    runs = []
    model.get_submodule(model.feature_info[1]["module"])[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model(x).square().sum().backward()
    assert len(runs) == 2
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet20", {"shortcut": "C"}, "shortcut 'A' or 'B'"),
        ("cifar_resnet20", {"depth": 21}, "6n\\+2, got 21"),
        ("wrn_16_2", {"depth": 4}, "6n\\+4, got 4"),
        ("vgg8", {"global_pool": ""}, "pooling"),
    ],
)
def test_wrong_arguments(name: str, options: dict, message: str):
    with pytest.raises(DistillError, match=message):
        timm.create_model(name, **options)


def test_published_weights_reach_their_accuracy():
    """All of CIFAR-10's test images through the published ResNet-20: 91.73 % (91.72 to 91.74 allowed, one image)."""
    if "KD_DATA" not in os.environ:
        pytest.skip("Set KD_DATA to a folder with cifar10/test.parquet and weights/cifar10_resnet20-12fca82f.th.")
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    data = Path(os.environ["KD_DATA"])
    table = parquet.read_table(data / "cifar10" / "test.parquet")
    pixels = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in table["img"].to_pylist()]
    labels = torch.tensor(table["label"].to_pylist())
    weights = data / "weights" / "cifar10_resnet20-12fca82f.th"
    model = timm.create_model("cifar_resnet20", checkpoint_path=str(weights)).eval()
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(labels), 500):
            x = torch.from_numpy(np.stack(pixels[start : start + 500])).permute(0, 3, 1, 2).float() / 255
            right += (model((x - mean) / std).argmax(1) == labels[start : start + 500]).sum().item()
    assert len(labels) == 10_000
    assert right == pytest.approx(9173, abs=1)
