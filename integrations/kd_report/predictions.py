"""What networks for segmentation predict, side by side."""

from __future__ import annotations

import colorsys

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Batch, Nets, Reads
from kd_plugins.binding import untouched
from kd_plugins.nn.patches import pixels
from kd_plugins.picture import Images

__all__ = ["predicted_maps"]


def predicted_maps(nets: Nets, batch: Batch, count: int = 4) -> Images | None:
    """The first images of a batch, their labels, and the class that each network gives to each pixel.

    Args:
        nets: The networks; they are asked in evaluation mode, without gradient.
        batch: Images `[B, 3, H, W]`, labels `[B, H', W']`, all at whose size everything is shown; ignored pixels are
            black.
        count: How many images.

    Returns:
        None where the task is not segmentation.
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
