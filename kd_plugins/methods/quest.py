"""QuEST: Quantized Embedding Space for Transferring Knowledge."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Nets, Paper, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import Fraction, NonNegative, Positive, Range
from kd_plugins.distiller import Terms
from kd_plugins.layers import LayerDistiller, Pair
from kd_plugins.nn.codebook import Sample, fingerprint_of
from kd_plugins.nn.patches import ImageSample, NearestPatches, patch_side, pixels
from kd_plugins.nn.vocabulary import Vocabulary
from kd_plugins.picture import Picture

_logger = logging.getLogger("kd_plugins.quest")

# The paper's words, and the different vectors that there are to be for each.
_WORDS, _LEAST = 4096, 39


class QUEST(LayerDistiller):
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
        words: K, the words of each layer; by default the paper's 4,096, or fewer where there would be less than 39
            different vectors for each, the least that faiss asks for.
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
    example = {"words": 16}

    def __init__(
        self,
        *,
        words: Annotated[int, Range(low=2)] | None = None,
        weight: NonNegative = 1.0,
        temperature: Positive | None = None,
        sharpness: Fraction | None = None,
        max_vectors: int = 200_000,
        seed: int | None = None,
        cache: str | None = None,
        **layers: Any,
    ) -> None:
        super().__init__(**layers)
        most = self.words or _WORDS
        if temperature is not None and sharpness is not None:
            raise DistillError("sharpness chooses the temperature: give one of them.")
        if sharpness is not None and sharpness <= 1 / most:
            raise DistillError(f"Expected sharpness between 1 / {most} and 1, got {sharpness}.")
        if max_vectors < most:
            raise DistillError(
                f"k-means needs at least as many vectors as words, got max_vectors={max_vectors} for {most} words:"
                " raise max_vectors, or ask for fewer words."
            )
        if temperature is None and sharpness is None:
            self.temperature = 5.0
        self.vocabularies = nn.ModuleList()

    # Before the training

    def setup(self, nets: Nets, batch: Batch) -> None:
        if batch.mask is not None:
            raise DistillError("quest reads images, and this batch is of padded sequences: use another method.")
        numbers: Counter[str | int] = Counter()
        for pair in self.pairs(nets.student(batch), nets.teacher(batch)):
            self.check_pair(pair)
            theirs = pair.teacher_layer
            if pair.student.dim() == 4:
                nets.student.network.check_map(self.name, pair.layer, pair.student)
                nets.teacher.network.check_map(self.name, theirs, pair.teacher)
            f_s, f_t = _positions(pair.student, pair.teacher)
            size = tuple(f_t.shape[2:])
            # Tokens have no place in the image that would be known here.
            image = batch.inputs.shape[2:] if isinstance(batch.inputs, Tensor) and f_t.dim() == 4 else ()
            made = Vocabulary(
                self.words or _WORDS,
                f_s.shape[1],
                f_t.shape[1],
                layer=f"{theirs}, output {numbers[theirs]}" if numbers[theirs] else str(theirs),
                size=size,
                side=patch_side(tuple(image), size) if len(image) == 2 else 0,
            )
            if self.temperature is not None:
                made.temperature.fill_(self.temperature)
            self.vocabularies.append(made)
            numbers[theirs] += 1

    def check_pair(self, pair: Pair) -> None:
        f_s, f_t = pair.student, pair.teacher
        if f_s.dim() not in (3, 4) or f_s.dim() != f_t.dim() or f_s.dim() == 3 and f_s.shape[1] != f_t.shape[1]:
            raise DistillError(
                "quest reads maps [B, C, H, W] of any size, or tokens [B, L, C] of one number L, got"
                f" {list(f_s.shape)} at the student's layer {pair.layer!r} and {list(f_t.shape)} at the teacher's"
                f" {pair.teacher_layer!r}: choose other layers."
            )

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        """Makes the words, and where it is asked for the temperature, of the teacher's features on the training set."""
        generator = self.host.generator() if self.seed is None else _random(self.seed)
        seed = int(torch.randint(2**31, (), generator=generator))
        _logger.info("%s: reading the teacher's features of the training set.", self.name)
        # Each has a stream of its own, so that a layer's words do not depend on what else is looked at.
        samples = [Sample(self.max_vectors, _random(seed)) for _ in self.vocabularies]
        images = ImageSample(_random(seed))
        for batch in batches:
            images.add(batch)
            for sample, f_t in zip(samples, self._teacher_maps(nets, batch), strict=True):
                sample.add(f_t.flatten(2).mT.flatten(0, 1))
        teacher = fingerprint_of(nets.teacher.module) if self.cache is not None else ""
        for vocabulary, sample in zip(self.vocabularies, samples, strict=True):
            _logger.info("%s: k-means of %d vectors.", self.name, min(sample.seen, self.max_vectors))
            made = vocabulary.fit(sample, seed, self.sharpness, self.cache, teacher, 0 if self.words else _LEAST)
            _logger.info("%s: %s", self.name, made)
        for vocabulary, found in zip(self.vocabularies, self.visual_words(nets, images.batches()), strict=True):
            if vocabulary.side:
                vocabulary.patches[: len(found.images)].copy_(found.images)

    def _teacher_maps(self, nets: Nets, batch: Batch) -> list[Tensor]:
        """The teacher's maps as they are quantised `[B, C_t, H, W]`, at the sizes that `setup` found."""
        features = nets.teacher(batch).features
        found = [f_t for layer in self.teacher_layers for f_t in features.select(layer)]
        maps = [_positions(f_t, f_t)[1] for f_t in found]
        sizes = [vocabulary.size for vocabulary in self.vocabularies]
        return [
            f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f, size in zip(maps, sizes, strict=True)
        ]

    # A step

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        pairs = zip(self.vocabularies, self.pairs(student, teacher), strict=True)
        losses = [vocabulary(*_positions(pair.student, pair.teacher), self.temperature) for vocabulary, pair in pairs]
        return {"quest": self.weight * torch.stack(losses).sum()}

    # What the report shows

    @torch.no_grad()
    def visual_words(
        self, nets: Nets, batches: Iterable[Batch], *, words: int = 8, patches: int = 8
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
        found = [vocabulary.search(words, patches) for vocabulary in self.vocabularies]
        for batch in batches if any(nearest.side for nearest in found) else ():
            images = pixels(batch)
            for nearest, f_t in zip(found, self._teacher_maps(nets, batch), strict=True):
                if nearest.side:
                    nearest.add(images, f_t)
        return found

    def pictures(self) -> list[Picture]:
        made = [vocabulary.picture() for vocabulary in self.vocabularies]
        return [picture for picture in made if picture is not None]


def _positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers as maps `[B, C, ...]` of the same positions; the larger is averaged down."""
    if student.dim() == 3:
        return student.mT, teacher.mT
    return KF.match_spatial(student, teacher, "pool")


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
