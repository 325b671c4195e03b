"""What is known of a finished (or running) training, read from its output folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from kd_plugins.errors import DistillError

__all__ = ["Run", "load_run"]

Row = dict[str, float]


@dataclass
class Run:
    """One run: its folder, and what stands in the files there.

    Attributes:
        info: What was run, results, cost (`run.json`).
        history: One row a log, numbers only.
        analysis: What was found `before` and `after` the training (`analysis.json`).
        arrays: Tensors of the analysis by name (`analysis.safetensors`).
        pictures: What the method shows of itself (`pictures.json`).
    """

    folder: Path
    info: dict[str, Any]
    history: list[Row] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    pictures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        """The distiller's name, or "alone"."""
        return (self.info.get("method") or {}).get("name") or "alone"

    @property
    def student(self) -> str:
        return (self.info.get("student") or {}).get("name") or "student"

    @property
    def teacher(self) -> str:
        """The teachers' names, or the peers' where there is no teacher; empty without either."""
        others = self.info.get("teachers") or self.info.get("peers") or []
        return " + ".join(str(other["name"]) for other in others)

    @property
    def other(self) -> str:
        """What the student is compared with: "teacher", "peer", or "student" for nothing."""
        return (self.analysis.get("after") or self.analysis.get("before") or {}).get("compared", "teacher")

    def array(self, phase: str, name: str) -> Tensor | None:
        """An array of the analysis before or after the training."""
        return self.arrays.get(f"{phase}/{name}")

    def part(self, phase: str, *keys: str) -> Any:
        """An entry of the analysis; None where there is none."""
        found: Any = self.analysis.get(phase)
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def load_run(folder: str | Path) -> Run:
    """Reads what a training script left: its record, or else the history that the host itself writes.

    Args:
        folder: The output folder of a run.

    Raises:
        DistillError: Nothing in the folder tells of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DistillError(f"Expected the output folder of a run, got {folder}, which does not exist: mend the path.")
    info = _json(folder / "run.json") or _host_info(folder)
    history = _history(folder)
    if not info and not history:
        raise DistillError(
            f"Expected run.json, summary.csv or trainer_state.json in {folder}, got none of them: name the output"
            " folder of a run of kd-timm-train or kd-transformers-train."
        )
    tensors = folder / "analysis.safetensors"
    arrays = load_file(tensors) if tensors.is_file() else {}
    pictures = _json(folder / "pictures.json") or []
    return Run(folder, info, history, _json(folder / "analysis.json") or {}, arrays, pictures)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DistillError(f"Expected JSON in {path}, got something else ({error}): was the file edited?") from error


def _host_info(folder: Path) -> dict[str, Any]:
    """What the hosts' own files tell of a run without a record."""
    info: dict[str, Any] = {}
    results = _json(folder / "results.json") or _json(folder / "all_results.json")
    if results:
        info["results"] = results
        info["cost"] = {key: results[key] for key in ("seconds_per_step",) if key in results}
    config = _json(folder / "config.json")
    if config:
        info["student"] = {"name": config.get("architecture") or (config.get("architectures") or ["student"])[0]}
    distiller = _json(folder / "distiller.json") or _json(folder / "state" / "distiller.json")
    if distiller:
        info["method"] = {"name": distiller.get("distiller"), "options": distiller.get("options", {}), "parts": []}
    return info


def _history(folder: Path) -> list[Row]:
    rows: list[Mapping[str, Any]] = []
    if (folder / "history.jsonl").is_file():
        for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # A run that is being written, or was killed while writing its last row.
                rows.append(json.loads(line))
    if not rows and (folder / "summary.csv").is_file():
        with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
        rows = max(((_json(path) or {}).get("log_history", []) for path in states), key=len)
    return [_numbers(row) for row in rows]


def _numbers(row: Mapping[str, Any]) -> Row:
    """The numbers of a row; text of a CSV file is read as such."""
    numbers: Row = {}
    for key, value in row.items():
        with suppress(TypeError, ValueError):
            if not isinstance(value, bool) and math.isfinite(float(value)):
                numbers[key] = float(value)
    return numbers
