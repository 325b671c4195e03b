"""The visual words of one layer of a teacher, and a student's predictor of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins import functional as KF
from kd_plugins.errors import DistillError
from kd_plugins.nn.codebook import Sample, cached_codebook, fit_codebook
from kd_plugins.nn.patches import NearestPatches
from kd_plugins.picture import Images

# Vectors that the temperature is chosen on.
_CALIBRATION = 2048
# The report's picture: words, and patches of each.
_WORDS, _PATCHES = 8, 8


class Vocabulary(nn.Module):
    """The words of one layer of the teacher, and the student's predictor of them.

    Args:
        words: K, the most words there may be.
        student_channels: C_s.
        teacher_channels: C_t.
        temperature: Multiplies the squared distances of the targets.
        layer: The teacher's layer, in words.
        size: Height and width of the teacher's map as it is quantised, or its number of tokens.
        side: Height and width of the patches that show a word; 0 without patches.

    Attributes:
        codebook: The words `[K, C_t]`; the last may be unused, and are 0.
        counts: How many of the vectors that k-means saw each word stands for `[K]`; 0 also where it is unused.
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
        temperature: float = 5.0,
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
        self._used = 0  # read from the words once, since that waits for the device

    def fit(
        self,
        sample: Sample,
        seed: int,
        sharpness: float | None = None,
        cache: str | None = None,
        teacher: str = "",
        least: int = 0,
    ) -> str:
        """Makes the words of a sample of the teacher's vectors, and the temperature that makes them that sharp.

        Args:
            sample: Of the vectors `[N, C_t]`.
            seed: Of k-means.
            sharpness: The mean of the targets' largest probability, in place of the temperature.
            cache: Folder of codebooks.
            teacher: What tells the teacher from others there.
            least: Different vectors that there are to be for each word, or there are fewer words.

        Returns:
            What has been made, in words.
        """
        if not sample.seen:
            raise DistillError("quest makes its words of the training set, and the pass over it gave no batch.")
        vectors, words = sample.vectors(), len(self.codebook)
        if cache is None:
            codebook, counts = fit_codebook(vectors, words, seed, least)
        else:
            place = {"layer": self.layer, "pooled to": list(self.size), "drawn of": sample.seen}
            codebook, counts = cached_codebook(vectors, words, seed, cache, {"teacher": teacher, **place}, least)
        words = len(codebook)
        self.codebook.zero_()[:words].copy_(codebook)
        self.counts.zero_()[:words].copy_(counts)
        self._used = words
        few = vectors[:_CALIBRATION]
        if sharpness is not None:
            self.temperature.fill_(KF.match_sharpness(few, codebook, sharpness))
        self.sharpness.copy_(KF.soft_assignment(few, codebook, self.temperature.cpu()).amax(1).mean())
        return (
            f"{words} words of the teacher's layer {self.layer}, of {len(vectors)} of {sample.seen} vectors; at"
            f" temperature {self.temperature.item():.3g} the targets' largest probability is"
            f" {self.sharpness.item():.2f} in the mean."
        )

    def forward(self, student_map: Tensor, teacher_map: Tensor, temperature: float | None = None) -> Tensor:
        """The divergence of the predicted words from the teacher's, of maps of the same positions."""
        given = self.temperature if temperature is None else temperature
        self._used = self._used or self._made()
        weight, codebook = self.weight[: self._used], self.codebook[: self._used]
        return KF.quest(student_map, teacher_map, weight, self.scale, codebook, given)

    def _made(self) -> int:
        """How many words there are; k-means may leave one that stands for no vector among them."""
        made = (self.counts > 0) | self.codebook.any(1)
        return int(made.nonzero().max()) + 1 if made.any() else len(made)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._used = 0

    def most(self, words: int = _WORDS) -> list[int]:
        """The words that stand for the most vectors, most first."""
        found = min(words, int(self.counts.count_nonzero()))
        return self.counts.argsort(descending=True, stable=True)[:found].tolist()

    def search(self, words: int = _WORDS, patches: int = _PATCHES) -> NearestPatches:
        """What looks for the patches that are nearest to the words that stand for the most vectors."""
        return NearestPatches(self.codebook[self.most(words)], patches, self.side)

    def picture(self) -> Images | None:
        """The words that stand for the most vectors, by the patches that were found; None where there are none."""
        if not self.side or self.patches.min() == 255:
            return None
        rows = {
            f"word {number} ({int(self.counts[number]):,})": list(images)
            for number, images in zip(self.most(), self.patches, strict=False)
        }
        return Images(
            f"Visual words of {self.layer}",
            rows,
            "The visual words that stand for the most of the teacher's features, with their number of vectors, and the"
            " patches of a sample of training images that are nearest to them: each a position of the map with its"
            " neighbours, grey beyond the image.",
        )
