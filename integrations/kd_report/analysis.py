"""What a student has in common with its teacher: layer similarity, features and attention, and what both predict.

Reads evaluation batches and leaves no trace: evaluation mode, no gradient, no random number, no hook remains.
"""

from __future__ import annotations

import colorsys
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads
from kd_plugins import functional as KF
from kd_plugins.binding import untouched
from kd_plugins.evaluation import Answers, dirichlet_offset
from kd_plugins.nn.patches import pixels, thumbnails
from kd_plugins.picture import Images
from kd_plugins.reading.network import adapt
from kd_plugins.reading.tap import Hook
from kd_plugins.reading.trunk import find_trunk
from kd_report.measures import cka, decisions, hsic, project_channels

__all__ = ["Analysis", "analyse", "as_nets", "predict", "predicted_maps"]

Decode = Callable[[list[int]], Sequence[str]]

_LAYERS, _SHOWN_LAYERS, _EXAMPLES = 12, 4, 4
_MAP, _IMAGE, _TOKENS, _SECONDS = 32, 96, 40, 20.0
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


@dataclass
class Analysis:
    """What `analyse` found.

    Attributes:
        summary: Numbers and names, ready for JSON.
        arrays: Tensors by name: `cka` `[Ls, Lt]`, `images` `[n, 3, H, W]`, `student/map/0` `[n, h, w]`,
            `student/attention` `[layers, n, L, L]` or `[layers, n, h, w]`, `student/channels` `[n, C, 2]` (points, see
            `project_channels`), `peers/similarity` `[P, P]` (of the last layers, the student's first).
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
    decode: Decode | None = None,
    attentions: Mapping[str, Sequence[int]] | None = None,
) -> Analysis:
    """Compares the student with its teacher (or with the first of its peers) on evaluation batches.

    Layer similarity is linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML
    2019, arXiv 1905.00414) with the unbiased estimator summed over minibatches (Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327).

    **Departures**: maps are averaged to at most 4 x 4, token sequences over their real tokens, before they are
    compared.

    Args:
        nets: The networks, unwrapped; a bare student where there is no distiller.
        batches: Evaluation batches in a fixed order, of few examples each, as all layers' activations are held at once;
            made lazily they are drawn outside the training's random state. None is begun after 20 seconds.
        decode: Turns a sentence's token ids into the tokens' texts.
        attentions: Layers whose attention is kept, by network (`"student"`, `"teacher"`): those that learn from each
            other; by default a few over the depth.
    """
    nets, began, found, count, alike = as_nets(nets), time.monotonic(), Analysis(), 0, None
    trained = list(nets.trained)
    compared = "teacher" if nets.teachers else "peer1" if len(trained) > 1 else "student"
    pair = dict.fromkeys(("student", compared))
    with _without_trace(nets):
        for batch in _read(nets, batches, _SECONDS):
            if not count:
                first, pick = batch, _pick(batch)
                named = zip([*trained, "teacher"], nets, strict=False)
                readers = {name: _Reader(net, batch) for name, net in named}
                found.summary |= {name: {"layers": list(reader.places)} for name, reader in readers.items()}
            seen = {name: reader.activations(batch, reader.places) for name, reader in readers.items()}
            if not count and _is_image(batch):
                for name in pair:
                    _keep_maps(found, name, readers[name], {layer: x[pick].float() for layer, x in seen[name].items()})
                if "teacher" in seen:
                    _keep_channels(found, seen["student"], seen["teacher"], pick)
            vectors = [_vectors(x, batch) for layers in seen.values() for x in layers.values()]
            if vectors and batch.size > 3:
                alike = hsic(vectors) + (0 if alike is None else alike)
            count += batch.size
        shown = _part(first, pick)
        for name in pair:
            _keep_attention(found, name, readers[name], shown, (attentions or {}).get(name))
        _keep_examples(found, shown, decode)
    if alike is not None:
        sizes = [len(reader.places) for reader in readers.values()]
        between = [dict(zip(readers, rows.split(sizes, 1), strict=True)) for rows in cka(alike).split(sizes)]
        found.arrays["cka"] = between[0][compared].contiguous()
        if len(trained) > 1 and all(readers[name].places for name in trained):
            rows = [[row[name][-1, -1] for name in trained] for row in between[: len(trained)]]
            found.arrays["peers/similarity"] = torch.tensor(rows)
    seconds = round(time.monotonic() - began, 3)
    found.summary |= {"peers": trained[1:], "examples": count, "compared": compared, "seconds": seconds}
    return found


def predict(nets: Nets | nn.Module, batches: Iterable[Batch], *, distiller: Distiller | None = None) -> Answers:
    """What student, teachers and peers say of evaluation batches; nothing for a task without classes.

    What the student's scores are, the distiller says.
    """
    nets, answers = as_nets(nets), Answers()
    fresh, peers = [_fresh(net) for net in nets], list(nets.trained)[1:]
    with _without_trace(nets):
        for batch in _read(nets, batches):
            ours, *others = (decisions(net(batch, reads=Reads()), batch) for net in fresh)
            if ours is None:
                break
            answers.offset = dirichlet_offset(distiller, ours.logits.shape[-1])
            answers.add("student", *ours)
            named = zip([*peers, *nets.frozen], others, strict=True)
            # Networks of other classes cannot be compared.
            known = {n: x.logits for n, x in named if x is not None and x.logits.shape == ours.logits.shape}
            told = [known.pop(name) for name in nets.frozen if name in known]
            for name, logits in known.items():
                answers.add(name, logits, ours.labels, student=ours.logits)
            answers.ensemble(told, ours.labels, ours.logits)
    return answers


def _read(nets: Nets, batches: Iterable[Batch], seconds: float = math.inf) -> Iterator[Batch]:
    """The batches on the student's device, at least one; none is begun after so many seconds."""
    began, batch, device = time.monotonic(), None, nets.device
    for batch in batches:
        if not batch.size:
            raise DistillError("The analysis needs batches of examples, got one whose size is unknown.")
        yield batch.to(device)
        if time.monotonic() - began >= seconds:
            break
    if batch is None:
        raise DistillError("The analysis got no evaluation batches: give at least one.")


@contextmanager
def _without_trace(nets: Nets) -> Iterator[None]:
    """`untouched`; neither a hook remains, nor a draw from NumPy's random stream."""
    modules = {m for net in nets for m in net.module.modules()}
    installed = [d for m in modules for name, d in vars(m).items() if name.startswith("_forward_")]
    before = {key for hooks in installed for key in hooks}
    try:
        with undisturbed(), untouched(nets):
            yield
    finally:
        # A network's own hooks, which transformers installs in a first forward, are here to stay.
        ours = {key for hooks in installed for key, hook in hooks.items() if isinstance(hook, Hook)} - before
        for hooks in installed:
            for added in ours & hooks.keys():
                del hooks[added]


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
    return replace(batch, size=len(rows), **{name: cut(getattr(batch, name)) for name in names})


class _Reader:
    """Reads one network: its logits, and the activations of layers over its depth, by name."""

    def __init__(self, net: Net, batch: Batch) -> None:
        self.net, self.attention = _fresh(net), 0
        self.net.network.tap.clone = True  # A module that follows may work in place.
        two = _part(batch, torch.arange(min(batch.size, 2)))
        with suppress(DistillError):
            self.attention = self.net.layers(two)
        self.places = dict(_spread(list(self._layers(two).items()), _LAYERS))
        if not self._readable(self.places, two):
            self.places = {name: place for name, place in self.places.items() if self._readable({name: place}, two)}

    def activations(self, batch: Batch, places: Mapping[str, str | int]) -> dict[str, Tensor]:
        """What layers say of a batch."""
        paths = tuple(place for place in places.values() if isinstance(place, str))
        numbers = tuple(place for place in places.values() if isinstance(place, int))
        view = self.net(batch, reads=Reads(False, paths, numbers))
        seen: dict[str | int, Tensor] = {**view.features, **view.hidden}
        if self.net.network.channels_last:
            seen = {place: x.movedim(-1, 1) if x.dim() == 4 else x for place, x in seen.items()}
        return {name: seen[place] for name, place in places.items()}

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
        network, root = self.net.network, self.net.module
        known = network.attention.layers if self.attention and network.attention is not None else ()
        numbers: dict[str, str | int] = {f"layer {i}": i for i, x in enumerate(known, 1) if x.layer is not None}
        if numbers:
            return numbers
        paths: list[str] = []
        with suppress(DistillError, AttributeError):
            paths = network.stages()
        with suppress(DistillError):
            found = [block.path for block in find_trunk(self.net, batch).all]
            paths = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
        if not any(next(root.get_submodule(path).children(), None) for path in paths):
            paths = [path for path, m in root.named_modules() if next(m.parameters(recurse=False), None) is not None]
        shared = commonprefix(paths).rpartition(".")[0]
        return {path.removeprefix(f"{shared}."): path for path in paths}

    def _readable(self, places: Mapping[str, str | int], batch: Batch) -> bool:
        """Whether layers run once in a forward and give something for each example."""
        try:
            found = self.activations(batch, places).values()
        except DistillError:
            return False
        return all(x.is_floating_point() and x.dim() > 1 and len(x) == batch.size for x in found)


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
    if x.dim() == 3:
        return KF.embedding(x, mask if mask is not None and mask.shape == x.shape[:2] else None)
    return x.flatten(1)


# What is shown


def _pick(batch: Batch) -> Tensor:
    """Rows to show: of different classes where labels say so."""
    values, rows = _classes(batch), list(range(batch.size))
    if values:
        rows.sort(key=lambda i: (values[:i].count(values[i]), i))
    return torch.tensor(rows[:_EXAMPLES])


def _classes(batch: Batch) -> list[int]:
    """The class of each example, where an example has one."""
    labels = batch.labels
    one = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return labels.tolist() if one else []


def _is_image(batch: Batch) -> bool:
    return batch.inputs is not None and batch.inputs.dim() == 4 and batch.inputs.is_floating_point()


def _keep_maps(found: Analysis, name: str, reader: _Reader, activations: Mapping[str, Tensor]) -> None:
    """Keeps the root mean square over the channels of a few layers' maps, or sequences of patches."""
    maps = {}
    for layer, x in activations.items():
        if x.dim() in (3, 4):
            strength = x.square().mean(1 if x.dim() == 4 else -1).sqrt()
            drawn = strength if x.dim() == 4 else reader.patches(strength)
            if drawn is not None and min(drawn.shape[1:]) > 1:
                maps[layer] = thumbnails(drawn[:, None], _MAP)[:, 0].half().cpu().contiguous()
    # The last layer of each resolution; with one resolution, a few layers over the depth.
    last = {tuple(x.shape): layer for layer, x in maps.items()}
    chosen = _spread(list(last.values() if len(last) > 2 else maps), _SHOWN_LAYERS)
    found.summary[name]["maps"] = chosen
    found.arrays |= {f"{name}/map/{i}": maps[layer] for i, layer in enumerate(chosen)}


def _keep_channels(found: Analysis, student: dict[str, Tensor], teacher: dict[str, Tensor], pick: Tensor) -> None:
    """Keeps the channels of the deepest maps of one size as points of a plane, and how far apart they are."""
    deepest = {x.shape[2:]: (layer, x) for layer, x in teacher.items() if x.dim() == 4}
    for layer, ours in reversed(student.items()):
        # A map of one position spans no plane.
        if ours.dim() == 4 and ours[0, 0].numel() > 1 and ours.shape[2:] in deepest:
            other, theirs = deepest[ours.shape[2:]]
            points = project_channels(ours[pick], theirs[pick])
            found.arrays["student/channels"], found.arrays["teacher/channels"] = points
            about = {"mmd": float(KF.nst(ours.float(), theirs.float(), "poly")), "examples": len(ours)}
            found.summary["channels"] = {"student": layer, "teacher": other, **about}
            break


def _keep_attention(found: Analysis, name: str, reader: _Reader, shown: Batch, asked: Sequence[int] | None) -> None:
    """Keeps attention distributions, averaged over heads, of a few layers."""
    if not reader.attention:
        return
    layers, kept = _spread(asked or range(1, reader.attention + 1), _SHOWN_LAYERS), []
    class_token = any(name.endswith(_CLASS_TOKENS) for name, _ in reader.net.module.named_parameters())
    try:
        seen = reader.net(shown, reads=Reads(logits=False, attentions=tuple(layers))).attentions
        if any(len(seen[layer].scores) != shown.size for layer in layers):
            raise DistillError("Attention within windows is not drawn.")
    except DistillError as error:
        found.summary[name]["attention_note"] = str(error)
        return
    for layer in layers:
        scores, given = seen[layer]
        probs = (scores.softmax(-1) if given is None else given).float().mean(1)
        if _is_image(shown):
            # A class token, where there is one, tells what it attends to; else the patches do, and no register token.
            patches = reader.patches(probs[:, 0])
            if patches is None:
                return
            before = probs.shape[-1] - patches[0].numel()
            kept.append(patches if before and class_token else reader.patches(probs[:, before:].mean(1)))
        else:
            mask = shown.teacher_mask if name == "teacher" else shown.mask
            pairs = zip(probs, (tokens.start for tokens in _tokens(mask, shown.size)), strict=True)
            kept.append(torch.stack([x.roll((-i, -i), (0, 1))[:_TOKENS, :_TOKENS] for x, i in pairs]))
    found.arrays[f"{name}/attention"] = torch.stack(kept).half().cpu().contiguous()
    found.summary[name]["attention"] = [f"layer {layer}" for layer in layers]


def _keep_examples(found: Analysis, shown: Batch, decode: Decode | None) -> None:
    """Keeps the inputs that are shown: images as they were before normalisation, sentences as tokens."""
    labels, inputs = _classes(shown), shown.inputs
    if labels:
        found.summary["labels"] = labels
    if _is_image(shown):
        found.arrays["images"] = thumbnails(pixels(shown).float(), _IMAGE).round().byte().contiguous()
    elif inputs is not None and not inputs.is_floating_point() and inputs.dim() == 2:
        rows = [row[tokens] for row, tokens in zip(inputs.tolist(), _tokens(shown.mask, shown.size), strict=True)]
        found.summary["tokens"] = [[str(t) for t in (decode(row) if decode else row)][:_TOKENS] for row in rows]


def _tokens(mask: Tensor | None, size: int) -> list[slice]:
    """The place of each sentence in its row, on whichever side the padding is."""
    if mask is None:
        return [slice(0, None)] * size
    starts, lengths = mask.int().argmax(1).tolist(), mask.sum(1).int().tolist()
    return [slice(start, start + n) for start, n in zip(starts, lengths, strict=True)]


def predicted_maps(nets: Nets, batch: Batch, count: int = 4) -> Images | None:
    """The first images of a batch, their labels, and the class that each network gives to each pixel.

    All are shown at the size of the labels; None where the task is not segmentation.
    """
    images, labels = batch.inputs, batch.labels
    if batch.task != "segmentation" or not isinstance(labels, Tensor) or images is None or images.dim() != 4:
        return None
    size, rows = labels.shape[-2:], slice(count)
    found = {"image": list(F.interpolate(pixels(batch.with_inputs(images[rows])), size, mode="bilinear"))}
    found["label"] = [_coloured(x) for x in labels[rows].masked_fill(labels[rows] == batch.ignore_index, -1)]
    teachers = {f"teacher {i}" if i else "teacher": net for i, net in enumerate(nets.teachers)}
    with untouched(nets):
        for name, net in {**teachers, "student": nets.student}.items():
            logits = net(batch, reads=Reads()).logits[rows].float()
            found[name] = [_coloured(x) for x in F.interpolate(logits, size, mode="bilinear").argmax(1)]
    return Images("Predictions", found, "The class of each pixel; the label is black where it is ignored.")


def _coloured(classes: Tensor) -> Tensor:
    """Class numbers `[H, W]` in colours `[3, H, W]`, from 0 to 255; -1 is black."""
    known = range(int(classes.max()) + 1)
    # Steps of the golden ratio around the circle keep the hues of any number of classes apart.
    colours = [colorsys.hsv_to_rgb(k * 0.618 % 1, 0.45 + 0.4 * (k % 2), 0.95 - 0.25 * (k % 3 == 2)) for k in known]
    table = torch.tensor([(0.0, 0.0, 0.0), *colours])
    return 255 * table[classes.cpu() + 1].movedim(-1, 0)
