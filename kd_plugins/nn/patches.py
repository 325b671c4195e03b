"""Image patches whose feature vectors are nearest to given ones: a picture of what a visual word stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.nn.codebook import Sample
from kd_plugins.reading.view import Batch

# A patch shows its position with the neighbours on both sides.
_CELLS = 3
# The grey of what is beyond the image.
_BEYOND = 128
# The most images of a sample, and the most numbers in them.
_IMAGES, _NUMBERS = 512, 2**25


class ImageSample:
    """A uniform sample of the images of a stream of batches: of those that have the shape of the first.

    Images whose batch has other inputs beside them are left out: these are not known by row.

    Args:
        generator: Where the random numbers come from.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._sample: Sample | None = None
        self._shape, self._last = torch.Size(), Batch()

    def add(self, batch: Batch) -> None:
        """Takes the images `[B, C, H, W]` of a batch."""
        if not isinstance(batch.inputs, Tensor) or batch.kwargs or batch.teacher_kwargs:
            return
        if self._sample is None:
            self._shape = batch.inputs.shape[1:]
            self._sample = Sample(max(1, min(_IMAGES, _NUMBERS // self._shape.numel())), self._generator)
        if batch.inputs.shape[1:] == self._shape:
            self._sample.add(batch.inputs)
            self._last = batch

    def batches(self) -> list[Batch]:
        """The sample, in batches as large as the last one was."""
        if self._sample is None:
            return []
        parts = self._sample.vectors().split(self._last.size)
        return [self._last.with_inputs(part.to(self._last.inputs)) for part in parts]


class NearestPatches:
    """Finds, in a stream of images, the patches that are nearest to some words, one of an image for each word at most.

    Args:
        words: Feature vectors `[W, C]`.
        count: P, the number of patches of a word.
        side: Height and width of a patch in pixels.

    Attributes:
        distances: Squared distances of the patches found `[W, P]`, nearest first; inf where there are fewer.
        images: The patches `[W, P, 3, side, side]`, 0 to 255.
    """

    def __init__(self, words: Tensor, count: int, side: int) -> None:
        self.words, self.side = words.float(), side
        self.distances = torch.full((len(words), count), torch.inf)
        self.images = torch.full((len(words), count, 3, side, side), 255, dtype=torch.uint8)

    def add(self, images: Tensor, maps: Tensor) -> None:
        """Looks at further images.

        Args:
            images: `[B, 3, H, W]`, 0 to 255.
            maps: Their feature maps `[B, C, h, w]`.
        """
        (height, width), (rows, columns) = images.shape[2:], maps.shape[2:]
        vectors = maps.float().flatten(2).mT.to(self.words.device)
        found, places = torch.cdist(vectors, self.words, compute_mode="donot_use_mm_for_euclid_dist").square().min(1)
        found, places = found.mT.cpu(), places.mT.cpu()
        kept = self.distances.shape[1]
        self.distances, chosen = torch.cat([self.distances, found], 1).topk(kept, largest=False)
        before, margin = self.images.clone(), self.side // 2
        padded = F.pad(images, [margin, self.side] * 2, value=_BEYOND)
        for word, row in enumerate(chosen.tolist()):
            for rank, index in enumerate(row):
                if index < kept:
                    self.images[word, rank] = before[word, index]
                    continue
                i, j = divmod(int(places[word, index - kept]), columns)
                top, left = int((i + 0.5) * height / rows), int((j + 0.5) * width / columns)
                patch = padded[index - kept, :, top : top + self.side, left : left + self.side]
                self.images[word, rank] = patch


def patch_side(image: tuple[int, ...], size: tuple[int, ...]) -> int:
    """The side of a patch in pixels, for images and maps of these heights and widths.

    >>> patch_side((32, 32), (8, 8)), patch_side((32, 32), (1, 1))
    (12, 32)
    """
    return min(*image, max(1, round(_CELLS * max(i / s for i, s in zip(image, size, strict=True)))))


def pixels(batch: Batch) -> Tensor:
    """The images of a batch as pixels `[B, 3, H, W]`, 0 to 255; each in its own range where that is not known."""
    assert batch.inputs is not None
    images = batch.inputs.detach().float().cpu()
    known = [torch.as_tensor(x, dtype=torch.float32).cpu().flatten() for x in (batch.mean, batch.std) if x is not None]
    if len(known) == 2 and all(len(x) in (1, images.shape[1]) for x in known):
        mean, std = (x.view(1, -1, 1, 1) for x in known)
        images = images * std + mean
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    images = (255 * images).round().clamp(0, 255).to(torch.uint8)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Images or maps `[B, C, H, W]` averaged down to a longest side; smaller ones as they are."""
    scale = side / max(images.shape[2:])
    return images if scale >= 1 else F.adaptive_avg_pool2d(images, [max(round(n * scale), 1) for n in images.shape[2:]])
