"""Makes the helpers beside the tests importable, and trainings quick to start."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> Iterator[None]:
    """Every train() collects garbage; without this it walks through all imported modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
