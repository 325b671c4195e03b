"""Knowledge review: the distance over several grids and the fusion, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins import functional as KF
from kd_plugins.nn.connectors import AttentionFusion


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(x: Tensor, side: int) -> Tensor:
    """Averages over a grid of equal cells `[B, C, side, side]`."""
    h, w = x.shape[2] // side, x.shape[3] // side
    cells = [[x[:, :, i * h : i * h + h, j * w : j * w + w].mean((2, 3)) for j in range(side)] for i in range(side)]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)


# Side of the map, and the weights of the grids 4, 2, 1 of those that are smaller than it.
@pytest.mark.parametrize(
    ("side", "grids"), [(8, {4: 0.5, 2: 0.25, 1: 0.125}), (4, {2: 0.5, 1: 0.25}), (2, {1: 0.5}), (1, {})]
)
def test_value_is_that_of_the_definition(side: int, grids: dict[int, float]) -> None:
    student, teacher = randn(3, 2, side, side), randn(3, 2, side, side, seed=1)

    def distance(s: Tensor, t: Tensor) -> Tensor:
        return torch.stack([(a - b).pow(2).mean() for a, b in zip(s, t, strict=True)])

    expected = distance(student, teacher)
    for n, weight in grids.items():
        expected = expected + weight * distance(grid(student, n), grid(teacher, n))
    expected = expected / (1 + sum(grids.values()))
    torch.testing.assert_close(KF.hcl(student, teacher, reduction="none"), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(KF.hcl(student, teacher), expected.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(KF.hcl(student, teacher, reduction="sum"), expected.sum(), rtol=1e-13, atol=0)


def test_what_the_grids_add() -> None:
    """A difference that averages out counts at the finest level alone, a constant one everywhere."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).reshape(1, 1, 8, 8)
    torch.testing.assert_close(KF.hcl(board, 0 * board), torch.tensor(1 / 1.875))
    torch.testing.assert_close(KF.hcl(board.abs(), 0 * board), torch.tensor(1.0))


def test_gradient() -> None:
    student, teacher = randn(2, 2, 5, 6).requires_grad_(), randn(2, 2, 5, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.hcl(x, teacher, reduction="none"), student)
    assert torch.autograd.grad(KF.hcl(student, teacher), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_island(dtype: torch.dtype) -> None:
    student, teacher = randn(2, 3, 8, 8).to(dtype), randn(2, 3, 8, 8, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = KF.hcl(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), KF.hcl(student.double(), teacher.double()), rtol=1e-5, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Expected maps of one shape"):
        KF.hcl(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5))


def test_fusion_is_the_papers() -> None:
    torch.manual_seed(0)
    deepest, shallow = AttentionFusion(5, 4, 7, deepest=True).double(), AttentionFusion(3, 4, 6).double()
    deep, x = randn(2, 5, 2, 2), randn(2, 3, 4, 4, seed=1)
    first, passed = deepest(deep, None, (3, 3))
    second, last = shallow(x, passed, (8, 8))
    assert [tuple(t.shape) for t in (first, passed, second, last)] == [
        (2, 7, 3, 3),
        (2, 4, 3, 3),
        (2, 6, 8, 8),
        (2, 4, 8, 8),
    ]

    def convolve(x: Tensor, weight: Tensor, pad: int) -> Tensor:
        """A convolution of stride 1 and a batch norm at its initial weights."""
        y = F.conv2d(x, weight, padding=pad)
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    ours = convolve(x, shallow.reduce[0].weight, 0)
    nearest = [i * 3 // 4 for i in range(4)]
    theirs = passed[:, :, nearest][:, :, :, nearest]
    convolution = shallow.attention[0]
    scores = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], torch.cat([ours, theirs], 1))
    a, b = torch.sigmoid(scores + convolution.bias.reshape(1, 2, 1, 1)).unbind(1)
    mixed = (a.unsqueeze(1) * ours + b.unsqueeze(1) * theirs).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(last, mixed, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, convolve(mixed, shallow.expand[0].weight, 1), rtol=0, atol=1e-12)
