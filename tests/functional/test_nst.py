"""The distance of channels, against the definition with every pair of channels written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import Sizes
from torch import Tensor

from kd_plugins import functional as KF
from kd_plugins.functional import _common

KERNELS: dict[str, dict[str, Any]] = {
    "linear": {"kernel": "linear"},
    "poly": {"kernel": "poly"},
    "poly with offset": {"kernel": "poly", "c": 0.3},
    "poly of degree 3": {"kernel": "poly", "d": 3, "c": 0.1},
    "poly of degree 1": {"kernel": "poly", "d": 1},
    "gaussian": {"kernel": "gaussian"},
    "gaussian of a width": {"kernel": "gaussian", "sigma2": 0.7},
}
# Student and teacher; in the first two the inner products of channels are fewer, then those of positions.
SHAPES = {
    "few channels": ((2, 3, 5, 4), (2, 4, 5, 4)),
    "one channel": ((2, 1, 2, 7), (2, 5, 2, 7)),
    "many channels": ((3, 12, 2, 3), (3, 7, 2, 3)),
    "many channels, [B, C, N]": ((2, 6, 4), (2, 9, 4)),
    "one position": ((2, 3, 1, 1), (2, 2, 1, 1)),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(
    student: Tensor,
    teacher: Tensor,
    kernel: str = "poly",
    c: float = 0.0,
    d: int = 2,
    sigma2: float | None = None,
    teacher_term: bool = True,
) -> Tensor:
    """Every pair by itself `[B, C, C', HW]`; the normalisation by division, channels of zeros as constants."""

    def unit(x: Tensor) -> Tensor:
        x = x.flatten(2)
        dead = (x == 0).all(2, keepdim=True)
        x = torch.where(dead, torch.ones_like(x), x)
        return torch.where(dead, torch.zeros_like(x), x / (x * x).sum(2, keepdim=True).sqrt())

    f_s, f_t = unit(student), unit(teacher)
    both = torch.cat([f_s, f_t], 1).detach()
    distances = (both[:, :, None] - both[:, None]).square().sum(3)
    n = both.shape[1]
    width = distances.sum((1, 2)) / (n * (n - 1)) if sigma2 is None else torch.full_like(f_s[:, 0, 0], sigma2)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.unsqueeze(2), y.unsqueeze(1)
        if kernel == "gaussian":
            values = torch.exp(-(x - y).square().sum(3) / (2 * width[:, None, None]))
        else:
            values = (x * y).sum(3) if kernel == "linear" else ((x * y).sum(3) + c) ** d
        return values.mean((1, 2))

    value = mean(f_s, f_s) - 2 * mean(f_s, f_t)
    return value + mean(f_t, f_t) if teacher_term else value


def maps(name: str, dead: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = (randn(*shape, seed=seed + i) for i, shape in enumerate(SHAPES[name]))
    if dead:
        student[0, 0], teacher[-1, 1] = 0, 0
    return student, teacher


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("teacher_term", [True, False])
@pytest.mark.parametrize("dead", [False, True], ids=["", "zero channels"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", KERNELS)
def test_value_and_gradient_are_those_of_the_definition(
    options: str, shapes: str, dead: bool, teacher_term: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setitem(KF.nst.__globals__, "_ENTRIES", 1)
    student, teacher = maps(shapes, dead)
    student.requires_grad_()
    ours = KF.nst(student, teacher, **KERNELS[options], teacher_term=teacher_term, reduction="none")
    theirs = oracle(student, teacher, **KERNELS[options], teacher_term=teacher_term)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weights = torch.arange(1.0, len(ours) + 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(ours @ weights, student)
    (expected,) = torch.autograd.grad(theirs @ weights, student)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)
    if dead:
        assert (grad[0, 0] == 0).all()


@pytest.mark.parametrize("shapes", ["few channels", "many channels"])
def test_second_degree_is_the_difference_of_normalised_grams(shapes: str) -> None:
    student, teacher = maps(shapes, dead=True)
    grams = []
    for x in (student, teacher):
        f = F.normalize(x.flatten(2), dim=2)
        grams.append(sum(f[:, c, :, None] * f[:, c, None, :] for c in range(f.shape[1])) / f.shape[1])
    expected = (grams[0] - grams[1]).pow(2).sum((1, 2)).mean()
    torch.testing.assert_close(KF.nst(student, teacher), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "student", "teacher", "largest"),
    [
        ("linear", (2, 64, 8, 8), (2, 64, 8, 8), 2 * 64 * 64),
        ("poly", (2, 8, 16, 16), (2, 16, 16, 16), 2 * 16 * 256),
        ("poly", (2, 64, 4, 4), (2, 128, 4, 4), 2 * 128 * 16),
        ("poly with offset", (2, 64, 4, 4), (2, 128, 4, 4), 2 * 128 * 128),
        ("gaussian", (2, 64, 4, 4), (2, 128, 4, 4), 2 * 128 * 128),
    ],
)
def test_memory(options: str, student: tuple[int, ...], teacher: tuple[int, ...], largest: int) -> None:
    """No tensor exceeds the maps, or the inner products of the cheaper side."""
    f_s, f_t = randn(*student).requires_grad_(), randn(*teacher, seed=1)
    with Sizes() as sizes:
        KF.nst(f_s, f_t, **KERNELS[options]).backward()
    assert 0 < sizes.largest <= max(largest, 2 * f_s.numel())


def test_memory_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KF.nst.__globals__, "_ENTRIES", 3 * 32**2)
    f_s, f_t = randn(6, 32, 2, 2).requires_grad_(), randn(6, 32, 2, 2, seed=1)
    with Sizes() as sizes:
        KF.nst(f_s, f_t, "gaussian").backward()
    assert sizes.largest <= 32**2


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(KERNELS)), st.sampled_from(sorted(SHAPES)), st.integers(0, 10**6))
def test_order_and_scale_of_channels_do_not_count(options: str, shapes: str, seed: int) -> None:
    student, teacher = maps(shapes, dead=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    value = KF.nst(student, teacher, **KERNELS[options])
    mixed = student[:, torch.randperm(student.shape[1], generator=generator)]
    scale = torch.rand(teacher.shape[:2], generator=generator, dtype=torch.float64) + 0.1
    scaled = teacher * scale.reshape(scale.shape + (1,) * (teacher.dim() - 2))
    torch.testing.assert_close(KF.nst(mixed, scaled, **KERNELS[options]), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 16, 2, 2)])
@pytest.mark.parametrize("options", KERNELS)
def test_zero_at_equality(options: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    # Doubled channels are the same distribution.
    for teacher in (x, x.flip(1), torch.cat([x, x], 1)):
        student = x.clone().requires_grad_()
        loss = KF.nst(student, teacher, **KERNELS[options])
        loss.backward()
        assert abs(loss.item()) < 1e-14
        assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("shapes", ["few channels", "many channels"])
@pytest.mark.parametrize("options", KERNELS)
def test_teacher_term_is_a_constant_of_the_gradient(options: str, shapes: str) -> None:
    student, teacher = maps(shapes, dead=False)
    student.requires_grad_()
    losses = [KF.nst(student, teacher, **KERNELS[options], teacher_term=term) for term in (True, False)]
    assert losses[0] > losses[1]
    grads = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shapes", ["few channels", "many channels"])
@pytest.mark.parametrize("options", ["linear", "poly", "poly of degree 3", "gaussian of a width"])
def test_gradcheck(options: str, shapes: str) -> None:
    student, teacher = maps(shapes, dead=False)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.nst(x, teacher, **KERNELS[options], reduction="none"), (student,))


def test_teacher_gets_no_gradient() -> None:
    student, teacher = (x.requires_grad_() for x in maps("many channels", dead=False))
    KF.nst(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_reductions() -> None:
    student, teacher = maps("many channels", dead=False)
    none = KF.nst(student, teacher, reduction="none")
    assert none.shape == (3,)
    torch.testing.assert_close(KF.nst(student, teacher), none.mean())
    torch.testing.assert_close(KF.nst(student, teacher, reduction="sum"), none.sum())
    alone = torch.stack([KF.nst(s, t, "gaussian") for s, t in zip(student.split(1), teacher.split(1), strict=True)])
    torch.testing.assert_close(KF.nst(student, teacher, "gaussian", reduction="none"), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KERNELS)
def test_half_precision(options: str, dtype: torch.dtype) -> None:
    """Values as small as half precision has, and channels that vanish in it, stay finite."""
    student = (1e-6 * randn(2, 40, 3, 3)).to(dtype).requires_grad_()
    teacher = (100 * randn(2, 30, 3, 3, seed=1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.nst(student, teacher, **KERNELS[options])
    assert loss.dtype == torch.float32
    expected = oracle(student.detach().double(), teacher.double(), **KERNELS[options]).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    with torch.no_grad():
        student.mul_(1 / 256 if dtype == torch.float16 else 0)
    assert KF.nst(student, teacher, **KERNELS[options]).isfinite()
    student = randn(2, 4, 3, 3).to(dtype).requires_grad_()
    KF.nst(student, teacher, **KERNELS[options]).backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_of_equal_channels(dtype: torch.dtype) -> None:
    """The mean distance is 0 up to rounding, and must not blow the rounding up."""
    student = randn(2, 1, 4, 4, dtype=dtype).expand(2, 5, 4, 4).clone().requires_grad_()
    loss = KF.nst(student, 3 * student.detach()[:, :2], "gaussian")
    loss.backward()
    assert abs(loss.item()) < 1e-3
    assert student.grad.isfinite().all()


def test_messages() -> None:
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"got \[4, 5\] and \[5, 4\].*match_spatial"):
        KF.nst(x, x.mT)
    with pytest.raises(ValueError, match=r"one batch, got \[2, 3, 4, 5\] and \[1, 3, 4, 5\]"):
        KF.nst(x, x[:1])
    with pytest.raises(ValueError, match="one batch"):
        KF.nst(x, x.flatten(2))
    with pytest.raises(ValueError, match="one batch"):
        KF.nst(x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match="kernel 'linear', 'poly' or 'gaussian', got 'rbf'"):
        KF.nst(x, x, "rbf")
    with pytest.raises(ValueError, match="degree d from 1, got 0"):
        KF.nst(x, x, d=0)
    with pytest.raises(ValueError, match="degree d from 1, got 1.5"):
        KF.nst(x, x, d=1.5)
    with pytest.raises(ValueError, match="sigma2 above 0"):
        KF.nst(x, x, "gaussian", sigma2=0.0)
    with pytest.raises(ValueError, match="reduction"):
        KF.nst(x, x, reduction="batchmean")


class TestMatchSpatial:
    def test_same_size_comes_back_as_it_is(self) -> None:
        student, teacher = randn(2, 3, 4, 5), randn(2, 7, 4, 5)
        for mode in ("interpolate", "pool"):
            matched = KF.match_spatial(student, teacher, mode)
            assert matched[0] is student
            assert matched[1] is teacher

    @settings(max_examples=20, derandomize=True, deadline=None)
    @given(*[st.integers(1, 9)] * 4, st.sampled_from(["interpolate", "pool"]))
    def test_sizes_and_constants(self, h_s: int, w_s: int, h_t: int, w_t: int, mode) -> None:
        student, teacher = torch.full((2, 3, h_s, w_s), 2.0), torch.full((2, 4, h_t, w_t), 3.0)
        ours, theirs = KF.match_spatial(student, teacher, mode)
        size = (h_t, w_t) if mode == "interpolate" else (min(h_s, h_t), min(w_s, w_t))
        assert ours.shape == (2, 3, *size)
        assert theirs.shape == (2, 4, *size)
        torch.testing.assert_close(ours, torch.full_like(ours, 2.0))
        torch.testing.assert_close(theirs, torch.full_like(theirs, 3.0))
        assert KF.nst(ours, theirs).isfinite()

    def test_interpolation_is_linear_between_the_centres(self) -> None:
        student = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
        teacher = torch.rand(1, 1, 1, 4)
        ours, theirs = KF.match_spatial(student, teacher)
        assert ours.flatten().tolist() == [0, 1, 3, 4]
        assert theirs is teacher

    def test_pooling_averages_blocks_of_the_larger(self) -> None:
        student, teacher = torch.arange(8.0).reshape(1, 1, 2, 4), torch.arange(6.0).reshape(1, 1, 6, 1)
        ours, theirs = KF.match_spatial(student, teacher, "pool")
        assert ours.flatten().tolist() == [1.5, 5.5]
        assert theirs.flatten().tolist() == [1, 4]

    def test_every_position_counts_where_the_map_shrinks(self) -> None:
        student = randn(1, 1, 12, 15).requires_grad_()
        KF.match_spatial(student, torch.zeros(1, 1, 3, 5))[0].sum().backward()
        assert (student.grad > 0).all()

    @pytest.mark.parametrize("mode", ["interpolate", "pool"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_types(self, mode, dtype: torch.dtype) -> None:
        student = randn(2, 3, 7, 4).to(dtype).requires_grad_()
        ours, theirs = KF.match_spatial(student, randn(2, 3, 5, 6).to(dtype), mode)
        assert ours.dtype == theirs.dtype == dtype
        KF.nst(ours, theirs).backward()
        assert student.grad.isfinite().all()

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match="mode 'interpolate' or 'pool', got 'nearest'"):
            KF.match_spatial(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), "nearest")
        with pytest.raises(ValueError, match=r"\[B, C, H, W\], got \[1, 1, 4\] and \[1, 1, 9\]"):
            KF.match_spatial(torch.zeros(1, 1, 4), torch.zeros(1, 1, 9))


def test_exact_promotes_to_the_wider_type() -> None:
    assert {x.dtype for x in _common.exact(torch.zeros(1), torch.zeros(1, dtype=torch.float64))} == {torch.float64}
    assert {x.dtype for x in _common.exact(torch.zeros(1).half(), torch.zeros(1))} == {torch.float32}
