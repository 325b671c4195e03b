"""Distances and angles within a batch, against every pair and triple by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF

LOSSES = [KF.rkd_distance, KF.rkd_angle]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float, y: float) -> float:
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def distance_oracle(student: Tensor, teacher: Tensor) -> float:
    potentials = []
    for x in (student.numpy(), teacher.numpy()):
        pairs = {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in itertools.permutations(range(len(x)), 2)}
        mu = np.mean(list(pairs.values()))
        potentials.append({pair: d / mu for pair, d in pairs.items()})
    return sum(huber(potentials[0][p], potentials[1][p]) for p in potentials[0]) / len(student) ** 2


def angle_oracle(student: Tensor, teacher: Tensor) -> float:
    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    s, t = student.numpy(), teacher.numpy()
    triples = itertools.permutations(range(len(s)), 3)
    return sum(huber(cosine(s, *triple), cosine(t, *triple)) for triple in triples) / len(s) ** 3


def test_values_are_those_of_the_definition() -> None:
    s, t = randn(6, 4), randn(6, 9, seed=1)
    # One far away, so that the loss leaves its quadratic part.
    s[0] *= 40
    assert KF.rkd_distance(s, t).item() == pytest.approx(distance_oracle(s, t), abs=1e-12)
    assert KF.rkd_angle(s, t).item() == pytest.approx(angle_oracle(s, t), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
class TestBoth:
    def test_what_they_do_not_see(self, loss) -> None:
        """Rotation, scale and shift of either network's embeddings, the order of the examples, the layout of axes."""
        s, t = randn(5, 4), randn(5, 6, seed=1)
        moved = 7 * s @ torch.linalg.qr(randn(4, 4, seed=2)).Q + randn(4, seed=3)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
        for other in (loss(moved, t), loss(s, 0.1 * t - 3), loss(s[order], t[order]), loss(s.view(5, 2, 2), t)):
            torch.testing.assert_close(other, loss(s, t))
        assert loss(moved, s) < 1e-24

    def test_gradient(self, loss) -> None:
        s, t = randn(5, 3).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, t.detach()), (s,))
        loss(s, t).backward()
        assert t.grad is None
        assert s.grad.abs().sum() > 0

    @pytest.mark.parametrize("equal", [2, 5])
    def test_equal_embeddings(self, loss, equal: int) -> None:
        """Some, as a batch with an image twice has; all of them, as a student that says nothing."""
        s, t = randn(5, 3).float(), randn(5, 4, seed=1)
        s[:equal] = s[0].clone()
        s.requires_grad_()
        value = loss(s, t)
        value.backward()
        assert value.isfinite()
        assert s.grad.isfinite().all()
        assert s.grad.abs().max() < 10

    def test_small_batches(self, loss) -> None:
        assert loss(randn(1, 3), randn(1, 4, seed=1)) == 0
        assert loss(randn(2, 3), randn(2, 4, seed=1)) == pytest.approx(0, abs=1e-15)

    def test_half_precision(self, loss) -> None:
        s, t = (300 * randn(6, 8)).half().requires_grad_(), (1e-3 * randn(6, 5, seed=1)).half()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(s, t)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(s.detach().double(), t.double()).item(), rel=1e-4)
        value.backward()
        assert s.grad.dtype == torch.float16
        assert s.grad.isfinite().all()

    def test_messages(self, loss) -> None:
        with pytest.raises(ValueError, match=r"one batch, got \[4, 3\] and \[2, 3\]"):
            loss(torch.zeros(4, 3), torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"\[B, D\]"):
            loss(torch.zeros(4), torch.zeros(4))
