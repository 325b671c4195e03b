"""Stages and blocks of a convolutional network, found by structure in one forward, and their groups of equal size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.reading.nets import Net, Nets
from kd_plugins.reading.tap import first_tensor
from kd_plugins.reading.view import Batch, Reads

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Block(NamedTuple):
    """A module that gives a map `[B, C, H, W]`: its path, C, and (H, W)."""

    path: str
    channels: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.path} ({self.channels} x {self.size[0]} x {self.size[1]})"


class Trunk(NamedTuple):
    """What a network's map passes through, in the order of the forward.

    Attributes:
        stages: The stages that the network's adapter names, or else its outermost lists of modules.
        blocks: The blocks that the stages consist of.
        all: Both.
    """

    stages: list[Block]
    blocks: list[Block]
    all: list[Block]


class LayerGroup(NamedTuple):
    """Layers of one spatial size.

    Attributes:
        student: Path of the student's last layer in the group.
        teacher: Paths of the teacher's layers.
        left_out: Teacher's layers of the same size with other channels than the last.
    """

    student: str
    teacher: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def find_trunk(net: Net, batch: Batch) -> Trunk:
    """Finds stages and blocks by one forward.

    A map has the proportions of the input. The blocks of a stage are the modules of its outermost list whose last
    output is the stage's own: a residual block adds something to what its inner lists give, and so stays whole. Without
    such a list they are its children, where these are of one class and give maps of one shape. A list in a list is
    taken apart as well. A named stage without blocks, such as a stem, counts as one block where no stage has any; an
    entry of an outermost list always does.

    Left out is what runs more than once in a forward, or is overwritten in place before the forward ends.

    Args:
        net: The network.
        batch: What to ask it with.

    Raises:
        DistillError: The network gives no maps.
    """
    seen = _probe(net, batch)
    root = net.module
    try:
        paths, named = net.network.stages(), True
    except DistillError:
        paths, named = list(_outermost(root, "", seen)), False
    stages = list(dict.fromkeys(_source(root, path, paths, seen) for path in paths if path in seen))
    if not stages or net.network.channels_last:
        kind = type(root).__name__
        if named:
            raise DistillError(f"The method does not fit {kind}: its modules give no maps [B, C, H, W] to pair.")
        raise DistillError(f"{kind} has no stages that give maps [B, C, H, W]: name layers by their module paths.")
    inner = {path: _blocks(root, path, seen) for path in stages}
    whole = not named or not any(inner.values())
    blocks = [path for stage, found in inner.items() for path in found or ([stage] if whole else [])]

    def described(paths: list[str]) -> list[Block]:
        return [_described(path, x) for path, x in seen.items() if path in paths]

    return Trunk(described(stages), described(blocks), described([*stages, *blocks]))


def find_groups(
    student: Net,
    teacher: Net,
    batch: Batch,
    layers: Sequence[int | str] | None = None,
    teacher_layers: Sequence[int | str] | None = None,
) -> list[LayerGroup]:
    """Pairs layers of a student with groups of a teacher's layers: in their order where both are named, else by size.

    Args:
        student: The student.
        teacher: The teacher.
        batch: What to ask them with.
        layers: Student layers, stage numbers or module paths; by default the last layer of each size.
        teacher_layers: Layers of each group, a stage number for the stage's blocks, or globs joined by `+`; by default
            all blocks.

    Raises:
        DistillError: No layers are of one size, a named one has no group, or the numbers of layers and groups differ.
    """
    ours = None if layers is None else [_path(student, layer) for layer in layers]
    theirs = None if teacher_layers is None else [_paths(teacher, layer, batch) for layer in teacher_layers]
    if ours is not None and theirs is not None:
        if len(ours) != len(theirs):
            raise DistillError(f"Expected one group of teacher layers for each of {ours}, got {len(theirs)}: {theirs}.")
        return [LayerGroup(*pair) for pair in zip(ours, theirs, strict=True)]
    last = find_trunk(student, batch).all if ours is None else _shapes(student, batch, ours)
    if theirs is None:
        blocks = find_trunk(teacher, batch).blocks
    else:
        blocks = _shapes(teacher, batch, [path for group in theirs for path in group])
    groups = []
    for size, block in {block.size: block for block in last}.items():
        same = [b for b in blocks if b.size == size]
        kept = tuple(b.path for b in same if b.channels == same[-1].channels)
        if kept:
            groups.append(LayerGroup(block.path, kept, tuple(str(b) for b in same if b.path not in kept)))
    if not groups:
        raise DistillError(
            "The student and the teacher have no maps of one spatial size: the student's are"
            f" {', '.join(map(str, last))}; the teacher's {', '.join(map(str, blocks))}. Name the layers of both, one"
            " group of the teacher's for each of the student's."
        )
    named: Sequence[Any] = ours or theirs or ()
    sizes = {block.path: block.size for block in (last if ours else blocks)}
    # A glob may stand for layers of several sizes, each of which has a group.
    wanted = [{sizes[path] for path in ([one] if isinstance(one, str) else one)} for one in named]
    if named and sum(map(len, wanted)) != len(groups):
        raise DistillError(
            f"Expected a group for each of the layers {named}, got {[[g.student, *g.teacher] for g in groups]}, since"
            " layers of one network are paired with the other's by their size: name one of each size that both have,"
            " or the layers of both in order."
        )
    return groups


def check_maps(method: str, group: LayerGroup, nets: Nets, student: Tensor, teacher: Sequence[Tensor]) -> None:
    """Refuses a group whose layers give no maps, or the teacher's no maps of equal channels, which cannot be summed.

    Args:
        method: Who sums them.
        group: The group.
        nets: The networks.
        student: The student's activation.
        teacher: The teacher's.
    """
    nets.student.network.check_map(method, group.student, student)
    for path, x in zip(group.teacher, teacher, strict=True):
        nets.teacher.network.check_map(method, path, x)
    channels = [x.shape[1] for x in teacher]
    if len(set(channels)) > 1:
        raise DistillError(
            f"The teacher's layers {list(group.teacher)} have {channels} channels and cannot be summed: name layers of"
            " equal channels as one group."
        )


def _source(root: nn.Module, path: str, stages: Sequence[str], seen: Mapping[str, Tensor]) -> str:
    """The neighbour of other stages that made a map which the module at a path only passes on, as an identity does."""
    if next(root.get_submodule(path).children(), None) is not None:
        return path
    lists = {stage.rpartition(".")[0] for stage in stages} - {""}
    same = [other for other, x in seen.items() if x is seen[path] and other.rpartition(".")[0] in lists]
    return same[-1] if same else path


def _path(net: Net, layer: int | str) -> str:
    return net.network.stage(layer) if isinstance(layer, int) else layer


def _paths(net: Net, layer: int | str, batch: Batch) -> tuple[str, ...]:
    """The layers of one group: the blocks of a stage, or what globs stand for."""
    if isinstance(layer, str):
        return tuple(path for glob in layer.split("+") for path in net.network.tap.expand(glob))
    stage = net.network.stage(layer)
    return tuple(b.path for b in find_trunk(net, batch).blocks if f"{b.path}.".startswith(stage + ".")) or (stage,)


def _shapes(net: Net, batch: Batch, paths: Sequence[str]) -> list[Block]:
    features = net(batch, reads=Reads(False, tuple(paths))).features
    return [_described(path, features[path]) for path in paths]


def _described(path: str, x: Tensor) -> Block:
    if x.dim() != 4:
        raise DistillError(f"Expected a map [B, C, H, W] at {path!r}, got {list(x.shape)}: name another layer.")
    return Block(path, x.shape[1], (x.shape[2], x.shape[3]))


def _probe(net: Net, batch: Batch) -> dict[str, Tensor]:
    """The maps that the modules of a network give, in the order in which the modules end."""
    calls: dict[str, list[tuple[Tensor, int]]] = {}
    images: list[Tensor] = []

    def ended(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = first_tensor(output)
            if x is not None and x.dim() == 4:
                calls.setdefault(path, []).append((x, x._version))

        return hook

    def began(module: nn.Module, args: Any, kwargs: Any) -> None:
        images.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4)

    # That of the hooks: a host may load a network no sooner than it is read.
    root = net.network.tap.root
    handles = [m.register_forward_hook(ended(path)) for path, m in root.named_modules() if path]
    handles.append(root.register_forward_pre_hook(began, with_kwargs=True))
    try:
        with torch.no_grad():
            # Cached logits would stand for the forward.
            net(dataclasses.replace(batch, teacher_logits=None), reads=Reads())
    finally:
        for handle in handles:
            handle.remove()
    once = {path: found[0] for path, found in calls.items() if len(found) == 1}
    return {path: x for path, (x, n) in once.items() if x._version == n and all(_in_proportion(x, i) for i in images)}


def _in_proportion(x: Tensor, image: Tensor) -> bool:
    """Whether a map is as wide for its height as the image, up to a pixel of the map: `[B, H, W, C]` is not."""
    (h, w), (height, width) = x.shape[2:], image.shape[2:]
    return abs(h * width - w * height) <= max(height, width)


def _outermost(module: nn.Module, path: str, seen: Mapping[str, Tensor]) -> Iterator[str]:
    """Lists of modules that give a map and are in no other one; of lists that give none, the entries that do."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if at in seen and (isinstance(child, _LISTS) or isinstance(module, _LISTS)):
            yield at
        else:
            yield from _outermost(child, at, seen)


def _blocks(root: nn.Module, stage: str, seen: Mapping[str, Tensor]) -> list[str]:
    """The blocks of a stage; none where it is not made of blocks."""
    module = root.get_submodule(stage)
    # The outer ones first.
    lists = sorted((p for p, m in module.named_modules() if isinstance(m, _LISTS)), key=lambda path: path.count("."))
    for path in lists:
        at = ".".join(filter(None, (stage, path)))
        children = [f"{at}.{name}" for name, _ in root.get_submodule(at).named_children()]
        children = [child for child in children if child in seen]
        if children and seen[children[-1]] is seen[stage]:
            return [block for child in children for block in _taken_apart(root, child, seen)]
    own = [f"{stage}.{name}" for name, _ in module.named_children() if f"{stage}.{name}" in seen]
    kinds = {(type(root.get_submodule(path)), seen[path].shape) for path in own}
    if len(kinds) == 1 and seen[own[-1]] is seen[stage] and any(True for _ in root.get_submodule(own[-1]).parameters()):
        return own
    return []


def _taken_apart(root: nn.Module, path: str, seen: Mapping[str, Tensor]) -> list[str]:
    """A block, or the blocks in it where it is itself a list."""
    if not isinstance(root.get_submodule(path), _LISTS):
        return [path]
    return _blocks(root, path, seen) or [path]
