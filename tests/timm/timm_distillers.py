"""Distillers for the tests of kd-timm-train, found as `timm_distillers:Name`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, Needs, OptimSpec, Reads, Stage, View


class Adversary(Distiller):
    """Everything a checkpoint has to carry: a connector, a critic with its own optimizer, noise, and row numbers."""

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight
        self.connector = nn.LazyConv2d(16, 1)
        self.critic = nn.Linear(16, 1)
        self.register_buffer("seen", torch.zeros(1297))

    def needs(self) -> Needs:
        return Needs(student=Reads(features=(-1,)), teacher=Reads(features=(-1,)), index=True)

    def extras(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def optimizers(self) -> dict[str, OptimSpec]:
        return {"critic": OptimSpec(lr=0.01, schedule="student")}

    def setup(self, nets: Any, batch: Batch) -> None:
        self.connector(nets.student(batch).features[-1])

    def turns(self, nets: Any, batch: Batch) -> Iterator[Any]:
        self.seen[batch.index] += 1
        real, view = nets.teacher(batch).features[-1].mean((2, 3)), nets.student(batch)
        fake = self.connector(view.features[-1]).mean((2, 3))
        noise = torch.randn(fake.shape, generator=self.generator())
        gap = self.critic(fake.detach() + 0.1 * noise).mean() - self.critic(real).mean()
        yield {"critic": {"gap": gap}}
        yield {"student": {"task": batch.task_loss(view), "fool": -self.weight * self.critic(fake).mean()}}


class Search(Distiller):
    """A stage that also reads held-out rows, then one with a fresh student and all rows."""

    rows: dict[str, set[int]] = {}

    def stages(self) -> list[Stage]:
        return [Stage("search", 1.0), Stage("distill", 2.0, fresh_student=True)]

    def needs(self) -> Needs:
        streams = {"search": 0.5} if self.progress.stage == 0 else {}
        return Needs(student=Reads(), teacher=Reads(), streams=streams, index=True)

    def turns(self, nets: Any, batch: Batch) -> Iterator[Any]:
        stage = "distill" if self.progress.stage else "search"
        type(self).rows.setdefault(stage, set()).update(batch.index.tolist())
        terms = {"task": batch.task_loss(nets.student(batch))}
        if stage == "search":
            held_out = batch.stream("search")
            type(self).rows.setdefault("held out", set()).update(held_out.index.tolist())
            terms["held_out"] = held_out.task_loss(nets.student(held_out))
        else:
            terms["kl"] = F.kl_div(
                nets.student(batch).logits.log_softmax(-1),
                nets.teacher(batch).logits.softmax(-1),
                reduction="batchmean",
            )
        yield {"student": terms}


class Impatient(Distiller):
    """Ends its first stage after one epoch."""

    teachers = 0

    def stages(self) -> list[Stage]:
        return [Stage("first", 3.0), Stage("second", 1.0), Stage("third", 1.0)]

    def stage_done(self) -> bool:
        return self.progress.stage == 0

    def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
        return {f"stage{self.progress.stage}": 0.0 * student.logits.sum()}


class Pair(Distiller):
    """Two peers that agree with each other."""

    teachers, peers = 0, True

    def turns(self, nets: Any, batch: Batch) -> Iterator[Any]:
        a, b = (peer(batch) for peer in nets.peers)
        gap = (a.logits.detach() - b.logits).pow(2).mean()
        back = (a.logits - b.logits.detach()).pow(2).mean()
        yield {
            "peer1": {"task": batch.task_loss(b), "agree": gap},
            "student": {"task": batch.task_loss(a), "agree": back},
        }


class Ring(Distiller):
    """Peers without number, each for itself."""

    teachers, peers = 0, True

    def turns(self, nets: Any, batch: Batch) -> Iterator[Any]:
        losses = [{"task": batch.task_loss(peer(batch))} for peer in nets.peers]
        yield {f"peer{i}": loss for i, loss in enumerate(losses) if i} | {"student": losses[0]}


class Dreams(Distiller):
    """Noise in place of images: the student learns the teacher's scores there."""

    data = False

    def turns(self, nets: Any, batch: Batch) -> Iterator[Any]:
        assert batch.inputs is None
        assert batch.labels is None
        dreamt = Batch.of(torch.randn(batch.size, 3, 16, 16, generator=self.generator()))
        gap = (nets.student(dreamt).logits - nets.teacher(dreamt).logits).pow(2).mean()
        yield {"student": {"gap": gap}}


class ForText(Distiller):
    """Fits tokens alone."""

    tasks = ("token",)
