"""Contrastive Representation Distillation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Needs, Nets, Paper, Reads
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, NonNegative, Positive, Share
from kd_plugins.layers import LayerDistiller
from kd_plugins.nn.bank import PairMemory

_AUTHORS = ("Yonglong Tian", "Dilip Krishnan", "Phillip Isola")
_ROWS = "crd remembers the training set by row: give Batch.of(..., index=row numbers, rows=M)."


class CRD(LayerDistiller):
    """The two networks' embeddings of an input are to be told apart from those of many other inputs.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699: heads embed both
    networks' layers (vectors `[B, C]`, means of maps `[B, C, H, W]` and of the real tokens of `[B, L, C]`) with length
    1, and memories hold the embeddings of all M rows of the training set. `task + weight * sum_sides (-log h(own,
    other's) - sum over N rows of log(1 - h))`, with the critic `h = e / (e + N / M)`, `e = exp(cosine / temperature)`.

    **Departures** e is divided by a constant that the first step estimates, as in the released code (read there). Its
    positive is the memory's, here this step's; the memory is updated first. Negatives are drawn with replacement.

    Args:
        negatives: N for each example; not more than there are rows.
        others: `classes` draws negatives of other classes (as far as they have been seen), `rows` any other rows.
        dim: Length of the embeddings.
        temperature: tau.
        momentum: Share of the old vector in a row's new one.
        normalize: Whether e is divided by its mean times M; the paper's critic is not, and begins at thousands.
        weight: Weight of both sides; 0.8 is the authors'.
    """

    paper = Paper("Contrastive Representation Distillation", _AUTHORS, "ICLR", 2020, arxiv="1910.10699")
    maps = False

    def __init__(
        self,
        *,
        negatives: AtLeastOne = 16384,
        others: Literal["classes", "rows"] = "classes",
        dim: AtLeastOne = 128,
        temperature: Positive = 0.07,
        momentum: Share = 0.5,
        normalize: bool = True,
        weight: NonNegative = 0.8,
        **layers: Any,
    ) -> None:
        super().__init__(**layers)

    def needs(self) -> Needs:
        return super().needs() | Needs(teacher=Reads(logits=False), index=True)

    def setup(self, nets: Nets, batch: Batch) -> None:
        if not batch.rows:
            raise DistillError(_ROWS)
        self.rows, self.size = batch.rows, batch.size
        super().setup(nets, batch)

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if not len(student) == len(teacher) == self.size:
            raise DistillError(
                f"crd remembers one vector of each example, got {len(student)} and {len(teacher)} of {self.size} at its"
                " layers: take layers of whole examples, which a model that reads each choice as a row has not."
            )
        return PairMemory([KF.embedding(x).shape[1] for x in (student, teacher)], self.dim, self.rows, self.normalize)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        if batch.index is None:
            raise DistillError(_ROWS)
        classes = batch.labels if self.others == "classes" else batch.index
        if not isinstance(classes, Tensor) or classes.dim() != 1 or classes.is_floating_point():
            raise DistillError("crd draws rows of other classes, and the labels are no classes [B]: take others=rows.")
        ours, theirs = KF.embedding(student, batch.mask), KF.embedding(teacher, batch.teacher_mask)
        sides: list[tuple[Tensor, Tensor, Tensor]] = part(ours, theirs, batch.index, classes.long(), self.momentum)
        rows = part.others.draw(classes.long(), min(self.negatives, self.rows), self.host.generator(student.device))
        tau, log_z = self.temperature, part.log_z
        if log_z.isnan().any():
            first = torch.stack([KF.crd_log_z(own, bank, rows, temperature=tau) for own, _, bank in sides])
            log_z.copy_(self.host.mean(first))
        terms = [KF.crd(*side, rows, temperature=tau, log_z=z) for side, z in zip(sides, log_z, strict=True)]
        return torch.stack(terms).sum()
