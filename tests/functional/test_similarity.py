"""Distances of features, against the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestFeatureL2:
    @pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 2)])
    def test_written_out(self, shape: tuple[int, ...]) -> None:
        s, t = randn(*shape), randn(*shape, seed=1)
        squares = [(a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)]
        assert KF.feature_l2(s, t).item() == pytest.approx(sum(squares) / len(squares))
        size = len(squares) // 3
        none = KF.feature_l2(s, t, reduction="none")
        assert none.tolist() == pytest.approx([sum(squares[i * size : (i + 1) * size]) / size for i in range(3)])
        assert KF.feature_l2(s, t, reduction="sum").item() == pytest.approx(none.sum().item())

    def test_both_sides_get_a_gradient(self) -> None:
        s, t = randn(2, 3, 2).requires_grad_(), randn(2, 3, 2, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(KF.feature_l2, (s, t))
        KF.feature_l2(s, t).backward()
        torch.testing.assert_close(s.grad, -t.grad)

    def test_zero_at_equality_and_independent_of_size(self) -> None:
        x, y = randn(2, 3), randn(2, 3, seed=1)
        assert KF.feature_l2(x, x) == 0
        torch.testing.assert_close(KF.feature_l2(x.repeat(1, 4), y.repeat(1, 4)), KF.feature_l2(x, y))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        s, t = torch.full((2, 3), 1000.0, dtype=dtype).requires_grad_(), torch.zeros(2, 3, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = KF.feature_l2(s, t)
        loss.backward()
        assert loss.item() == s.detach().double().square().mean().item()
        assert s.grad.isfinite().all()

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 1\].*connect"):
            KF.feature_l2(torch.zeros(2, 3), torch.zeros(2, 1))
        with pytest.raises(ValueError, match="reduction"):
            KF.feature_l2(torch.zeros(2, 3), torch.zeros(2, 3), reduction="batchmean")


class TestFeatureL1:
    @pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 2)])
    def test_written_out(self, shape: tuple[int, ...]) -> None:
        s, t = randn(*shape), randn(*shape, seed=1)
        gaps = [abs(a - b) for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)]
        assert KF.feature_l1(s, t).item() == pytest.approx(sum(gaps) / len(gaps))
        size = len(gaps) // 3
        none = KF.feature_l1(s, t, reduction="none")
        assert none.tolist() == pytest.approx([sum(gaps[i * size : (i + 1) * size]) / size for i in range(3)])
        assert KF.feature_l1(s, t, reduction="sum").item() == pytest.approx(none.sum().item())

    def test_gradients_and_precision(self) -> None:
        s, t = randn(2, 3, 2).requires_grad_(), randn(2, 3, 2, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(KF.feature_l1, (s, t))
        with torch.autocast("cpu", torch.bfloat16):
            loss = KF.feature_l1(torch.full((2, 3), 1000.0, dtype=torch.float16), torch.ones(2, 3).half())
        assert loss.dtype == torch.float32
        assert loss.item() == 999

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 1\].*connect"):
            KF.feature_l1(torch.zeros(2, 3), torch.zeros(2, 1))
