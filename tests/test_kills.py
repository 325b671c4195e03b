"""SIGKILL anywhere, and the run that goes on ends with what the run that was not killed ends with, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed_kit import on_processes


def survives(host: str, points: int, seed: int, *shapes: str) -> None:
    worker = [str(Path(__file__).with_name("kill_worker.py")), host, str(points), str(seed), *shapes]
    found = json.loads(on_processes(1, *worker, timeout=3000).splitlines()[-1])
    assert found["killed"] > 0
    assert found["lost"] == []


@pytest.mark.parametrize(("host", "shape"), [("timm", "online"), ("transformers", "stages")])
def test_a_killed_run_goes_on(host, shape):
    survives(host, 1, 2, shape)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_a_run_goes_on_wherever_it_is_killed(host):
    survives(host, 40, 0)
