"""The divergence of visual words, against the definition with every distance and cosine written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import Sizes
from torch import Tensor

from kd_plugins import functional as KF

TENSORS = ("student", "teacher", "weight", "scale", "codebook")


def given_tensors(
    rows: int = 2, c_s: int = 3, c_t: int = 4, words: int = 5, size: tuple[int, ...] = (2, 3), seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, c_s, *size), (rows, c_t, *size), (words, c_s), (), (words, c_t))
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(TENSORS, shapes, strict=True)
    }
    return made | {"scale": made["scale"].abs() + 1}


def values(x: dict[str, Tensor], temperature: float | Tensor = 0.7, **options) -> Tensor:
    return KF.quest(*(x[name] for name in TENSORS), temperature, **options)


def oracle(x: dict[str, Tensor], temperature: float = 0.7) -> Tensor:
    """One position after the other, one word after the other: `[B]`."""
    found = []
    for f_s, f_t in zip(x["student"].flatten(2), x["teacher"].flatten(2), strict=True):
        total = 0.0
        for n in range(f_s.shape[1]):
            d = torch.stack([sum((f_t[c, n] - v[c]) ** 2 for c in range(len(v))) for v in x["codebook"]])
            cosines = [(w @ f_s[:, n]) / ((w @ w).sqrt() * (f_s[:, n] @ f_s[:, n]).sqrt()) for w in x["weight"]]
            p = torch.exp(-temperature * d) / torch.exp(-temperature * d).sum()
            e = torch.exp(x["scale"] * torch.stack(cosines))
            total = total + (p * (p.log() - (e / e.sum()).log())).sum()
        found.append(total / f_s.shape[1])
    return torch.stack(found)


@pytest.mark.parametrize("pieces", [2**22, 1, 12], ids=["whole", "rows", "pieces"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5,)], ids=str)
def test_value_and_gradients_are_those_of_the_definition(reduction, size, pieces, monkeypatch):
    monkeypatch.setitem(KF.quest.__globals__, "_SCORES", pieces)
    x = given_tensors(size=size)
    moved = [x[name].requires_grad_() for name in ("student", "weight", "scale")]
    ours, theirs = values(x, reduction=reduction), oracle(x)
    theirs = {"none": theirs, "mean": theirs.mean(), "sum": theirs.sum()}[reduction]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    outer = torch.arange(2.0, 2 + ours.numel(), dtype=torch.float64).view(ours.shape)
    grads = [torch.autograd.grad((y * outer).sum(), moved) for y in (ours, theirs)]
    for grad, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_gradcheck():
    x = given_tensors()
    moved = [x[name].requires_grad_() for name in ("student", "weight", "scale")]

    def loss(student: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return values({**x, "student": student, "weight": weight, "scale": scale}, reduction="none")

    assert torch.autograd.gradcheck(loss, moved)


def test_teacher_and_words_get_no_gradient():
    x = {name: value.requires_grad_() for name, value in given_tensors().items()}
    values(x).backward()
    assert [name for name in TENSORS if x[name].grad is None] == ["teacher", "codebook"]
    with torch.no_grad():
        assert not values(x).requires_grad


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_properties(rows, c_s, c_t, words, seed):
    x = given_tensors(rows, c_s, c_t, words, seed=seed)
    value = values(x)
    assert value >= -1e-12
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(words, generator=generator)
    mixed = {**x, "weight": x["weight"][order], "codebook": x["codebook"][order]}
    torch.testing.assert_close(values(mixed), value, rtol=0, atol=1e-12)
    moved = {**x, "teacher": x["teacher"] + 3, "codebook": x["codebook"] + 3}
    torch.testing.assert_close(values(moved), value, rtol=0, atol=1e-10)
    # Cosines know no length, neither of the features nor of the predictor.
    longer = {**x, "student": 7 * x["student"], "weight": 3 * x["weight"]}
    torch.testing.assert_close(values(longer), value, rtol=0, atol=1e-12)
    # Distances do: features and words k times as long are a temperature k^2 times as high.
    scaled = {**x, "teacher": 3 * x["teacher"], "codebook": 3 * x["codebook"]}
    torch.testing.assert_close(values(scaled, 0.7 / 9), value, rtol=0, atol=1e-10)


def test_temperature_multiplies():
    x = given_tensors(rows=4, words=20)
    vectors = x["teacher"].flatten(2).mT.flatten(0, 1)
    sharp = [KF.soft_assignment(vectors, x["codebook"], t).amax(1).mean().item() for t in (1e-6, 0.2, 1, 5, 1e6)]
    assert sharp == sorted(sharp)
    assert sharp[0] == pytest.approx(1 / 20, abs=1e-3)
    assert sharp[3] > 0.85
    assert sharp[4] == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(
        KF.soft_assignment(vectors, x["codebook"]),
        (-5 * torch.cdist(vectors, x["codebook"]) ** 2).softmax(1),
        rtol=0,
        atol=1e-10,
    )


def test_a_student_that_knows_the_words_pays_nothing():
    """Hard targets on the axes, and a predictor whose scores are as far apart."""
    words = torch.eye(3, dtype=torch.float64)
    maps = words.T.reshape(1, 3, 3, 1)
    assert KF.quest(maps, maps, words, 50.0, words, 100.0) < 1e-10
    assert KF.quest(maps.flip(1), maps, words, 50.0, words, 100.0) > 10


def test_memory_in_pieces(monkeypatch):
    monkeypatch.setitem(KF.quest.__globals__, "_SCORES", 2**10)
    x = given_tensors(8, 4, 4, 256, (8, 8))
    for name in ("student", "weight", "scale"):
        x[name].requires_grad_()
    with Sizes() as sizes:
        values(x).backward()
    assert sizes.largest == 8 * 4 * 8 * 8


def test_far_features_are_not_rounded_away():
    x = given_tensors(words=30)
    x["teacher"], x["codebook"] = x["teacher"] + 100, x["codebook"] + 100
    single = {name: value.float() for name, value in x.items()}
    exact = {name: value.double() for name, value in single.items()}
    assert values(single, 5.0).item() == pytest.approx(values(exact, 5.0).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = {name: value.to(dtype) for name, value in given_tensors().items()}
    x["student"].requires_grad_()
    # Squared distances beyond the range of half precision.
    x["teacher"], x["codebook"] = 300 * x["teacher"], 300 * x["codebook"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = values(x, 1e-5)
    assert loss.dtype == torch.float32
    expected = oracle({name: value.detach().double() for name, value in x.items()}, 1e-5).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert x["student"].grad.dtype == dtype
    assert x["student"].grad.isfinite().all()


def test_features_of_zeros():
    """As rectifiers leave them: equal chances, and no gradient that blows up."""
    x = given_tensors(rows=1, size=(2,))
    with torch.no_grad():
        x["student"][..., 0] = 0
    x["student"].requires_grad_()
    values(x).backward()
    assert (x["student"].grad[..., 0] == 0).all()
    assert x["student"].grad[..., 1].abs().max() > 0
    alone = {**x, "student": x["student"].detach()[..., :1], "teacher": x["teacher"][..., :1]}
    p = KF.soft_assignment(x["teacher"][0, :, :1].T, x["codebook"], 0.7)[0]
    assert values(alone).item() == pytest.approx(((p * p.log()).sum() + math.log(5)).item())


class TestMatchSharpness:
    @pytest.mark.parametrize("sharpness", [0.06, 0.3, 0.8, 0.99])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_targets_are_that_sharp(self, sharpness, scale):
        x = given_tensors(rows=10, words=20)
        vectors, words = scale * x["teacher"].flatten(2).mT.flatten(0, 1), scale * x["codebook"]
        temperature = KF.match_sharpness(vectors, words, sharpness)
        assert KF.soft_assignment(vectors, words, temperature).amax(1).mean().item() == pytest.approx(sharpness, 1e-4)

    def test_what_cannot_be_had(self):
        words = torch.tensor([[0.0], [1.0]])
        for sharpness in (0.5, 1.0):
            with pytest.raises(ValueError, match="between 1 / K = 0.5 and 1"):
                KF.match_sharpness(words, words, sharpness)
        with pytest.raises(ValueError, match=r"as sharp as 0\.8: at most 0\.500"):
            KF.match_sharpness(torch.tensor([[0.5]]), words, 0.8)


def test_messages():
    x = given_tensors()
    for changed, words in (
        ({"student": x["student"][:, :, :1]}, r"same positions, got \[2, 3, 1, 3\] and \[2, 4, 2, 3\].*match_spatial"),
        ({"student": x["student"][:1]}, "of one batch"),
        ({"student": x["student"][0, 0]}, "of one batch"),
        ({"weight": x["weight"][:4]}, r"a predictor \[5, 3\] and a codebook \[5, 4\].*got \[4, 3\] and \[5, 4\]"),
        ({"codebook": x["codebook"][:, :3]}, r"a codebook \[5, 4\].*got \[5, 3\] and \[5, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            values({**x, **changed})
    with pytest.raises(ValueError, match="reduction"):
        values(x, reduction="batchmean")
