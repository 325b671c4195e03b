"""The same run in every host: same weights, same batches in the same order, SGD at one learning rate."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from shapes.base import Host, Job
from shapes.hf import Trained
from shapes.loops import Accelerated, Bare
from shapes.timm_host import TimmTrained
from torch import Tensor

HOSTS: dict[str, type[Host]] = {"bare": Bare, "accelerate": Accelerated, "trainer": Trained, "timm": TimmTrained}


def finished(host: str, shape: str, *, resume_at: int | None = None, folder: Path | None = None, **job: Any) -> Host:
    """A run to its end, where asked with a stop in between.

    Args:
        host: Name of the host.
        shape: Name of the shape.
        resume_at: The update after which everything is saved, and loaded into fresh objects.
        folder: Where checkpoints go, the same on all processes.
        **job: Other fields of `Job`.
    """
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as name:
        made = HOSTS[host](Job(shape, **job), Path(name))
        if resume_at is not None:
            made.train(resume_at)
            made.save()
            made = HOSTS[host](made.job, Path(name), shift=1.0)
            made.load()
        made.train(made.job.steps)
        made.tidy()
        return made


def run(host: str, shape: str, **options: Any) -> dict[str, Tensor]:
    """What `finished` leaves: every weight and buffer."""
    return finished(host, shape, **options).result()
