"""QuEST: Quantized Embedding Space for Transferring Knowledge."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import functional as KF
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller, Terms
from kd_plugins.errors import DistillError
from kd_plugins.layers import paired
from kd_plugins.nn.codebook import Sample, cached_codebook, fingerprint_of, fit_codebook
from kd_plugins.nn.patches import NearestPatches, patch_side, pixels
from kd_plugins.picture import Images, Picture
from kd_plugins.reading.nets import Nets
from kd_plugins.reading.view import Batch, Needs, Reads, View

__all__ = ["QUEST", "Vocabulary"]

_logger = logging.getLogger("kd_plugins.quest")

# Vectors that the temperature is chosen on.
_CALIBRATION = 2048
# The report's picture: words, patches of each, and numbers in the sample of images that these are looked for in.
_WORDS, _PATCHES, _PIXELS = 8, 8, 2**25


class Vocabulary(nn.Module):
    """The words of one layer of the teacher, and the student's predictor of them.

    Args:
        words: K.
        student_channels: C_s.
        teacher_channels: C_t.
        temperature: Multiplies the squared distances of the targets.
        layer: The teacher's layer, in words.
        size: Height and width of the teacher's map as it is quantised, or its number of tokens.
        side: Height and width of the patches that show a word; 0 without patches.

    Attributes:
        codebook: The words `[K, C_t]`.
        counts: How many of the vectors that k-means saw each word stands for `[K]`.
        temperature: Chosen for a sharpness, where that is asked for.
        sharpness: The mean largest probability of the targets before the training.
        patches: Of the words that stand for the most vectors, `[W, P, 3, side, side]`.
    """

    codebook: Tensor
    counts: Tensor
    temperature: Tensor
    sharpness: Tensor
    patches: Tensor

    def __init__(
        self,
        words: int,
        student_channels: int,
        teacher_channels: int,
        temperature: float,
        *,
        layer: str = "",
        size: tuple[int, ...] = (),
        side: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.size, self.side = layer, size, side
        self.weight = nn.Parameter(torch.randn(words, student_channels) * math.sqrt(2 / student_channels))
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("codebook", torch.zeros(words, teacher_channels))
        self.register_buffer("counts", torch.zeros(words, dtype=torch.long))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("sharpness", torch.tensor(0.0))
        shown = min(_WORDS, words), _PATCHES, 3, side, side
        self.register_buffer("patches", torch.full(shown, 255, dtype=torch.uint8) if side else None)

    def fill(self, vectors: Tensor, codebook: Tensor, counts: Tensor, sharpness: float | None) -> None:
        """Takes up the words of a sample of vectors `[N, C_t]`, and the temperature that makes them that sharp."""
        self.codebook.copy_(codebook)
        self.counts.copy_(counts)
        few = vectors[:_CALIBRATION]
        if sharpness is not None:
            self.temperature.fill_(KF.match_sharpness(few, codebook, sharpness))
        self.sharpness.copy_(KF.soft_assignment(few, codebook, self.temperature.cpu()).amax(1).mean())

    def most(self, words: int) -> list[int]:
        """The words that stand for the most vectors, most first."""
        return self.counts.argsort(descending=True, stable=True)[:words].tolist()

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """The divergence of the predicted words from the teacher's, of maps of the same positions."""
        return KF.quest(student_map, teacher_map, self.weight, self.scale, self.codebook, self.temperature)


class QUEST(Distiller):
    """The student predicts which visual words of the teacher stand at each position of the image.

    Jain, Gidaris, Komodakis, Perez, Cord, "QuEST: Quantized Embedding Space for Transferring Knowledge", ECCV 2020,
    arXiv 1912.01540. Before the training k-means makes K words `v_k` of the teacher's feature vectors on the training
    set. With the maps `f_t` `[B, C_t, H, W]` and `f_s` `[B, C_s, H, W]`, at every position:

    - the teacher's soft assignment `p_t = softmax_k(-temperature * |f_t - v_k|^2)`;
    - the student's prediction `q_s = softmax_k(scale * cos(w_k, f_s))`, w and the scale (3 at first) learned with it;
    - `task + weight * mean KL(p_t || q_s)`, summed over the layers, each with its own words and predictor.

    The numbers of channels may differ. The larger of two maps is averaged down to the smaller one's size, the teacher's
    before its words are made. Layers of transformers `[B, L, C]` have a vector for each token. The words are fitted on
    one process, with networks in evaluation mode on the batches that the host passes (no augmentation in
    kd-timm-train), and are part of every checkpoint. The divergence is computed in pieces and its gradient along with
    it, so that nothing of size `B * H * W * K` is held.

    Departures: k-means (scikit-learn's Lloyd, 20 iterations at most from random vectors) sees `max_vectors` of the
    vectors and not all, except where there are fewer; the released code has faiss, which re-splits empty clusters that
    are moved to the farthest vector here. Averaging the student down, `sharpness` and tokens are ours.

    Args:
        layers: Student layers: stage numbers (-1 is the last stage) or module paths.
        teacher_layers: Teacher layers, in the same order; the same names by default.
        words: K, the words of each layer; the paper's.
        weight: Weight of the divergence summed over the layers; the released code's for most pairs.
        temperature: Multiplies the squared distances of the unnormalised features, so that a larger one makes harder
            targets; 5 by default, the released code's. Its effect depends on the teacher's scale: see `sharpness`.
        sharpness: In place of the temperature: the mean of the targets' largest probability, between 1 / K and 1,
            that each layer's temperature is chosen for before the training.
        max_vectors: The most feature vectors of a layer that k-means sees, drawn uniformly over images and positions;
            our default.
        seed: Seed of that draw and of k-means, so that runs share a codebook; by default the run's own.
        cache: Folder for codebooks; one is found again as long as teacher, layer, pooling, data, augmentation, K and
            seed are the same. By default nothing is kept but the checkpoint.
    """

    paper = Paper(
        "QuEST: Quantized Embedding Space for Transferring Knowledge",
        ("Himalaya Jain", "Spyros Gidaris", "Nikos Komodakis", "Patrick Pérez", "Matthieu Cord"),
        "ECCV",
        2020,
        arxiv="1912.01540",
    )
    tasks = ("classification", "multilabel", "segmentation", "detection", "regression", "other")

    def __init__(
        self,
        *,
        layers: tuple[str | int, ...] = (-1,),
        teacher_layers: tuple[str | int, ...] | None = None,
        words: int = 4096,
        weight: float = 1.0,
        temperature: float | None = None,
        sharpness: float | None = None,
        max_vectors: int = 200_000,
        seed: int | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.teacher_layers = layers if teacher_layers is None else teacher_layers
        if len(self.layers) != len(self.teacher_layers) or not self.layers:
            raise DistillError(
                f"Expected as many teacher_layers as layers, got {list(self.layers)} and {list(self.teacher_layers)}."
            )
        if words < 2:
            raise DistillError(f"Expected at least 2 words, got {words}.")
        if weight < 0:
            raise DistillError(f"Expected a weight of 0 or more, got {weight}.")
        if temperature is not None and sharpness is not None:
            raise DistillError("sharpness chooses the temperature: give one of them.")
        if temperature is not None and temperature <= 0:
            raise DistillError(f"Expected a temperature above 0, got {temperature}: the distances' sign is the loss's.")
        if sharpness is not None and not 1 / words < sharpness < 1:
            raise DistillError(f"Expected sharpness between 1 / {words} and 1, got {sharpness}.")
        if max_vectors < words:
            raise DistillError(
                f"k-means needs at least as many vectors as words, got max_vectors={max_vectors} for {words} words:"
                " raise max_vectors, or ask for fewer words."
            )
        self.n_words, self.weight, self.sharpness = words, weight, sharpness
        self.temperature = 5.0 if temperature is None else temperature
        self.max_vectors, self.seed, self.cache = max_vectors, seed, cache
        self.vocabularies = nn.ModuleList()

    def needs(self) -> Needs:
        return Needs(Reads(features=self.layers), Reads(logits=False, features=self.teacher_layers))

    # Before the training

    def setup(self, nets: Nets, batch: Batch) -> None:
        if batch.mask is not None:
            raise DistillError("quest reads images, and this batch is of padded sequences: use another method.")
        numbers: Counter[str | int] = Counter()
        for pair in paired(nets.student(batch), nets.teacher(batch), self.layers, self.teacher_layers):
            f_s, f_t, ours, theirs = pair
            if f_s.dim() not in (3, 4) or f_s.dim() != f_t.dim() or f_s.dim() == 3 and f_s.shape[1] != f_t.shape[1]:
                raise DistillError(
                    "quest reads maps [B, C, H, W] of any size, or tokens [B, L, C] of one number L, got"
                    f" {list(f_s.shape)} at the student's layer {ours!r} and {list(f_t.shape)} at the teacher's"
                    f" {theirs!r}: choose other layers."
                )
            if f_s.dim() == 4:
                nets.student.network.check_map(self.name, ours, f_s)
                nets.teacher.network.check_map(self.name, theirs, f_t)
            f_s, f_t = _positions(f_s, f_t)
            size = tuple(f_t.shape[2:])
            # Tokens have no place in the image that would be known here.
            image = batch.inputs.shape[2:] if isinstance(batch.inputs, Tensor) and f_t.dim() == 4 else ()
            made = Vocabulary(
                self.n_words,
                f_s.shape[1],
                f_t.shape[1],
                self.temperature,
                layer=f"{theirs}, output {numbers[theirs]}" if numbers[theirs] else str(theirs),
                size=size,
                side=patch_side(tuple(image), size) if len(image) == 2 else 0,
            )
            self.vocabularies.append(made)
            numbers[theirs] += 1

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        """Makes the words, and where it is asked for the temperature, of the teacher's features on the training set."""
        generator = self.generator() if self.seed is None else torch.Generator().manual_seed(self.seed)
        seed = int(torch.randint(2**31, (), generator=generator))
        _logger.info("%s: reading the teacher's features of the training set.", self.name)
        # Each has a stream of its own, so that a layer's words do not depend on what else is looked at.
        samples = [Sample(self.max_vectors, _random(seed)) for _ in self.vocabularies]
        images, shape, last = None, None, None
        for batch in batches:
            for sample, f_t in zip(samples, self._teacher_maps(nets, batch), strict=True):
                sample.add(f_t.flatten(2).mT.flatten(0, 1))
            # Images whose other inputs are not known by row cannot be asked again.
            if isinstance(batch.inputs, Tensor) and not (batch.kwargs or batch.teacher_kwargs):
                if images is None:
                    shape = batch.inputs.shape[1:]
                    images = Sample(max(1, min(512, _PIXELS // shape.numel())), _random(seed))
                if batch.inputs.shape[1:] == shape:
                    images.add(batch.inputs)
                    last = batch
        teacher = fingerprint_of(nets.teacher.module) if self.cache is not None else ""
        for vocabulary, sample in zip(self.vocabularies, samples, strict=True):
            if not sample.seen:
                raise DistillError("quest makes its words of the training set, and the pass over it gave no batch.")
            vectors = sample.vectors()
            _logger.info("%s: k-means of %d vectors into %d words.", self.name, len(vectors), self.n_words)
            if self.cache is None:
                made = fit_codebook(vectors, self.n_words, seed)
            else:
                place = {"layer": vocabulary.layer, "pooled to": list(vocabulary.size), "drawn of": sample.seen}
                made = cached_codebook(vectors, self.n_words, seed, self.cache, {"teacher": teacher, **place})
            vocabulary.fill(vectors, *made, self.sharpness)
            _logger.info(
                "%s: %d words of the teacher's layer %s, of %d of %d vectors; at temperature %.3g the targets' largest"
                " probability is %.2f in the mean.",
                *(self.name, self.n_words, vocabulary.layer, len(vectors), sample.seen),
                *(vocabulary.temperature.item(), vocabulary.sharpness.item()),
            )
        if images is not None and last is not None:
            shown = [last.with_inputs(part.to(last.inputs)) for part in images.vectors().split(last.size)]
            for vocabulary, found in zip(self.vocabularies, self.visual_words(nets, shown), strict=True):
                if vocabulary.side:
                    vocabulary.patches.copy_(found.images)

    def _teacher_maps(self, nets: Nets, batch: Batch) -> list[Tensor]:
        """The teacher's maps as they are quantised `[B, C_t, H, W]`, at the sizes that `setup` found."""
        features = nets.teacher(batch).features
        found = [f_t for layer in self.teacher_layers for f_t in features.select(layer)]
        maps = [_positions(f_t, f_t)[1] for f_t in found]
        sizes = [vocabulary.size for vocabulary in self.vocabularies]
        return [
            f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f, size in zip(maps, sizes, strict=True)
        ]

    # What the words are

    @torch.no_grad()
    def visual_words(
        self, nets: Nets, batches: Iterable[Batch], *, words: int = _WORDS, patches: int = _PATCHES
    ) -> list[NearestPatches]:
        """The image patches that are nearest to the words that stand for the most vectors, most first.

        Args:
            nets: The networks.
            batches: The images to look through, such as the training set.
            words: Number of words of each layer.
            patches: Number of patches of each word.

        Returns:
            For each layer, distances `[words, patches]` and images `[words, patches, 3, side, side]`; white images at
            distance inf for a layer of tokens.
        """
        found = [NearestPatches(v.codebook[v.most(words)], patches, v.side) for v in self.vocabularies]
        for batch in batches:
            images = pixels(batch)
            for vocabulary, nearest, f_t in zip(self.vocabularies, found, self._teacher_maps(nets, batch), strict=True):
                if vocabulary.side:
                    nearest.add(images, f_t)
        return found

    def pictures(self) -> list[Picture]:
        caption = (
            "The visual words that stand for the most of the teacher's features, with their number of vectors, and the"
            " patches of a sample of training images that are nearest to them: each a position of the map with its"
            " neighbours, grey beyond the image."
        )
        return [
            Images(
                f"Visual words of {vocabulary.layer}",
                {
                    f"word {number} ({int(vocabulary.counts[number]):,})": list(images)
                    for number, images in zip(vocabulary.most(_WORDS), vocabulary.patches, strict=True)
                },
                caption,
            )
            for vocabulary in self.vocabularies
            if vocabulary.side and vocabulary.patches.min() < 255
        ]

    # A step

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        pairs = paired(student, teacher, self.layers, self.teacher_layers)
        losses = [
            vocabulary(*_positions(pair.student, pair.teacher))
            for vocabulary, pair in zip(self.vocabularies, pairs, strict=True)
        ]
        return {"quest": self.weight * torch.stack(losses).sum()}


def _positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers as maps `[B, C, ...]` of the same positions; the larger is averaged down."""
    if student.dim() == 3:
        return student.mT, teacher.mT
    return KF.match_spatial(student, teacher, "pool")


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
