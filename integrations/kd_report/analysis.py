"""What a student has in common with its teacher: predictions, calibration, layer similarity, features and attention.

Reads a few evaluation batches and leaves no trace: evaluation mode, no gradient, no random number, no hook remains.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Net, Nets, Reads
from kd_plugins import functional as KF
from kd_plugins.reading.network import adapt
from kd_report.channels import common_maps, project_channels
from kd_report.predictions import Predictions, rows_of
from kd_report.similarity import Similarity

__all__ = ["Analysis", "analyse", "as_nets"]

Decode = Callable[[list[int]], Sequence[str]]

_CHUNK = 64
_LAYERS = 12
_SHOWN_LAYERS = 4
_MAP, _IMAGE, _TOKENS = 32, 96, 40


@dataclass
class Analysis:
    """What `analyse` found.

    Attributes:
        summary: Numbers and names, ready for JSON.
        arrays: Tensors by name: `cka` `[Ls, Lt]`, `images` `[n, 3, H, W]`, `student/map/0` `[n, h, w]`,
            `student/attention` `[layers, n, L, L]` or `[layers, n, h, w]`, `student/confusion` `[K, K]` (true class,
            predicted class), `student/reliability` `[bins, 3]` (examples, confidence, accuracy), `student/channels`
            `[n, C, 2]` (points, see `kd_report.channels`).
    """

    summary: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


class Place(NamedTuple):
    """Where an activation is read: a module, and which of its calls in one forward."""

    name: str
    path: str
    call: int = 0


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
    Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327). Calibration is the expected calibration error with
    15 bins of equal width (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599).

    Departures: maps are averaged to at most 4 x 4, token sequences over their real tokens, before they are compared.

    Args:
        nets: The networks, unwrapped; a bare student where there is no distiller.
        batches: Evaluation batches in a fixed order; made lazily they are drawn outside the training's random state.
        examples: Examples to look at.
        shown: Examples whose maps and attention are kept.
        seconds: No batch is begun after this time; at least one is read.
        decode: Turns a sentence's token ids into the tokens' texts.
    """
    nets = as_nets(nets)
    began, found = time.monotonic(), Analysis()
    with untouched(nets):
        stream = _chunks(batches, examples, _device(nets.student))
        first = next(stream, None)
        if first is None:
            raise DistillError("The analysis got no evaluation batches: give at least one.")
        readers = {name: _Reader(net, first) for name, net in _compared(nets).items()}
        ensemble = [_fresh(t) for t in nets.teachers[1:]]
        predictions, similarity = Predictions(list(readers)), Similarity([len(r.places) for r in readers.values()])
        pick = _pick(first, shown)
        shown_networks = ("student", list(readers)[-1])
        count = 0
        chunk: Batch | None = first
        while chunk is not None:
            logits, features = {}, []
            first_maps: dict[str, dict[str, Tensor]] = {}
            for name, reader in readers.items():
                logits[name], seen = reader(chunk)
                if chunk is first:
                    first_maps[name] = seen
                if chunk is first and name in shown_networks:
                    _keep_maps(found, name, reader, seen, chunk, pick)
                features += [_vectors(seen[place.name], chunk) for place in reader.places]
            if "teacher" in first_maps:
                _keep_channels(found, first_maps["student"], first_maps["teacher"], chunk, pick)
            if ensemble:
                others = [logits["teacher"], *(t(chunk, reads=Reads()).logits for t in ensemble)]
                logits["teacher"] = torch.stack([o.float().softmax(-1) for o in others]).mean(0).log()
            predictions.add({name: rows_of(value, chunk) for name, value in logits.items()})
            similarity.add(features)
            count += chunk.size
            chunk = next(stream, None) if time.monotonic() - began < seconds else None
        for name, reader in readers.items():
            found.summary[name] = {"layers": [place.name for place in reader.places], **found.summary.get(name, {})}
            if name in shown_networks:
                _keep_attention(found, name, reader, first, pick)
        _keep_examples(found, first, pick, decode)
    matrices = similarity.matrices()
    if matrices is not None:
        names = list(readers)
        found.arrays["cka"] = matrices[0, len(names) - 1]
        trained = [names.index(name) for name in _trained(nets) if readers[name].places]
        if len(trained) == len(nets.peers) > 1:
            rows = [torch.stack([matrices[i, j][-1, -1] for j in trained]) for i in trained]
            found.arrays["peers/similarity"] = torch.stack(rows)
    found.summary["peers"] = _trained(nets)[1:]
    summary, arrays = predictions.result()
    found.arrays |= arrays
    found.summary |= {
        "examples": count,
        "predictions": summary,
        "compared": list(readers)[-1],
        "teachers": len(nets.teachers),
        "seconds": round(time.monotonic() - began, 3),
    }
    return found


def _trained(nets: Nets) -> list[str]:
    """Names of the networks that were trained together; the first peer is what a student without teacher meets."""
    first = "peer1" if nets.teachers else "peer"
    return ["student", first, *(f"peer{i}" for i in range(2, len(nets.peers)))][: len(nets.peers)]


def _compared(nets: Nets) -> dict[str, Net]:
    """All networks that are looked at; the last is what the student is compared with, its teacher or its first peer."""
    named = dict(zip(_trained(nets), nets.peers, strict=True))
    if nets.teachers:
        return {**named, "teacher": nets.teachers[0]}
    if len(nets.peers) > 1:
        named["peer"] = named.pop("peer")
    return named


# Reading without a trace

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def untouched(nets: Nets) -> Iterator[None]:
    """Evaluation mode and no gradient; modes, hooks and every random state are as before afterwards."""
    modules = {id(m): m for net in nets for m in net.module.modules()}
    modes = {key: module.training for key, module in modules.items()}
    hooks = {key: [set(getattr(module, name)) for name in _HOOKS] for key, module in modules.items()}
    devices = sorted({p.device.index or 0 for net in nets for p in net.module.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), _numpy_random()
    state = numpy.get_state() if numpy is not None else None
    try:
        for net in nets:
            net.module.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(state)
        for key, module in modules.items():
            module.training = modes[key]
            for name, before in zip(_HOOKS, hooks[key], strict=True):
                installed = getattr(module, name)
                for added in set(installed) - before:
                    del installed[added]


def _numpy_random() -> Any:
    """NumPy's random module; data sets draw from its global state."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy.random


def _fresh(net: Net) -> Net:
    """The same network, read through taps of its own that go with it."""
    return Net(adapt(net.module), Reads, frozen=net.frozen, transform=net.transform, order=net.order)


def _device(net: Net) -> torch.device:
    return next((p.device for p in net.module.parameters()), torch.device("cpu"))


def _chunks(batches: Iterable[Batch], examples: int, device: torch.device) -> Iterator[Batch]:
    """Parts of batches, small enough that every layer's activations fit into memory."""
    left = examples
    for batch in batches:
        if left <= 0:
            return
        batch = batch.to(device)
        if not batch.size:
            raise DistillError("The analysis needs batches of examples, got one whose size is unknown.")
        for start in range(0, min(batch.size, left), _CHUNK):
            part = _rows(batch, start, min(start + _CHUNK, batch.size, start + left))
            left -= part.size
            yield part


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() and len(value) == batch.size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        return value

    names = ("inputs", "labels", "kwargs", "teacher_kwargs", "mask", "index")
    return dataclasses.replace(batch, size=stop - start, **{name: cut(getattr(batch, name)) for name in names})


class _Reader:
    """Reads one network: its logits, and the activations of layers that are chosen by its structure."""

    def __init__(self, net: Net, batch: Batch) -> None:
        self.net = _fresh(net)
        self.network = self.net.network
        self.attention = 0
        if self.network.attention is not None:
            try:
                self.attention = self.net.layers(_rows(batch, 0, min(batch.size, 2)))
            except DistillError:
                self.attention = 0
        self.places = _spread(self._candidates(), _LAYERS)
        _, seen = self(_rows(batch, 0, min(batch.size, 2)))
        self.places = [place for place in self.places if place.name in seen]

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and activations by the place's name; places that did not run are left out."""
        calls: dict[str, list[Tensor]] = {place.path: [] for place in self.places}
        with ExitStack() as stack:
            for path, kept in calls.items():
                module = self.net.module.get_submodule(path)
                handle = module.register_forward_hook(lambda _, __, out, kept=kept: _append(kept, out))
                stack.callback(handle.remove)
            logits = self.net(batch, reads=Reads()).logits
        found = {p.name: calls[p.path][p.call] for p in self.places if len(calls[p.path]) > p.call}
        return logits, {name: x for name, x in found.items() if x.dim() > 1 and len(x) == batch.size}

    def _candidates(self) -> list[Place]:
        if self.attention and self.network.attention is not None:
            layers = enumerate(self.network.attention.layers, 1)
            listed = [Place(f"layer {i}", x.layer, x.layer_call) for i, x in layers if x.layer is not None]
            if listed:
                return listed
        try:
            paths = _blocks(self.net.module, self.network.stages())
        except (DistillError, AttributeError):
            paths = _leaves(self.net.module)
        prefix = _common(paths)
        return [Place(path.removeprefix(prefix), path) for path in paths]


def _append(kept: list[Tensor], output: Any) -> None:
    """Keeps a copy: a module that follows may work in place."""
    found = output
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


def _leaves(root: nn.Module) -> list[str]:
    """Modules with weights, in the order of the network, opened from the top until there are enough."""
    paths = [name for name, _ in root.named_children()]
    while True:
        opened = [
            inner
            for path in paths
            for inner in (
                [f"{path}.{name}" for name, _ in root.get_submodule(path).named_children()]
                if isinstance(root.get_submodule(path), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
                or len(paths) == 1
                else []
            )
            or [path]
        ]
        if opened == paths:
            break
        paths = opened
    return [p for p in paths if next(root.get_submodule(p).parameters(), None) is not None]


def _common(paths: Sequence[str]) -> str:
    """The dotted prefix that all paths share."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared) + "." if shared and len(paths) > 1 else ""


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the last one among them.

    >>> _spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _vectors(x: Tensor, batch: Batch) -> Tensor:
    """One vector for each example."""
    x = x.float()
    if x.dim() == 4:
        x = _channels_first(x)
        return F.adaptive_avg_pool2d(x, (min(4, x.shape[2]), min(4, x.shape[3]))).flatten(1)
    if x.dim() == 3:
        mask = batch.mask
        if mask is not None and mask.shape == x.shape[:2]:
            return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return x.mean(1)
    return x.flatten(1)


def _channels_first(x: Tensor) -> Tensor:
    """Maps `[B, C, H, W]`; Swin and its like give `[B, H, W, C]`."""
    return x.permute(0, 3, 1, 2) if x.shape[1] == x.shape[2] != x.shape[3] else x


# What is shown


def _pick(batch: Batch, n: int) -> Tensor:
    """Rows to show: of different classes where labels say so."""
    labels = batch.labels
    rows = list(range(batch.size))
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
    found: Analysis, name: str, reader: _Reader, seen: Mapping[str, Tensor], batch: Batch, pick: Tensor
) -> None:
    """Keeps the root mean square over channels of a few layers' maps."""
    if not _is_image(batch):
        return
    maps = {}
    for place in reader.places:
        if place.name not in seen:
            continue
        x = seen[place.name][pick].float()
        if x.dim() == 4:
            x = _channels_first(x).square().mean(1).sqrt()
        elif x.dim() == 3:
            grid = _grid(x.shape[1], getattr(reader.net.module, "num_prefix_tokens", None))
            if grid is None:
                continue
            x = x[:, grid[0] :].square().mean(-1).sqrt().unflatten(1, (grid[1], grid[1]))
        else:
            continue
        if min(x.shape[1:]) > 1:
            maps[place.name] = _shrink(x[:, None], _MAP)[:, 0].half().cpu().contiguous()
    chosen = _last_of_each_size(maps)
    found.summary[name] = {**found.summary.get(name, {}), "maps": chosen}
    found.arrays |= {f"{name}/map/{i}": maps[layer] for i, layer in enumerate(chosen)}


def _keep_channels(
    found: Analysis, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, pick: Tensor
) -> None:
    """Keeps the channels of the deepest maps of one size as points of a plane."""
    if not _is_image(batch):
        return
    ours, theirs = ({k: _channels_first(x) for k, x in maps.items() if x.dim() == 4} for maps in (student, teacher))
    layers = common_maps(ours, theirs)
    if layers is None:
        return
    a, b = ours[layers[0]], theirs[layers[1]]
    found.arrays["student/channels"], found.arrays["teacher/channels"] = project_channels(a[pick], b[pick])
    distance = float(KF.nst(a.float(), b.float(), "poly"))
    found.summary["channels"] = {"student": layers[0], "teacher": layers[1], "mmd": distance, "examples": len(a)}


def _last_of_each_size(maps: Mapping[str, Tensor]) -> list[str]:
    """The last layer of each resolution; with one resolution, a few layers over the depth."""
    last = {tuple(x.shape): layer for layer, x in maps.items()}
    return _spread(list(last.values() if len(last) > 2 else maps), _SHOWN_LAYERS)


def _shrink(x: Tensor, side: int) -> Tensor:
    """Images no larger than `side`."""
    height, width = x.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return x
    return F.adaptive_avg_pool2d(x, (max(round(height * scale), 1), max(round(width * scale), 1)))


def _keep_attention(found: Analysis, name: str, reader: _Reader, batch: Batch, pick: Tensor) -> None:
    """Keeps attention distributions, averaged over heads, of a few layers."""
    if not reader.attention:
        return
    layers = _spread(range(1, reader.attention + 1), _SHOWN_LAYERS)
    small = _take(batch, pick)
    try:
        attentions = reader.net(small, reads=Reads(logits=False, attentions=tuple(layers))).attentions
    except DistillError as error:
        found.summary[name]["attention_note"] = str(error)
        return
    kept = []
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


def _take(batch: Batch, pick: Tensor) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[pick.to(value.device)] if value.dim() and len(value) == batch.size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        return value

    names = ("inputs", "labels", "kwargs", "teacher_kwargs", "mask", "index")
    return dataclasses.replace(batch, size=len(pick), **{name: cut(getattr(batch, name)) for name in names})


def _keep_examples(found: Analysis, batch: Batch, pick: Tensor, decode: Decode | None) -> None:
    """Keeps the inputs that are shown: images as they were before normalisation, sentences as tokens."""
    small = _take(batch, pick)
    if isinstance(small.labels, Tensor) and small.labels.dim() == 1 and not small.labels.is_floating_point():
        found.summary["labels"] = small.labels.tolist()
    if small.inputs is None:
        return
    if _is_image(batch):
        found.arrays["images"] = _pixels(small)
        return
    if small.inputs.is_floating_point() or small.inputs.dim() != 2:
        return
    ids = small.inputs.tolist()
    lengths = [len(row) for row in ids] if small.mask is None else small.mask.sum(1).int().tolist()
    found.summary["tokens"] = [
        [str(t) for t in (decode(row[:n]) if decode is not None else row[:n])][:_TOKENS]
        for row, n in zip(ids, lengths, strict=True)
    ]


def _pixels(batch: Batch) -> Tensor:
    """Images `[n, 3, H, W]` in 0 to 255."""
    assert batch.inputs is not None  # noqa: S101
    x = batch.inputs.float()
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    if batch.mean is not None and batch.std is not None:
        mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).flatten()[:3] for v in (batch.mean, batch.std))
        x = x * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    else:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp_min(1e-6)
    return (_shrink(x, _IMAGE).clamp(0, 1) * 255).round().byte().cpu().contiguous()
