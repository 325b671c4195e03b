"""Two processes under DistributedDataParallel equal one at the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed_kit import on_two_processes
from safetensors.torch import load_file
from trainer_kit import difference, logged, weights
from trainer_worker import RUNS, run_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes ended with; one start for all tests, because importing takes most of the time."""
    folder = tmp_path_factory.mktemp("two")
    on_two_processes(str(Path(__file__).with_name("trainer_worker.py")), str(folder), timeout=600)
    return folder


def ended(folder: Path, name: str, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_file(folder / f"{name}_{rank}.safetensors"), json.loads((folder / f"{name}_{rank}.json").read_text())


def student(state: dict[str, Any]) -> dict[str, Any]:
    """Without sums that each process keeps for itself."""
    return {name: value for name, value in state.items() if not name.endswith("cosine")}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(tmp_path: Path, two: Path, name: str) -> None:
    """Weights of student and own parts, losses, norms and stages: 1e-5; both processes hold the same weights."""
    one = run_of(name, tmp_path, 1)
    one.train()
    (first, log), (second, _) = (ended(two, name, rank) for rank in range(2))
    assert difference(student(first), student(second)) == 0.0
    expected = {**weights(one.model), **{f"distiller.{k}": v for k, v in weights(one.distiller).items()}}
    assert difference(student(first), student(expected)) < 1e-5
    for term in ("loss", "grad_norm", "distill/kd", "distill/kl_attention"):
        assert log[term] == pytest.approx(logged(one, term), rel=1e-4, abs=1e-5)
    # Batches of other numbers of labels have means that differ a little.
    assert log["eval_loss"] == pytest.approx(one.evaluate(one.train_dataset)["eval_loss"], rel=1e-3)
    assert log["stages"] == one.distiller.progress.table.starts
    if name == "threshold":
        assert log["stages"] == [0, 6, 12]


def test_resume_of_two_processes_is_exact(two: Path) -> None:
    """Mid-phase, from a checkpoint that one of them wrote."""
    for rank in range(2):
        assert difference(student(ended(two, "whole", rank)[0]), student(ended(two, "resumed", rank)[0])) == 0.0
