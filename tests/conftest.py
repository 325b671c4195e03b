"""What all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Before torch is imported: the processes of `pytest -n` share the cores, and what each of them starts does too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from accelerate_kit import fresh_accelerate  # noqa: E402


def pytest_collection_finish() -> None:
    """Trainer collects garbage with every training, which searches all that torch and transformers have loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _without_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power: nothing has to be on the disk, and where others write, waiting for it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state for a process, and a run with another precision needs a fresh one."""
    fresh_accelerate()
    yield
    fresh_accelerate()
