"""Attention and [CLS] losses, against the maps written out, in every kind of mask."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(student: Tensor, teacher: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Loops over examples and keeps only real keys and queries; `[B]`, differentiable.

    Args:
        student: Unmasked scores `[B, heads, Lq, Lk]`.
        teacher: Unmasked scores.
        keys: `[B, Lk]`, True for the keys that may be attended to.
        queries: `[B, Lq]`, True for the queries that count.
    """
    examples = []
    for s, t, k, q in zip(student, teacher, keys, queries, strict=True):
        if not (k.any() and q.any()):
            examples.append(0 * s.sum())
            continue
        log_s, log_t = s[:, q][..., k].log_softmax(-1), t[:, q][..., k].log_softmax(-1)
        examples.append((log_t.exp() * (log_t - log_s)).sum(-1).mean())
    return torch.stack(examples)


def masked(scores: Tensor, keys: Tensor, filler: float) -> Tensor:
    return scores.masked_fill(~keys[:, None, None, :], filler)


FILLERS = [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(FILLERS),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_value_and_gradient_are_those_of_log_softmax(
    batch: int, heads: int, queries: int, keys: int, filler: float, share: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * randn(batch, heads, queries, keys, seed=seed + i) for i in (1, 2))
    student.requires_grad_()
    real_keys = torch.rand(batch, keys, generator=generator) > 0.4
    real_keys[:, 0] = True
    real_queries = torch.rand(batch, queries, generator=generator) > 0.4
    s, t = masked(student, real_keys, filler), masked(teacher, real_keys, filler)
    probs = {"student_probs": s.softmax(-1), "teacher_probs": t.softmax(-1)} if share else {}
    ours = KF.attention_kl(s, t, real_queries, **probs, reduction="none")
    theirs = oracle(student, teacher, real_keys, real_queries)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weights = torch.arange(1.0, batch + 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(ours @ weights, student)
    (expected,) = torch.autograd.grad(theirs @ weights, student)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)
    assert (grad[~real_keys[:, None, None, :].expand_as(grad)] == 0).all()
    assert (grad[~real_queries[:, None, :, None].expand_as(grad)] == 0).all()


@pytest.mark.parametrize("given_probs", ["student", "teacher", "both"])
def test_shared_probabilities_give_the_same(given_probs: str) -> None:
    student, teacher = (2 * randn(2, 3, 5, 5, seed=i, dtype=torch.float32) for i in (0, 1))
    student[..., 4], teacher[..., 4] = -1e4, -1e4
    student.requires_grad_()
    probs = {f"{who}_probs": x.softmax(-1) for who, x in (("student", student), ("teacher", teacher))}
    probs = {name: p for name, p in probs.items() if given_probs == "both" or name.startswith(given_probs)}
    before = {name: p.clone() for name, p in probs.items()}
    shared, alone = KF.attention_kl(student, teacher, **probs), KF.attention_kl(student, teacher)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    (grad,), (expected,) = torch.autograd.grad(shared, student), torch.autograd.grad(alone, student)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(before[name], p) for name, p in probs.items())


def test_probabilities_that_the_layer_goes_on_with() -> None:
    """The layer's own backward pass needs the probabilities unchanged, and adds its gradient."""
    scores, teacher, value = randn(1, 2, 3, 3).requires_grad_(), randn(1, 2, 3, 3, seed=1), randn(1, 2, 3, 4, seed=2)
    probs = scores.softmax(-1)
    loss = (probs @ value).sum() + KF.attention_kl(scores, teacher, student_probs=probs)
    plain = (scores.softmax(-1) @ value).sum() + KF.attention_kl(scores, teacher)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(plain, scores))


@pytest.mark.parametrize("filler", FILLERS)
def test_padding_changes_nothing(filler: float) -> None:
    student, teacher = (2 * randn(2, 3, 5, 5, seed=i, dtype=torch.float32) for i in (0, 1))
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def loss(length: int) -> tuple[Tensor, Tensor]:
        pad = (0, length - 5, 0, length - 5)
        mask = F.pad(real, (0, length - 5))
        leaf = F.pad(student, pad, value=7.0).requires_grad_()
        s, t = (masked(x, mask.bool(), filler) for x in (leaf, F.pad(teacher, pad, value=-3.0)))
        value = KF.attention_kl(s, t, mask)
        return value.detach(), torch.autograd.grad(value, leaf)[0][..., :5, :5]

    for value, grad in (loss(6), loss(13)):
        torch.testing.assert_close(value, loss(5)[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(grad, loss(5)[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("filler", [-1e4, -torch.inf])
def test_query_without_any_key(filler: float, share: bool) -> None:
    student, teacher = randn(2, 2, 3, 3).requires_grad_(), randn(2, 2, 3, 3, seed=1)
    dead = torch.zeros(2, 1, 3, 1, dtype=torch.bool)
    dead[1, :, 2] = True
    s, t = student.masked_fill(dead, filler), teacher.masked_fill(dead, filler)
    probs = {"student_probs": s.softmax(-1), "teacher_probs": t.softmax(-1)} if share else {}
    values = KF.attention_kl(s, t, **probs, reduction="none")
    expected = oracle(student, teacher, torch.ones(2, 3).bool(), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    # It counts as a query that agrees, unless the mask leaves it out.
    torch.testing.assert_close(values, expected * torch.tensor([1, 2 / 3]))
    left_out = KF.attention_kl(s, t, torch.tensor([[1, 1, 1], [1, 1, 0]]), **probs, reduction="none")
    torch.testing.assert_close(left_out, expected)
    # The gradient of the scores themselves: masking by addition passes it on as it is.
    leaf = s.detach().requires_grad_()
    KF.attention_kl(leaf, t, **{name: p.detach() for name, p in probs.items()}).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[1, :, 2] == 0).all()
    assert (leaf.grad[0] != 0).all()


def test_key_that_only_the_student_masks_is_infinitely_far() -> None:
    student, teacher = randn(1, 1, 2, 3), randn(1, 1, 2, 3, seed=1)
    student[..., 1] = -torch.inf
    assert KF.attention_kl(student, teacher) == torch.inf


def test_nan_is_not_hidden() -> None:
    for which in (0, 1):
        scores = [randn(1, 1, 2, 3), randn(1, 1, 2, 3, seed=1)]
        scores[which][0, 0, 0, 1] = torch.nan
        assert KF.attention_kl(*scores).isnan()


def test_zero_at_equality() -> None:
    scores = masked(10 * randn(2, 3, 4, 4, dtype=torch.float32), torch.tensor([[1, 1, 1, 0]] * 2).bool(), -1e4)
    scores.requires_grad_()
    loss = KF.attention_kl(scores, scores.detach())
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()
    # A constant added to the scores of a query changes nothing either.
    assert abs(KF.attention_kl(scores.double() + randn(2, 3, 4, 1), scores.double()).item()) < 1e-12


def test_gradcheck() -> None:
    student, teacher = randn(2, 2, 3, 4).requires_grad_(), randn(2, 2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda s: KF.attention_kl(s, teacher, mask, reduction="none"), (student,))


def test_gradient_is_for_the_students_scores_only() -> None:
    student, teacher = randn(2, 2, 3, 3).requires_grad_(), randn(2, 2, 3, 3, seed=1).requires_grad_()
    probs = [x.detach().softmax(-1).requires_grad_() for x in (student, teacher)]
    KF.attention_kl(student, teacher, student_probs=probs[0], teacher_probs=probs[1]).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is probs[0].grad is probs[1].grad is None
    assert not KF.attention_kl(student.detach(), teacher).requires_grad


def test_one_map_is_kept() -> None:
    student, teacher = randn(2, 3, 16, 16).requires_grad_(), randn(2, 3, 16, 16, seed=1)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        KF.attention_kl(student, teacher)
    assert [n for n in kept if n >= student.numel()] == [student.numel()]


def test_order_of_heads_and_keys_and_examples() -> None:
    student, teacher = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    heads, keys, examples = torch.randperm(4), torch.randperm(6), torch.randperm(3)
    values = KF.attention_kl(student, teacher, reduction="none")
    mixed = [x[examples][:, heads][..., keys] for x in (student, teacher)]
    torch.testing.assert_close(KF.attention_kl(*mixed, reduction="none"), values[examples])
    torch.testing.assert_close(KF.attention_kl(student, teacher), values.mean())
    torch.testing.assert_close(KF.attention_kl(student, teacher, reduction="sum"), values.sum())


def test_examples_count_the_same_however_long() -> None:
    student, teacher = randn(4, 2, 6, 6), randn(4, 2, 6, 6, seed=1)
    mask = torch.arange(6) < torch.tensor([1, 6, 3, 2])[:, None]
    halves = [KF.attention_kl(student[i : i + 2], teacher[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(KF.attention_kl(student, teacher, mask), (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    student, teacher = (20 * randn(2, 2, 4, 4, seed=i) for i in (0, 1))
    student[..., 3], teacher[..., 3] = -1e4, -1e4
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = KF.attention_kl(student, teacher)
    assert loss.dtype == torch.float32
    expected = KF.attention_kl(student.detach().double(), teacher.double()).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_probabilities_in_half_precision() -> None:
    student, teacher = torch.zeros(1, 1, 1, 4), torch.tensor([0.0, -1e4, -1e4, -1e4]).reshape(1, 1, 1, 4)
    probs = {"student_probs": student.softmax(-1).bfloat16(), "teacher_probs": teacher.softmax(-1).bfloat16()}
    assert KF.attention_kl(student, teacher, **probs).item() == pytest.approx(math.log(4), rel=1e-6)


def test_compiles_to_one_graph() -> None:
    student, teacher = randn(2, 2, 4, 4).requires_grad_(), randn(2, 2, 4, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    compiled = torch.compile(KF.attention_kl, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(student, teacher, mask), KF.attention_kl(student, teacher, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


def test_messages() -> None:
    x = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"got \[2, 4, 3, 3\] and \[2, 2, 3, 3\].*as many heads"):
        KF.attention_kl(x, x[:, :2])
    with pytest.raises(ValueError, match="one shape"):
        KF.attention_kl(x[0], x[0])
    with pytest.raises(ValueError, match=r"scores' shape \[2, 4, 3, 3\], got \[2, 4, 3\]"):
        KF.attention_kl(x, x, student_probs=x[..., 0])
    with pytest.raises(ValueError, match=r"mask \[2, 3\].*\[2, 1, 1, 3\]"):
        KF.attention_kl(x, x, torch.ones(2, 1, 1, 3).long())
    with pytest.raises(ValueError, match="boolean or integer"):
        KF.attention_kl(x, x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="reduction"):
        KF.attention_kl(x, x, reduction="batchmean")


class TestClsCosine:
    @settings(max_examples=20, derandomize=True, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
    def test_written_out(self, batch: int, length: int, size: int, seed: int) -> None:
        s, t = randn(batch, length, size, seed=seed), randn(batch, length + 1, size, seed=seed + 1)
        for index in (0, length - 1, -1):
            total = 0.0
            for b in range(batch):
                a, c = s[b, index].tolist(), t[b, index].tolist()
                dot = sum(x * y for x, y in zip(a, c, strict=True))
                total += 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in c))
            assert KF.cls_cosine(s, t, index).item() == pytest.approx(total / batch, abs=1e-10)

    def test_gradient(self) -> None:
        s, t = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: KF.cls_cosine(x, t.detach(), reduction="none"), (s,))
        KF.cls_cosine(s, t).backward()
        assert t.grad is None
        assert (s.grad[:, 1:] == 0).all()

    def test_zero_for_one_direction_and_two_for_the_opposite(self) -> None:
        s = randn(3, 2, 5)
        assert KF.cls_cosine(s, 3 * s).item() == pytest.approx(0, abs=1e-12)
        assert KF.cls_cosine(s, -s, reduction="none").tolist() == pytest.approx([2, 2, 2])
        assert KF.cls_cosine(s, -s, reduction="sum").item() == pytest.approx(6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        s, t = (300 * randn(2, 3, 64)).to(dtype).requires_grad_(), (300 * randn(2, 3, 64, seed=1)).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = KF.cls_cosine(s, t)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(KF.cls_cosine(s.detach().double(), t.double()).item(), rel=1e-5)
        loss.backward()
        assert s.grad.isfinite().all()

    def test_messages(self) -> None:
        x = torch.zeros(2, 3, 8)
        with pytest.raises(ValueError, match=r"got \[2, 3, 8\] and \[2, 3, 1\].*project"):
            KF.cls_cosine(x, x[..., :1])
        with pytest.raises(ValueError, match="one batch"):
            KF.cls_cosine(x, x[:1])
        with pytest.raises(ValueError, match=r"\[B, L, H\]"):
            KF.cls_cosine(x[:, 0], x[:, 0])


def test_a_vector_of_zeros_has_no_direction_and_no_gradient() -> None:
    hidden = torch.zeros(2, 3, 4, requires_grad=True)
    values = KF.cls_cosine(hidden, torch.ones(2, 3, 4), reduction="none")
    assert values.tolist() == [1, 1]
    assert not torch.autograd.grad(values.sum(), hidden)[0].any()
