"""The loss of relations between probabilities, against numpy's correlation, row by row and class by class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def oracle(s: Tensor, t: Tensor, beta: float, gamma: float, temperature: float, mask: Tensor) -> float:
    """Logits `[B, N, K]`."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z / temperature)
        return e / e.sum()

    rows = [
        [(softmax(s[b, i].numpy()), softmax(t[b, i].numpy())) for i in range(s.shape[1]) if mask[b, i]]
        for b in range(len(s))
    ]
    between_classes = np.mean([np.mean([1 - correlation(x, y) for x, y in r]) if r else 0.0 for r in rows])
    y_s, y_t = (np.stack([pair[i] for r in rows for pair in r]) for i in (0, 1))
    between_rows = np.mean([1 - correlation(y_s[:, k], y_t[:, k]) for k in range(y_s.shape[1])])
    return float(temperature**2 * (beta * between_classes + gamma * between_rows))


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 3.0, 0.5)])
def test_value_is_that_of_the_definition(beta: float, gamma: float, temperature: float) -> None:
    s, t = randn(4, 5, 6), randn(4, 5, 6, seed=1)
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 3])[:, None]
    options = (beta, gamma, temperature)
    everything = torch.ones(4, 5, dtype=torch.bool)
    assert KF.dist(s, t, *options).item() == pytest.approx(oracle(s, t, *options, everything), abs=1e-10)
    assert KF.dist(s, t, *options, mask=mask.long()).item() == pytest.approx(oracle(s, t, *options, mask), abs=1e-10)
    first = oracle(s[:, :1], t[:, :1], *options, everything[:, :1])
    assert KF.dist(s[:, 0], t[:, 0], *options).item() == pytest.approx(first, abs=1e-10)


def test_what_the_relations_do_not_see() -> None:
    """A shift of a row's logits; scale and shift of the student's probabilities along a row, of two classes."""
    s, t = randn(6, 5), randn(6, 5, seed=1)
    torch.testing.assert_close(KF.dist(s + randn(6, 1, seed=2), t), KF.dist(s, t))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(KF.dist(s[order], t[order]), KF.dist(s, t))
    torch.testing.assert_close(KF.dist(s.flip(1), t.flip(1)), KF.dist(s, t))
    flatter = (0.3 * s.softmax(1) + 0.7 / 5).log()
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        torch.testing.assert_close(KF.dist(flatter, s, *weights), torch.zeros((), dtype=torch.float64))


def test_gradient() -> None:
    s, t = randn(3, 4, 5).requires_grad_(), randn(3, 4, 5, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: KF.dist(x, t.detach(), 1.0, 2.0, 2.0, mask=mask), (s,))
    KF.dist(s, t, mask=mask).backward()
    assert t.grad is None
    assert (s.grad[mask == 0] == 0).all()
    assert (s.grad[mask == 1] != 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, -7.3])
def test_a_student_that_says_nothing(level: float) -> None:
    """Equal logits, as a head of zeros gives: no correlation, where rounding divided by itself would be one."""
    s = torch.full((5, 7), level, requires_grad=True)
    loss = KF.dist(s, randn(5, 7).float())
    loss.backward()
    assert loss == 2
    assert (s.grad == 0).all()


def test_one_row_and_no_row() -> None:
    s, t = randn(1, 7).requires_grad_(), randn(1, 7, seed=1)
    torch.testing.assert_close(KF.dist(s, t, 1.0, 1.0), KF.dist(s, t, 1.0, 0.0) + 1)
    loss = KF.dist(s, t, mask=torch.tensor([False]))
    loss.backward()
    assert loss == 0
    assert (s.grad == 0).all()


def test_classes_that_are_improbable_in_every_row_count_as_the_others() -> None:
    """As most of a vocabulary is to a language model."""
    s, t = 3 * randn(6, 5), 3 * randn(6, 5, seed=1)
    s[:, 3:] -= 35
    t[:, 3:] -= 35
    assert s.softmax(1)[:, 3:].max() < 1e-12
    x = s.float().requires_grad_()
    loss = KF.dist(x, t.float(), 0.0)
    assert loss.item() == pytest.approx(oracle(s[:, None], t[:, None], 0.0, 1.0, 1.0, torch.ones(6, 1)), rel=1e-4)
    loss.backward()
    assert (x.grad[:, 3:].abs() > 1e-4).any(0).all()


def test_half_precision() -> None:
    s, t = (5 * randn(6, 9)).bfloat16().requires_grad_(), (5 * randn(6, 9, seed=1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.dist(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(KF.dist(s.detach().double(), t.double()).item(), rel=1e-5)
    loss.backward()
    assert s.grad.dtype == torch.bfloat16
    assert s.grad.isfinite().all()


def test_messages() -> None:
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"one shape.*\[4, 3\] and \[4, 2\]"):
        KF.dist(z, z[:, :2])
    with pytest.raises(ValueError, match="temperature above 0"):
        KF.dist(z, z, temperature=-1.0)
    with pytest.raises(ValueError, match=r"mask \[4\]"):
        KF.dist(z, z, mask=torch.ones(4, 3, dtype=torch.bool))
