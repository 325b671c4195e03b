"""The decoupled soft labels, against probabilities written out, and against the soft labels that they take apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of four examples of five tokens; ignored labels where the mask is 0, one example without any token."""
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 3])[:, None]
    labels = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(2)).where(mask, -100)
    return 3 * randn(4, 5, 6), 3 * randn(4, 5, 6, seed=1), labels, mask


def row(z_s: list[float], z_t: list[float], label: int, alpha: float, beta: float, temperature: float) -> float:
    """One row by the definition: probabilities of the softmax, then two classes and the rest, each normalised."""

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def split(z: list[float]) -> tuple[list[float], list[float]]:
        e = [math.exp(x / temperature) for x in z]
        p = [x / sum(e) for x in e]
        rest = p[:label] + p[label + 1 :]
        return [p[label], sum(rest)], [x / sum(rest) for x in rest]

    (b_s, q_s), (b_t, q_t) = split(z_s), split(z_t)
    return temperature**2 * (alpha * kl(b_t, b_s) + beta * kl(q_t, q_s))


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.3, 0.0, 1.0), (0.0, 2.0, 0.7)])
def test_value_is_that_of_the_definition(alpha: float, beta: float, temperature: float) -> None:
    s, t, labels, mask = batch()
    expected = []
    for b in range(4):
        rows = [
            row(s[b, i].tolist(), t[b, i].tolist(), int(labels[b, i]), alpha, beta, temperature)
            for i in range(5)
            if mask[b, i]
        ]
        expected.append(sum(rows) / len(rows) if rows else 0.0)
    options = (alpha, beta, temperature)
    none = KF.dkd(s, t, labels, *options, mask=mask, reduction="none")
    assert none.tolist() == pytest.approx(expected, abs=1e-10)
    assert KF.dkd(s, t, labels, *options, mask=mask.long()) == none.mean()
    assert KF.dkd(s, t, labels, *options, mask=mask, reduction="sum") == none.sum()
    first = KF.dkd(s[:, 0], t[:, 0], labels[:, 0].clamp_min(0), *options, mask=mask[:, 0], reduction="none")
    one = KF.dkd(s[:1, 0], t[:1, 0], labels[:1, 0], *options)
    assert first[0] == one
    assert first[2] == 0


def test_the_soft_labels_are_taken_apart() -> None:
    """`KD = TCKD + (1 - p_t[y]) NCKD`, the identity that the paper starts from."""
    s, t = 2 * randn(7, 5), 2 * randn(7, 5, seed=1)
    labels = torch.arange(7) % 5
    others = 1 - (t / 3).softmax(1).gather(1, labels[:, None]).squeeze(1)
    parts = [KF.dkd(s, t, labels, a, b, 3.0, reduction="none") for a, b in ((1.0, 0.0), (0.0, 1.0))]
    torch.testing.assert_close(parts[0] + others * parts[1], KF.kd(s, t, 3.0, reduction="none"), rtol=1e-10, atol=0)


def test_gradient() -> None:
    s, t, labels, mask = batch()
    s.requires_grad_()
    t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: KF.dkd(x, t.detach(), labels, 0.5, 2.0, 2.0, mask=mask, reduction="none"), (s,)
    )
    KF.dkd(s, t, labels, mask=mask).backward()
    assert t.grad is None
    assert (s.grad[~mask] == 0).all()
    assert (s.grad[mask] != 0).all()


def test_confident_logits_in_half_precision() -> None:
    """A probability of 1 is where the definition divides by 0; at equality the value is 0 and so is the gradient."""
    s = torch.tensor([[200.0, 0.0, -3.0], [-150.0, 100.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    t, labels = torch.tensor([[0.0, 190.0, 3.0], [90.0, -90.0, 1.0]], dtype=torch.bfloat16), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.dkd(s, t, labels)
        same = KF.dkd(s, s.detach(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(KF.dkd(s.detach().double(), t.double(), labels).item(), rel=1e-5)
    assert same == 0
    loss.backward()
    assert s.grad.dtype == torch.bfloat16
    assert s.grad.isfinite().all()


def test_two_classes_have_no_others_to_compare() -> None:
    s, t, labels = randn(4, 2), randn(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
    assert KF.dkd(s, t, labels, 0.0, 8.0).item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(KF.dkd(s, t, labels, 1.0, 8.0), KF.kd(s, t))


def test_classes_that_neither_network_has() -> None:
    """They add nothing; where the label is one of them, or the only one that is left, a part of the loss is 0."""
    s, t, labels = randn(4, 3).requires_grad_(), randn(4, 3, seed=1), torch.tensor([0, 1, 2, 0])
    without = KF.dkd(s, t, labels)
    without.backward()
    padded, theirs = (F.pad(x.detach(), (0, 1), value=-torch.inf) for x in (s, t))
    padded.requires_grad_()
    value = KF.dkd(padded, theirs, labels)
    value.backward()
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(padded.grad[:, :3], s.grad)
    torch.testing.assert_close(KF.dkd(padded, theirs, torch.full((4,), 3), 1.0, 2.0), 2 * KF.kd(s, t))
    alone = padded.detach()[:, 2:].requires_grad_()
    value = KF.dkd(alone, theirs[:, 2:], torch.zeros(4, dtype=torch.long))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert (alone.grad == 0).all()


def test_messages() -> None:
    z, labels = torch.zeros(8, 5, 3), torch.zeros(8, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"two classes or more, got \[8, 5, 1\]"):
        KF.dkd(z[..., :1], z[..., :1], labels)
    with pytest.raises(ValueError, match="one shape"):
        KF.dkd(z, z[:, :4], labels)
    with pytest.raises(ValueError, match=r"class numbers \[8, 5\].*float32 \[8, 5, 3\]"):
        KF.dkd(z, z, z)
    with pytest.raises(ValueError, match=r"a mask like them.*and \[8\]"):
        KF.dkd(z, z, labels, mask=labels[:, 0])
    with pytest.raises(ValueError, match="temperature above 0"):
        KF.dkd(z, z, labels, temperature=0.0)
    with pytest.raises(ValueError, match="reduction"):
        KF.dkd(z, z, labels, reduction="batchmean")
