"""VID against the Gaussian likelihood, and its regressor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from kd_plugins import functional as KF
from kd_plugins.nn.connectors import GaussianRegressor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VARIANCE = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7), (2, 3)])
def test_value_is_the_likelihoods_without_its_constant(shape: tuple[int, ...]) -> None:
    mean, teacher = randn(*shape), randn(*shape, seed=1)
    deviation = VARIANCE.sqrt().reshape(1, 3, *[1] * (len(shape) - 2))
    each = -Normal(mean, deviation.expand(shape)).log_prob(teacher) - 0.5 * math.log(2 * math.pi)
    expected = each.reshape(2, -1).sum(1) / each[0].numel()
    torch.testing.assert_close(KF.vid(mean, teacher, VARIANCE, reduction="none"), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(KF.vid(mean, teacher, VARIANCE, reduction="sum"), expected.sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(KF.vid(mean, teacher, VARIANCE), expected.mean(), rtol=1e-14, atol=0)


def test_gradient_reaches_mean_and_variance_and_not_the_teacher() -> None:
    mean, variance = randn(2, 3, 2, 2).requires_grad_(), VARIANCE.clone().requires_grad_()
    teacher = randn(2, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: KF.vid(m, teacher, v, reduction="none"), (mean, variance))
    assert torch.autograd.grad(KF.vid(mean, teacher, variance), teacher, allow_unused=True) == (None,)


def test_the_best_variance_is_the_mean_squared_error() -> None:
    mean, teacher = randn(4, 3, 5, 5), 3 * randn(4, 3, 5, 5, seed=1)
    best = (teacher - mean).square().mean((0, 2, 3)).requires_grad_()
    (grad,) = torch.autograd.grad(KF.vid(mean, teacher, best), best)
    torch.testing.assert_close(grad, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_regressor_trains_its_variance() -> None:
    regressor = GaussianRegressor(4, 3, variance=2.0).double()
    x, teacher = randn(2, 4, 3, 3), randn(2, 3, 3, 3, seed=1)
    mean, variance = regressor(x)
    one, two, three = (layer.weight[:, :, 0, 0] for layer in list(regressor.mean)[::2])
    for n, i, j in ((0, 0, 0), (1, 2, 1)):  # the same network at every position
        expected = three @ (two @ (one @ x[n, :, i, j]).relu()).relu()
        torch.testing.assert_close(mean[n, :, i, j], expected, rtol=1e-12, atol=1e-14)
    alpha = regressor.alpha
    torch.testing.assert_close(variance, alpha.exp().add(1).log() + 1e-5, rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, torch.full_like(variance, 2.0 + 1e-5), rtol=1e-6, atol=0)
    KF.vid(mean, teacher, variance).backward()
    error = (teacher - mean.detach()).square().mean((0, 2, 3))
    # d/d sigma^2 of (log sigma^2 + error / sigma^2) / 2, over three channels, times the sigmoid of alpha.
    slope = (1 / variance - error / variance**2).detach() / 6
    torch.testing.assert_close(alpha.grad, slope * alpha.detach().sigmoid(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_island(dtype: torch.dtype) -> None:
    mean, teacher = randn(2, 3, 4, 4).to(dtype), 10 * randn(2, 3, 4, 4, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = KF.vid(mean, teacher, VARIANCE.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), KF.vid(mean.double(), teacher.double(), VARIANCE), rtol=1e-5, atol=0)


def test_refusals() -> None:
    x = torch.ones(2, 3, 4, 4)
    for mean, teacher, variance in ((x, x[:, :2], VARIANCE), (x, x, VARIANCE[:2]), (x[0, 0, 0], x[0, 0, 0], VARIANCE)):
        with pytest.raises(ValueError, match="Expected a mean"):
            KF.vid(mean, teacher, variance)
    with pytest.raises(ValueError, match=r"variance \[C\], got \[2, 3, 4, 4\], \[2, 3, 4, 4\] and \[2\]\.$"):
        KF.vid(x, x, VARIANCE[:2])
