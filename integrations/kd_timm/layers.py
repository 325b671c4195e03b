"""`--list-layers`: what can be read of a timm model, and which methods fit it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch

from kd_plugins import Batch, DistillError, Reads, create_distiller, list_distillers
from kd_plugins.binding import connect, set_up
from kd_timm.build import create_student
from kd_timm.network import TimmNetwork, image_batch


def list_layers(args: argparse.Namespace) -> str:
    """Describes the model that `--list-layers` names, made with the other arguments of the model.

    Args:
        args: Parsed arguments.

    Returns:
        Stages by number with the shapes of their maps, module paths, and the methods: whether each can be set up with
        its default options on this model as student and as teacher, or what it says against it.
    """
    args.model = args.list_layers
    model, config = create_student(args, "--list-layers")
    network = TimmNetwork(model.eval())
    inputs = torch.randn(2, *config["input_size"], generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, dtype=torch.long)
    batch = image_batch(config, inputs, labels, index=torch.arange(2), rows=2, classes=args.num_classes)
    size = "x".join(map(str, config["input_size"]))
    lines = [f"{args.model}, images {size}, {args.num_classes} classes", "", "stages"]
    try:
        names = network.stages()
        with torch.no_grad():
            view = network.read(batch, Reads(logits=False, features=tuple(range(len(names)))))
        lines += [f"  {i}  {name}  {list(view.features[i].shape[1:])}" for i, name in enumerate(names)]
    except DistillError as error:
        lines.append(f"  {error}")
    lines += ["", "module paths (deeper ones go on with further dots)"]
    named = model.named_modules()
    lines += [f"  {path}  {type(module).__name__}" for path, module in named if path and path.count(".") < 2]
    lines += ["", "methods, with their default options and a teacher of the same architecture"]

    def fresh() -> TimmNetwork:
        return TimmNetwork(create_student(args, "--list-layers")[0])

    return "\n".join([*lines, *(f"  {name}  {_fit(name, fresh, batch)}" for name in list_distillers())])


def _fit(name: str, fresh: Callable[[], TimmNetwork], batch: Batch) -> str:
    """`fits`, or what the method says against networks such as `fresh` makes."""
    distiller = create_distiller(name)
    if "classification" not in distiller.tasks:
        return f"is for {', '.join(distiller.tasks)}"

    teachers = [fresh() for _ in range(distiller.teachers if isinstance(distiller.teachers, int) else 1)]
    peers = [fresh()] if distiller.peers and not teachers else []
    data = batch if distiller.data else dataclasses.replace(batch, inputs=None, labels=None)
    try:
        set_up(distiller, connect(distiller, fresh(), teachers, peers), data)
    except DistillError as error:
        return str(error)
    return "fits"
