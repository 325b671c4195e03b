"""One vector for each example."""

from __future__ import annotations

import pytest
import torch

from kd_plugins import functional as KF


def test_vectors_maps_and_tokens() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert KF.embedding(maps).tolist() == [[5.5, 17.5]]
    assert KF.embedding(maps[:, :, 0, 0]).tolist() == [[0.0, 12.0]]
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[5.0, 5.0], [99.0, 99.0]]], requires_grad=True)
    assert KF.embedding(tokens).tolist() == [[2.0, 4.0], [52.0, 52.0]]
    found = KF.embedding(tokens, torch.tensor([[1, 1], [1, 0]]))
    assert found.tolist() == [[2.0, 4.0], [5.0, 5.0]]
    found.sum().backward()
    assert tokens.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]]]
    assert KF.embedding(tokens, torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_half_precision_is_averaged_in_float32() -> None:
    maps = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16).reshape(1, 1, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = KF.embedding(maps)
    assert found.tolist() == [[1.00390625]]


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"mask \[2, 5\] for these tokens, got \[2, 4\]"):
        KF.embedding(torch.zeros(2, 5, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"got \[2\]"):
        KF.embedding(torch.zeros(2))
