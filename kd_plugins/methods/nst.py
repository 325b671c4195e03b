"""Like What You Like: Knowledge Distill via Neuron Selectivity Transfer."""

from __future__ import annotations

from typing import Literal

from kd_plugins import functional as KF
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller, Terms
from kd_plugins.errors import DistillError
from kd_plugins.reading.nets import Nets
from kd_plugins.reading.view import Batch, Needs, Reads, View, paired

__all__ = ["NST"]


class NST(Distiller):
    """Matches the distributions of the networks' neuron selectivities, one sample per channel, by squared MMD.

    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219:
    `task + lambda / 2 * MMD^2(F_t, F_s)`, where every channel's map, normalised over space, is one sample.

    Maps are `[B, C, H, W]`; the numbers of channels may differ. `weight` multiplies MMD^2 itself, so it is the paper's
    `lambda / 2`, and the `kt_weight` of the released code.

    Departures: the sum over layers is not averaged; a map of another size is resized (`spatial`).

    Args:
        layers: Student layers: stage numbers (-1 is the last stage) or module paths.
        teacher_layers: Teacher layers, in the same order; the same names by default.
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
    tasks = ("classification", "multilabel", "segmentation", "detection", "regression", "other")

    def __init__(
        self,
        *,
        layers: tuple[str | int, ...] = (-1,),
        teacher_layers: tuple[str | int, ...] | None = None,
        kernel: Literal["linear", "poly", "gaussian"] = "poly",
        weight: float = 50.0,
        c: float = 0.0,
        d: int = 2,
        bandwidth: float | None = None,
        spatial: Literal["interpolate", "pool"] = "interpolate",
    ) -> None:
        super().__init__()
        self.layers = layers
        self.teacher_layers = layers if teacher_layers is None else teacher_layers
        if len(self.layers) != len(self.teacher_layers) or not self.layers:
            raise DistillError(
                f"Expected as many teacher_layers as layers, got {list(self.layers)} and {list(self.teacher_layers)}."
            )
        if weight < 0 or d < 1 or (bandwidth is not None and bandwidth <= 0):
            raise DistillError(
                f"Expected weight from 0, d from 1 and bandwidth above 0, got {weight}, {d} and {bandwidth}."
            )
        self.kernel, self.weight, self.c, self.d = kernel, weight, c, d
        self.bandwidth, self.spatial = bandwidth, spatial

    def needs(self) -> Needs:
        return Needs(Reads(features=self.layers), Reads(logits=False, features=self.teacher_layers))

    def setup(self, nets: Nets, batch: Batch) -> None:
        for pair in paired(nets.student(batch), nets.teacher(batch), self.layers, self.teacher_layers):
            read = (nets.student, pair.layer, pair.student), (nets.teacher, pair.teacher_layer, pair.teacher)
            for net, layer, found in read:
                net.network.check_map(self.name, layer, found)
                if found.shape[2] * found.shape[3] == 1:
                    raise DistillError(
                        f"nst compares where in the image the channels respond, and the map at the layer {layer!r} of"
                        f" {type(net.module).__name__} has one position, {list(found.shape)}: choose an earlier layer."
                    )

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        distance = 0.0
        for f_s, f_t, *_ in paired(student, teacher, self.layers, self.teacher_layers):
            f_s, f_t = KF.match_spatial(f_s, f_t, self.spatial)
            distance = distance + KF.nst(f_s, f_t, self.kernel, c=self.c, d=self.d, sigma2=self.bandwidth)
        return {"nst": self.weight * distance}
