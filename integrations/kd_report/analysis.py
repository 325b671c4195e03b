"""What a student has in common with its teacher: predictions, calibration, layer similarity, features and attention.

Reads a few evaluation batches and leaves no trace: evaluation mode, no gradient, no random number, no hook remains.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Net, Nets, Reads
from kd_plugins import functional as KF
from kd_plugins.reading.network import adapt
from kd_report.measures import Predictions, Similarity, common_maps, project_channels, rows_of

__all__ = ["Analysis", "analyse", "as_nets"]

Decode = Callable[[list[int]], Sequence[str]]
Maps = dict[str, Tensor]

_CHUNK, _LAYERS, _SHOWN_LAYERS = 64, 12, 4
_MAP, _IMAGE, _TOKENS = 32, 96, 40


@dataclass
class Analysis:
    """What `analyse` found.

    Attributes:
        summary: Numbers and names, ready for JSON.
        arrays: Tensors by name: `cka` `[Ls, Lt]`, `images` `[n, 3, H, W]`, `student/map/0` `[n, h, w]`,
            `student/attention` `[layers, n, L, L]` or `[layers, n, h, w]`, `student/confusion` `[K, K]` (true class,
            predicted class), `student/reliability` `[bins, 3]` (examples, confidence, accuracy), `student/channels`
            `[n, C, 2]` (points, see `project_channels`).
    """

    summary: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


def as_nets(student: nn.Module | Nets) -> Nets:
    """The networks of a training without a distiller: the student alone."""
    return student if isinstance(student, Nets) else Nets(Net(adapt(student), Reads))


def analyse(
    nets: Nets | nn.Module,
    batches: Iterable[Batch],
    *,
    examples: int = 1000,
    shown: int = 4,
    seconds: float = 20.0,
    decode: Decode | None = None,
) -> Analysis:
    """Compares the student with its teacher (or with the first of its peers) on evaluation batches.

    Of all networks that were trained together it tells accuracy, agreement with the student, and the similarity of
    their last layers, each with each (`peers/similarity` `[P, P]`, the student first).

    Layer similarity is linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML
    2019, arXiv 1905.00414) with the unbiased estimator summed over minibatches (Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327).

    **Departures**: maps are averaged to at most 4 x 4, token sequences over their real tokens, before they are
    compared.

    Args:
        nets: The networks, unwrapped; a bare student where there is no distiller.
        batches: Evaluation batches in a fixed order; made lazily they are drawn outside the training's random state.
        examples: Examples to look at.
        shown: Examples whose maps and attention are kept.
        seconds: No batch is begun after this time; at least one is read.
        decode: Turns a sentence's token ids into the tokens' texts.
    """
    nets = as_nets(nets)
    began, found, count = time.monotonic(), Analysis(), 0
    with _untouched(nets):
        device = next((p.device for p in nets.student.module.parameters()), torch.device("cpu"))
        stream = _chunks(batches, examples, device)
        first = chunk = next(stream, None)
        if first is None:
            raise DistillError("The analysis got no evaluation batches: give at least one.")
        readers = {name: _Reader(net, first) for name, net in _compared(nets).items()}
        ensemble = [_fresh(t) for t in nets.teachers[1:]]
        predictions, similarity = Predictions(list(readers)), Similarity([len(r.places) for r in readers.values()])
        pick = _pick(first, shown)
        while chunk is not None:
            read = {name: reader(chunk) for name, reader in readers.items()}
            logits, seen = ({name: one[part] for name, one in read.items()} for part in (0, 1))
            if chunk is first:
                _keep_maps(found, readers, seen, first, pick)
            if ensemble:
                others = [logits["teacher"], *(t(chunk, reads=Reads()).logits for t in ensemble)]
                logits["teacher"] = torch.stack([o.float().softmax(-1) for o in others]).mean(0).log()
            predictions.add({name: rows_of(value, chunk) for name, value in logits.items()})
            similarity.add([_vectors(seen[n][place.name], chunk) for n, r in readers.items() for place in r.places])
            count += chunk.size
            chunk = next(stream, None) if time.monotonic() - began < seconds else None
        for name in dict.fromkeys(("student", list(readers)[-1])):
            _keep_attention(found, name, readers[name], first, pick)
        _keep_examples(found, _part(first, pick), decode)
    if similarity.sum is not None:
        names, trained = list(readers), _trained(nets)
        found.arrays["cka"] = similarity.between(0, len(names) - 1)
        if len(trained) > 1 and all(readers[name].places for name in trained):
            pairs = [[similarity.between(names.index(a), names.index(b))[-1, -1] for b in trained] for a in trained]
            found.arrays["peers/similarity"] = torch.tensor(pairs)
    found.summary["predictions"], arrays = predictions.result()
    found.arrays |= arrays
    found.summary |= {"peers": _trained(nets)[1:], "examples": count, "compared": list(readers)[-1]}
    found.summary |= {"teachers": len(nets.teachers), "seconds": round(time.monotonic() - began, 3)}
    return found


def _trained(nets: Nets) -> list[str]:
    """Names of the networks that were trained together; the first peer is what a student without teacher meets."""
    first = "peer1" if nets.teachers else "peer"
    return ["student", first, *(f"peer{i}" for i in range(2, len(nets.peers)))][: len(nets.peers)]


def _compared(nets: Nets) -> dict[str, Net]:
    """All networks that are looked at; the last is what the student is compared with, its teacher or its first peer."""
    named = dict(zip(_trained(nets), nets.peers, strict=True))
    if nets.teachers:
        named["teacher"] = nets.teachers[0]
    elif len(nets.peers) > 1:
        named["peer"] = named.pop("peer")
    return named


# Reading without a trace


@contextmanager
def _untouched(nets: Nets) -> Iterator[None]:
    """Evaluation mode and no gradient; modes, hooks and every random state are as before afterwards."""
    import numpy

    modules = list({id(m): m for net in nets for m in net.module.modules()}.values())
    modes = [m.training for m in modules]
    hooks = [(d, set(d)) for m in modules for n, d in vars(m).items() if n.startswith("_forward_")]
    devices = sorted({p.device.index or 0 for net in nets for p in net.module.parameters() if p.device.type == "cuda"})
    states = random.getstate(), numpy.random.get_state()
    try:
        for net in nets:
            net.module.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for installed, before in hooks:
            for added in set(installed) - before:
                del installed[added]


def _fresh(net: Net) -> Net:
    """The same network, read through taps of its own that go with it."""
    return Net(adapt(net.module), Reads, frozen=net.frozen, transform=net.transform, order=net.order)


def _chunks(batches: Iterable[Batch], examples: int, device: torch.device) -> Iterator[Batch]:
    """Parts of batches, small enough that every layer's activations fit into memory."""
    left = examples
    for batch in batches:
        if left <= 0:
            return
        if not batch.size:
            raise DistillError("The analysis needs batches of examples, got one whose size is unknown.")
        batch = batch.to(device)
        for rows in torch.arange(min(batch.size, left), device=device).split(_CHUNK):
            left -= len(rows)
            yield _part(batch, rows)


def _part(batch: Batch, rows: Tensor) -> Batch:
    """Some examples of a batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        sized = isinstance(value, Tensor) and value.dim() and len(value) == batch.size
        return value[rows.to(value.device)] if sized else value

    names = ("inputs", "labels", "kwargs", "teacher_kwargs", "mask", "index")
    return dataclasses.replace(batch, size=len(rows), **{name: cut(getattr(batch, name)) for name in names})


class Place(NamedTuple):
    """Where an activation is read: a module, and which of its calls in one forward."""

    name: str
    path: str
    call: int = 0


class _Reader:
    """Reads one network: its logits, and the activations of layers that are chosen by its structure."""

    def __init__(self, net: Net, batch: Batch) -> None:
        self.net, self.attention = _fresh(net), 0
        two = _part(batch, torch.arange(min(batch.size, 2)))
        if self.net.network.attention is not None:
            try:
                self.attention = self.net.layers(two)
            except DistillError:
                self.attention = 0
        self.places = _spread(self._candidates(), _LAYERS)
        _, seen = self(two)
        self.places = [place for place in self.places if place.name in seen]

    def __call__(self, batch: Batch) -> tuple[Tensor, Maps]:
        """Logits, and activations by the place's name; places that did not run are left out."""
        calls: dict[str, list[Tensor]] = {place.path: [] for place in self.places}
        modules = {path: self.net.module.get_submodule(path) for path in calls}
        handles = [m.register_forward_hook(lambda *a, kept=calls[p]: _append(kept, a[-1])) for p, m in modules.items()]
        try:
            logits = self.net(batch, reads=Reads()).logits
        finally:
            for handle in handles:
                handle.remove()
        found = {p.name: calls[p.path][p.call] for p in self.places if len(calls[p.path]) > p.call}
        return logits, {name: x for name, x in found.items() if x.dim() > 1 and len(x) == batch.size}

    def _candidates(self) -> list[Place]:
        if self.attention and self.net.network.attention is not None:
            layers = enumerate(self.net.network.attention.layers, 1)
            listed = [Place(f"layer {i}", x.layer, x.layer_call) for i, x in layers if x.layer is not None]
            if listed:
                return listed
        try:
            paths = _blocks(self.net.module, self.net.network.stages())
        except (DistillError, AttributeError):
            paths = _leaves(self.net.module)
        prefix = _common(paths)
        return [Place(path.removeprefix(prefix), path) for path in paths]


def _append(kept: list[Tensor], found: Any) -> None:
    """Keeps a copy: a module that follows may work in place."""
    while isinstance(found, (tuple, list, Mapping)) and found:
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    if isinstance(found, Tensor) and found.is_floating_point():
        kept.append(found.clone())


def _blocks(root: nn.Module, stages: Sequence[str]) -> list[str]:
    """The blocks of each stage where a stage is a plain sequence of them, else the stage."""
    paths: list[str] = []
    for stage in stages:
        module = root.get_submodule(stage)
        inner = module if isinstance(module, nn.Sequential) else getattr(module, "blocks", None)
        prefix = stage if inner is module else f"{stage}.blocks"
        whole = isinstance(inner, nn.Sequential) and all(next(m.children(), None) is not None for m in inner)
        paths += [f"{prefix}.{name}" for name, _ in inner.named_children()] if whole and inner is not None else [stage]
    return paths


def _leaves(module: nn.Module, path: str = "", alone: bool = True) -> list[str]:
    """Modules with weights, in the order of the network; containers, and what wraps a single module, are opened."""
    inner = dict(module.named_children())
    if inner and (alone or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))):
        alone = alone and len(inner) == 1
        return [leaf for n, m in inner.items() for leaf in _leaves(m, f"{path}.{n}" if path else n, alone)]
    return [path] if next(module.parameters(), None) is not None else []


def _common(paths: Sequence[str]) -> str:
    """The dotted prefix that all paths share."""
    shared = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared) + "." if shared and len(paths) > 1 else ""


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the last one among them.

    >>> _spread(range(10), 4)
    [0, 3, 6, 9]
    """
    return list(items) if len(items) <= n else [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _vectors(x: Tensor, batch: Batch) -> Tensor:
    """One vector for each example."""
    x, mask = x.float(), batch.mask
    if x.dim() == 4:
        x = _channels_first(x)
        return F.adaptive_avg_pool2d(x, (min(4, x.shape[2]), min(4, x.shape[3]))).flatten(1)
    if x.dim() == 3 and mask is not None and mask.shape == x.shape[:2]:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return x.mean(1) if x.dim() == 3 else x.flatten(1)


def _channels_first(x: Tensor) -> Tensor:
    """Maps `[B, C, H, W]`; Swin and its like give `[B, H, W, C]`."""
    return x.permute(0, 3, 1, 2) if x.shape[1] == x.shape[2] != x.shape[3] else x


# What is shown


def _pick(batch: Batch, n: int) -> Tensor:
    """Rows to show: of different classes where labels say so."""
    labels, rows = batch.labels, list(range(batch.size))
    if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
        values = labels.tolist()
        rows.sort(key=lambda i: (values[:i].count(values[i]), i))
    return torch.tensor(rows[:n], device=labels.device if isinstance(labels, Tensor) else None)


def _is_image(batch: Batch) -> bool:
    return batch.inputs is not None and batch.inputs.dim() == 4 and batch.inputs.is_floating_point()


def _grid(tokens: int, prefix: int | None = None) -> tuple[int, int] | None:
    """Number of prefix tokens and side of the square grid behind a sequence of patches.

    >>> _grid(197), _grid(64), _grid(199, 3), _grid(3)
    ((1, 14), (0, 8), (3, 14), None)
    """
    for count in range(6) if prefix is None else (prefix,):
        side = round(max(tokens - count, 0) ** 0.5)
        if side > 1 and side * side == tokens - count:
            return count, side
    return None


def _keep_maps(
    found: Analysis, readers: Mapping[str, _Reader], seen: Mapping[str, Maps], batch: Batch, pick: Tensor
) -> None:
    """Keeps layer names, the root mean square over channels of a few layers' maps, and the channels of two."""
    shown = ("student", list(readers)[-1])
    for name, reader in readers.items():
        found.summary[name] = {"layers": [place.name for place in reader.places]}
        if name not in shown or not _is_image(batch):
            continue
        prefix = getattr(reader.net.module, "num_prefix_tokens", None)
        strengths = {layer: _strength(x[pick].float(), prefix) for layer, x in seen[name].items()}
        drawn = {layer: x for layer, x in strengths.items() if x is not None and min(x.shape[1:]) > 1}
        maps = {layer: _shrink(x[:, None], _MAP)[:, 0].half().cpu().contiguous() for layer, x in drawn.items()}
        # The last layer of each resolution; with one resolution, a few layers over the depth.
        last = {tuple(x.shape): layer for layer, x in maps.items()}
        chosen = _spread(list(last.values() if len(last) > 2 else maps), _SHOWN_LAYERS)
        found.summary[name]["maps"] = chosen
        found.arrays |= {f"{name}/map/{i}": maps[layer] for i, layer in enumerate(chosen)}
    if "teacher" in seen and _is_image(batch):
        both = [{k: _channels_first(x) for k, x in seen[n].items() if x.dim() == 4} for n in ("student", "teacher")]
        layers = common_maps(*both)
        if layers is not None:
            ours, theirs = (maps[layer] for maps, layer in zip(both, layers, strict=True))
            points = project_channels(ours[pick], theirs[pick])
            found.arrays["student/channels"], found.arrays["teacher/channels"] = points
            about = {"mmd": float(KF.nst(ours.float(), theirs.float(), "poly")), "examples": len(ours)}
            found.summary["channels"] = {"student": layers[0], "teacher": layers[1], **about}


def _strength(x: Tensor, prefix: int | None) -> Tensor | None:
    """Root mean square over the channels of maps, or of a sequence of patches, `[n, h, w]`; None for anything else."""
    if x.dim() == 4:
        return _channels_first(x).square().mean(1).sqrt()
    grid = _grid(x.shape[1], prefix) if x.dim() == 3 else None
    return None if grid is None else x[:, grid[0] :].square().mean(-1).sqrt().unflatten(1, (grid[1], grid[1]))


def _shrink(x: Tensor, side: int) -> Tensor:
    """Images no larger than `side`."""
    scale = side / max(x.shape[-2:])
    return x if scale >= 1 else F.adaptive_avg_pool2d(x, [max(round(n * scale), 1) for n in x.shape[-2:]])


def _keep_attention(found: Analysis, name: str, reader: _Reader, batch: Batch, pick: Tensor) -> None:
    """Keeps attention distributions, averaged over heads, of a few layers."""
    if not reader.attention:
        return
    layers, kept = _spread(range(1, reader.attention + 1), _SHOWN_LAYERS), []
    try:
        attentions = reader.net(_part(batch, pick), reads=Reads(logits=False, attentions=tuple(layers))).attentions
    except DistillError as error:
        found.summary[name]["attention_note"] = str(error)
        return
    for layer in layers:
        attention = attentions[layer]
        probs = attention.scores.softmax(-1) if attention.probs is None else attention.probs
        if len(probs) != len(pick):
            found.summary[name]["attention_note"] = "Attention within windows is not drawn."
            return
        probs = probs.float().mean(1)
        if _is_image(batch):
            grid = _grid(probs.shape[-1], getattr(reader.net.module, "num_prefix_tokens", None))
            if grid is None:
                return
            prefix, side = grid
            probs = (probs[:, 0] if prefix else probs.mean(1))[:, prefix:].unflatten(1, (side, side))
        else:
            probs = probs[:, :_TOKENS, :_TOKENS]
        kept.append(probs)
    found.arrays[f"{name}/attention"] = torch.stack(kept).half().cpu().contiguous()
    found.summary[name]["attention"] = [f"layer {layer}" for layer in layers]


def _keep_examples(found: Analysis, batch: Batch, decode: Decode | None) -> None:
    """Keeps the inputs that are shown: images as they were before normalisation, sentences as tokens."""
    if isinstance(batch.labels, Tensor) and batch.labels.dim() == 1 and not batch.labels.is_floating_point():
        found.summary["labels"] = batch.labels.tolist()
    if batch.inputs is not None and _is_image(batch):
        found.arrays["images"] = _pixels(batch.inputs.float(), batch)
    elif batch.inputs is not None and not batch.inputs.is_floating_point() and batch.inputs.dim() == 2:
        ids, mask = batch.inputs.tolist(), batch.mask
        lengths = [len(row) for row in ids] if mask is None else mask.sum(1).int().tolist()
        rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        found.summary["tokens"] = [[str(t) for t in (decode(row) if decode else row)][:_TOKENS] for row in rows]


def _pixels(x: Tensor, batch: Batch) -> Tensor:
    """Images `[n, 3, H, W]` in 0 to 255."""
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    if batch.mean is not None and batch.std is not None:
        mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).flatten()[:3] for v in (batch.mean, batch.std))
        x = x * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    else:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp_min(1e-6)
    return (_shrink(x, _IMAGE).clamp(0, 1) * 255).round().byte().cpu().contiguous()
