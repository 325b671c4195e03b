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


_HE_RESNETS = [f"cifar_resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)]
_RESNETS = ["resnet8", "resnet8x4", "resnet32x4"]
_WRNS = [f"wrn_{shape}" for shape in ("16_1", "16_2", "16_4", "28_2", "28_4", "40_1", "40_2")]
_VGG: dict[str, Any] = dict(first_conv="block0.0", pool_size=(4, 4))

default_cfgs = generate_default_cfgs(
    {
        # The public CIFAR-10 weights of these take images normalized as ImageNet's.
        **{f"{name}.cifar10": _cfg(**(_CIFAR10 | _IMAGENET)) for name in _HE_RESNETS},
        **{f"{name}.cifar10": _cfg(**_CIFAR10) for name in _RESNETS + _WRNS},
        **{f"{name}.cifar100": _cfg(**_CIFAR100) for name in _HE_RESNETS + _RESNETS + _WRNS},
        **{f"{name}.cifar10": _cfg(**_CIFAR10, **_VGG) for name in ("vgg8", "cifar_vgg13")},
        **{f"{name}.cifar100": _cfg(**_CIFAR100, **_VGG) for name in ("vgg8", "cifar_vgg13")},
        **{f"{name}.mnist": _cfg(**_MNIST, num_classes=10, pool_size=(1, 1)) for name in ("lenet5", "lenet5_half")},
    }
)


def _create(
    variant: str, cls: type[StagedNet], pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    stages = 3 if cls is LeNet5 else 5 if cls is CifarVGG else 4
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(stages)), feature_cls="getter"),
        **(model_args | kwargs),
    )


def _resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> CifarResNet:
    return _create(variant, CifarResNet, pretrained, model_args, kwargs)


def _wrn(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> WideResNet:
    return _create(variant, WideResNet, pretrained, model_args, kwargs)


_WIDE: dict[str, Any] = dict(widths=(32, 64, 128, 256), shortcut="B")


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with widths 16/32/64 and zero-padded shortcuts."""
    return _resnet("cifar_resnet8", pretrained, kwargs, depth=8)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 of He et al. for CIFAR."""
    return _resnet("cifar_resnet20", pretrained, kwargs, depth=20)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 of He et al. for CIFAR."""
    return _resnet("cifar_resnet32", pretrained, kwargs, depth=32)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 of He et al. for CIFAR."""
    return _resnet("cifar_resnet44", pretrained, kwargs, depth=44)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 of He et al. for CIFAR."""
    return _resnet("cifar_resnet56", pretrained, kwargs, depth=56)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 of He et al. for CIFAR."""
    return _resnet("cifar_resnet110", pretrained, kwargs, depth=110)


@register_model
def resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 of Tian et al., with 1x1 convolutions as shortcuts."""
    return _resnet("resnet8", pretrained, kwargs, depth=8, shortcut="B")


@register_model
def resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 of Tian et al. with four times the channels and a stem of 32."""
    return _resnet("resnet8x4", pretrained, kwargs, depth=8, **_WIDE)


@register_model
def resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 of Tian et al. with four times the channels and a stem of 32."""
    return _resnet("resnet32x4", pretrained, kwargs, depth=32, **_WIDE)


@register_model
def wrn_16_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 16 and width factor 1."""
    return _wrn("wrn_16_1", pretrained, kwargs, depth=16, widen_factor=1)


@register_model
def wrn_16_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 16 and width factor 2."""
    return _wrn("wrn_16_2", pretrained, kwargs, depth=16, widen_factor=2)


@register_model
def wrn_16_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 16 and width factor 4."""
    return _wrn("wrn_16_4", pretrained, kwargs, depth=16, widen_factor=4)


@register_model
def wrn_28_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 28 and width factor 2."""
    return _wrn("wrn_28_2", pretrained, kwargs, depth=28, widen_factor=2)


@register_model
def wrn_28_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 28 and width factor 4."""
    return _wrn("wrn_28_4", pretrained, kwargs, depth=28, widen_factor=4)


@register_model
def wrn_40_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 40 and width factor 1."""
    return _wrn("wrn_40_1", pretrained, kwargs, depth=40, widen_factor=1)


@register_model
def wrn_40_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Wide ResNet of depth 40 and width factor 2."""
    return _wrn("wrn_40_2", pretrained, kwargs, depth=40, widen_factor=2)


@register_model
def vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-8 for CIFAR: one convolution a block."""
    return _create("vgg8", CifarVGG, pretrained, dict(layers=1), kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-13 for CIFAR: two convolutions a block."""
    return _create("cifar_vgg13", CifarVGG, pretrained, dict(layers=2), kwargs)


@register_model
def lenet5(pretrained: bool = False, **kwargs: Any) -> LeNet5:
    """LeNet-5, for grey images of 32 x 32."""
    return _create("lenet5", LeNet5, pretrained, {}, kwargs)


@register_model
def lenet5_half(pretrained: bool = False, **kwargs: Any) -> LeNet5:
    """LeNet-5 of half the width, for grey images of 32 x 32."""
    return _create("lenet5_half", LeNet5, pretrained, dict(widths=(3, 8, 60, 42)), kwargs)
