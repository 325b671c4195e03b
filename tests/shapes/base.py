"""What all hosts of the shapes share: the job, the networks, the data, and where further streams come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shapes.distillers import SHAPES, DataFree
from shapes.nets import BATCH, EPOCH, MEAN, ROWS, SEED, STD, Images, TinyNet, networks
from torch import Tensor, nn
from torch.utils.data import default_collate

from kd_accelerate.streams import Streams
from kd_plugins import Batch, Distiller, Nets, bind
from kd_plugins.binding import needs_in

LR, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Job:
    """What is run: one shape, for so many updates of 8 examples, made of micro-batches on so many processes.

    `rank_seeds` seeds every process differently, as training scripts do for their augmentation; `clip` is the largest
    norm of a gradient, where the host clips; `decay` lets the learning rate fall to 0 in a line.
    """

    shape: str
    steps: int = 3 * EPOCH
    accumulation: int = 1
    precision: str = "no"
    processes: int = 1
    rank_seeds: bool = False
    clip: float | None = None
    decay: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def micro(self) -> int:
        """Examples in a micro-batch of one process."""
        return BATCH // self.accumulation // self.processes

    def distiller(self) -> Distiller:
        """The shape's distiller."""
        cls = SHAPES[self.shape]
        return cls(rows=self.micro) if cls is DataFree else cls(**self.options)


class Host:
    """A run in one host, that can be stopped, saved, and taken up by another one of fresh objects.

    Args:
        job: What to run.
        folder: Where checkpoints go, the same on all processes.
        shift: Added to every weight, so that a resumed run depends on what it loads.
    """

    kind: type[TinyNet] = TinyNet
    epochs = False
    """Whether checkpoints are written between epochs alone."""

    def __init__(self, job: Job, folder: Path, shift: float = 0.0) -> None:
        self.job, self.folder, self.shift = job, folder, shift
        rank = torch.distributed.get_rank() if job.rank_seeds else 0
        torch.manual_seed(SEED + int(shift) + rank)
        self.distiller = job.distiller()
        count = {"many": 3}.get(str(self.distiller.teachers), self.distiller.teachers)
        self.student, self.teachers, self.peers = networks(self.kind, int(count), self.distiller.peers)
        self.moved(self.student, *self.peers)
        self.data = Images()

    @classmethod
    def fits(cls, shape: str) -> bool:
        """Whether the host can run a shape."""
        return True

    def moved(self, *modules: nn.Module) -> None:
        """Shifts the weights of modules."""
        with torch.no_grad():
            for module in modules:
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.add_(self.shift)

    def optimizer(self) -> torch.optim.Optimizer:
        """The student's optimizer."""
        return torch.optim.SGD(self.student.parameters(), lr=LR, momentum=MOMENTUM)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate's curve, for hosts that are loops."""
        total = self.job.steps
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / total if self.job.decay else 1.0)

    def bound(self) -> Nets:
        """The networks as the method sees them, for hosts that are loops."""
        return bind(
            self.distiller,
            self.student,
            self.teachers,
            peers=self.peers,
            batch=next(self.passes()) if self.distiller.data else None,
            batches=self.passes(),
            total_steps=self.job.steps,
        )

    def tidy(self) -> None:
        """Checks that the teachers are as they were and no gradient is left anywhere."""
        count = len(self.teachers)
        for teacher, fresh in zip(self.teachers, networks(self.kind, count, False)[1], strict=True):
            assert not teacher.training
            assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), fresh.parameters(), strict=True))
        for module in (self.student, self.distiller, *self.teachers, *self.peers):
            assert all(parameter.grad is None for parameter in module.parameters())

    def train(self, until: int) -> None:
        """Trains up to an update."""
        raise NotImplementedError

    def save(self) -> None:
        """Writes a checkpoint."""
        raise NotImplementedError

    def load(self) -> None:
        """Takes up a checkpoint."""
        raise NotImplementedError

    def result(self) -> dict[str, Tensor]:
        """All trained weights and buffers, and how often each block was called."""
        parts = {"student": self.student, "distiller": self.distiller}
        parts |= {f"peer{i}": peer for i, peer in enumerate(self.peers, 1)}
        return {
            f"{name}.{key}": value.detach().clone().double()
            for name, module in parts.items()
            for key, value in module.state_dict().items()
        }

    def calls(self) -> dict[str, int]:
        """How often each block of student and first teacher has been called."""
        nets = {"student": self.student} | dict(zip(["teacher"], self.teachers, strict=False))
        return {f"{name}.layer{i}": getattr(net, f"layer{i}").calls for name, net in nets.items() for i in (1, 2, 3)}

    def wrap(self, items: Mapping[str, Tensor], streams: Mapping[str, Batch] | None = None) -> Batch:
        """A batch of what the loader gives."""
        return Batch.of(
            items["pixel_values"], items["labels"], index=items["index"], mean=MEAN, std=STD, streams=streams or {}
        )

    def rows(self, rows: list[int]) -> dict[str, Tensor]:
        """The collated items of some rows."""
        return default_collate([{**self.data[row], "index": row} for row in rows])

    def passes(self) -> Iterator[Batch]:
        """One pass over the whole training set."""
        for start in range(0, ROWS, BATCH):
            yield self.wrap(self.rows(list(range(start, start + BATCH))))

    def further(self, drawn: Mapping[str, int] | None = None) -> Streams:
        """The further streams that the method reads at any time."""
        shares: dict[str, float] = {}
        for stage in range(len(self.distiller.stages())):
            shares |= needs_in(self.distiller, stage).streams
        streams = Streams(Indexed(self.data), shares, self.job.micro, default_collate, SEED)
        streams.drawn |= drawn or {}
        return streams


class Indexed:
    """Items with their rows."""

    def __init__(self, data: Images) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.data[row], "index": row}


def with_row(item: dict[str, Any], row: int) -> dict[str, Any]:
    """An item with its row."""
    return {**item, "index": row}
