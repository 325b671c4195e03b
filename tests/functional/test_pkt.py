"""Neighbours within a batch, against the conditional probabilities written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(student: Tensor, teacher: Tensor) -> float:
    """Without the eps of the logarithm."""

    def kernel(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return (dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)) + 1) / 2

    def probability(rows: list[list[float]], i: int, j: int) -> float:
        return kernel(rows[i], rows[j]) / sum(kernel(rows[i], rows[k]) for k in range(len(rows)) if k != i)

    s, t, n = student.flatten(1).tolist(), teacher.flatten(1).tolist(), len(student)
    pairs = [(probability(t, i, j), probability(s, i, j)) for i in range(n) for j in range(n) if i != j]
    return sum(p * math.log(p / q) for p, q in pairs) / n**2


def test_value_is_that_of_the_definition() -> None:
    s, t = randn(6, 3, 2), randn(6, 9, seed=1)
    assert KF.pkt(s, t, eps=1e-14).item() == pytest.approx(oracle(s, t), abs=1e-12)
    assert KF.pkt(s, t).item() == pytest.approx(oracle(s, t), rel=1e-4)


def test_what_the_neighbours_do_not_see() -> None:
    """Rotation of either network's features, the length of each example's, the order of the examples."""
    s, t = randn(6, 5), randn(6, 8, seed=1)
    rotated = s @ torch.linalg.qr(randn(5, 5, seed=2)).Q * (1 + torch.arange(6.0).double())[:, None]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    for other in (KF.pkt(rotated, t), KF.pkt(s[order], t[order]), KF.pkt(s.view(6, 5, 1), t)):
        torch.testing.assert_close(other, KF.pkt(s, t))
    assert KF.pkt(rotated, s).abs() < 1e-15


def test_gradient() -> None:
    s, t = randn(5, 3).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.pkt(x, t.detach()), (s,))
    KF.pkt(s, t).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


def test_opposite_and_equal_and_no_features() -> None:
    """A kernel of 0 in the student where the teacher's is not; an example whose rectifiers are all off."""
    s = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = KF.pkt(s, randn(4, 3))
    loss.backward()
    assert loss > 0
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    assert (s.grad[2] == 0).all()


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches(size: int) -> None:
    s = randn(size, 3).requires_grad_()
    loss = KF.pkt(s, randn(size, 4, seed=1))
    loss.backward()
    assert loss == 0
    assert s.grad.isfinite().all()


def test_half_precision() -> None:
    s, t = (300 * randn(6, 40)).half().requires_grad_(), (1e-3 * randn(6, 30, seed=1)).half()
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.pkt(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(KF.pkt(s.detach().double(), t.double()).item(), rel=1e-3)
    loss.backward()
    assert s.grad.dtype == torch.float16
    assert s.grad.isfinite().all()


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"one batch, got \[4, 3\] and \[2, 3\]"):
        KF.pkt(torch.zeros(4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        KF.pkt(torch.zeros(4), torch.zeros(4))
