"""The losses of the first adversarial networks, on scores before the sigmoid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_plugins.functional._common import exactly

__all__ = ["gan_discriminator", "gan_generator"]


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy of a discriminator that tells real from fake.

    Goodfellow et al., "Generative Adversarial Nets", NIPS 2014, arXiv 1406.2661, eq. 1 as a loss: `-E log D(real) - E
    log(1 - D(fake))` with `D = sigmoid(score)`, of the scores themselves, so that it is finite for every score.

    Args:
        real: Scores of any shape.
        fake: Scores of any shape.

    Returns:
        A scalar.

    >>> import torch
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

    >>> import torch
    >>> gan_generator(torch.tensor([0.0, -200.0]))
    tensor(100.3466)
    """
    with exactly(fake) as (fake,):
        return F.softplus(-fake).mean()
