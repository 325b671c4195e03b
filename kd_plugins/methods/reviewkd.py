"""Distilling Knowledge via Knowledge Review."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kd_plugins import Batch, DistillError, Nets, Paper, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative, Share
from kd_plugins.distiller import Terms
from kd_plugins.layers import LayerDistiller
from kd_plugins.nn.connectors import AttentionFusion, as_weights


class ReviewKD(LayerDistiller):
    """Each teacher layer teaches the student's layer together with all deeper ones, fused from deep to shallow.

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044. From the deepest of
    the student's maps `[B, C, H, W]` to the shallowest, a trained attention-based fusion (ABF) mixes each with what the
    deeper ones give; `task + weight * sum_layers HCL(fused, teacher)`, squared distances at several resolutions (HCL).

    **Departures** ABF and HCL are as in the released code (read there), and so is the width of the fusion, the channels
    of the student's deepest map but 512 at most. That code also has the pooled embedding as a deepest map and reads
    maps before their ReLU: here the layers are those that are named.

    Args:
        layers: Student layers from shallow to deep: stage numbers (-1 is the last stage) or module paths; our default.
        weight: Weight of the sum over the layers; 1 is the released code's, whose scripts change it with the networks.
        warmup: Share of the training in which the weight grows linearly from 0; the released code has 20 of 240 epochs.
    """

    paper = Paper(
        "Distilling Knowledge via Knowledge Review",
        ("Pengguang Chen", "Shu Liu", "Hengshuang Zhao", "Jiaya Jia"),
        "CVPR",
        2021,
        arxiv="2104.09044",
    )
    example = {"layers": (-2, -1)}

    def __init__(
        self,
        *,
        layers: tuple[str | int, ...] = (-3, -2, -1),
        weight: NonNegative = 1.0,
        warmup: Share = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(**more)

    def setup(self, nets: Nets, batch: Batch) -> None:
        super().setup(nets, batch)
        pairs = self.pairs(nets.student(batch), nets.teacher(batch))
        sizes = [pair.student.shape[2] * pair.student.shape[3] for pair in pairs]
        if sizes != sorted(sizes, reverse=True):
            raise DistillError(
                f"reviewkd fuses layers from deep to shallow, and the maps of {list(self.layers)} grow from one to the"
                " next: name the layers from shallow to deep."
            )
        middle = min(512, pairs[-1].student.shape[1])
        self.fusions = nn.ModuleList(
            AttentionFusion(pair.student.shape[1], middle, pair.teacher.shape[1], deepest=number == len(pairs) - 1)
            for number, pair in enumerate(pairs)
        )

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        terms, deeper = [], None
        for pair, fusion in reversed(list(zip(self.pairs(student, teacher), self.fusions, strict=True))):
            fused, deeper = fusion(as_weights(fusion, pair.student), deeper, pair.teacher.shape[2:])
            terms.append(KF.hcl(fused, pair.teacher))
        return {self.name: self.weight * self.progress.warmed(self.warmup) * torch.stack(terms).sum()}
