"""Scikit-learn's handwritten digits as an image data set: real images that are on every machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from kd_plugins.errors import DistillError, told

# What timm's flags default to for this data set; timm itself would take the size and the classes of ImageNet.
DIGITS_DEFAULTS: dict[str, Any] = {"num_classes": 10, "img_size": 32, "crop_pct": 1.0}

_SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("validation", "val", "valid", "eval", "test"), "val")


class Digits(Dataset[tuple[Any, int]]):
    """The 1,797 digits of the UCI test set (8 x 8, 16 grey levels), split once and for all into 1,297 and 500.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998. The split
    is stratified by class and does not depend on any seed. Images are enlarged to 32 x 32 so that networks with strides
    and timm's random crops have something to work on.

    Args:
        split: `"train"` or `"validation"` (`"val"`, `"test"`), or a part as `datasets` writes one: `"train[:100]"`,
            `"train[10%:]"`; rows are in a fixed mixed order.
        mode: PIL mode of the images, `"RGB"` or `"L"`.
        transform: Applied to the PIL image; timm's loader sets it.
    """

    classes: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str = "train", mode: str = "RGB", transform: Callable[[Any], Any] | None = None) -> None:
        name, _, part = split.partition("[")
        if name not in _SPLITS:
            raise DistillError(f"Expected the digits' split train or validation, got {split!r}: name one of the two.")
        with told(f"--input-img-mode {mode}", ValueError, remedy="name a mode of PIL, as L or RGB."):
            images, targets, splits = _digits(mode)
        rows = splits[_SPLITS[name]]
        rows = rows[_part(split, len(rows))] if part else rows
        self.images, self.targets = [images[i] for i in rows], targets[rows].tolist()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image, self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


@cache
def _digits(mode: str) -> tuple[list[Image.Image], np.ndarray, dict[str, np.ndarray]]:
    """All images, enlarged, in one mode; their classes; and the rows of each split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, targets = load_digits(return_X_y=True)
    train, held_out = train_test_split(np.arange(len(targets)), test_size=500, stratify=targets, random_state=0)
    grey = (values.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC) for i in grey]
    return [image.convert(mode) for image in large], targets, {"train": train, "val": held_out}


def _part(split: str, rows: int) -> slice:
    """The rows that `name[a:b]` means of so many."""
    from datasets import ReadInstruction

    with told(f"Expected a part of the digits such as train[:100] or train[10%:], got {split!r}", Exception):
        (found,) = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: rows})
    # What is beyond the last row would be cut without a word.
    if "%" not in split and any(int(bound) > rows for bound in re.findall(r"\d+", split.partition("[")[2])):
        raise DistillError(f"Expected a part of the digits, got {split!r}: this split has {rows:,} images.")
    if found.from_ >= found.to:
        raise DistillError(f"Expected a part of the digits with images in it, got {split!r}: there are {rows}.")
    return slice(found.from_, found.to)
