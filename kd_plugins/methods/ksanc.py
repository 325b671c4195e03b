"""Knowledge Squeezed Adversarial Network Compression."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Needs, Nets, OptimSpec, Paper, Stage, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, Fraction, NonNegative
from kd_plugins.distiller import Terms, Turn
from kd_plugins.errors import check_any, check_built
from kd_plugins.layers import LayerDistiller, Pair
from kd_plugins.nn.descriptors import AttentionEstimator, LogitDiscriminator


class KSANC(LayerDistiller):
    """Squeezes layers of both networks to small descriptors by attention and compares those, beside the logits.

    After Shu, Li, Xie, Qu, Dai, Ma, "Knowledge Squeezed Adversarial Network Compression", 2019, arXiv 1904.05100. Of
    each pair of layers, maps `[B, C, H, W]` or tokens `[B, L, C]`, and of the logits `z` `[B, K]` attention estimators
    make the descriptors `V` `[B, D]`; a discriminator D sees logits and says "teacher's" and the class, 1 + K numbers:

    `task + weight * sum_layers |V_s - V_t|^2 + logit_weight * mean (z_s - z_t)^2
    + adversarial_weight * (-log D(z_s) + class_weight * CE(y, D(z_s)))`, and for D
    `-log D(z_t) - log(1 - D(z_s)) - fooled * log D(z_s) + l1 * |w_D|_1 + l2 * |w_D|_2^2
    + class_weight * (CE(y, D(z_t)) + CE(y, D(z_s)))`, which moves first in each step.

    The training has two stages. In the first the teacher's estimators alone learn, each to tell the classes from its
    descriptor by a linear head of its own; then they are frozen, and the student's learn with the student. So what the
    student should reach is informative and stands still: nothing is gained by descriptors that say nothing.

    **Departures** Inspired by the paper: there is no public code, and its weights, schedule and estimator's form are
    not known to us; all defaults are ours. The attention score is `w . tanh(F_n + U z)`: without the tanh, in the
    additive form of Jetley et al. (ICLR 2018, arXiv 1804.02391), what the logits add is the same at all positions and
    falls out of the softmax. The V have length 1, and all logits are divided by the root mean square of the teacher's
    in the first batch where that is above 1: a sure teacher's squared distances are in the hundreds. A mean over K in
    place of the sum; the student's own task loss; the first stage; `-log D` in place of `log(1 - D)`; D's widths are
    those of Belagiannis et al. (2018, arXiv 1803.10750) as far as known to us.

    Args:
        weight: Weight of the descriptors' distance summed over the layers; 0 leaves out estimators and first stage.
        logit_weight: Weight of the logits' distance; 0 leaves it out.
        adversarial_weight: Weight of the adversarial loss; 0 leaves out the discriminator.
        task_weight: Weight of the task loss; at 0 labels come in by the discriminator's classes alone.
        dim: D, the length of a descriptor; by default the number of classes.
        estimator_share: Share of the training that the teacher's estimators learn in.
        hidden: Widths of the discriminator.
        fooled: Weight of the student's logits labelled as the teacher's, of which the discriminator grows less sure.
        l1: Weight of the absolute values of the discriminator's parameters.
        l2: Weight of their squares.
        class_weight: Weight of the discriminator's classes; 0, or a batch without labels, leaves them out.
    """

    paper = Paper(
        "Knowledge Squeezed Adversarial Network Compression",
        ("Changyong Shu", "Peng Li", "Yuan Xie", "Yanyun Qu", "Longquan Dai", "Lizhuang Ma"),
        "arXiv",
        2019,
        arxiv="1904.05100",
    )
    tasks = ("classification",)
    maps = False

    def __init__(
        self,
        *,
        weight: NonNegative = 1.0,
        logit_weight: NonNegative = 3.0,
        adversarial_weight: NonNegative = 0.1,
        task_weight: NonNegative = 1.0,
        dim: AtLeastOne | None = None,
        estimator_share: Fraction = 0.1,
        hidden: tuple[AtLeastOne, ...] = (128, 256, 128),
        fooled: NonNegative = 0.5,
        l1: NonNegative = 1e-5,
        l2: NonNegative = 1e-4,
        class_weight: NonNegative = 1.0,
        **layers: Any,
    ) -> None:
        super().__init__(**layers)
        check_any(self, "weight", "logit_weight", "adversarial_weight")
        self.outputs = 0  # of the discriminator
        self.estimators, self.heads = nn.ModuleList(), nn.ModuleList()
        self.register_buffer("scale", torch.ones(()))

    # Parts, stages and groups of parameters

    def needs(self) -> Needs:
        return super().needs() | Needs() if self.weight else Needs()

    def setup(self, nets: Nets, batch: Batch) -> None:
        logits = nets.teacher(batch).logits
        ours, theirs = list(nets.student(batch).logits.shape), list(logits.shape)
        if ours != theirs or len(ours) != 2 or ours[1] < 2 or batch.task not in self.tasks:
            raise DistillError(
                f"ksanc compares logits [B, K] of the same K >= 2 classes, got {ours} from the student and {theirs}"
                f" from the teacher of the task {batch.task}: use classifiers with one label for each example."
            )
        self.classes = ours[1]
        self.scale = self.host.mean(logits.float().square().mean()).sqrt().clamp_min(1)
        if self.weight:
            super().setup(nets, batch)
        if self.adversarial_weight:
            self.outputs = 1 + (self.classes if self.class_weight else 0)
            self.discriminator = LogitDiscriminator(self.classes, self.hidden, self.outputs)

    def check_pair(self, pair: Pair) -> None:
        if not {pair.student.dim(), pair.teacher.dim()} <= {3, 4}:
            raise DistillError(
                f"ksanc reads maps [B, C, H, W] or tokens [B, L, C], got {list(pair.student.shape)} at {pair.layer!r}"
                f" and {list(pair.teacher.shape)} at the teacher's {pair.teacher_layer!r}: choose another layer."
            )

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        dim, (ours, theirs) = self.dim or self.classes, (x.shape[1 if x.dim() == 4 else 2] for x in (student, teacher))
        self.estimators.append(AttentionEstimator(theirs, self.classes, dim))
        self.heads.append(nn.Linear(dim, self.classes))
        return AttentionEstimator(ours, self.classes, dim)

    def stages(self) -> list[Stage]:
        first = Stage("estimators", self.estimator_share, ends_with="estimators")
        return [first, Stage("distill", 1 - self.estimator_share)] if self.weight else super().stages()

    def extras(self) -> dict[str, nn.Module]:
        first: dict[str, nn.Module] = {"estimators": nn.ModuleList([self.estimators, self.heads])} if self.heads else {}
        return first | ({"discriminator": self.discriminator} if self.outputs else {})

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam: 3e-3 for estimators, 1e-4 along the student's curve for the discriminator; our default."""
        estimators = {"estimators": OptimSpec("Adam", 3e-3)} if self.weight else {}
        judge = {"discriminator": OptimSpec("Adam", 1e-4, schedule="student")} if self.adversarial_weight else {}
        return estimators | judge

    # A step

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        check_built(self, weight=self.heads, adversarial_weight=self.outputs, class_weight=self.outputs != 1)
        if self.weight and self.progress.stage == 0:
            yield {"estimators": self.informed(nets.teacher(batch), batch)}
            return
        student, teacher = nets.student(batch), nets.teacher(batch)
        if self.adversarial_weight:
            yield {"discriminator": self.judged(student, teacher, batch)}
        yield {"student": {**self.task(student, batch), **self.loss(student, teacher, batch)}}

    def informed(self, teacher: View, batch: Batch) -> Terms:
        """How well each of the teacher's descriptors tells the classes: the labels, or without those the teacher's."""
        labels = _labels(teacher, batch)
        labels = teacher.logits.float().softmax(1) if labels is None else labels
        said = [head(v) for head, v in zip(self.heads, self.descriptors(teacher, batch, teacher=True), strict=True)]
        return {f"classes_{i}": _classified(scores, labels=labels) for i, scores in enumerate(said)}

    def descriptors(self, view: View, batch: Batch, *, teacher: bool = False) -> list[Tensor]:
        """The descriptors of all layers of one network, each `[B, D]`."""
        estimators = self.estimators if teacher else self.connectors
        found = [x for name in (self.teacher_layers if teacher else self.layers) for x in view.features.select(name)]
        scores, mask = self.scores(view), batch.teacher_mask if teacher else batch.mask
        return [estimator(x, scores, mask) for estimator, x in zip(estimators, found, strict=True)]

    def scores(self, view: View) -> Tensor:
        """The logits `[B, K]` in the teacher's scale, in float32."""
        return view.logits.float() / self.scale

    def judged(self, student: View, teacher: View, batch: Batch) -> Terms:
        """The discriminator's loss with its regularisers."""
        real, fake = (self.discriminator(self.scores(view).detach()) for view in (teacher, student))
        absolute, squares = self.discriminator.norms()
        terms = {
            "tell": (1.0, KF.gan_discriminator(real[:, 0], fake[:, 0])),
            "fooled": (self.fooled, KF.gan_generator(fake[:, 0])),
            "l1": (self.l1, absolute),
            "l2": (self.l2, squares),
            "classes": (self.class_weight, _classified(real[:, 1:], fake[:, 1:], labels=_labels(student, batch))),
        }
        return {name: weight * term for name, (weight, term) in terms.items() if weight}

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        terms: Terms = {}
        if self.weight:
            with torch.no_grad():
                targets = self.descriptors(teacher, batch, teacher=True)
            ours = torch.stack(self.descriptors(student, batch))
            terms["descriptors"] = self.weight * (ours - torch.stack(targets)).square().sum(2).mean(1).sum()
        if self.logit_weight:
            terms["logits"] = self.logit_weight * KF.feature_l2(self.scores(student), self.scores(teacher))
        if self.adversarial_weight:
            fake = self.discriminator(self.scores(student))
            classes = self.class_weight * _classified(fake[:, 1:], labels=_labels(student, batch))
            terms["adversarial"] = self.adversarial_weight * (KF.gan_generator(fake[:, 0]) + classes)
        return terms


def _labels(view: View, batch: Batch) -> Tensor | None:
    """Class numbers `[B]` or shares of the classes `[B, K]`; None without labels."""
    labels, shape = batch.labels, view.logits.shape
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.shape != (shape if labels.is_floating_point() else shape[:1]):
        raise DistillError(
            f"ksanc takes class numbers [B] or shares of the classes [B, K] as labels, got"
            f" {getattr(labels, 'shape', labels)} with logits {shape}: give such labels, or none."
        )
    # Bytes have no -100.
    return labels if labels.is_floating_point() else labels.long().masked_fill(labels == batch.ignore_index, -100)


def _classified(*said: Tensor, labels: Tensor | None) -> Tensor:
    """The cross entropy of scores of the classes, in the mean over the examples that have one; 0 without any."""
    if labels is None or not said[0].shape[1]:
        return said[0].new_zeros(())
    counted = len(labels) if labels.is_floating_point() else (labels != -100).sum().clamp_min(1)
    return torch.stack([F.cross_entropy(scores, labels, reduction="sum") for scores in said]).sum() / counted
