"""Tiny distillers of the shapes that the ten methods have, with real mathematics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from shapes.nets import BATCH, CLASSES, ROWS, SIZE, fill
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, Needs, Nets, OptimSpec, Reads, Stage, View
from kd_plugins.distiller import Terms, Turn

MIDDLE = "layer2"


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of scores, mean over the batch, in float32."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return F.kl_div(s, t, log_target=True, reduction="batchmean")


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference in float32."""
    return (a.float() - b.float()).square().mean()


class Own(Distiller):
    """Feature regression through a learned connector: the group "own"."""

    def needs(self) -> Needs:
        return Needs(Reads(features=(MIDDLE,)), Reads(logits=False, features=(MIDDLE,)))

    def setup(self, nets: Nets, batch: Batch) -> None:
        s, t = nets.student(batch).features[MIDDLE], nets.teacher(batch).features[MIDDLE]
        self.connector = fill(nn.Conv2d(s.shape[1], t.shape[1], 1), 1)

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        return {"regression": mse(self.connector(student.features[MIDDLE]), teacher.features[MIDDLE])}


class Critic(nn.Sequential):
    """Whose feature map is it: `[B, C, H, W] -> [B, 1]`."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(nn.Conv2d(width, 5, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 1))
        fill(self, seed)


class Online(Distiller):
    """Two peers and their critics; one forward serves logit and adversarial losses, which move the same features."""

    teachers = 0
    peers = True

    def needs(self) -> Needs:
        return Needs(Reads(features=(MIDDLE,)))

    def setup(self, nets: Nets, batch: Batch) -> None:
        width = nets.student(batch).features[MIDDLE].shape[1]
        self.critics = nn.ModuleList(Critic(width, 10 + k) for k in range(len(nets.peers)))

    def extras(self) -> dict[str, nn.Module]:
        return {f"critic{k}": critic for k, critic in enumerate(self.critics)}

    def shared(self, nets: Nets) -> dict[str, list[nn.Parameter]]:
        return {
            f"features{k}": [*peer.module.layer1.parameters(), *peer.module.layer2.parameters()]
            for k, peer in enumerate(nets.peers)
        }

    def optimizers(self) -> dict[str, OptimSpec]:
        critic = OptimSpec("Adam", 1e-2, options={"eps": 1e-3}, clip=1.0)
        features = OptimSpec("SGD", 0.05, weight_decay=1e-3, options={"momentum": 0.5}, schedule="student")
        return {f"critic{k}": critic for k in range(2)} | {f"features{k}": features for k in range(2)}

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        views = [peer(batch) for peer in nets.peers]
        maps = [view.features[MIDDLE] for view in views]
        yield {
            f"critic{k}": {
                "real": (1 - critic(maps[1 - k].detach()).float()).square().mean(),
                "fake": critic(maps[k].detach()).float().square().mean(),
            }
            for k, critic in enumerate(self.critics)
        }
        fool = [(1 - critic(maps[k]).float()).square().mean() for k, critic in enumerate(self.critics)]
        yield {
            "features0": {"fool": fool[0]},
            "features1": {"fool": fool[1]},
            "peer1": {"task": batch.task_loss(views[1]), "mutual": kl(views[1].logits, views[0].logits.detach())},
            "student": {"task": batch.task_loss(views[0]), "mutual": kl(views[0].logits, views[1].logits.detach())},
        }


class Mixture(nn.Module):
    """Softmax weights over feature maps of one shape."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(n))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return sum(w * m for w, m in zip(self.beta.softmax(0), maps, strict=True))  # type: ignore[return-value]


class Search(Distiller):
    """Bi-level: after a warm-up, mixture weights learn on held-out rows through the student's upper layers.

    Then a fresh student distils what they mix.
    """

    def needs(self) -> Needs:
        return Needs(
            Reads(features=(MIDDLE,)),
            Reads(logits=False, features=(MIDDLE, "layer3")),
            streams={"search": 0.5} if self.searching else {},
            index=True,
        )

    @property
    def searching(self) -> bool:
        """Whether this is the stage that reads the held-out rows."""
        return self.progress.stage == 1

    def stages(self) -> list[Stage]:
        return [Stage("warm-up"), Stage("search", fresh_optimizer=False), Stage("distill", fresh_student=True)]

    def setup(self, nets: Nets, batch: Batch) -> None:
        s, t = nets.student(batch).features[MIDDLE], nets.teacher(batch).features
        self.mixture = Mixture(2)
        self.bridge = fill(nn.Conv2d(t[MIDDLE].shape[1], s.shape[1], 1), 2)
        self.register_buffer("seen", torch.zeros(4, ROWS))

    def begin_stage(self, stage: Stage) -> None:
        if stage.fresh_student:
            fill(self.bridge, 2)

    def extras(self) -> dict[str, nn.Module]:
        return {"mixture": self.mixture}

    def optimizers(self) -> dict[str, OptimSpec]:
        return {"mixture": OptimSpec("Adam", 0.05, options={"betas": (0.5, 0.9), "eps": 1e-3})}

    def _mixed(self, nets: Nets, batch: Batch) -> Tensor:
        features = nets.teacher(batch).features
        return self.mixture([features[MIDDLE], features["layer3"]])

    def _count(self, stream: int, batch: Batch) -> None:
        share = F.one_hot(batch.index, ROWS).float().mean(0)
        self.seen[stream] += self.host.mean(share)

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        if self.searching:
            held_out = batch.stream("search")
            self._count(0, held_out)
            bridged = nets.student(held_out, replace={MIDDLE: self.bridge(self._mixed(nets, held_out))})
            yield {"mixture": {"bridge": held_out.task_loss(bridged)}}
        self._count(1 + self.progress.stage, batch)
        target = self.bridge(self._mixed(nets, batch))
        view = nets.student(batch)
        terms = {"task": batch.task_loss(view), "features": mse(view.features[MIDDLE], target)}
        if self.searching:
            terms["bridge"] = batch.task_loss(nets.student(batch, replace={MIDDLE: target}))
        yield {"student": terms}


class Generator(nn.Module):
    """Noise to images: `[B, 6] -> [B, 3, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4 * 16), nn.Conv2d(4, 3, 3, 1, 1)
        fill(self, 3)

    def forward(self, z: Tensor) -> Tensor:
        maps = F.gelu(self.first(z)).view(-1, 4, 4, 4)
        return self.last(F.interpolate(maps, size=(SIZE, SIZE), mode="bilinear")).tanh()


class DataFree(Distiller):
    """A generator learns inputs on which the teacher is certain and its classes balanced; the student imitates it."""

    data = False

    def __init__(self, *, rows: int = BATCH) -> None:
        super().__init__()
        self.rows = rows
        self.generator_net = Generator()

    def extras(self) -> dict[str, nn.Module]:
        return {"generator": self.generator_net}

    def optimizers(self) -> dict[str, OptimSpec]:
        return {"generator": OptimSpec("SGD", 0.1, options={"momentum": 0.9})}

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        images = self.generator_net(self.randn(self.rows, 6))
        t = nets.teacher(batch.with_inputs(images), input_grad=True).logits.float()
        mean = self.host.mean(t.softmax(-1).mean(0))
        yield {
            "generator": {
                "one_hot": F.cross_entropy(t, t.argmax(-1)),
                "information": 2 * (mean * mean.log()).sum(),
            }
        }
        fresh = batch.with_inputs(self.generator_net(self.randn(self.rows, 6)).detach())
        yield {"student": {"kd": kl(nets.student(fresh).logits, nets.teacher(fresh).logits)}}


class Conditioned(nn.Module):
    """A critic of scores given the image: `[B, K], [B, 3, 8, 8] -> [B]`."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.join, self.judge = nn.Linear(3 * 16, 5), nn.Linear(5 + CLASSES, 6), nn.Linear(6, 1)
        fill(self, 4)

    def forward(self, scores: Tensor, images: Tensor) -> Tensor:
        seen = self.see(F.avg_pool2d(images.float(), 2).flatten(1)).tanh()
        joint = self.join(torch.cat([scores.float(), seen.float()], 1)).tanh()
        return self.judge(joint).squeeze(1).float()


class Wasserstein(Distiller):
    """A WGAN-GP critic of the scores, conditioned on the input, with two turns of its own in each step."""

    critic_turns = 2

    def __init__(self) -> None:
        super().__init__()
        self.critic = Conditioned()

    def extras(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def optimizers(self) -> dict[str, OptimSpec]:
        return {"critic": OptimSpec("SGD", 0.02, options={"momentum": 0.5})}

    def _penalised(self, fake: Tensor, real: Tensor, given: Tensor) -> Tensor:
        # Uniform numbers: the distribution function of normal ones.
        share = torch.special.ndtr(self.randn(len(fake), 1))
        between = (share * real.float() + (1 - share) * fake.float()).requires_grad_()
        with torch.autocast(fake.device.type, enabled=False):
            (slope,) = torch.autograd.grad(self.critic(between, given).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake, given).mean() - self.critic(real, given).mean() + 2 * penalty

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        s, t = nets.student(batch), nets.teacher(batch)
        for _ in range(self.critic_turns):
            yield {"critic": {"wgan_gp": self._penalised(s.logits.detach(), t.logits, batch.inputs)}}
        holistic = -0.5 * self.critic(s.logits, batch.inputs).mean()
        yield {"student": {"task": batch.task_loss(s), "pixel": kl(s.logits, t.logits), "holistic": holistic}}


class Progressive(Distiller):
    """One layer after another, no network deeper than the stage; the task at the end, without the layer terms."""

    LAYERS = ("layer1", MIDDLE)

    @property
    def layer(self) -> str | None:
        """The layer of the current stage; None in the last, which has the task alone."""
        return self.LAYERS[self.progress.stage] if self.progress.stage < len(self.LAYERS) else None

    def needs(self) -> Needs:
        if self.layer is None:
            return Needs()
        reads = Reads(logits=False, features=(self.layer,))
        return Needs(reads, reads)

    def stages(self) -> list[Stage]:
        return [Stage(name) for name in self.LAYERS] + [Stage("soft labels", share=2, fresh_optimizer=False)]

    def setup(self, nets: Nets, batch: Batch) -> None:
        reads = Reads(logits=False, features=self.LAYERS)
        s, t = nets.student(batch, reads=reads).features, nets.teacher(batch, reads=reads).features
        self.connectors = nn.ModuleDict({k: fill(nn.Conv2d(s[k].shape[1], t[k].shape[1], 1), 5) for k in self.LAYERS})

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        s, t = nets.student(batch), nets.teacher(batch)
        if self.layer is None:
            yield {"student": {"task": batch.task_loss(s), "kd": kl(s.logits, t.logits)}}
        else:
            mapped = self.connectors[self.layer](s.features[self.layer])
            yield {"student": {f"match_{self.layer}": mse(mapped, t.features[self.layer])}}


class Ensemble(Distiller):
    """Three teachers: the mean of their distributions, and a learned map onto each of their features."""

    teachers = "many"

    def needs(self) -> Needs:
        return Needs(Reads(features=(MIDDLE,)), Reads(features=(MIDDLE,)))

    def setup(self, nets: Nets, batch: Batch) -> None:
        s = nets.student(batch).features[MIDDLE]
        widths = [t(batch).features[MIDDLE].shape[1] for t in nets.teachers]
        self.maps = nn.ModuleList(fill(nn.Conv2d(s.shape[1], w, 1), 20 + i) for i, w in enumerate(widths))

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        s, ts = nets.student(batch), [teacher(batch) for teacher in nets.teachers]
        mean = torch.stack([t.logits.float().softmax(-1) for t in ts]).mean(0)
        regress = [mse(m(s.features[MIDDLE]), t.features[MIDDLE]) for m, t in zip(self.maps, ts, strict=True)]
        yield {"student": {**self.task(s, batch), "kd": kl(s.logits, mean.log()), "features": sum(regress) / len(ts)}}


class Codebook(Distiller):
    """Two steps of Lloyd's algorithm on the teacher's features before the training; the student predicts the words."""

    words = 4

    def needs(self) -> Needs:
        return Needs(Reads(features=(MIDDLE,)), Reads(logits=False, features=(MIDDLE,)))

    def setup(self, nets: Nets, batch: Batch) -> None:
        s, t = nets.student(batch).features[MIDDLE], nets.teacher(batch).features[MIDDLE]
        self.predict = fill(nn.Conv2d(s.shape[1], self.words, 1), 6)
        self.register_buffer("codebook", self._pixels(t)[: self.words].clone())
        self.register_buffer("counts", torch.zeros(self.words, dtype=torch.long))

    @staticmethod
    def _pixels(maps: Tensor) -> Tensor:
        return maps.float().permute(0, 2, 3, 1).flatten(0, 2)

    def prepare(self, nets: Nets, batches: Iterable[Batch]) -> None:
        pixels = torch.cat([self._pixels(nets.teacher(batch).features[MIDDLE]) for batch in batches])
        for _ in range(2):
            words = torch.cdist(pixels, self.codebook).argmin(1)
            hot = F.one_hot(words, self.words)
            self.counts.copy_(hot.sum(0))
            self.codebook.copy_(hot.T.float() @ pixels / self.counts.clamp(min=1)[:, None])

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        pixels = self._pixels(teacher.features[MIDDLE])
        target = (-5 * (pixels[:, None] - self.codebook).square().sum(-1)).softmax(-1)
        scores = self._pixels(self.predict(student.features[MIDDLE]))
        # Rare words count for more.
        weight = 1 / (1 + self.counts.float() / self.counts.sum().clamp(min=1))
        return {"words": -(target * weight * scores.log_softmax(-1)).sum(-1).mean()}


class Noisy(Distiller):
    """Both networks see noisy images, some with other labels."""

    def __init__(self, *, own_stream: bool = False) -> None:
        super().__init__()
        self.own_stream = own_stream

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        x = batch.inputs
        noisy = batch.with_inputs(x + batch.pixels(0.1 * self.randn(*x.shape)))
        flip = self.randn(len(x), 2)
        if self.own_stream:
            flip = flip + torch.randn(flip.shape, generator=self.generator())
        other = (batch.labels + 1 + (flip[:, 1] > 0)) % CLASSES
        noisy = noisy.with_labels(torch.where(flip[:, 0] > 0.5, other, batch.labels))
        s, t = nets.student(noisy), nets.teacher(noisy)
        yield {"student": {"task": noisy.task_loss(s), "kd": kl(s.logits, t.logits)}}


class Balanced(Distiller):
    """The information entropy of the student's mean prediction over the global batch, and a moving average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((CLASSES,), 1 / CLASSES))
        self.register_buffer("current", torch.zeros(CLASSES))

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        mean = self.host.mean(student.logits.float().softmax(-1).mean(0))
        self.current.copy_(mean.detach())
        return {
            "kd": kl(student.logits, teacher.logits),
            "information": 3 * (mean * mean.log()).sum() + mse(mean, self.average.clone()),
        }

    def after_update(self) -> None:
        self.average.lerp_(self.current, 0.1)


SHAPES: dict[str, type[Distiller]] = {
    "own": Own,
    "online": Online,
    "search": Search,
    "data_free": DataFree,
    "wasserstein": Wasserstein,
    "progressive": Progressive,
    "ensemble": Ensemble,
    "codebook": Codebook,
    "noisy": Noisy,
    "balanced": Balanced,
}
