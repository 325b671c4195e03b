"""Two distillers that keep every clause of the contract; others are made from them by breaking one."""

from __future__ import annotations

import torch
from torch import nn

from kd_plugins import Distiller, Needs, OptimSpec, Reads


class Honest(Distiller):
    """Draws the logits `[B, K]` and a projection of the features `[B, C, H, W]` to the teacher's.

    Nobody, "A method for tests", 2020.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """

    def __init__(self, *, weight: float = 1.0, layer: str = "layer2") -> None:
        super().__init__()
        self.weight, self.layer = weight, layer
        self.connector = nn.LazyConv2d(1, 1)

    def needs(self) -> Needs:
        return Needs(Reads(features=(self.layer,)), Reads(features=(self.layer,)))

    def setup(self, nets, batch):
        s, t = nets.student(batch).features[self.layer], nets.teacher(batch).features[self.layer]
        self.connector = nn.Conv2d(s.shape[1], t.shape[1], 1)

    def loss(self, student, teacher, batch):
        features = self.connector(student.features[self.layer]).float() - teacher.features[self.layer].float()
        logits = student.logits.float() - teacher.logits.float()
        return {"features": self.weight * features.pow(2).mean(), "logits": self.weight * logits.pow(2).mean()}


class Adversarial(Honest):
    """As `Honest`, with a critic of the logits `[B, K]` that has an optimizer of its own; 2020.

    Args:
        weight: Weight of all terms.
        layer: Module path of the features.
    """

    def __init__(self, *, weight: float = 1.0, layer: str = "layer2") -> None:
        super().__init__(weight=weight, layer=layer)
        self.critic = nn.Linear(4, 1)

    def extras(self):
        return {"critic": self.critic}

    def optimizers(self):
        return {"critic": OptimSpec("SGD", lr=0.01)}

    def judge(self, logits):
        with torch.autocast("cpu", enabled=False):
            return self.critic(logits.float()).tanh().mean()

    def turns(self, nets, batch):
        s, t = nets.student(batch), nets.teacher(batch)
        noise = 0.1 * torch.randn(s.logits.shape, generator=self.generator())
        yield {"critic": {"critic": self.judge(s.logits.detach() + noise) - self.judge(t.logits)}}
        yield {"student": {**self.task(s, batch), **self.loss(s, t, batch), "fool": -self.judge(s.logits)}}
