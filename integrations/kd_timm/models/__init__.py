"""CIFAR and MNIST networks of the distillation literature, as timm models: ResNet, Wide ResNet, VGG and LeNet-5.

Importing this module registers them, so that `timm.create_model`, `timm.list_models` and `kd-timm-train --model` know
their names. Names follow the papers, with two rules:

* `cifar_resnet*` is the network of He et al. (widths 16/32/64, shortcut `"A"`); `resnet8`, `resnet8x4` and `resnet32x4`
  are those of the benchmark of Tian et al. (shortcut `"B"`).
* VGG-13 is `cifar_vgg13`, because `vgg13` is timm's own network for ImageNet.

The tag chooses the number of classes and the normalization: `wrn_16_2` is `wrn_16_2.cifar10`, and `wrn_16_2.cifar100`
has 100 classes. No weights come with them, but checkpoints of the papers' code load with `checkpoint_path=`: their
parameter names are translated.

Departures: convolutions start as He et al. (ICCV 2015) with fan-out, classifiers as torch's `Linear` does. ReLUs do not
work in place, so that what is read before a ReLU stays what it was.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from kd_timm.models.networks import CifarResNet, CifarVGG, LeNet5, WideResNet
from kd_timm.models.staged import StagedNet, checkpoint_filter_fn

__all__ = ["CifarResNet", "CifarVGG", "LeNet5", "StagedNet", "WideResNet", "checkpoint_filter_fn"]

_IMAGENET: dict[str, Any] = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
_CIFAR10: dict[str, Any] = dict(num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_CIFAR100: dict[str, Any] = dict(num_classes=100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
_MNIST: dict[str, Any] = dict(input_size=(1, 32, 32), min_input_size=(1, 32, 32), mean=(0.1307,), std=(0.3081,))


def _cfg(first_conv: str = "conv1", pool_size: tuple[int, int] = (8, 8), **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "pool_size": pool_size,
        "first_conv": first_conv,
        "classifier": "fc",
        **kwargs,
    }


_WIDE: dict[str, Any] = dict(widths=(32, 64, 128, 256), shortcut="B")
_WRNS = ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2))

# By name: the class, and the arguments that make the network.
_RESNETS: dict[str, tuple[type[StagedNet], dict[str, Any]]] = {
    "resnet8": (CifarResNet, dict(depth=8, shortcut="B")),
    "resnet8x4": (CifarResNet, dict(depth=8, **_WIDE)),
    "resnet32x4": (CifarResNet, dict(depth=32, **_WIDE)),
    **{f"wrn_{depth}_{factor}": (WideResNet, dict(depth=depth, widen_factor=factor)) for depth, factor in _WRNS},
}
_HE_RESNETS: dict[str, tuple[type[StagedNet], dict[str, Any]]] = {
    f"cifar_resnet{depth}": (CifarResNet, dict(depth=depth)) for depth in (8, 20, 32, 44, 56, 110)
}
_VGGS: dict[str, tuple[type[StagedNet], dict[str, Any]]] = {
    "vgg8": (CifarVGG, dict(layers=1)),
    "cifar_vgg13": (CifarVGG, dict(layers=2)),
}
_LENETS: dict[str, tuple[type[StagedNet], dict[str, Any]]] = {
    "lenet5": (LeNet5, {}),
    "lenet5_half": (LeNet5, dict(widths=(3, 8, 60, 42))),
}
_VGG: dict[str, Any] = dict(first_conv="block0.0", pool_size=(4, 4))

default_cfgs = generate_default_cfgs(
    {
        # The public CIFAR-10 weights of these take images normalized as ImageNet's.
        **{f"{name}.cifar10": _cfg(**(_CIFAR10 | _IMAGENET)) for name in _HE_RESNETS},
        **{f"{name}.cifar10": _cfg(**_CIFAR10) for name in _RESNETS},
        **{f"{name}.cifar100": _cfg(**_CIFAR100) for name in (*_HE_RESNETS, *_RESNETS)},
        **{f"{name}.cifar10": _cfg(**_CIFAR10, **_VGG) for name in _VGGS},
        **{f"{name}.cifar100": _cfg(**_CIFAR100, **_VGG) for name in _VGGS},
        **{f"{name}.mnist": _cfg(**_MNIST, num_classes=10, pool_size=(1, 1)) for name in _LENETS},
    }
)


def _register(name: str, cls: type[StagedNet], arguments: dict[str, Any]) -> None:
    """Makes the function that timm's registry calls for a name."""

    def create(pretrained: bool = False, **kwargs: Any) -> StagedNet:
        stages = 3 if cls is LeNet5 else 5 if cls is CifarVGG else 4
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=tuple(range(stages)), feature_cls="getter"),
            **(arguments | kwargs),
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{cls.__name__} with {arguments or 'its defaults'}."
    globals()[name] = register_model(create)


for _name, (_cls, _arguments) in (_HE_RESNETS | _RESNETS | _VGGS | _LENETS).items():
    _register(_name, _cls, _arguments)
