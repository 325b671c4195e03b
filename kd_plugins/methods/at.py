"""Paying More Attention to Attention: attention transfer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_plugins import Batch, Paper
from kd_plugins.catalog.values import AtLeastOne, NonNegative
from kd_plugins.functional.at import at
from kd_plugins.layers import LayerDistiller


class AT(LayerDistiller):
    """The student responds where in the image the teacher responds, whatever their numbers of channels.

    Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer", ICLR 2017, arXiv 1612.03928, section 3.1, eq. 2, on activations: of maps
    `[B, C, H, W]`, `task + beta / 2 * sum_layers |Q_s / |Q_s| - Q_t / |Q_t||` with `Q = sum_c |A_c|^p`.

    **Departures** The mean square of the difference, as in the released code (read there), whose beta is `weight`. The
    larger of two attention maps is averaged down to the other's size. The gradient-based form is left out.

    Args:
        p: Exponent of the activations; the paper's choice is 2.
        weight: Weight of the sum over the layers; the paper's 10^3, of a mean over examples and positions.
    """

    paper = Paper(
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention"
        " Transfer",
        ("Sergey Zagoruyko", "Nikos Komodakis"),
        "ICLR",
        2017,
        arxiv="1612.03928",
    )
    teachers = "many"

    def __init__(self, *, p: AtLeastOne = 2, weight: NonNegative = 1000.0, **layers: Any) -> None:
        super().__init__(**layers)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        return at(student, teacher, self.p)
