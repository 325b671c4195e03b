"""The weighted sum of maps, against the sum written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=4), st.integers(0, 10**6))
def test_is_the_sum_written_out(n: int, shape: list[int], seed: int) -> None:
    maps, weights = randn(n, 2, *shape, seed=seed), randn(n, seed=seed + 1)
    expected = torch.einsum("n,nb->b", weights, maps.flatten(1)).reshape(2, *shape)
    torch.testing.assert_close(KF.aggregate(list(maps), weights), expected, rtol=1e-12, atol=1e-12)


def test_one_hot_weights_choose_a_map_to_the_bit() -> None:
    maps = list(randn(3, 2, 4, 3, 3, dtype=torch.float32))
    for j in range(3):
        assert torch.equal(KF.aggregate(maps, torch.eye(3)[j]), maps[j])


def test_gradients() -> None:
    maps, weights = [randn(2, 3, seed=i).requires_grad_() for i in range(3)], randn(3, seed=9).requires_grad_()
    torch.autograd.gradcheck(lambda w, *m: KF.aggregate(m, w), (weights, *maps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32(dtype: torch.dtype) -> None:
    maps, weights = [randn(2, 8, seed=i).to(dtype) for i in range(4)], randn(4, seed=9).float().softmax(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = KF.aggregate(maps, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), sum(w * m.double() for w, m in zip(weights.double(), maps, strict=True)))


def test_refuses_what_cannot_be_summed() -> None:
    with pytest.raises(ValueError, match=r"one or more maps of one shape"):
        KF.aggregate([torch.zeros(2, 3), torch.zeros(2, 4)], torch.ones(2))
    with pytest.raises(ValueError, match=r"one or more maps"):
        KF.aggregate([], torch.ones(0))
    with pytest.raises(ValueError, match=r"Expected 2 weights.*\[3\]"):
        KF.aggregate([torch.zeros(2), torch.zeros(2)], torch.ones(3))
