"""DAFL's three losses against loops, and where they must stay finite."""

from __future__ import annotations

import math

import pytest
import torch

from kd_plugins import functional as KF


def logits(rows: int = 6, classes: int = 5, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def probabilities(z: torch.Tensor) -> list[list[float]]:
    return [[math.exp(a) / sum(math.exp(b) for b in row) for a in row] for row in z.tolist()]


def test_one_hot() -> None:
    z = logits()
    expected = -sum(math.log(max(row)) for row in probabilities(z)) / len(z)
    assert KF.dafl_one_hot(z).item() == pytest.approx(expected)


def test_activation_is_a_mean_over_examples_and_units() -> None:
    f = logits(4, 7)
    assert KF.dafl_activation(f).item() == pytest.approx(-sum(abs(v) for row in f.tolist() for v in row) / 28)


@pytest.mark.parametrize("base", [2.0, math.e, 10.0])
def test_information(base: float) -> None:
    z = logits()
    mean = [sum(column) / len(z) for column in zip(*probabilities(z), strict=True)]
    assert KF.dafl_information(z, base).item() == pytest.approx(sum(p * math.log(p, base) for p in mean))


def test_information_is_finite_where_a_class_is_never_predicted() -> None:
    z = torch.tensor([[0.0, -1e4, 300.0], [300.0, -1e4, 0.0]], requires_grad=True)
    loss = KF.dafl_information(z)
    assert loss.item() == pytest.approx(math.log10(0.5))
    assert torch.autograd.grad(KF.dafl_information(z), z)[0].isfinite().all()


def test_gradients() -> None:
    z = logits().requires_grad_()
    for loss in (KF.dafl_one_hot, KF.dafl_activation, KF.dafl_information):
        assert torch.autograd.gradcheck(loss, (z,))


def test_half_precision_is_computed_in_single() -> None:
    z = logits(scale=20.0).bfloat16()
    for loss in (KF.dafl_one_hot, KF.dafl_activation, KF.dafl_information):
        assert loss(z).dtype == torch.float32
        torch.testing.assert_close(loss(z), loss(z.float()))


def test_refusals() -> None:
    for loss, x in ((KF.dafl_one_hot, torch.zeros(3)), (KF.dafl_information, torch.zeros(2, 3, 4))):
        with pytest.raises(ValueError, match="Expected"):
            loss(x)
    with pytest.raises(ValueError, match="base of a logarithm, above 1"):
        KF.dafl_information(torch.zeros(2, 3), 1)
