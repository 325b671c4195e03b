"""Three shapes by hand, in plain torch: what the player's arithmetic is checked against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from shapes.distillers import Conditioned, Critic
from shapes.nets import BATCH, EPOCH, SEED, Images, TinyNet, fill
from torch import Tensor, nn

LR, MOMENTUM = 0.1, 0.9


def micro_batches(steps: int, accumulation: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Images, labels, and whether the update closes with them."""
    data, size = Images(), BATCH // accumulation
    for step in range(steps):
        for m in range(accumulation):
            first = step % EPOCH * BATCH + m * size
            yield data.images[first : first + size], data.labels[first : first + size], m + 1 == accumulation


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    """The students' optimizer."""
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=LR, momentum=MOMENTUM)


def features(net: TinyNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map after layer2, and the scores."""
    middle = net.layer2(net.layer1(x))
    return middle, net.head(net.layer3(middle).mean((2, 3)))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(q) || softmax(p)), mean over the batch."""
    return (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()


def states(**modules: nn.Module) -> dict[str, Tensor]:
    """Weights by name, as `Host.result` gives them."""
    return {f"{k.replace('__', '.')}.{n}": v.double() for k, m in modules.items() for n, v in m.state_dict().items()}


def own(steps: int, accumulation: int, clip: float | None = None, decay: bool = False) -> dict[str, Tensor]:
    """A connector trained, and clipped, with the student."""
    student, teacher = TinyNet(4, 100), TinyNet(6, 200)
    connector = fill(nn.Conv2d(4, 6, 1), 1)
    optimizer = sgd(student, connector)
    updates = 0
    for x, y, last in micro_batches(steps, accumulation):
        middle, scores = features(student, x)
        with torch.no_grad():
            target, _ = features(teacher, x)
        loss = F.cross_entropy(scores, y) + ((connector(middle) - target) ** 2).mean()
        (loss / accumulation).backward()
        if last:
            if clip is not None:
                nn.utils.clip_grad_norm_([*student.parameters(), *connector.parameters()], clip)
            optimizer.param_groups[0]["lr"] = LR * (1 - updates / steps if decay else 1)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return states(student=student, distiller__connector=connector)


def online(steps: int, accumulation: int, clip: float | None = None) -> dict[str, Tensor]:
    """Two peers: critics move first, then the features by the adversarial loss, then the peers by the logit loss.

    Each peer's gradient of the logit loss is clipped by itself.
    """
    peers = [TinyNet(4, 100), TinyNet(4, 300)]
    critics = [Critic(4, 10), Critic(4, 11)]
    low = [[*p.layer1.parameters(), *p.layer2.parameters()] for p in peers]
    critic_steps = [torch.optim.Adam(c.parameters(), lr=1e-2, eps=1e-3) for c in critics]
    low_steps = [torch.optim.SGD(ps, lr=0.05, momentum=0.5, weight_decay=1e-3) for ps in low]
    steppers = [sgd(p) for p in peers]
    sums: dict[int, Tensor] = {}

    def add(parameters: list[nn.Parameter], key: int, loss: Tensor) -> None:
        for i, g in enumerate(torch.autograd.grad(loss / accumulation, parameters, retain_graph=True)):
            slot = 1000 * key + i
            sums[slot] = sums[slot] + g if slot in sums else g

    def step(
        optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], key: int, norm: float | None = None
    ) -> None:
        for i, p in enumerate(parameters):
            p.grad = sums.pop(1000 * key + i)
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        optimizer.step()
        optimizer.zero_grad()

    for x, y, last in micro_batches(steps, accumulation):
        (map0, scores0), (map1, scores1) = features(peers[0], x), features(peers[1], x)
        maps = [map0, map1]
        for k, critic in enumerate(critics):
            own_map, other = maps[k].detach(), maps[1 - k].detach()
            add(list(critic.parameters()), k, ((1 - critic(other)) ** 2).mean() + (critic(own_map) ** 2).mean())
        if last:
            for k, critic in enumerate(critics):
                step(critic_steps[k], list(critic.parameters()), k, norm=1.0)
        for k, critic in enumerate(critics):
            add(low[k], 2 + k, ((1 - critic(maps[k])) ** 2).mean())
        add(list(peers[0].parameters()), 4, F.cross_entropy(scores0, y) + divergence(scores0, scores1.detach()))
        add(list(peers[1].parameters()), 5, F.cross_entropy(scores1, y) + divergence(scores1, scores0.detach()))
        if last:
            for k in range(2):
                step(low_steps[k], low[k], 2 + k)
            for k in range(2):
                step(steppers[k], list(peers[k].parameters()), 4 + k, norm=clip)
    return states(student=peers[0], peer1=peers[1], distiller__critics__0=critics[0], distiller__critics__1=critics[1])


def wasserstein(steps: int, accumulation: int) -> dict[str, Tensor]:
    """A conditioned WGAN-GP critic that moves twice before the student."""
    student, teacher, critic = TinyNet(4, 100), TinyNet(6, 200), Conditioned()
    optimizer, critic_step = sgd(student), torch.optim.SGD(critic.parameters(), lr=0.02, momentum=0.5)
    noise = torch.Generator().manual_seed(SEED)
    sums: list[list[Tensor] | None] = [None, None]
    for x, y, last in micro_batches(steps, accumulation):
        scores = student(x)
        with torch.no_grad():
            real = teacher(x)
        fake = scores.detach()
        for turn in range(2):
            u = 0.5 * (1 + torch.erf(torch.randn(len(x), 1, generator=noise) / 2**0.5))
            point = (u * real + (1 - u) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(point, x).sum(), point, create_graph=True)
            penalty = ((slope.pow(2).sum(1).sqrt() - 1) ** 2).mean()
            loss = critic(fake, x).mean() - critic(real, x).mean() + 2 * penalty
            gradients = torch.autograd.grad(loss / accumulation, list(critic.parameters()))
            before = sums[turn]
            sums[turn] = list(gradients) if before is None else [a + b for a, b in zip(before, gradients, strict=True)]
            if last:
                for p, g in zip(critic.parameters(), sums[turn] or [], strict=True):
                    p.grad = g
                critic_step.step()
        loss = F.cross_entropy(scores, y) + divergence(scores, real) - 0.5 * critic(scores, x).mean()
        (loss / accumulation).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
            sums = [None, None]
    return states(student=student, distiller__critic=critic)


def first_step_of_distilling(beta: Tensor) -> dict[str, Tensor]:
    """One update of a fresh student and bridge, without momentum, towards a given mixture of the teacher's maps."""
    student, teacher, bridge = TinyNet(4, 100), TinyNet(6, 200), fill(nn.Conv2d(6, 4, 1), 2)
    x, y, _ = next(micro_batches(1, 1))
    middle, scores = features(student, x)
    with torch.no_grad():
        low = teacher.layer2(teacher.layer1(x))
        mixed = beta.softmax(0)[0] * low + beta.softmax(0)[1] * teacher.layer3(low)
    (F.cross_entropy(scores, y) + ((middle - bridge(mixed)) ** 2).mean()).backward()
    torch.optim.SGD([*student.parameters(), *bridge.parameters()], lr=LR).step()
    return states(student=student, distiller__bridge=bridge)


REFERENCES = {"own": own, "online": online, "wasserstein": wasserstein}
