"""FitNets' hints: the regressor that the paper describes, and the squared distance behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF
from kd_plugins.nn.connectors import hint_regressor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "mapped"),
    [
        ((4, 6, 6), (5, 6, 6), (1, 1), (5, 6, 6)),
        ((4, 8, 8), (5, 6, 3), (3, 6), (5, 6, 3)),
        ((4, 3, 8), (5, 6, 4), (1, 5), (5, 3, 4)),  # the student's height is the smaller one
    ],
)
def test_kernel_is_the_difference_of_sizes_plus_one(student, teacher, kernel, mapped) -> None:
    v, u = randn(2, *student), randn(2, *teacher, seed=1)
    regressor = hint_regressor(v, u).double()
    assert regressor.kernel_size == kernel
    out = regressor(v)
    assert out.shape == (2, *mapped)
    weight, bias = regressor.weight, regressor.bias
    for n, o, i, j in ((0, 0, 0, 0), (1, 4, mapped[1] - 1, mapped[2] - 1)):
        patch = v[n, :, i : i + kernel[0], j : j + kernel[1]]
        torch.testing.assert_close(out[n, o, i, j], (patch * weight[o]).sum() + bias[o], rtol=1e-12, atol=1e-14)


def test_hint_loss_is_the_papers_up_to_its_factor() -> None:
    """|u_h - r(v_g)|^2 / 2 of each example, over half the number of entries."""
    v, u = randn(3, 4, 5, 5), randn(3, 6, 4, 4, seed=1)
    regressor = hint_regressor(v, u).double()
    expected = torch.stack([(u[n] - regressor(v[n : n + 1])[0]).pow(2).sum() / 2 for n in range(3)]) / (
        u[0].numel() / 2
    )
    torch.testing.assert_close(KF.feature_l2(regressor(v), u, reduction="none"), expected, rtol=1e-12, atol=0)
