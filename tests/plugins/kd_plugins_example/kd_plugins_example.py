"""Two methods as somebody outside kd-plugins would add them: one reads feature maps, one reads logits alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import Batch, Distiller, DistillError, Needs, Paper, Reads, View

__all__ = ["ExampleAttentionTransfer", "ExampleLogitRegression", "attention_transfer"]


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean squared distance of normalised spatial attention maps, the channel means of `|activation| ** power`.

    Args:
        student: Activations `[B, C, H, W]`.
        teacher: Activations `[B, C', H', W']`; where the sizes differ, the larger map is average-pooled to the smaller.
        power: Exponent p of the activations.

    >>> x = torch.rand(2, 3, 4, 4)
    >>> attention_transfer(x, 5 * x).item() < 1e-12
    True
    """
    maps = [_wide(x).abs().pow(power).mean(1) for x in (student, teacher)]
    size = min(m.shape[-2] for m in maps), min(m.shape[-1] for m in maps)
    student_map, teacher_map = (F.normalize(F.adaptive_avg_pool2d(m, size).flatten(1)) for m in maps)
    return (student_map - teacher_map).pow(2).mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ExampleAttentionTransfer(Distiller):
    """Attention transfer: the student looks where the teacher looks.

    Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, equation 2 with activation-based attention (section 3.1).

    Args:
        weight: Of the attention term, beta of the released code; 1000 is our default.
        layers: Layers of the student, as stage numbers or module paths whose outputs are `[B, C, H, W]`.
        teacher_layers: The teacher's layers, in the same order; none: named as the student's.
        power: Exponent p of the activations.

    Departures: none from the released code, which takes the mean over batch and positions where equation 2 has half the
    2-norm; activations that differ in size are pooled.
    """

    paper = Paper(
        title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        authors=("Sergey Zagoruyko", "Nikos Komodakis"),
        venue="ICLR",
        year=2017,
        arxiv="1612.03928",
    )

    def __init__(
        self,
        *,
        weight: float = 1000.0,
        layers: tuple[int | str, ...] = (-2, -1),
        teacher_layers: tuple[int | str, ...] | None = None,
        power: float = 2.0,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.teacher_layers = self.layers if teacher_layers is None else tuple(teacher_layers)
        if not self.layers or len(self.layers) != len(self.teacher_layers):
            raise DistillError(
                f"expected one teacher layer for each student layer, got {self.layers} and {self.teacher_layers} — "
                "give layers and teacher_layers of the same length"
            )
        self.weight = weight
        self.power = power

    def needs(self) -> Needs:
        return Needs(student=Reads(features=self.layers), teacher=Reads(logits=False, features=self.teacher_layers))

    def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
        pairs = zip(self.layers, self.teacher_layers, strict=True)
        terms = [attention_transfer(student.features[s], teacher.features[t], self.power) for s, t in pairs]
        return {"attention": self.weight * torch.stack(terms).sum()}


class ExampleLogitRegression(Distiller):
    """Regresses the teacher's logits `[B, K]`, without a softmax.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014, arXiv:1312.6184.

    Args:
        weight: Of the squared distance; our default.

    Departures: the mean over the classes, where the paper sums over them; the task loss stays beside it.
    """

    paper = Paper(
        title="Do Deep Nets Really Need to be Deep?",
        authors=("Jimmy Ba", "Rich Caruana"),
        venue="NIPS",
        year=2014,
        arxiv="1312.6184",
    )
    tasks = ("classification", "regression", "multilabel")

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
        return {"logits": self.weight * F.mse_loss(_wide(student.logits), _wide(teacher.logits))}
