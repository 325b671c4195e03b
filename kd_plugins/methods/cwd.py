"""Channel-wise Knowledge Distillation for Dense Prediction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Needs, Nets, Paper, Reads, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import NonNegative, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.layers import DENSE_TASKS, LayerDistiller
from kd_plugins.reading.scores import score_maps


class CWD(LayerDistiller):
    """Matches, channel by channel, where in the image a map is active: of the scores, and of the layers that are named.

    Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256:
    `task + logit_weight * phi(scores) + weight * sum_layers phi(features)` of maps `[B, C, H, W]`, with a softmax over
    the positions of each channel, `phi = T^2 / C * sum_c KL(softmax(y_t_c / T) || softmax(y_s_c / T))`. Where features
    differ in channels, a 1x1 convolution trained with the student brings its own to the teacher's. A channel of the
    scores is a class, and what counts is where the class is, not how it compares with others.

    All pixels count, those with an ignored label too: the teacher's map says something there. A teacher's map of scores
    of another size is resized to the student's (bilinear), of features the larger one is averaged down.

    **Departures** None known in the loss. The paper distils either scores or features, here the caller may have both;
    its values of the options are from memory, the weights confirmed by a public copy (CIRKD).

    Args:
        logit_weight: Weight of the term of the scores; the paper's for semantic segmentation. 0 leaves it out.
        weight: Weight of the sum over the layers; the paper's.
        temperature: Softens both sides; the paper's.
        layers: Student layers: stage numbers (-1 is the last stage) or module paths; none by default.
    """

    paper = Paper(
        "Channel-wise Knowledge Distillation for Dense Prediction",
        ("Changyong Shu", "Yifan Liu", "Jianfei Gao", "Zheng Yan", "Chunhua Shen"),
        "ICCV",
        2021,
        arxiv="2011.13256",
    )
    tasks = DENSE_TASKS
    optional = True

    def __init__(
        self,
        *,
        logit_weight: NonNegative = 3.0,
        weight: NonNegative = 50.0,
        temperature: Temperature = 4.0,
        layers: tuple[str | int, ...] = (),
        **more: Any,
    ) -> None:
        super().__init__(layers=layers, **more)
        if not (logit_weight or (weight and layers)):
            raise DistillError("cwd has no map to compare: give logit_weight, or weight and layers.")

    def needs(self) -> Needs:
        needs, scores = super().needs(), bool(self.logit_weight)
        return needs | Needs(Reads(scores), Reads(scores))

    def setup(self, nets: Nets, batch: Batch) -> None:
        super().setup(nets, batch)
        if self.logit_weight:
            score_maps(nets.student(batch), nets.teacher(batch), batch, self.name)

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        ours, theirs = student.shape[1], teacher.shape[1]
        return nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)

    def distance(self, student: Tensor, teacher: Tensor, part: Any, batch: Batch) -> Tensor:
        return KF.cwd(*KF.match_spatial(part(student), teacher, "pool"), self.temperature)

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        terms = super().loss(student, teacher, batch) if self.layers else {}
        if self.logit_weight:
            maps = score_maps(student, teacher, batch, self.name)
            terms["cwd_logits"] = self.logit_weight * KF.cwd(*maps, self.temperature)
        return terms
