"""Teachers: built with their own weights, called with their own normalisation and size, checked against the student."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict, parse_model_name
from torch import Tensor, nn

from kd_plugins import Distiller, DistillError, Nets
from kd_plugins.binding import connect, needs_of_stages
from kd_plugins.errors import told
from kd_plugins.reading.network import Network
from kd_plugins.states import read_json
from kd_timm.build import check_model_name, check_normalisation, data_config
from kd_timm.network import TimmNetwork

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as images are read in grey


class InputTransform:
    """Turns the student's normalised images into a teacher's: other mean and std, other size, grey or colour.

    A teacher of colours gets a grey image in each channel; a teacher of grey images the luminance of colours.

    Args:
        student: The student's data configuration (`mean`, `std`, `input_size`).
        teacher: The teacher's.
        fixed_size: Whether the teacher takes images of its own size alone.
    """

    def __init__(self, student: Mapping[str, Any], teacher: Mapping[str, Any], fixed_size: bool) -> None:
        mean, std, own_mean, own_std = (
            torch.tensor(config[key], dtype=torch.float64) for config in (student, teacher) for key in ("mean", "std")
        )
        self.grey = (len(mean), len(own_mean)) == (3, 1)
        share = torch.tensor(_LUMA if self.grey else 1.0, dtype=torch.float64)
        black = (share * mean).sum(0, keepdim=True) if self.grey else mean
        self.scale = (share * std / own_std).float().view(1, -1, 1, 1)
        self.shift = ((black - own_mean) / own_std).float().view(1, -1, 1, 1)
        self.same = torch.equal(mean, own_mean) and torch.equal(std, own_std)
        self.size = tuple(teacher["input_size"][1:]) if fixed_size else None

    def __call__(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` in the teacher's terms, with its number of channels."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", align_corners=False, antialias=True)
        if self.same:
            return images
        scaled = images * self.scale.to(images)
        return (scaled.sum(1, keepdim=True) if self.grey else scaled) + self.shift.to(images)


@dataclass
class Teacher:
    """A teacher and what it takes to ask it.

    Attributes:
        name: The model's name.
        network: The network, with its weights.
        transform: Makes its images of the student's.
        order: Its class numbers in the student's order, where they differ.
        misfit: Why its classes are not the student's, where they are not.
    """

    name: str
    network: Network
    transform: InputTransform | None = None
    order: list[int] | None = None
    misfit: str = ""

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self.network.module


def connected(
    distiller: Distiller, student: Network, teachers: Sequence[Teacher], peers: Sequence[Network] = ()
) -> Nets:
    """The networks as a method sees them, with what each teacher takes."""
    transforms, orders = [t.transform for t in teachers], [t.order for t in teachers]
    return connect(distiller, student, [t.network for t in teachers], peers, transforms=transforms, orders=orders)


def check_classifies(distiller: Distiller, who: str) -> None:
    """Refuses a method that does not fit classification, where `who` trains classifiers alone."""
    if "classification" not in distiller.tasks:
        raise DistillError(
            f"{distiller.name} fits {', '.join(distiller.tasks)}, and {who} trains classifiers: choose a method that"
            " fits (kd-plugins list)."
        )


def check_classes(distiller: Distiller, teachers: Sequence[Teacher]) -> None:
    """Refuses a teacher of other classes, where a method that is set up reads its scores in any stage."""
    stages = needs_of_stages(distiller)
    for number, teacher in enumerate(teachers):
        if teacher.misfit and any(needs.of_teacher(number).logits for needs in stages):
            raise DistillError(teacher.misfit)


def named_teachers(args: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """The teachers that the flags name: the model, the file of its weights, its arguments."""
    given = zip_longest(args.teacher, args.teacher_checkpoint, args.teacher_kwargs)
    return [(name, checkpoint or "", kwargs or {}) for name, checkpoint, kwargs in given]


def create_teacher(
    name: str,
    checkpoint: str,
    kwargs: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    num_classes: int,
    classes: Sequence[str] | None,
) -> Teacher:
    """Builds a teacher and checks that it fits the student; `check_classes` says whether its classes must, too.

    Its normalisation, size and class names are those of `config.json` beside the checkpoint, which kd-timm-train and
    timm write, else those of timm's configuration of the model. A teacher of fixed size gets images of its size, any
    other one the student's.

    Args:
        name: A model name of timm.
        checkpoint: Its weights; empty for the published ones.
        kwargs: Further arguments of the model.
        config: The student's data configuration.
        num_classes: The student's number of classes.
        classes: The student's class names, where they are known.

    Raises:
        DistillError: There are no weights, or they do not fill the whole model.
    """
    check_model_name(name, "--teacher", weights=not checkpoint)
    saved: dict[str, Any] = {}
    module: Any
    if checkpoint:
        module, saved = _from_checkpoint(name, checkpoint, kwargs, num_classes)
    else:
        module = published(name, kwargs)
    named = {"label_names": saved["label_names"]} if saved.get("label_names") else {}
    cfg = {**module.pretrained_cfg, **saved.get("pretrained_cfg", {}), **named}
    module.requires_grad_(False).eval()
    return as_teacher(name, module, cfg, config=config, num_classes=num_classes, classes=classes)


def as_teacher(
    name: str,
    module: nn.Module,
    cfg: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    num_classes: int | None,
    classes: Sequence[str] | None,
) -> Teacher:
    """A network as the teacher of a student: how its images are made, and whether it has the student's classes.

    Args:
        name: What to call it.
        module: The network, with its weights.
        cfg: Its pretrained configuration; one without gets the student's images as they are.
        config: The student's data configuration.
        num_classes: The student's number of classes, where it is known.
        classes: The student's class names, where they are known.

    Raises:
        DistillError: Its images are not to be had from the student's.
    """
    teacher, theirs = Teacher(name, TimmNetwork(module)), getattr(module, "num_classes", None)
    if cfg:
        own = data_config(module, cfg=cfg)
        check_normalisation(own, f"The teacher {name}")
        channels = own["input_size"][0], config["input_size"][0]
        if channels[0] != channels[1] and {*channels} != {1, 3}:
            raise DistillError(
                f"The teacher {name} takes {channels[0]} image channels and the student {channels[1]}: give both the"
                " same, --in-chans for the student or --teacher-kwargs in_chans=... for the teacher."
            )
        teacher.transform = InputTransform(config, own, bool(cfg.get("fixed_input_size")))
    if None in (theirs, num_classes) or theirs == num_classes:
        teacher.order, teacher.misfit = _order(name, cfg.get("label_names"), classes)
    else:
        has = f"tells {theirs} classes apart" if theirs else "has no classifier"
        same = f"give the student as many (--num-classes {theirs}), " if theirs else ""
        teacher.misfit = (
            f"The teacher {name} {has} and the student tells {num_classes} classes apart: {same}take a teacher that was"
            " trained on the student's classes, or a method that reads its features alone."
        )
    return teacher


def published(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model with its published weights."""
    source, model = parse_model_name(name)
    cfg = timm.get_pretrained_cfg(model) if source is None else None
    if source is None and (cfg is None or not (cfg.has_weights)):
        raise DistillError(f"The teacher {name} has no published weights: give its own, --teacher-checkpoint PATH.")
    wanted = kwargs.get("num_classes")
    if wanted and cfg is not None and wanted != cfg.num_classes:
        raise DistillError(
            f"The published weights of the teacher {name} have {cfg.num_classes} classes, so with num_classes={wanted}"
            " its head would be random: train it first, and give --teacher-checkpoint PATH."
        )
    remedy = "give them as a file, --teacher-checkpoint PATH."
    # Whatever the hub, the network or the file system raises, the remedy is the same.
    with told(f"The published weights of the teacher {name} cannot be had", Exception, remedy=remedy):
        return timm.create_model(name, pretrained=True, **kwargs)


def _from_checkpoint(
    name: str, checkpoint: str, kwargs: Mapping[str, Any], num_classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with the weights of a file, and what the file's own `.json`, or `config.json` beside it, says."""
    if not os.path.isfile(checkpoint):
        raise DistillError(f"--teacher-checkpoint {checkpoint} is no file: name the teacher's weights.")
    own = Path(checkpoint).with_suffix(".json")
    beside = own if own.is_file() else own.with_name("config.json")
    saved = read_json(beside) if beside.is_file() else {}
    if not isinstance(saved, dict):
        raise DistillError(f"Expected what a model is, by name, in {beside}, got {type(saved).__name__}: remove it.")
    architecture = parse_model_name(name)[1].split(".")[0]
    if saved and saved.get("architecture") != architecture:
        raise DistillError(
            f"--teacher-checkpoint {checkpoint} holds a {saved.get('architecture')} by the {beside.name} beside it, not"
            f" a {name}: name the right --teacher."
        )
    remedy = "give a checkpoint of that model, and what it was built with as --teacher-kwargs."
    # Weights of a file cannot hold code, since torch.load runs with weights_only=True, but be anything else.
    with told(f"--teacher-checkpoint {checkpoint} does not fill the teacher {name}", Exception, remedy=remedy):
        state = load_state_dict(checkpoint, use_ema=True)
        arguments = {"num_classes": _classes_in(architecture, state) or num_classes}
        arguments |= {**saved.get("model_args", {}), **kwargs}
        model = timm.create_model(name, **arguments)
        model.load_state_dict(state, strict=True)
    return model, saved


def _classes_in(architecture: str, state: Mapping[str, Any]) -> int | None:
    """Number of classes that the classifier in a state dict has."""
    cfg = timm.get_pretrained_cfg(architecture)
    head = getattr(cfg, "classifier", None)
    head = head[0] if isinstance(head, (tuple, list)) else head
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in state:
            return len(state[key])
    return None


def _order(name: str, theirs: Any, ours: Sequence[str] | None) -> tuple[list[int] | None, str]:
    """A teacher's class numbers in the student's order, None where nothing else is known; and why they do not fit."""
    if isinstance(theirs, Mapping):
        theirs = [theirs[key] for key in sorted(theirs, key=int)]
    if not theirs or ours is None or list(map(str, theirs)) == list(ours):
        return None, ""
    place = {str(label): i for i, label in enumerate(theirs)}
    missing = [label for label in ours if label not in place]
    if missing:
        return None, (
            f"The teacher {name} does not know the student's classes {', '.join(missing[:4])}; it has"
            f" {', '.join(list(place)[:4])}, ...: take a teacher that was trained on the student's classes."
        )
    # Outputs beyond the names of the data keep the classes that are left.
    return [place[label] for label in ours] + [i for label, i in place.items() if label not in ours], ""
