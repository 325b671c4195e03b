"""Like What You Like: Knowledge Distill via Neuron Selectivity Transfer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from kd_plugins import Batch, DistillError, Paper
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, NonNegative, Positive
from kd_plugins.layers import LayerDistiller, Pair


class NST(LayerDistiller):
    """Matches the distributions of the networks' neuron selectivities, one sample per channel, by squared MMD.

    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219:
    `task + lambda / 2 * MMD^2(F_t, F_s)`, where every channel's map, normalised over space, is one sample.

    Maps are `[B, C, H, W]`; the numbers of channels may differ. `weight` multiplies MMD^2 itself, so it is the paper's
    `lambda / 2`, and the `kt_weight` of the released code.

    Departures: the sum over layers is not averaged; a map of another size is resized (`spatial`).

    Args:
        kernel: Kernel of the MMD: `poly` is `(x.y + c)^d`, `gaussian` is `exp(-|x - y|^2 / (2 sigma^2))`.
        weight: Weight of MMD^2 summed over the layers; 50 is the released code's for `poly`, and ours for the others.
        c: Offset of the polynomial kernel.
        d: Degree of the polynomial kernel.
        bandwidth: sigma^2 of the Gaussian kernel; by default the mean squared distance of all pairs.
        spatial: How maps of different sizes meet: `interpolate` resizes the student's to the teacher's size, `pool`
            averages the larger one down.
    """

    paper = Paper(
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        ("Zehao Huang", "Naiyan Wang"),
        "arXiv",
        2017,
        arxiv="1707.01219",
    )
    teachers = "many"

    def __init__(
        self,
        *,
        kernel: Literal["linear", "poly", "gaussian"] = "poly",
        weight: NonNegative = 50.0,
        c: float = 0.0,
        d: AtLeastOne = 2,
        bandwidth: Positive | None = None,
        spatial: Literal["interpolate", "pool"] = "interpolate",
        **layers: Any,
    ) -> None:
        super().__init__(**layers)

    def check_pair(self, pair: Pair) -> None:
        for whose, layer, f in (("student", pair.layer, pair.student), ("teacher", pair.teacher_layer, pair.teacher)):
            if f.shape[2] * f.shape[3] == 1:
                raise DistillError(
                    f"nst compares where in the image the channels respond, and the {whose}'s map at the layer"
                    f" {layer!r} has one position, {list(f.shape)}: choose an earlier layer."
                )

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        f_s, f_t = KF.match_spatial(student, teacher, self.spatial)
        return KF.nst(f_s, f_t, self.kernel, c=self.c, d=self.d, sigma2=self.bandwidth)
