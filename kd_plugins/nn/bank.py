"""A memory of the training set by row: an embedding for each, and the classes to draw other rows by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.nn.connectors import UnitHead


def of_all_processes(x: Tensor) -> Tensor:
    """The rows of all processes' tensors, in their order; without gradient, and of any number on each."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros(int(max(counts)), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _of_all_processes(rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Each row once, with the last of the values that any process has for it."""
    rows, inverse = of_all_processes(rows).unique(return_inverse=True)
    last = torch.zeros_like(rows).scatter_reduce_(0, inverse, torch.arange(len(inverse), device=rows.device), "amax")
    return rows, *(of_all_processes(x)[last] for x in values)


class MemoryBank(nn.Module):
    """A vector of length 1 for each row of the training set: a moving average of the row's embeddings.

    Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, arXiv
    1805.01978. Random at first. With several processes the rows of all of them go in, so that the banks stay the same.

    Args:
        rows: M.
        dim: D.

    Attributes:
        vectors: `[M, D]`, float32.
    """

    vectors: Tensor

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(rows, dim), dim=1))

    @torch.no_grad()
    def update(self, rows: Tensor, vectors: Tensor, momentum: float) -> None:
        """Takes up embeddings `[B, D]` of rows `[B]`; of a row that is there twice, the last.

        The momentum is the share of the old vector in the new one, which is normalised again.
        """
        rows, vectors = _of_all_processes(rows, vectors)
        self.vectors[rows] = F.normalize(torch.lerp(vectors.float(), self.vectors[rows], momentum), dim=1)


class OtherRows(nn.Module):
    """Draws rows of the training set that are of another class, as far as the classes have been seen.

    Args:
        rows: M.

    Attributes:
        classes: The class of each row `[M]`, -1 before it has been seen.
        order: The rows sorted by class `[M]`.
    """

    classes: Tensor
    order: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("classes", torch.full((rows,), -1))
        self.register_buffer("order", torch.arange(rows))

    @torch.no_grad()
    def update(self, rows: Tensor, classes: Tensor) -> None:
        """Notes the classes `[B]`, from 0, of rows `[B]`."""
        rows, classes = _of_all_processes(rows, classes)
        if not torch.equal(self.classes[rows], classes):
            self.classes[rows] = classes
            self.order.copy_(self.classes.argsort(stable=True))

    def draw(self, classes: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` rows for each class `[B, count]`, uniform over the rows that are not of it, with replacement.

        Raises:
            DistillError: All rows are of one class.
        """
        known = self.classes[self.order]
        start, end = torch.searchsorted(known, classes), torch.searchsorted(known, classes, right=True)
        others = len(known) - (end - start)
        if not bool(others.all()):
            raise DistillError("Expected rows of several classes in the training set, got one class alone.")
        # In float64, where the product with a number of rows below 2^53 never rounds up to that number.
        uniform = torch.rand(len(classes), count, dtype=torch.float64, device=classes.device, generator=generator)
        places = (uniform * others.unsqueeze(1)).long()
        return self.order[torch.where(places < start.unsqueeze(1), places, places + (end - start).unsqueeze(1))]


class PairMemory(nn.Module):
    """The embeddings of two networks' layers, beside those of all rows of the training set.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.

    Args:
        widths: C_s and C_t.
        dim: D.
        rows: M.
        normalize: Whether each side has a normalising constant; without, it is 1.

    Attributes:
        others: Draws rows of other classes.
        log_z: The logarithms of the constants `[2]`, nan before they are known.
    """

    log_z: Tensor

    def __init__(self, widths: Sequence[int], dim: int, rows: int, normalize: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList([UnitHead(width, dim) for width in widths])
        self.banks = nn.ModuleList([MemoryBank(rows, dim), MemoryBank(rows, dim)])
        self.others = OtherRows(rows)
        self.register_buffer("log_z", torch.full((2,), torch.nan if normalize else 0.0))

    def forward(
        self, student: Tensor, teacher: Tensor, rows: Tensor, classes: Tensor, momentum: float
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Takes up a batch, and gives each side's anchors `[B, D]`, positives `[B, D]` and bank of the other `[M, D]`.

        Args:
            student: `[B, C_s]`.
            teacher: `[B, C_t]`.
            rows: The batch's rows `[B]`.
            classes: Their classes `[B]`.
            momentum: Share of the old vector in a row's new one.
        """
        ours, theirs = (head(x) for head, x in zip(self.heads, (student, teacher), strict=True))
        for bank, embedded in zip(self.banks, (ours, theirs), strict=True):
            bank.update(rows, embedded, momentum)
        self.others.update(rows, classes)
        return [(ours, theirs, self.banks[1].vectors), (theirs, ours, self.banks[0].vectors)]
