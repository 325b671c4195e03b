"""The soft labels, against sums over classes written out, and against the two-class softmax."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_plugins import functional as KF

kd_module = sys.modules["kd_plugins.functional.kd"]


def oracle(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> float:
    """Loops over examples, tokens and classes."""
    s, t = (x.double() if x.dim() == 3 else x.double().unsqueeze(1) for x in (student, teacher))
    examples = []
    for b in range(len(s)):
        tokens = [i for i in range(s.shape[1]) if mask is None or mask.reshape(len(s), -1)[b, i]]
        total = 0.0
        for i in tokens:
            z_s, z_t = (s[b, i] / temperature).tolist(), (t[b, i] / temperature).tolist()
            sum_s, sum_t = sum(map(math.exp, z_s)), sum(map(math.exp, z_t))
            for a, c in zip(z_s, z_t, strict=True):
                p_s, p_t = math.exp(a) / sum_s, math.exp(c) / sum_t
                total += p_t * math.log(p_t / p_s)
        examples.append(total / len(tokens) if tokens else 0.0)
    return temperature**2 * sum(examples) / len(examples)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 20), st.integers(0, 10**6))
def test_kd_is_the_sum_written_out(batch: int, length: int, classes: int, temperature: float, seed: int) -> None:
    s, t = 3 * randn(batch, length, classes, seed=seed), 3 * randn(batch, length, classes, seed=seed + 1)
    mask = randn(batch, length, seed=seed + 2) > 0
    assert KF.kd(s, t, temperature, mask=mask).item() == pytest.approx(oracle(s, t, temperature, mask), abs=1e-10)
    assert KF.kd(s, t, temperature, mask=mask.long()) == KF.kd(s, t, temperature, mask=mask)
    assert KF.kd(s, t, temperature).item() == pytest.approx(oracle(s, t, temperature), abs=1e-10)
    assert KF.kd(s[:, 0], t[:, 0], temperature).item() == pytest.approx(
        oracle(s[:, 0], t[:, 0], temperature), abs=1e-10
    )


def test_kd_is_batchmean_of_torch() -> None:
    s, t = randn(8, 10), randn(8, 10, seed=1)
    theirs = 16 * F.kl_div((s / 4).log_softmax(-1), (t / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(KF.kd(s, t), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [KF.kd, KF.kd_multilabel])
class TestBoth:
    def test_gradient(self, function) -> None:
        s, t = randn(3, 4, 5).requires_grad_(), randn(3, 4, 5, seed=1).requires_grad_()
        mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
        assert torch.autograd.gradcheck(lambda x: function(x, t.detach(), 2.0, mask=mask, reduction="none"), (s,))
        function(s, t, mask=mask).backward()
        assert t.grad is None
        assert (s.grad[mask == 0] == 0).all()
        assert (s.grad[mask == 1] != 0).all()

    def test_zero_at_equality(self, function) -> None:
        z = (5 * randn(4, 7, dtype=torch.float32)).requires_grad_()
        loss = function(z, z.detach())
        loss.backward()
        assert loss == 0
        assert z.grad.abs().max() < 1e-6

    def test_not_negative(self, function) -> None:
        assert (function(randn(50, 6), randn(50, 6, seed=1), reduction="none") > 0).all()

    def test_order_of_classes_and_examples(self, function) -> None:
        s, t = randn(4, 7), randn(4, 7, seed=1)
        classes, examples = torch.randperm(7), torch.randperm(4)
        torch.testing.assert_close(function(s[:, classes], t[:, classes]), function(s, t))
        none = function(s, t, reduction="none")
        torch.testing.assert_close(function(s[examples], t[examples], reduction="none"), none[examples])

    def test_examples_count_the_same(self, function) -> None:
        """So that two processes with half of the batch each have the mean of the batch."""
        s, t = randn(4, 6, 3), randn(4, 6, 3, seed=1)
        mask = torch.arange(6) < torch.tensor([1, 6, 3, 2])[:, None]
        halves = [function(s[i : i + 2], t[i : i + 2], mask=mask[i : i + 2]) for i in (0, 2)]
        torch.testing.assert_close(function(s, t, mask=mask), (halves[0] + halves[1]) / 2, rtol=1e-12, atol=0)

    def test_padding_changes_nothing(self, function) -> None:
        s, t, mask = randn(2, 5, 3), randn(2, 5, 3, seed=1), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        longer = [F.pad(x, (0, 0, 0, 4), value=9.0) for x in (s, t - 1)]
        longer[1][:, :5] = t
        torch.testing.assert_close(function(*longer, mask=F.pad(mask, (0, 4))), function(s, t, mask=mask))

    def test_example_without_tokens_is_zero(self, function) -> None:
        s, t, mask = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1), torch.tensor([[0, 0, 0], [1, 1, 1]])
        values = function(s, t, mask=mask, reduction="none")
        assert values[0] == 0
        torch.testing.assert_close(function(s, t, mask=mask), function(s[1:], t[1:]) / 2)
        values.sum().backward()
        assert (s.grad[0] == 0).all()

    def test_reductions(self, function) -> None:
        s, t = randn(5, 3), randn(5, 3, seed=1)
        none = function(s, t, reduction="none")
        assert none.shape == (5,)
        torch.testing.assert_close(function(s, t, reduction="sum"), none.sum())
        torch.testing.assert_close(function(s, t), none.mean())

    def test_mask_of_examples(self, function) -> None:
        s, t = randn(3, 4), randn(3, 4, seed=1)
        none = function(s, t, reduction="none")
        masked = function(s, t, mask=torch.tensor([True, False, True]), reduction="none")
        assert masked.tolist() == [none[0], 0, none[2]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite_and_computed_in_float32(self, function, dtype: torch.dtype) -> None:
        s, t = (100 * randn(4, 5)).to(dtype).requires_grad_(), (100 * randn(4, 5, seed=1)).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(s, t, 1.0)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(function(s.detach().double(), t.double(), 1.0).item(), rel=1e-5)
        loss.backward()
        assert s.grad.dtype == dtype
        assert s.grad.isfinite().all()

    def test_mixed_precision_of_the_two(self, function) -> None:
        s, t = randn(4, 5, dtype=torch.float32), randn(4, 5, seed=1).bfloat16()
        torch.testing.assert_close(function(s, t), function(s, t.float()))
        assert function(s.double(), t).dtype == torch.float64

    def test_messages(self, function) -> None:
        with pytest.raises(ValueError, match=r"got \[8, 10\] and \[8, 1\].*same classes"):
            function(torch.zeros(8, 10), torch.zeros(8, 1))
        with pytest.raises(ValueError, match="one shape"):
            function(torch.zeros(8), torch.zeros(8))
        with pytest.raises(ValueError, match="temperature above 0, got 0"):
            function(torch.zeros(8, 2), torch.zeros(8, 2), 0)
        with pytest.raises(ValueError, match="'batchmean'"):
            function(torch.zeros(8, 2), torch.zeros(8, 2), reduction="batchmean")
        with pytest.raises(ValueError, match=r"mask \[8, 5\].*\[8\]"):
            function(torch.zeros(8, 5, 2), torch.zeros(8, 5, 2), mask=torch.ones(8, dtype=torch.bool))
        with pytest.raises(ValueError, match="boolean or integer mask"):
            function(torch.zeros(8, 5, 2), torch.zeros(8, 5, 2), mask=torch.zeros(8, 5))


def test_gradient_keeps_its_size_with_the_temperature() -> None:
    """Section 2.1 of the paper: at high temperatures the gradient tends to `(z_s - z_t) / K`, of centred logits."""
    s, t = randn(1, 6).requires_grad_(), randn(1, 6, seed=1)
    KF.kd(s, t, 1e6).backward()
    difference = (s - s.mean() - t + t.mean()).detach() / 6
    torch.testing.assert_close(s.grad, difference, rtol=1e-3, atol=1e-6)


def standardized(student: Tensor, teacher: Tensor) -> Tensor:
    return KF.kd(KF.standardize(student), KF.standardize(teacher))


@pytest.mark.parametrize("function", [KF.kd, KF.kd_multilabel, standardized])
def test_classes_that_neither_network_has(function) -> None:
    s, t = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    without = function(s, t)
    without.backward()
    padded = F.pad(s.detach(), (0, 2), value=-torch.inf).requires_grad_()
    value = function(padded, F.pad(t, (0, 2), value=-torch.inf))
    value.backward()
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(padded.grad, F.pad(s.grad, (0, 2)))


def test_a_class_that_the_teacher_alone_has_not() -> None:
    """What is left of the divergence of that label is `-log(1 - p_s)`."""
    s, t = torch.tensor([[0.3, -1.0]]), torch.tensor([[-torch.inf, -torch.inf]])
    expected = 9 * sum(math.log(1 + math.exp(x / 3)) for x in (0.3, -1.0))
    assert KF.kd_multilabel(s, t, 3.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        *(KF.kd, KF.kd_multilabel, KF.kd_regression, KF.structured_pixel, KF.dist),
        *(lambda s, t, f=f, **mask: f(s, torch.stack([t, t + 1], 1), **mask) for f in (KF.end, KF.endd, KF.endd_proxy)),
        lambda s, t, mask: KF.dkd(s, t, torch.ones(3, 4, dtype=torch.long), mask=mask),
    ],
)
@pytest.mark.parametrize("chunk", [2**23, 7])
def test_what_a_mask_leaves_out_may_be_anything(function, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher may give nan or infinity where nothing is to be read; then 0 times it is no 0."""
    monkeypatch.setattr(kd_module, "_CHUNK", chunk)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
    s, t = randn(3, 4, 5).requires_grad_(), randn(3, 4, 5, seed=1)
    found = []
    for filled in (0.0, torch.nan, torch.inf, -torch.inf):
        s.grad = None
        value = function(s, t.masked_fill(mask.unsqueeze(-1) == 0, filled), mask=mask)
        value.backward()
        found.append((value.detach(), s.grad))
    assert found[0][0].isfinite()
    assert (found[0][1][1] == 0).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_kd_has_one_derivative_only() -> None:
    s = randn(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(KF.kd(s, randn(2, 3, seed=1)).square(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.floats(0.5, 20), st.floats(0, 30), st.integers(0, 10**6))
def test_multilabel_is_a_softmax_over_two_classes(temperature: float, scale: float, seed: int) -> None:
    s, t = scale * randn(3, 5, seed=seed), scale * randn(3, 5, seed=seed + 1)
    labels = [
        KF.kd(F.pad(s[:, k, None], (0, 1)), F.pad(t[:, k, None], (0, 1)), temperature, reduction="none")
        for k in range(5)
    ]
    together = KF.kd_multilabel(s, t, temperature, reduction="none")
    torch.testing.assert_close(together, torch.stack(labels).sum(0), rtol=1e-8, atol=1e-9)


def test_multilabel_written_out() -> None:
    s, t = torch.tensor([[0.3, -1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.5], [-2.0, 0.0]])
    total = 0.0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True):
        p_s, p_t = 1 / (1 + math.exp(-a / 3)), 1 / (1 + math.exp(-b / 3))
        total += p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
    assert KF.kd_multilabel(s, t, 3.0).item() == pytest.approx(9 * total / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("chunk", [1, 13, 45])
def test_chunks_change_nothing(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, of views too; no chunk is larger than it may be but for one row of classes."""
    sizes: list[int] = []
    one = kd_module._softened_kl

    def watched(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        sizes.append(student.numel())
        return one(student, teacher, temperature)

    s, t = randn(*shape).float(), randn(*shape, seed=1).float()
    s[..., 0] = t[..., 0] = -torch.inf
    t[1] = -torch.inf
    mask = randn(*shape[:-1], seed=2) > -1
    found = []
    for size in (2**23, chunk):
        monkeypatch.setattr(kd_module, "_CHUNK", size)
        monkeypatch.setattr(kd_module, "_softened_kl", watched)
        student = s.clone().movedim(0, -2).contiguous().movedim(-2, 0).requires_grad_()
        value = KF.kd(student, t, 3.0, mask=mask)
        value.backward()
        found.append((value.detach(), student.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
    assert len(sizes) > 2 or s.numel() <= chunk
    assert max(sizes[1:]) <= max(chunk, shape[-1])
    half = s.bfloat16().requires_grad_()
    KF.kd(half, t, 3.0, mask=mask).backward()
    assert half.grad.dtype == torch.bfloat16


def test_regression_written_out() -> None:
    s, t = randn(3, 4, 2).requires_grad_(), randn(3, 4, 2, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    squares = ((s - t).detach() ** 2).mean(-1)
    expected = [squares[0, :2].mean(), torch.tensor(0.0), squares[2].mean()]
    values = KF.kd_regression(s, t, mask=mask, reduction="none")
    torch.testing.assert_close(values, torch.stack([x.double() for x in expected]))
    assert KF.kd_regression(s, t, mask=mask).item() == pytest.approx(values.sum().item() / 3)
    KF.kd_regression(s[:, 0], t[:, 0]).backward()
    torch.testing.assert_close(s.grad[:, 0], (s - t).detach()[:, 0] / 3)
    assert t.grad is None
    half = KF.kd_regression(s.detach().bfloat16(), t.detach().bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="one shape"):
        KF.kd_regression(s[:, 0], t[:, 0, :1])


class TestStandardize:
    @pytest.mark.parametrize("shape", [(4, 10), (2, 3, 7)])
    def test_value_is_that_of_the_definition(self, shape: tuple[int, ...]) -> None:
        z = 5 * randn(*shape) + 3
        ours = KF.standardize(z).reshape(-1, shape[-1]).tolist()
        for row, found in zip(z.reshape(-1, shape[-1]).tolist(), ours, strict=True):
            mean = sum(row) / len(row)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
            assert found == pytest.approx([(x - mean) / deviation for x in row], abs=1e-12)

    def test_properties_of_the_paper(self) -> None:
        """Order is kept, scale and shift are not seen, and no score leaves `[-sqrt(K - 1), sqrt(K - 1)]`."""
        z = randn(50, 6).exp()
        scores = KF.standardize(z)
        assert (scores.argsort(1) == z.argsort(1)).all()
        torch.testing.assert_close(KF.standardize(9 * z - 4), scores)
        spike = torch.zeros(1, 6, dtype=torch.float64)
        spike[0, 2] = 7
        assert KF.standardize(spike).max().item() == pytest.approx(math.sqrt(5), abs=1e-12)
        assert scores.abs().max() <= math.sqrt(5) + 1e-12

    def test_gradient(self) -> None:
        assert torch.autograd.gradcheck(KF.standardize, (randn(3, 5).requires_grad_(),))

    @pytest.mark.parametrize("level", [0.0, 0.1, -7.3])
    def test_equal_logits(self, level: float) -> None:
        z = torch.full((3, 7), level, requires_grad=True)
        scores = KF.standardize(z)
        scores.square().sum().backward()
        assert (scores == 0).all()
        assert (z.grad == 0).all()

    def test_half_precision(self) -> None:
        z = (100 * randn(4, 5)).half()
        with torch.autocast("cpu", torch.bfloat16):
            scores = KF.standardize(z)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, KF.standardize(z.double()).float())
