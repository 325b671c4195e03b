"""Adversarial losses, against formulas and against gradients known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_lsgan_written_out(real: list[float], fake: list[float]) -> None:
    r, f = (torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (real, fake))
    ours = KF.lsgan_discriminator(r, f).item()
    assert ours == pytest.approx(sum((1 - x) ** 2 for x in real) / len(real) + sum(x**2 for x in fake) / len(fake))
    assert KF.lsgan_generator(f).item() == pytest.approx(sum((1 - x) ** 2 for x in fake) / len(fake))


def test_lsgan_targets_and_gradients() -> None:
    real, fake = torch.rand(4, 1, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    real.requires_grad_(), fake.requires_grad_()
    assert torch.autograd.gradcheck(KF.lsgan_discriminator, (real, fake))
    assert torch.autograd.gradcheck(KF.lsgan_generator, (fake,))
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert KF.lsgan_discriminator(ones, zeros) == 0
    assert KF.lsgan_discriminator(zeros, ones) == 2
    assert KF.lsgan_generator(ones) == 0
    assert KF.lsgan_generator(zeros) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lsgan_half_precision(dtype: torch.dtype) -> None:
    real, fake = torch.rand(64, 1).to(dtype), torch.rand(64, 1).to(dtype)
    loss = KF.lsgan_discriminator(real, fake) + KF.lsgan_generator(fake)
    assert loss.dtype == torch.float32
    expected = KF.lsgan_discriminator(real.double(), fake.double()) + KF.lsgan_generator(fake.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.data())
def test_lsgan_classes_written_out(rows: int, k: int, data: st.DataObject) -> None:
    scores = randn(rows, k, seed=data.draw(st.integers(0, 99)))
    source = data.draw(st.integers(0, k - 1))
    total = 0.0
    for row in scores.tolist():
        whole = sum(math.exp(x) for x in row)
        total += sum(((j == source) - math.exp(x) / whole) ** 2 for j, x in enumerate(row)) / 2
    assert KF.lsgan_classes(scores, source).item() == pytest.approx(total / rows)
    assert 0 <= KF.lsgan_classes(100 * scores, source).item() <= 1


def test_lsgan_classes_of_two_networks_is_one_discriminator_of_two() -> None:
    first, second = randn(5, 2), randn(5, 2, seed=1)
    ours = KF.lsgan_classes(first, 0) + KF.lsgan_classes(second, 1)
    comes_from_second = [(x[:, 1] - x[:, 0]).sigmoid() for x in (second, first)]
    torch.testing.assert_close(ours, KF.lsgan_discriminator(*comes_from_second))


def test_lsgan_classes_gradient_precision_and_messages() -> None:
    scores = randn(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.lsgan_classes(x, 2), (scores,))
    half = KF.lsgan_classes(scores.detach().half(), 2)
    assert half.dtype == torch.float32
    for bad, source in ((torch.zeros(3), 0), (torch.zeros(3, 2), 2)):
        with pytest.raises(ValueError, match="network 0 to K - 1"):
            KF.lsgan_classes(bad, source)


class Quadratic(nn.Module):
    """`D(x) = w / 2 |x|^2` has the slope w x, whose norm is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w / 2 * x.flatten(1).square().sum(1)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 2)])
def test_wgan_gp_in_closed_form(shape: tuple[int, ...]) -> None:
    critic, fake, real = Quadratic(), randn(*shape), randn(*shape, seed=1)
    loss = KF.wgan_gp(critic, fake, real, penalty=7.0, generator=torch.Generator().manual_seed(3))
    u = torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    between = (u * real + (1 - u) * fake).flatten(1).norm(dim=1)
    half_norms = [x.flatten(1).square().sum(1) / 2 for x in (fake, real)]
    w = critic.w.item()
    expected = w * (half_norms[0].mean() - half_norms[1].mean()) + 7 * (w * between - 1).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    slope = half_norms[0].mean() - half_norms[1].mean() + 14 * ((w * between - 1) * between).mean()
    torch.testing.assert_close(critic.w.grad, slope)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 1))


def test_wgan_gp_trains_the_critic_only() -> None:
    critic = network()
    fake, real = randn(3, 4, dtype=torch.float32).requires_grad_(), randn(3, 4, seed=1, dtype=torch.float32)
    KF.wgan_gp(critic, fake, real.requires_grad_()).backward()
    assert fake.grad is real.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [critic[0].weight, critic[2].weight])


def test_wgan_gp_gradient_against_differences() -> None:
    critic = network().double()
    fake, real = randn(3, 4), randn(3, 4, seed=1)

    def loss(weight: Tensor) -> Tensor:
        def judge(x: Tensor) -> Tensor:
            return torch.tanh(x @ weight) @ critic[2].weight.T

        return KF.wgan_gp(judge, fake, real, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, (randn(4, 8, seed=2).requires_grad_(),))


def test_wgan_gp_gives_the_condition_to_the_critic() -> None:
    seen: list[Tensor] = []

    def critic(x: Tensor, image: Tensor) -> Tensor:
        seen.append(image)
        return (x * image).sum(1)

    image = torch.full((3, 4), 2.0, dtype=torch.bfloat16)
    fake, real = torch.ones(3, 4), torch.zeros(3, 4)
    # The slope is the image, of norm 4.
    assert KF.wgan_gp(critic, fake, real, given=image, penalty=10.0).item() == pytest.approx(8 + 10 * 9)
    assert len(seen) == 3
    assert all(x.dtype == torch.float32 for x in seen)
    labels = torch.tensor([0, 1, 2])
    KF.wgan_gp(lambda x, y: x.gather(1, y[:, None]), fake, real, given=labels)


def test_wgan_gp_is_random_by_its_generator() -> None:
    critic, fake, real = Quadratic(), randn(6, 3), randn(6, 3, seed=1)
    values = [KF.wgan_gp(critic, fake, real, generator=torch.Generator().manual_seed(i)).item() for i in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    KF.wgan_gp(critic, fake, real, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_wgan_gp_where_it_is_said() -> None:
    """The slope of `|x|^2 w / 2` at u is known: all at fake, all at real, one in between."""
    critic, fake, real = Quadratic(), randn(3, 4), randn(3, 4, seed=1)
    u = torch.tensor([0.0, 0.25, 1.0])
    at = torch.stack([fake[0], 0.75 * fake[1] + 0.25 * real[1], real[2]])
    penalty = KF.wgan_gp(critic, fake, real, u=u) - KF.wgan_gp(critic, fake, real, penalty=0.0)
    torch.testing.assert_close(penalty, 10 * (critic.w * at.norm(dim=1) - 1).square().mean())


def test_wgan_gp_without_penalty_is_the_distance() -> None:
    critic, fake, real = Quadratic(), randn(6, 3), randn(6, 3, seed=1)
    distance = critic(fake).mean() - critic(real).mean()
    torch.testing.assert_close(KF.wgan_gp(critic, fake, real, penalty=0.0), distance)
    torch.testing.assert_close(KF.wgan_gp(critic, real, fake, penalty=0.0), -distance)


def test_wgan_gp_of_a_flat_critic() -> None:
    """The norm's derivative at 0 must not be nan."""
    critic = nn.Linear(4, 1)
    nn.init.zeros_(critic.weight)
    loss = KF.wgan_gp(critic, torch.randn(3, 4), torch.randn(3, 4))
    loss.backward()
    assert loss.item() == pytest.approx(10)
    assert critic.weight.grad.isfinite().all()


def test_wgan_gp_in_an_evaluation() -> None:
    critic, fake, real = network(), torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        value = KF.wgan_gp(critic, fake, real, generator=torch.Generator().manual_seed(0))
    assert not value.requires_grad
    torch.testing.assert_close(
        value, KF.wgan_gp(critic, fake, real, generator=torch.Generator().manual_seed(0)).detach()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wgan_gp_is_computed_in_float32_under_autocast(dtype: torch.dtype) -> None:
    critic, fake, real = network(), torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.wgan_gp(critic, fake, real, generator=torch.Generator().manual_seed(0))
    plain = KF.wgan_gp(critic, fake.float(), real.float(), generator=torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    assert loss.item() == plain.item()


def test_wgan_gp_message() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[3, 1\]"):
        KF.wgan_gp(network(), torch.zeros(3, 4), torch.zeros(3, 1))
