"""Structured Knowledge Distillation for Dense Prediction."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd_plugins import Batch, DistillError, Needs, Nets, OptimSpec, Paper, Reads, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, NonNegative
from kd_plugins.distiller import Terms, Turn
from kd_plugins.errors import check_any, check_built
from kd_plugins.layers import DENSE_TASKS, LayerDistiller, Pair
from kd_plugins.nn.discriminators import Critic
from kd_plugins.reading.scores import class_scores, score_maps


class Structured(LayerDistiller):
    """Matches the teacher's map pixel by pixel, by similarities of patches, and by a critic that sees it as a whole.

    Liu, Chen, Liu, Qin, Luo, Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019; Liu, Shu,
    Wang, Shen, "Structured Knowledge Distillation for Dense Prediction", TPAMI 2020, arXiv 1903.04197. With scores
    `[B, K, H, W]`, probabilities Q and the image I,
    `task + pixel * L_pi + pair * sum_layers L_pa - holistic * E[D(Q_s | I)]`; each term may be on alone (weights of 0):

    - pixel-wise: `KL(q_t || q_s)` of each pixel whose label is not ignored (`KF.structured_pixel`);
    - pair-wise: cosine similarities between all patches of a map of features (`KF.structured_pair`);
    - holistic: a critic D (group `critic`), trained by `E[D(Q_s | I)] - E[D(Q_t | I)] + penalty * GP` (`KF.wgan_gp`).

    One forward of each network serves all. The gradients of student and critic are taken before either moves, which is
    the released code's order: the student's step, then the critic's on the outputs from before it. Maps of depth
    `[B, H, W]` or `[B, 1, H, W]` have no class probabilities (`pixel=0`), and the critic sees them as they are; a
    detector has the pair-wise term alone (`pixel=0 holistic=0`), at each level of its pyramid that `layers` names.

    **Departures** The mean over the images in L_pi; average pooling in L_pa, as in the paper, where the released code
    takes the maximum over patches so large that 4 to 9 nodes are left. That code gives the critic raw scores through
    batch normalisation and no image (`conditional=false`), and multiplies the critic's loss by the weight of the term.
    The critic's optimizer is our default, that of Gulrajani et al. for WGAN-GP.

    Args:
        pixel: Weight of the pixel-wise term; the paper's and the released code's.
        pair: Weight of the pair-wise term; the released code's (the paper has 10).
        holistic: Weight of the holistic term; the paper's and the released code's.
        granularity: Height and width of the patches that are one node each.
        neighbours: With how many of the nearest patches each is compared; with all by default.
        conditional: The critic sees the image and class probabilities, as in the paper; false: scores alone.
        penalty: Weight of the gradient penalty.
        critic_width: Channels of the critic's first convolution; the released code's.
        critic_size: Longest side of the maps that the critic sees: larger ones are averaged down; the released code's.
        layers: The student's maps of the pair-wise term: stage numbers (-1 is the last stage) or module paths; the
            paper has the features before the classifier.
        teacher_layers: The teacher's, in the same order; the same names by default.
    """

    paper = Paper(
        "Structured Knowledge Distillation for Dense Prediction",
        ("Yifan Liu", "Changyong Shu", "Jingdong Wang", "Chunhua Shen"),
        "TPAMI",
        2020,
        arxiv="1903.04197",
    )
    tasks = DENSE_TASKS
    example = {"critic_width": 4}

    def __init__(
        self,
        *,
        pixel: NonNegative = 10.0,
        pair: NonNegative = 1.0,
        holistic: NonNegative = 0.1,
        granularity: tuple[AtLeastOne, AtLeastOne] = (2, 2),
        neighbours: AtLeastOne | None = None,
        conditional: bool = True,
        penalty: NonNegative = 10.0,
        critic_width: AtLeastOne = 64,
        critic_size: AtLeastOne = 65,
        layers: tuple[str | int, ...] = (-1,),
        teacher_layers: tuple[str | int, ...] | None = None,
    ) -> None:
        super().__init__(layers=layers, teacher_layers=teacher_layers)
        check_any(self, "pixel", "pair", "holistic")
        self.critic: nn.Module = nn.Identity()

    def needs(self) -> Needs:
        scores, features = bool(self.pixel or self.holistic), super().needs() if self.pair else Needs()
        teacher = Reads(scores, features=features.teacher.features)
        return Needs(Reads(scores or bool(self.task_weight), features=features.student.features), teacher)

    def setup(self, nets: Nets, batch: Batch) -> None:
        if self.pair:
            super().setup(nets, batch)
        if not (self.pixel or self.holistic):
            return
        fake, _ = self._judged(nets.student(batch), nets.teacher(batch), batch)
        if self.pixel and fake.shape[1] == 1:
            raise DistillError(
                f"The pixel-wise term of {self.name} compares class probabilities, and these maps have one number at"
                " each pixel, such as a depth: pixel=0."
            )
        if self.holistic:
            image = batch.inputs
            if self.conditional and not (isinstance(image, Tensor) and image.dim() == 4):
                found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise DistillError(
                    f"The critic sees images [B, C, H, W], got {found}: conditional=false, or holistic=0."
                )
            condition = image.shape[1] if self.conditional and image is not None else 0
            self.critic = Critic(fake.shape[1], condition, self.critic_width, norm=not self.conditional)

    def check_pair(self, pair: Pair) -> None:
        height, width = (min(a, b) for a, b in zip(pair.student.shape[2:], pair.teacher.shape[2:], strict=True))
        if height <= self.granularity[0] and width <= self.granularity[1]:
            raise DistillError(
                f"Patches of {self.granularity[0]} x {self.granularity[1]} leave one node of the map {height} x {width}"
                f" at the layer {pair.layer!r}, and no pair: take a smaller granularity, or a larger map."
            )

    def extras(self) -> dict[str, nn.Module]:
        return {"critic": self.critic} if isinstance(self.critic, Critic) else {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam at 1e-4 with betas (0, 0.9), as for WGAN-GP, along the student's learning-rate curve; our default."""
        spec = OptimSpec("Adam", 1e-4, options={"betas": (0.0, 0.9)}, schedule="student")
        return {"critic": spec} if self.holistic else {}

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        check_built(self, holistic=isinstance(self.critic, Critic))
        student, teacher = nets.student(batch), nets.teacher(batch)
        terms = {**self.task(student, batch), **self.loss(student, teacher, batch)}
        if not self.holistic:
            yield {"student": terms}
            return
        fake, real = self._judged(student, teacher, batch)
        image = batch.inputs if self.conditional else None
        # Uniform, and the same for an example however many processes share the batch.
        u = torch.special.ndtr(self.randn(len(fake), device=fake.device))
        with parametrize.cached():  # One set of normalised weights for all of the critic's forwards.
            judged = KF.wgan_gp(self.critic, fake, real, given=image, penalty=self.penalty, u=u)
            terms["holistic"] = -self.holistic * self.critic(fake, image).mean()
        yield {"critic": {"wgan_gp": judged}, "student": terms}

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        terms: Terms = {}
        if self.pixel:
            rows = class_scores(student, teacher, batch).exclusive(self.name)
            terms["pixel"] = self.pixel * KF.structured_pixel(rows.student, rows.teacher, mask=rows.mask)
        if self.pair:
            maps = [KF.match_spatial(pair.student, pair.teacher, "pool") for pair in self.pairs(student, teacher)]
            apart = [KF.structured_pair(*both, self.granularity, self.neighbours) for both in maps]
            terms["pair"] = self.pair * torch.stack(apart).sum()
        return terms

    def _judged(self, student: View, teacher: View, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the critic tells apart, fake and real: class probabilities, or maps as they are, `[B, K, H, W]`."""
        fake, real = (x.float() for x in score_maps(student, teacher, batch, self.name))
        if self.conditional and fake.shape[1] > 1:
            fake, real = fake.softmax(1), real.softmax(1)
        longest = max(fake.shape[2:])
        if longest > self.critic_size:
            size = [max(1, round(n * self.critic_size / longest)) for n in fake.shape[2:]]
            fake, real = (F.adaptive_avg_pool2d(x, size) for x in (fake, real))
        return fake, real
