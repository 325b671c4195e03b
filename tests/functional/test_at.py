"""Attention transfer against eq. 2 of the paper, written out position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(x: Tensor, p: int) -> Tensor:
    """Q of one example `[C, H, W]`, over its norm."""
    q = [sum(abs(float(channel[i, j])) ** p for channel in x) for i in range(x.shape[1]) for j in range(x.shape[2])]
    norm = sum(value * value for value in q) ** 0.5
    return torch.tensor([value / norm for value in q], dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_value_is_that_of_the_definition(p: int) -> None:
    student, teacher = randn(3, 4, 3, 5), randn(3, 6, 3, 5, seed=1)
    pairs = zip(student, teacher, strict=True)
    expected = torch.stack([(attention(s, p) - attention(t, p)).pow(2).sum() / 15 for s, t in pairs])
    for reduction, value in {"none": expected, "sum": expected.sum(), "mean": expected.mean()}.items():
        torch.testing.assert_close(KF.at(student, teacher, p, reduction=reduction), value, rtol=0, atol=1e-14)


def test_maps_of_other_sizes_meet_at_the_smaller_one() -> None:
    student, teacher = randn(2, 3, 4, 4), randn(2, 5, 2, 2, seed=1)
    blocks = student.square().mean(1, keepdim=True).reshape(2, 1, 2, 2, 2, 2).mean((3, 5))
    for ours, theirs in ((student, teacher), (teacher, student)):
        # One channel whose square is the average is the same attention.
        expected = KF.at(blocks.sqrt(), teacher)
        torch.testing.assert_close(KF.at(ours, theirs), expected, rtol=0, atol=1e-15)


def test_channels_signs_and_scale_do_not_count() -> None:
    student, teacher = randn(2, 4, 3, 3), randn(2, 6, 3, 3, seed=1)
    value = KF.at(student, teacher)
    scale = torch.tensor([0.1, 30.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    torch.testing.assert_close(KF.at(-scale * student.flip(1), torch.cat([teacher, -teacher], 1)), value)
    assert KF.at(student, 7 * student) < 1e-30


@pytest.mark.parametrize("p", [2, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_no_power_leaves_the_range_of_floats(p: int, size: float) -> None:
    student, teacher = (randn(2, 3, 4, 4, seed=i) for i in range(2))
    ours, theirs = (size * student).float().requires_grad_(), (teacher / size).float()
    value = KF.at(ours, theirs, p)
    torch.testing.assert_close(value.double(), KF.at(student, teacher, p), rtol=1e-4, atol=0)
    assert torch.autograd.grad(value, ours)[0].isfinite().all()


def test_gradient() -> None:
    student, teacher = randn(2, 3, 2, 3).requires_grad_(), randn(2, 4, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.at(x, teacher, reduction="none"), student)
    (grad,) = torch.autograd.grad(KF.at(student, teacher), student)
    # The map over its norm does not see its scale, so the gradient is orthogonal to it.
    assert abs(float((grad * student.detach()).sum())) < 1e-15
    assert torch.autograd.grad(KF.at(student, teacher), teacher, allow_unused=True) == (None,)
    dead = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(KF.at(dead, randn(1, 3, 2, 2)), dead)
    assert (grad == 0).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_loss(wrong: float) -> None:
    """A training must see it; zeros, which have no direction, are told apart from it."""
    broken, whole = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    broken[0, 1, 2, 2] = wrong
    tokens, others = broken.flatten(2), whole.flatten(2)
    tokens[0, 0, 0] = wrong
    for student, teacher in ((broken, whole), (whole, broken)):
        assert KF.at(student, teacher).isnan()
        assert KF.sp(student, teacher).isnan()
    for student, teacher in ((tokens, others), (others, tokens)):
        assert KF.cls_cosine(student, teacher).isnan()
    logits = tokens[:, 0]
    assert KF.dist(logits, others[:, 0]).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_island(dtype: torch.dtype) -> None:
    student, teacher = randn(2, 3, 4, 4).to(dtype), 300 * randn(2, 5, 4, 4, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = KF.at(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), KF.at(student.double(), teacher.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "p"), [((2, 3), (2, 3), 2), ((2, 3, 4, 4), (3, 3, 4, 4), 2), ((1, 1, 2, 2), (1, 1, 2, 2), 0)]
)
def test_refusals(student: tuple[int, ...], teacher: tuple[int, ...], p: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        KF.at(torch.ones(student), torch.ones(teacher), p)
