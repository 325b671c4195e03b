"""Losses of discriminators and critics, and of what they judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import exactly, expect

__all__ = ["gan_discriminator", "gan_generator", "lsgan_classes", "lsgan_discriminator", "lsgan_generator", "wgan_gp"]


def lsgan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Least-squares loss of a discriminator: 1 for real, 0 for fake.

    Mao, Li, Xie, Lau, Wang, Smolley, "Least Squares Generative Adversarial Networks", ICCV 2017, arXiv 1611.04076,
    eq. 2 with a = 0, b = 1: `mean((1 - D(real))^2) + mean(D(fake)^2)`. In AFD (Chung, Park, Kim, Kwak, ICML 2020, arXiv
    2002.01775) real is the peer's feature map and fake the network's own, both detached.

    Departures: without the paper's factor 1/2, as in AFD.

    Args:
        real: Probabilities `D(real)` in [0, 1], any shape.
        fake: Probabilities `D(fake)` in [0, 1], any shape.

    Returns:
        A scalar from 0 to 2.

    >>> lsgan_discriminator(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0]))
    tensor(0.2500)
    """
    with exactly(real, fake) as (real, fake):
        return (1 - real).square().mean() + fake.square().mean()


def lsgan_generator(fake: Tensor) -> Tensor:
    """Least-squares loss of a generator: its discriminator should say 1.

    Mao, Li, Xie, Lau, Wang, Smolley, ICCV 2017, arXiv 1611.04076, eq. 2 with c = 1: `mean((1 - D(fake))^2)`.

    Departures: without the paper's factor 1/2, as in AFD.

    Args:
        fake: Probabilities `D(fake)` in [0, 1], any shape.

    Returns:
        A scalar from 0 to 1.

    >>> lsgan_generator(torch.tensor([0.5, 1.0]))
    tensor(0.1250)
    """
    with exactly(fake) as (fake,):
        return (1 - fake).square().mean()


def lsgan_classes(scores: Tensor, source: int) -> Tensor:
    """Least-squares loss of one discriminator that tells which of K networks a feature map comes from.

    `1/2 mean sum_j ([j = source] - p_j)^2` with `p = softmax(scores)`: the targets 1 and 0 of `lsgan_discriminator` for
    K classes. The factor makes the sum over two networks that of one discriminator with `D = p_2`: `(1 - D(f_2))^2 +
    D(f_1)^2`. What is judged then minimises `lsgan_generator(p_j)` for the network j that it imitates.

    Our own: AFD (Chung, Park, Kim, Kwak, ICML 2020, arXiv 2002.01775) has K discriminators of two classes.

    Args:
        scores: `[B, K]`, before the softmax, of maps that come from one network.
        source: The network, 0 to K - 1.

    Returns:
        A scalar from 0 to 1.

    >>> lsgan_classes(torch.zeros(1, 2), 0)
    tensor(0.2500)
    """
    if scores.dim() != 2 or not 0 <= source < scores.shape[1]:
        raise ValueError(f"Expected scores [B, K] and a network 0 to K - 1, got {list(scores.shape)} and {source}.")
    with exactly(scores) as (scores,):
        target = torch.zeros_like(scores)
        target[:, source] = 1
        return (target - scores.softmax(1)).square().sum(1).mean() / 2


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy of a discriminator that tells real from fake.

    Goodfellow et al., "Generative Adversarial Nets", NIPS 2014, arXiv 1406.2661, eq. 1 as a loss: `-E log D(real) - E
    log(1 - D(fake))` with `D = sigmoid(score)`, of the scores themselves, so that it is finite for every score.

    Args:
        real: Scores of any shape.
        fake: Scores of any shape.

    Returns:
        A scalar.

    >>> gan_discriminator(torch.tensor([0.0]), torch.tensor([0.0, -200.0]))
    tensor(1.0397)
    """
    with exactly(real, fake) as (real, fake):
        return F.softplus(-real).mean() + F.softplus(fake).mean()


def gan_generator(fake: Tensor) -> Tensor:
    """Cross entropy of what wants to be taken for real.

    Goodfellow et al., 2014, arXiv 1406.2661, section 3: `-E log D(fake)`, whose gradient does not vanish where the
    discriminator is sure, as that of `E log(1 - D(fake))` does.

    Args:
        fake: Scores of any shape, before the sigmoid.

    Returns:
        A scalar.

    >>> gan_generator(torch.tensor([0.0, -200.0]))
    tensor(100.3466)
    """
    with exactly(fake) as (fake,):
        return F.softplus(-fake).mean()


def wgan_gp(
    critic: Callable[..., Tensor],
    fake: Tensor,
    real: Tensor,
    *,
    given: Any = None,
    penalty: float = 10.0,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss of a Wasserstein critic with gradient penalty, for the critic's parameters only.

    Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, "Improved Training of Wasserstein GANs", NeurIPS 2017, arXiv
    1704.00028, eq. 3: `E[D(fake)] - E[D(real)] + penalty * E[(|grad_x D(x)| - 1)^2]` at `x = u real + (1 - u) fake`, u
    uniform on [0, 1] for each example. What is judged minimises `-E[D(fake)]`.

    The critic is called three times, in float32 with autocast off, and must be twice differentiable and treat each
    example on its own: no batch norm, no fused attention. Outside of `torch.no_grad` the result carries a graph of
    second order.

    Args:
        critic: Called as `critic(x)`, or `critic(x, given)`; gives scores of any shape with B first.
        fake: `[B, ...]`, detached here.
        real: `[B, ...]`, detached here.
        given: A condition, such as the image `[B, 3, H, W]`, that is passed on.
        penalty: Weight of the gradient penalty; 10 is the paper's. Where the slope is 0 the gradient of its norm is 0.
        u: Where on the line from fake (0) to real (1) the slope of each example is taken, `[B]`; drawn by default.
        generator: Draws u; the device's own by default.

    Returns:
        A scalar.

    >>> critic = torch.nn.Linear(4, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = critic.weight.fill_(1.0)
    >>> wgan_gp(critic, fake=torch.ones(2, 4), real=torch.zeros(2, 4))
    tensor(14., grad_fn=<AddBackward0>)
    """
    remedy = "the penalty is taken on the lines between them"
    expect(fake.shape == real.shape, "fake and real of one shape [B, ...]", fake, real, remedy=remedy)
    with exactly(fake.detach(), real.detach()) as (fake, real):
        if isinstance(given, Tensor) and given.is_floating_point():
            given = given.detach().to(fake.dtype)
        condition = () if given is None else (given,)
        distance = critic(fake, *condition).mean() - critic(real, *condition).mean()
        # Second order only where there is a first: in an evaluation under no_grad the penalty is a number.
        second_order = torch.is_grad_enabled()
        with torch.enable_grad():
            if u is None:
                device = fake.device if generator is None else generator.device
                u = torch.rand(len(fake), dtype=fake.dtype, device=device, generator=generator)
            u = u.to(fake).reshape(-1, *[1] * (fake.dim() - 1))
            between = torch.lerp(fake, real, u).requires_grad_()
            scores = critic(between, *condition)
            (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=second_order)
        norms = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        return distance + penalty * (norms - 1).square().mean()
