"""Similarity of features, against the centred Gram matrices and the sums written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    return torch.trace(k @ h @ m @ h)


class TestLinearCka:
    @settings(max_examples=30, derandomize=True, deadline=None)
    @given(st.integers(3, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
    def test_is_that_of_the_centred_grams(self, n: int, d_x: int, d_y: int, seed: int) -> None:
        x, y = randn(n, d_x, seed=seed) + 5, randn(n, d_y, seed=seed + 1)
        k, m = x @ x.T, y @ y.T
        expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
        torch.testing.assert_close(KF.linear_cka(x, y), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(KF.linear_cka(y, x), KF.linear_cka(x, y), rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
    def test_one_for_rotation_scale_and_shift(self, shape: tuple[int, int]) -> None:
        x = randn(*shape)
        rotation = torch.linalg.qr(randn(shape[1], shape[1], seed=1))[0]
        assert KF.linear_cka(x, 4 * x @ rotation + 3).item() == pytest.approx(1, abs=1e-12)
        order = torch.randperm(shape[0])
        y = randn(shape[0], 3, seed=2)
        torch.testing.assert_close(KF.linear_cka(x[order], y[order]), KF.linear_cka(x, y))
        assert 0 < KF.linear_cka(x, y) < 1

    def test_zero_for_unrelated_and_constant(self) -> None:
        x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
        assert KF.linear_cka(x, y) == 0
        assert KF.linear_cka(x, torch.full((4, 2), 0.1)) == 0
        assert KF.linear_cka(torch.zeros(4, 2), x) == 0
        # What rounding leaves of a constant minus its mean is like itself, but nothing.
        constant = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64).repeat(48, 1)
        assert (constant - constant.mean(0)).any()
        assert KF.linear_cka(constant, constant) == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_is_computed_in_float64(self, dtype: torch.dtype) -> None:
        x, y = randn(8, 5).to(dtype), (1000 + randn(8, 4, seed=1)).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            value = KF.linear_cka(x, y)
        assert value.dtype == torch.float64
        assert value.shape == ()
        torch.testing.assert_close(value, KF.linear_cka(x.double(), y.double()))

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match=r"got \[4, 3\] and \[5, 3\]"):
            KF.linear_cka(torch.zeros(4, 3), torch.zeros(5, 3))
        with pytest.raises(ValueError, match="pool maps"):
            KF.linear_cka(torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2))


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
