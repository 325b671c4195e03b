"""Ensemble distribution distillation against scipy's and torch's Dirichlet distributions, and its gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import digamma
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

import kd_plugins
from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


LOSSES = {
    "endd": KF.endd,
    "reverse": KF.endd_proxy,
    "forward": lambda s, m, **options: KF.endd_proxy(s, m, direction="forward", **options),
    "end": KF.end,
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 1e-3), (4.0, 1e-3), (2.5, 0.2)])
def test_likelihood_is_that_of_scipys_dirichlet(temperature: float, smoothing: float) -> None:
    s, m = 2 * randn(4, 5), 3 * randn(4, 6, 5, seed=1)
    expected = []
    for z, members in zip(s.numpy(), m.numpy(), strict=True):
        pi = softmax(members / temperature)
        pi = (1 - smoothing) * (pi - 0.2) + 0.2
        logs = [stats.dirichlet(np.exp(z / temperature)).logpdf(p / p.sum()) for p in pi]
        expected.append(-(temperature**2) * np.mean(logs))
    none = KF.endd(s, m, temperature, smoothing, reduction="none")
    assert none.tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(KF.endd(s, m, temperature, smoothing), none.mean())


def proxy(members: Tensor, largest: float = 1e5) -> tuple[Tensor, float]:
    """Mean of one example's members `[M, K]` and the precision that is fitted to them."""
    p = members.softmax(-1)
    mean = p.mean(0)
    apart = sum(float((mean * (mean / q).log()).sum()) for q in p) / len(p)
    return mean, min((members.shape[-1] - 1) / (2 * apart), largest)


def test_proxies_are_divergences_of_dirichlets() -> None:
    s, m = 2 * randn(4, 5), randn(4, 6, 5, seed=1)
    forward, reverse = (KF.endd_proxy(s, m, direction=d, reduction="none") for d in ("forward", "reverse"))
    for b in range(4):
        mean, precision = proxy(m[b])
        student, target = Dirichlet(s[b].exp() + 1), Dirichlet(mean * precision + 1)
        torch.testing.assert_close(forward[b], kl_divergence(target, student), rtol=1e-10, atol=0)
        alpha = s[b].exp() + 1
        expected = -(mean * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        torch.testing.assert_close(reverse[b], expected - student.entropy() / (precision + 5), rtol=1e-10, atol=0)


def test_reverse_proxy_is_the_reverse_divergence_but_for_units() -> None:
    """Its gradient is that of `KL(student || target) / beta0`, where the released code's `beta0 + K` is `beta0`."""
    s, m = randn(1, 4).requires_grad_(), 0.01 * randn(1, 3, 4, seed=1)
    mean, precision = proxy(m[0])
    (ours,) = torch.autograd.grad(KF.endd_proxy(s, m), s)
    divergence = kl_divergence(Dirichlet(s.exp() + 1), Dirichlet(mean * precision + 1)).sum()
    (theirs,) = torch.autograd.grad(divergence / precision, s)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_plain_distillation_sums_over_classes() -> None:
    s, m = randn(4, 5), 3 * randn(4, 6, 5, seed=1)
    p, q = softmax(m.numpy() / 2).mean(1), softmax(s.numpy() / 2)
    assert KF.end(s, m, 2.0).item() == pytest.approx(4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-12)
    torch.testing.assert_close(KF.end(s, m[:, :1], 2.0), KF.kd(s, m[:, 0], 2.0))


def test_gradients_at_the_start_with_many_classes() -> None:
    """What the proxies are for: with 100 classes the likelihood pushes each wrong class harder than the true one."""
    m = torch.zeros(1, 5, 100, dtype=torch.float64)
    m[..., 0] = 12.0
    gradients = {}
    for name in ("endd", "reverse"):
        s = torch.zeros(1, 100, dtype=torch.float64, requires_grad=True)
        LOSSES[name](s, m).backward()
        assert s.grad is not None
        gradients[name] = s.grad[0, :2].tolist()
    # By hand: alpha (digamma(alpha) - digamma(100 alpha) - log pi) at alpha = 1.
    first = softmax(m[0, 0].numpy()) * (1 - 1e-3) + 1e-5
    assert gradients["endd"] == pytest.approx((digamma(1) - digamma(100) - np.log(first[:2])).tolist(), rel=1e-3)
    assert gradients["endd"] == pytest.approx([-5.18, 5.86], abs=0.01)
    assert gradients["reverse"] == pytest.approx([-0.64, 0.005], abs=0.001)


@every_loss
def test_gradient(name: str) -> None:
    s, m = (2 * randn(3, 4)).requires_grad_(), randn(3, 5, 4, seed=1).requires_grad_()
    for temperature in (1.0, 3.0):
        assert torch.autograd.gradcheck(lambda x, t=temperature: LOSSES[name](x, m, temperature=t), (s,))
    LOSSES[name](s, m).backward()
    assert m.grad is None


@every_loss
@given(order=st.permutations(range(5)), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_members_have_no_order(name: str, order: list[int], seed: int) -> None:
    s, m = randn(2, 3, seed=seed), 4 * randn(2, 5, 3, seed=seed + 100)
    torch.testing.assert_close(LOSSES[name](s, m), LOSSES[name](s, m[:, order]), rtol=1e-9, atol=1e-9)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_overflows(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    values = torch.tensor([[12.0, 0.0, -3.0], [300.0, -300.0, 0.0], [largest, -largest, 0.0]])
    s = values.to(dtype).requires_grad_()
    for members in (s.detach()[:, None], s.detach()[:, None].expand(3, 4, 3), 2 * torch.ones(3, 2, 3, dtype=dtype)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](s, members, reduction="none")
        assert loss.dtype == torch.float32
        assert loss[:2].isfinite().all()
        # The likelihood's gradient is as large as the concentrations, beyond float16 at logits of 12.
        if dtype != torch.float16 or name in ("reverse", "end"):
            (gradient,) = torch.autograd.grad(loss[:2].sum(), s)
            assert gradient.isfinite().all()


def test_a_single_member_draws_to_the_bound_and_no_further() -> None:
    m = torch.tensor([[[3.0, 0.0, 1.0]]])
    z = torch.log(m[:, 0].softmax(-1)).double()
    values = [KF.endd(z + offset, m, smoothing=0.0).item() for offset in (0.0, 5.0, 10.0, 25.0, 35.0)]
    assert values[:4] == sorted(values[:4], reverse=True)
    assert values[3] == pytest.approx(values[4])


@every_loss
def test_positions_and_mask(name: str) -> None:
    s, m = randn(3, 4, 5), randn(3, 2, 4, 5, seed=1)
    mask = torch.arange(4) < torch.tensor([4, 1, 0])[:, None]
    none = LOSSES[name](s, m, mask=mask, reduction="none")
    for b, count in enumerate((4, 1)):
        rows = LOSSES[name](s[b, :count], m[b, :, :count].transpose(0, 1))
        torch.testing.assert_close(none[b], rows)
    assert none[2] == 0


def test_uncertainty_of_a_dirichlet_is_that_of_its_samples() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0], [3.0, 3.0, 3.0], [-2.0, -2.0, 1.0]], dtype=torch.float64)
    for offset in (0.0, 1.0):
        found = kd_plugins.uncertainty(logits, offset=offset)
        alpha = logits.exp().numpy() + offset
        for b in range(3):
            samples = stats.dirichlet(alpha[b]).rvs(20000, random_state=0)
            entropy = stats.entropy(samples, axis=1).mean()
            assert found.total[b].item() == pytest.approx(stats.entropy(alpha[b]), rel=1e-6)
            assert found.data[b].item() == pytest.approx(entropy, abs=0.01)
        torch.testing.assert_close(found.total, found.data + found.knowledge)


def test_uncertainty_of_an_ensemble() -> None:
    m = 3 * randn(4, 6, 5)
    p = softmax(m.numpy())
    found = kd_plugins.uncertainty(m, members=True)
    assert found.total.tolist() == pytest.approx(stats.entropy(p.mean(1), axis=1).tolist())
    assert found.data.tolist() == pytest.approx(stats.entropy(p, axis=2).mean(1).tolist())
    torch.testing.assert_close(found.knowledge, found.total - found.data)
    one = kd_plugins.uncertainty(m[:, :1], members=True)
    torch.testing.assert_close(one.knowledge, torch.zeros(4, dtype=torch.float64))


def test_uncertainty_of_extreme_logits() -> None:
    logits = torch.tensor([[60000.0, -60000.0], [-60000.0, -60000.0], [12.0, 12.0]], dtype=torch.float16)
    found = kd_plugins.uncertainty(logits)
    assert found.total.dtype == torch.float32
    assert [x.isfinite().all() for x in found] == [True] * 3
    assert found.total.tolist() == pytest.approx([0.0, np.log(2), np.log(2)])
    assert found.knowledge.tolist() == pytest.approx([0.0, np.log(2), 0.0], abs=1e-5)


def test_messages() -> None:
    s, m = torch.zeros(2, 3), torch.zeros(2, 4, 3)
    for wrong in (m[:, 0], m[:, :, :2], m[:1], m[:, :0]):
        with pytest.raises(ValueError, match=r"the members' \[B, M, K\]"):
            KF.endd(s, wrong)
    with pytest.raises(ValueError, match="temperature above 0"):
        KF.endd_proxy(s, m, temperature=0.0)
    with pytest.raises(ValueError, match="smoothing from 0 to 1"):
        KF.endd(s, m, smoothing=2.0)
    with pytest.raises(ValueError, match="'reverse' or 'forward'"):
        KF.endd_proxy(s, m, direction="both")
    with pytest.raises(ValueError, match="max_precision"):
        KF.endd_proxy(s, m, max_precision=0.0)
    with pytest.raises(ValueError, match=r"logits \[B, M, K\] of two classes"):
        kd_plugins.uncertainty(s, members=True)
