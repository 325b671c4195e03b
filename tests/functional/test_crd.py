"""CRD against its critic written out, and the memory that its negatives come from."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import DistillError
from kd_plugins import functional as KF
from kd_plugins.nn.bank import MemoryBank, OtherRows
from kd_plugins.nn.connectors import UnitHead


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


NEGATIVES = torch.tensor([[1, 2, 2, 6, 5], [0, 0, 3, 4, 1]])


@pytest.mark.parametrize("z", [1.0, 40.0])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_is_that_of_the_definition(temperature: float, z: float) -> None:
    anchor, positive, bank = unit(2, 3), unit(2, 3, seed=1), unit(7, 3, seed=2)
    n, m = NEGATIVES.shape[1], len(bank)

    def critic(a: Tensor, b: Tensor) -> float:
        e = math.exp(float(a @ b) / temperature) / z
        return e / (e + n / m)

    expected = []
    for i in range(2):
        likelihood = math.log(critic(anchor[i], positive[i]))
        likelihood += sum(math.log(1 - critic(anchor[i], bank[j])) for j in NEGATIVES[i])
        expected.append(-likelihood)
    expected = torch.tensor(expected, dtype=torch.float64)
    options = {"temperature": temperature, "log_z": math.log(z)}
    for reduction, value in {"none": expected, "sum": expected.sum(), "mean": expected.mean()}.items():
        ours = KF.crd(anchor, positive, bank, NEGATIVES, **options, reduction=reduction)
        torch.testing.assert_close(ours, value, rtol=1e-8, atol=0)


def test_normalising_constant_is_the_mean_of_exponentials_times_the_rows() -> None:
    anchor, bank = unit(2, 3), unit(7, 3, seed=2)
    values = [math.exp(float(anchor[i] @ bank[j]) / 0.2) for i in range(2) for j in NEGATIVES[i]]
    expected = 7 * sum(values) / len(values)
    ours = KF.crd_log_z(anchor.requires_grad_(), bank, NEGATIVES, temperature=0.2)
    assert not ours.requires_grad
    assert math.isclose(ours.exp().item(), expected, rel_tol=1e-12)


def test_gradient_is_the_anchors_alone() -> None:
    anchor, positive, bank = (unit(n, 3, seed=i).requires_grad_() for i, n in enumerate((2, 2, 7)))
    assert torch.autograd.gradcheck(lambda a: KF.crd(a, positive, bank, NEGATIVES, reduction="none"), anchor)
    loss = KF.crd(anchor, positive, bank, NEGATIVES)
    assert torch.autograd.grad(loss, (positive, bank), allow_unused=True) == (None, None)


def test_a_rotation_and_the_order_of_negatives_do_not_count() -> None:
    anchor, positive, bank = unit(2, 3), unit(2, 3, seed=1), unit(7, 3, seed=2)
    turn, _ = torch.linalg.qr(unit(3, 3, seed=3))
    value = KF.crd(anchor, positive, bank, NEGATIVES)
    turned = KF.crd(anchor @ turn, positive @ turn, bank @ turn, NEGATIVES.flip(1))
    torch.testing.assert_close(turned, value, rtol=1e-12, atol=0)


def test_extreme_scores_stay_finite() -> None:
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = KF.crd(a, -a, bank, torch.tensor([[0, 1]]), temperature=1e-3)
    torch.testing.assert_close(loss, torch.tensor(2000.0))
    assert torch.autograd.grad(loss, a)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_island(dtype: torch.dtype) -> None:
    anchor, positive, bank = unit(2, 3).to(dtype), unit(2, 3, seed=1).to(dtype), unit(7, 3, seed=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = KF.crd(anchor, positive, bank, NEGATIVES)
        head = UnitHead(4, 3)(torch.randn(2, 4).to(dtype))
    assert value.dtype == head.dtype == torch.float32
    expected = KF.crd(anchor.double(), positive.double(), bank.double(), NEGATIVES)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(head.norm(dim=1), torch.ones(2))


def test_refusals() -> None:
    a, bank = unit(2, 3), unit(7, 3)
    for anchor, positive, rows, temperature, words in (
        (a, a[:1], NEGATIVES, 0.07, "one positive"),
        (a, a, NEGATIVES[:1], 0.07, "anchors"),
        (a[:, :2], a[:, :2], NEGATIVES, 0.07, "anchors"),
        (a, a, NEGATIVES, 0.0, "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            KF.crd(anchor, positive, bank, rows, temperature=temperature)


def test_bank_averages_and_stays_on_the_sphere() -> None:
    bank = MemoryBank(5, 3)
    before = bank.vectors.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(5))
    new = unit(3, 3).float()
    bank.update(torch.tensor([4, 1, 4]), new, 0.25)  # row 4 twice: the last counts
    for row, vector in ((4, new[2]), (1, new[1])):
        mixed = 0.25 * before[row] + 0.75 * vector
        torch.testing.assert_close(bank.vectors[row], mixed / mixed.norm())
    assert torch.equal(bank.vectors[[0, 2, 3]], before[[0, 2, 3]])


def test_negatives_are_uniform_over_the_other_classes() -> None:
    rows = OtherRows(6)
    rows.update(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 1, 2]))  # 4 and 5 not seen
    drawn = rows.draw(torch.tensor([0, 1, 2]), 6000, torch.Generator().manual_seed(0))
    for found, allowed in zip(drawn, ([0, 2, 3, 4, 5], [1, 3, 4, 5], [0, 1, 2, 4, 5]), strict=True):
        counts = torch.bincount(found, minlength=6)
        assert counts.nonzero().flatten().tolist() == allowed
        assert (counts[allowed] - 6000 / len(allowed)).abs().max() < 6 * math.sqrt(6000 / len(allowed))
    rows.update(torch.arange(6), torch.zeros(6, dtype=torch.long))
    with pytest.raises(DistillError, match="one class"):
        rows.draw(torch.tensor([0]), 3)
