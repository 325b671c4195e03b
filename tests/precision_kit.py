"""How far a training in lower precision ends from the exact one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def share_of_the_way(begin: Sequence[Tensor], exact: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The distance of two ends, over that from the beginning to the first, of as many tensors as `begin` has."""

    def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return float(torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=False)]).norm())

    return distance(exact[: len(begin)], other) / distance(begin, exact)
