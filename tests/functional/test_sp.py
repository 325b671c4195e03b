"""Similarity of examples, against inner products written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(student: Tensor, teacher: Tensor) -> float:
    grams = []
    for x in (student.numpy(), teacher.numpy()):
        g = np.array([[float((a * b).sum()) for b in x] for a in x])
        grams.append(np.array([row / np.sqrt((row**2).sum()) for row in g]))
    return float(((grams[1] - grams[0]) ** 2).sum() / len(student) ** 2)


def test_value_is_that_of_the_definition() -> None:
    for s, t in ((randn(5, 3, 4, 2), randn(5, 7, 2, 2, seed=1)), (randn(4, 6), randn(4, 3, 5, seed=1))):
        assert KF.sp(s, t).item() == pytest.approx(oracle(s, t), abs=1e-12)


def test_what_the_similarities_do_not_see() -> None:
    """Rotation and scale of either network's features, the order of the examples, copies of channels."""
    s, t = randn(6, 5), randn(6, 8, seed=1)
    rotation = torch.linalg.qr(randn(5, 5, seed=2)).Q
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    for other in (KF.sp(3 * s @ rotation, t), KF.sp(s[order], t[order]), KF.sp(s, torch.cat([t, t], 1))):
        torch.testing.assert_close(other, KF.sp(s, t))
    assert KF.sp(3 * s @ rotation, s) < 1e-24


def test_gradient() -> None:
    s, t = randn(4, 3, 2).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.sp(x, t.detach()), (s,))
    KF.sp(s, t).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_features_of_zeros(dtype: torch.dtype) -> None:
    """Products that overflow half precision; an example whose rectifiers are all off."""
    s, t = (300 * randn(4, 50)).to(dtype), (300 * randn(4, 60, seed=1)).to(dtype)
    s[1] = 0
    s.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.sp(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(KF.sp(s.detach().double(), t.double()).item(), rel=1e-4)
    loss.backward()
    assert s.grad.dtype == dtype
    assert s.grad.isfinite().all()


def test_one_example_has_no_pairs() -> None:
    s = randn(1, 3).requires_grad_()
    loss = KF.sp(s, randn(1, 4, seed=1))
    loss.backward()
    assert loss == 0
    assert (s.grad.abs() < 1e-15).all()


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"one batch, got \[4, 3\] and \[2, 3\]"):
        KF.sp(torch.zeros(4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"features \[B, D\] or \[B, \.\.\.\] of one batch"):
        KF.sp(torch.zeros(4), torch.zeros(4))
