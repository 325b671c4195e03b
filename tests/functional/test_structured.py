"""The losses of dense prediction, against loops over pixels, patches and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_plugins import functional as KF


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_pixels_that_count_one_by_one() -> None:
    s, t = randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1)
    mask = randn(2, 3, 5, seed=2) > -0.5
    images = []
    for b in range(2):
        places = [(y, x) for y in range(3) for x in range(5) if mask[b, y, x]]
        found = [divergence(softmax(t[b, :, y, x].numpy()), softmax(s[b, :, y, x].numpy())) for y, x in places]
        images.append(sum(found) / len(found))
    assert KF.structured_pixel(s, t, mask=mask).item() == pytest.approx(sum(images) / 2)
    assert KF.structured_pixel(s, t, mask=mask, reduction="none").tolist() == pytest.approx(images)
    flat = [x.flatten(2).mT for x in (s, t)]
    assert KF.structured_pixel(*flat, mask=mask.flatten(1)).item() == pytest.approx(sum(images) / 2)
    changed = torch.where(mask[:, None], t, 9 * t)
    assert KF.structured_pixel(s, changed, mask=mask).item() == pytest.approx(sum(images) / 2)


def pair_oracle(s: Tensor, t: Tensor, size: tuple[int, int], near: int | None) -> float:
    """Patches, cosines and the nearest of the other patches, in loops."""
    total = 0.0
    for ours, theirs in zip(s.numpy(), t.numpy(), strict=True):
        height, width = ours.shape[1:]
        tops, lefts = range(0, height, size[0]), range(0, width, size[1])
        places = [(y, x) for y in tops for x in lefts]

        def cosines(map_: np.ndarray, places: Sequence[tuple[int, int]] = places) -> list[list[float]]:
            nodes = [map_[:, y : y + size[0], x : x + size[1]].mean((1, 2)) for y, x in places]
            return [[float(a @ b / np.sqrt((a @ a) * (b @ b))) for b in nodes] for a in nodes]

        a_s, a_t = cosines(ours), cosines(theirs)
        found = []
        for i, (y, x) in enumerate(places):
            others = sorted(range(len(places)), key=lambda j: ((places[j][0] - y) ** 2 + (places[j][1] - x) ** 2, j))
            found += [(a_s[i][j] - a_t[i][j]) ** 2 for j in others[:near]]
        total += sum(found) / len(found)
    return total / len(s)


@pytest.mark.parametrize(
    ("size", "near"), [((2, 2), None), ((1, 1), None), ((2, 2), 3), ((1, 3), 4), ((3, 2), 1), ((2, 2), 99)]
)
def test_pairs_one_by_one(size: tuple[int, int], near: int | None) -> None:
    s, t = randn(2, 3, 5, 6), randn(2, 4, 5, 6, seed=1)
    value = KF.structured_pair(s, t, granularity=size, neighbours=near)
    assert value.item() == pytest.approx(pair_oracle(s, t, size, near))
    assert KF.structured_pair(s, t, size, near, reduction="none").mean().item() == pytest.approx(value.item())


def test_all_neighbours_are_the_whole_graph() -> None:
    s, t = randn(2, 3, 4, 6), randn(2, 4, 4, 6, seed=1)
    f_s, f_t = (torch.nn.functional.normalize(torch.nn.functional.avg_pool2d(x, 2).flatten(2), dim=1) for x in (s, t))
    gram = (f_s.mT @ f_s - f_t.mT @ f_t).square().mean()
    for neighbours in (None, 6):
        torch.testing.assert_close(KF.structured_pair(s, t, neighbours=neighbours), gram)


def test_pairs_gradients_scales_and_maps_of_zeros() -> None:
    s, t = randn(1, 2, 4, 4).requires_grad_(), randn(1, 3, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KF.structured_pair(x, t, neighbours=2), (s,))
    KF.structured_pair(s, t).backward()
    assert t.grad is None
    torch.testing.assert_close(KF.structured_pair(7 * s, t), KF.structured_pair(s, 0.1 * t))
    nothing = torch.zeros(1, 2, 4, 4, requires_grad=True)
    KF.structured_pair(nothing, t).backward()
    assert nothing.grad.isfinite().all()


def test_channels_one_by_one() -> None:
    s, t, temperature = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1), 2.5
    found = [
        divergence(*(softmax(m[b, c].flatten().numpy() / temperature) for m in (t, s)))
        for b in range(2)
        for c in range(3)
    ]
    value = KF.cwd(s, t, temperature)
    assert value.item() == pytest.approx(temperature**2 * sum(found) / len(found))
    torch.testing.assert_close(KF.cwd(s + randn(2, 3, 1, 1), t, temperature), value)


@pytest.mark.parametrize("loss", [KF.structured_pixel, KF.structured_pair, KF.cwd])
def test_half_precision_is_computed_in_float32(loss) -> None:
    s, t = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(s.double(), t.double()).item(), rel=1e-5)


def test_messages() -> None:
    with pytest.raises(ValueError, match="one batch and size"):
        KF.structured_pair(randn(2, 3, 4, 4), randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="at least 1 neighbour, got"):
        KF.structured_pair(randn(2, 3, 4, 4), randn(2, 3, 4, 4), neighbours=0)
    with pytest.raises(ValueError, match="of one shape"):
        KF.cwd(randn(2, 3, 4, 4), randn(2, 4, 4, 4))
