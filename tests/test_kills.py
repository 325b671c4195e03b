"""SIGKILL anywhere, and the run that goes on ends with what the run that was not killed ends with, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def survives(host: str, points: int, seed: int) -> None:
    worker = [sys.executable, str(Path(__file__).with_name("kill_worker.py")), host, str(points), str(seed)]
    done = subprocess.run(worker, capture_output=True, text=True, check=True, timeout=3000)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] > 0
    assert found["lost"] == []


@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_a_killed_run_goes_on(host):
    survives(host, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_a_run_goes_on_wherever_it_is_killed(host):
    survives(host, 40, 0)
