"""What a student has in common with its teacher: layer similarity, features and attention, and what both predict.

Reads evaluation batches and leaves no trace: evaluation mode, no gradient, no random number, no hook remains.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads
from kd_plugins import functional as KF
from kd_plugins.binding import untouched
from kd_plugins.nn.patches import pixels
from kd_plugins.reading.network import adapt
from kd_plugins.reading.trunk import find_trunk
from kd_plugins.reading.view import View
from kd_report.measures import Similarity, common_maps, decisions, project_channels
from kd_report.uncertainty import Answers, dirichlet_offset

__all__ = ["Analysis", "analyse", "as_nets", "predict"]

Decode = Callable[[list[int]], Sequence[str]]

_LAYERS, _SHOWN_LAYERS = 12, 4
_MAP, _IMAGE, _TOKENS = 32, 96, 40
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


@dataclass
class Analysis:
    """What `analyse` found.

    Attributes:
        summary: Numbers and names, ready for JSON.
        arrays: Tensors by name: `cka` `[Ls, Lt]`, `images` `[n, 3, H, W]`, `student/map/0` `[n, h, w]`,
            `student/attention` `[layers, n, L, L]` or `[layers, n, h, w]`, `student/channels` `[n, C, 2]` (points, see
            `project_channels`).
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
    shown: int = 4,
    seconds: float = 20.0,
    decode: Decode | None = None,
    attentions: Mapping[str, Sequence[int]] | None = None,
) -> Analysis:
    """Compares the student with its teacher (or with the first of its peers) on evaluation batches.

    Of all networks that were trained together it tells the similarity of their last layers, each with each
    (`peers/similarity` `[P, P]`, the student first).

    Layer similarity is linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML
    2019, arXiv 1905.00414) with the unbiased estimator summed over minibatches (Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327).

    **Departures**: maps are averaged to at most 4 x 4, token sequences over their real tokens, before they are
    compared.

    Args:
        nets: The networks, unwrapped; a bare student where there is no distiller.
        batches: Evaluation batches in a fixed order, of few examples each, as all layers' activations are held at once;
            made lazily they are drawn outside the training's random state.
        shown: Examples whose maps and attention are kept.
        seconds: No batch is begun after this time; at least one is read.
        decode: Turns a sentence's token ids into the tokens' texts.
        attentions: Layers whose attention is kept, by network (`"student"`, `"teacher"`): those that learn from each
            other; by default a few over the depth.
    """
    nets = as_nets(nets)
    began, found, count = time.monotonic(), Analysis(), 0
    peers = [f"peer{i}" for i in range(1, len(nets.peers))]
    compared = "teacher" if nets.teachers else peers[0] if peers else "student"
    named = dict(zip(["student", *peers, "teacher"], [*nets.peers, *nets.teachers], strict=False))
    with _without_trace(nets):
        for batch in _sized(nets, batches):
            if not count:
                first, pick = batch, _pick(batch, shown)
                readers = {name: _Reader(net, batch) for name, net in named.items()}
                found.summary |= {name: {"layers": list(reader.places)} for name, reader in readers.items()}
                similarity = Similarity([len(r.places) for r in readers.values()])
            seen = {name: reader.activations(batch) for name, reader in readers.items()}
            if not count and _is_image(batch):
                for name in dict.fromkeys(("student", compared)):
                    _keep_maps(found, name, readers[name], {layer: x[pick].float() for layer, x in seen[name].items()})
                if "teacher" in seen:
                    _keep_channels(found, seen["student"], seen["teacher"], pick)
            similarity.add([_vectors(x, batch) for layers in seen.values() for x in layers.values()])
            count += batch.size
            if time.monotonic() - began >= seconds:
                break
        for name in dict.fromkeys(("student", compared)):
            _keep_attention(found, name, readers[name], first, pick, (attentions or {}).get(name))
        _keep_examples(found, _part(first, pick), decode)
    if similarity.sum is not None:
        found.arrays["cka"] = similarity.between(0, list(readers).index(compared))
        trained = range(1 + len(peers))
        if peers and all(readers[name].places for name in ("student", *peers)):
            rows = [[similarity.between(a, b)[-1, -1] for b in trained] for a in trained]
            found.arrays["peers/similarity"] = torch.tensor(rows)
    found.summary |= {"peers": peers, "examples": count, "compared": compared}
    found.summary["seconds"] = round(time.monotonic() - began, 3)
    return found


def predict(
    nets: Nets | nn.Module,
    batches: Iterable[Batch],
    *,
    distiller: Distiller | None = None,
    seconds: float | None = None,
) -> Answers:
    """What student, teachers and peers say of evaluation batches; nothing for a task without classes.

    Args:
        nets: The networks, unwrapped.
        batches: Evaluation batches, in an order that has nothing to do with their classes where `seconds` may end them.
        distiller: The method, which says what the student's scores are.
        seconds: No batch is begun after this time; at least one is read.
    """
    nets, answers, began = as_nets(nets), Answers(), time.monotonic()
    named = {f"peer{i}" if i else "student": _fresh(net) for i, net in enumerate(nets.peers)}
    teachers = [_fresh(net) for net in nets.teachers]
    with _without_trace(nets):
        for batch in _sized(nets, batches):
            asked = [decisions(net(batch, reads=Reads()), batch) for net in (*named.values(), *teachers)]
            ours = asked[0]
            if ours is None:
                break
            answers.offset = dirichlet_offset(distiller, ours.logits.shape[-1])
            # Networks of other classes cannot be compared.
            known = [x.logits if x is not None and x.logits.shape == ours.logits.shape else None for x in asked]
            answers.add("student", *ours)
            for name, logits in zip(list(named)[1:], known[1:], strict=False):
                if logits is not None:
                    answers.add(name, logits, ours.labels, student=ours.logits)
            told = [logits for logits in known[len(named) :] if logits is not None]
            answers.ensemble(told, ours.labels, ours.logits)
            if seconds is not None and time.monotonic() - began >= seconds:
                break
    return answers


def _sized(nets: Nets, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, at least one, on the student's device."""
    device, batch = next((p.device for p in nets.student.module.parameters()), torch.device("cpu")), None
    for batch in batches:
        if not batch.size:
            raise DistillError("The analysis needs batches of examples, got one whose size is unknown.")
        yield batch.to(device)
    if batch is None:
        raise DistillError("The analysis got no evaluation batches: give at least one.")


# Reading without a trace


@contextmanager
def _without_trace(nets: Nets) -> Iterator[None]:
    """`untouched`; neither a hook remains, nor a draw from NumPy's random stream."""
    modules = {m for net in nets for m in net.module.modules()}
    hooks = [(d, set(d)) for m in modules for name, d in vars(m).items() if name.startswith("_forward_")]
    try:
        with undisturbed(), untouched(nets):
            yield
    finally:
        # A network's own hooks, which transformers installs in a first forward, are here to stay.
        ours = {
            key
            for m in modules
            for key, hook in (*m._forward_hooks.items(), *m._forward_pre_hooks.items())
            if str(getattr(hook, "__module__", "")).startswith(("kd_plugins.", "kd_timm.", "kd_transformers."))
        }
        for installed, before in hooks:
            for added in ours & set(installed) - before:
                del installed[added]


def _fresh(net: Net) -> Net:
    """The same network, read through taps of its own that go with it."""
    return Net(adapt(net.module), Reads, frozen=net.frozen, transform=net.transform, order=net.order)


def _part(batch: Batch, rows: Tensor) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        sized = isinstance(value, Tensor) and value.dim() and len(value) == batch.size
        return value[rows.to(value.device)] if sized else value

    names = ("inputs", "labels", "kwargs", "teacher_kwargs", "mask", "index")
    return dataclasses.replace(batch, size=len(rows), **{name: cut(getattr(batch, name)) for name in names})


class _Reader:
    """Reads one network: its logits, and the activations of layers over its depth, by name."""

    def __init__(self, net: Net, batch: Batch) -> None:
        self.net, self.attention = _fresh(net), 0
        self.net.network.tap.clone = True  # A module that follows may work in place.
        two = _part(batch, torch.arange(min(batch.size, 2)))
        if self.net.network.attention is not None:
            with suppress(DistillError):
                self.attention = self.net.layers(two)
        self.places = dict(_spread(list(self._layers(two).items()), _LAYERS))
        if not self._readable(self.places.values(), two):
            self.places = {name: place for name, place in self.places.items() if self._readable([place], two)}

    def activations(self, batch: Batch) -> dict[str, Tensor]:
        """What the layers say of a batch."""
        view = self.net(batch, reads=_reads(self.places.values()))
        found = {name: _activation(view, place) for name, place in self.places.items()}
        last = self.net.network.channels_last
        return {name: x.movedim(-1, 1) if last and x.dim() == 4 else x for name, x in found.items()}

    @property
    def class_token(self) -> bool:
        """Whether the first token stands for the whole image."""
        return any(name.endswith(_CLASS_TOKENS) for name, _ in self.net.module.named_parameters())

    def strength(self, x: Tensor) -> Tensor | None:
        """Root mean square over the channels of maps, or of a sequence of patches, `[n, h, w]`; None of others."""
        if x.dim() == 4:
            return x.square().mean(1).sqrt()
        return self.patches(x.square().mean(-1).sqrt()) if x.dim() == 3 else None

    def patches(self, x: Tensor) -> Tensor | None:
        """A square map `[n, h, w]` of values `[n, L]` of tokens, without what stands before patches; None of others."""
        before = getattr(self.net.module, "num_prefix_tokens", None)
        for prefix in range(6) if before is None else (before,):
            side = round(max(x.shape[1] - prefix, 0) ** 0.5)
            if side > 1 and side * side == x.shape[1] - prefix:
                return x[:, prefix:].unflatten(1, (side, side))
        return None

    def _layers(self, batch: Batch) -> dict[str, str | int]:
        """Numbers of a transformer's layers; else blocks and stem of the trunk, stages, or all modules with weights."""
        attention, root = self.net.network.attention, self.net.module
        if self.attention and attention is not None:
            numbers = {f"layer {i}": i for i, layer in enumerate(attention.layers, 1) if layer.layer is not None}
            if numbers:
                return dict[str, str | int](numbers)
        paths: list[str] = []
        with suppress(DistillError, AttributeError):
            paths = self.net.network.stages()
        with suppress(DistillError):
            found = [block.path for block in find_trunk(self.net, batch).all]
            paths = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
        if not any(next(root.get_submodule(path).children(), None) for path in paths):
            paths = [path for path, m in root.named_modules() if next(m.parameters(recurse=False), None) is not None]
        shared = commonprefix(paths).rpartition(".")[0]
        return {path.removeprefix(f"{shared}."): path for path in paths}

    def _readable(self, places: Collection[str | int], batch: Batch) -> bool:
        """Whether layers run once in a forward and give something for each example."""
        try:
            view = self.net(batch, reads=_reads(places))
        except DistillError:
            return False
        found = [_activation(view, place) for place in places]
        return all(x.is_floating_point() and x.dim() > 1 and len(x) == batch.size for x in found)


def _reads(places: Collection[str | int]) -> Reads:
    paths = tuple(place for place in places if isinstance(place, str))
    return Reads(False, paths, tuple(place for place in places if isinstance(place, int)))


def _activation(view: View, place: str | int) -> Tensor:
    return view.hidden[place] if isinstance(place, int) else view.features[place]


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the last one among them.

    >>> _spread(range(10), 4)
    [0, 3, 6, 9]
    """
    return list(items) if len(items) <= n else [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _vectors(x: Tensor, batch: Batch) -> Tensor:
    x, mask = x.float(), batch.mask
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, (min(4, x.shape[2]), min(4, x.shape[3]))).flatten(1)
    if x.dim() == 3 and mask is not None and mask.shape == x.shape[:2]:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return x.mean(1) if x.dim() == 3 else x.flatten(1)


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


def _keep_maps(found: Analysis, name: str, reader: _Reader, activations: Mapping[str, Tensor]) -> None:
    """Keeps the root mean square over channels of a few layers' maps."""
    strengths = {layer: reader.strength(x) for layer, x in activations.items()}
    drawn = {layer: x for layer, x in strengths.items() if x is not None and min(x.shape[1:]) > 1}
    maps = {layer: _shrink(x[:, None], _MAP)[:, 0].half().cpu().contiguous() for layer, x in drawn.items()}
    # The last layer of each resolution; with one resolution, a few layers over the depth.
    last = {tuple(x.shape): layer for layer, x in maps.items()}
    chosen = _spread(list(last.values() if len(last) > 2 else maps), _SHOWN_LAYERS)
    found.summary[name]["maps"] = chosen
    found.arrays |= {f"{name}/map/{i}": maps[layer] for i, layer in enumerate(chosen)}


def _keep_channels(found: Analysis, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], pick: Tensor) -> None:
    """Keeps the channels of the deepest maps of one size as points of a plane, and how far apart they are."""
    both = [{layer: x for layer, x in seen.items() if x.dim() == 4} for seen in (student, teacher)]
    layers = common_maps(*both)
    if layers is not None:
        ours, theirs = (maps[layer] for maps, layer in zip(both, layers, strict=True))
        points = project_channels(ours[pick], theirs[pick])
        found.arrays["student/channels"], found.arrays["teacher/channels"] = points
        about = {"mmd": float(KF.nst(ours.float(), theirs.float(), "poly")), "examples": len(ours)}
        found.summary["channels"] = {"student": layers[0], "teacher": layers[1], **about}


def _shrink(x: Tensor, side: int) -> Tensor:
    scale = side / max(x.shape[-2:])
    return x if scale >= 1 else F.adaptive_avg_pool2d(x, [max(round(n * scale), 1) for n in x.shape[-2:]])


def _keep_attention(
    found: Analysis, name: str, reader: _Reader, batch: Batch, pick: Tensor, asked: Sequence[int] | None
) -> None:
    """Keeps attention distributions, averaged over heads, of a few layers."""
    if not reader.attention:
        return
    layers, kept = _spread(asked or range(1, reader.attention + 1), _SHOWN_LAYERS), []
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
            # A class token, where there is one, tells what it attends to; else the patches do, and no register token.
            patches = reader.patches(probs[:, 0])
            if patches is None:
                return
            before = probs.shape[-1] - patches[0].numel()
            probs = patches if before and reader.class_token else reader.patches(probs[:, before:].mean(1))
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
        found.arrays["images"] = _shrink(pixels(batch).float(), _IMAGE).round().byte().contiguous()
    elif batch.inputs is not None and not batch.inputs.is_floating_point() and batch.inputs.dim() == 2:
        ids, mask = batch.inputs.tolist(), batch.mask
        lengths = [len(row) for row in ids] if mask is None else mask.sum(1).int().tolist()
        rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        found.summary["tokens"] = [[str(t) for t in (decode(row) if decode else row)][:_TOKENS] for row in rows]
