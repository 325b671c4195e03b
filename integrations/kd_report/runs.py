"""What is known of a finished (or running) training, read from its output folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kd_plugins.errors import DistillError, told
from kd_plugins.states import read_json

__all__ = ["FORMAT", "Run", "find_runs", "load_run", "read_rows"]

FORMAT = 2
_FILES, _TENSORS = ("run.json", "history.jsonl"), "analysis.safetensors"
_KEY = re.compile(r"(?:(eval|train)_)?(?:(peer\d+)-.+_(?=[^_]+$))?(?:distill/)?(.+)")
_COST = ("runtime", "per_second", "flos", "samples", "steps_per", "grad_norm", "seconds", "memory")
_RATES = ("lr", "learning_rate")
_LISTS, _BY_NAME = ("teachers", "peers", "classes", "command", "notes", "pictures"), ("settings", "results", "versions")


@dataclass
class Run:
    """One run: its folder, and what stands in the files there.

    Attributes:
        info: What was run, results, cost, what was found `before` and `after`, the method's `pictures` (`run.json`).
            Lists and mappings that were left out are empty here.
        history: One row a log, numbers only (`history.jsonl`).
        arrays: Tensors of the analysis by name (`analysis.safetensors`).
    """

    folder: Path
    info: Mapping[str, Any]
    history: list[dict[str, float]]
    arrays: dict[str, Tensor]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        """The distiller's name, or "alone"."""
        return self.part("method", "name") or "alone"

    @property
    def status(self) -> str:
        """`"finished"`, `"interrupted"`, or since when nothing more was written: it runs, or it was killed."""
        status, files = str(self.info.get("status") or ""), [self.folder / name for name in _FILES]
        if status != "unfinished":
            return status
        last = max(file.stat().st_mtime for file in files if file.is_file())
        return f"unfinished, last written {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"

    @property
    def student(self) -> str:
        return self.part("student", "name") or "student"

    @property
    def teacher(self) -> str:
        """The teachers' names, or the peers' where there is no teacher; empty without either."""
        return " + ".join(str(other["name"]) for other in self.info["teachers"] or self.info["peers"])

    @property
    def other(self) -> str:
        """What the student is compared with: "teacher", "peer1", or "student" for nothing."""
        return self.part("after", "compared") or self.part("before", "compared") or "teacher"

    @property
    def phases(self) -> list[str]:
        """The phases of which something was found."""
        return [phase for phase in ("before", "after") if self.part(phase)]

    @property
    def result(self) -> tuple[str, float] | None:
        """The metric that tells how good the student is, and its value: of the exported student, or the last."""
        named = str(self.info.get("metric") or "")
        short = named.removeprefix("eval_")
        # Of the student that is exported, whose epoch need not be the last.
        for exported in (self.part("results", "evaluation", short), self.part("results", named)):
            if type(exported) in (int, float):
                return short, float(exported)
        last = {key: value for row in self.history for key, value in row.items() if _drawn(key)}
        usual = [named, "eval_top1", "eval_accuracy", "eval_f1", "eval_mean_iou"]
        evaluated = [key for key in last if key.startswith("eval_") and key != "eval_loss"]
        key = next((key for key in (*usual, *evaluated, "eval_loss") if key in last), None)
        return None if key is None else (key.removeprefix("eval_"), last[key])

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """Name, first and last step of each stage; empty for fewer than two."""
        table = self.info.get("stages")
        if not table or len(table["names"]) < 2 or not table["total"]:
            return []
        starts = [*table["starts"], table["total"]]
        return [(str(name), *ends) for name, ends in zip(table["names"], pairwise(starts), strict=True)]

    def curves(self, x: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
        """The curves: panel (a loss, a metric, the rate), line ("training", "evaluation", a peer), and points."""
        found, first = [], (self.result or ("", 0))[0]
        # Of a run that is finished one point is no curve: it stands among the results.
        least = 2 if self.info.get("status") == "finished" else 1
        keys = [key for key in dict.fromkeys(key for row in self.history for key in row) if _drawn(key)]
        for key in sorted(keys, key=lambda k: (k in _RATES, "distill/" in k, not k.endswith(("loss", first)))):
            kind, peer, title = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
            title = "learning rate" if key in _RATES else title.replace("/", ": ")
            points = [(row.get(x, float(i)), row[key]) for i, row in enumerate(self.history) if key in row]
            if len(points) >= least:
                found.append((title, peer or ("evaluation" if kind == "eval" else "training"), points))
        return found

    def array(self, phase: str, name: str) -> Tensor | None:
        """An array of the analysis before or after the training."""
        return self.arrays.get(f"{phase}/{name}")

    def part(self, *keys: str) -> Any:
        """An entry of `info`; None where there is none."""
        found: Any = self.info
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def _drawn(key: str) -> bool:
    """Whether a number of the history is a loss, a metric or a rate, and no place or cost."""
    return key not in ("step", "epoch") and not any(word in key for word in _COST)


def load_run(folder: str | Path) -> Run:
    """Reads the record that a training left.

    Args:
        folder: The output folder of a run.

    Raises:
        DistillError: Nothing in the folder tells of a run, or another version wrote it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DistillError(f"Expected the output folder of a run, got {folder}, which is no folder: mend the path.")
    for name in (*_FILES, _TENSORS):
        # Path.resolve raises where a link leads to itself.
        real = Path(os.path.realpath(folder / name))
        if (folder / name).is_symlink() and not real.is_relative_to(os.path.realpath(folder)):
            raise DistillError(f"{folder / name} is a link out of the run's folder, which is not followed: remove it.")
    file, tensors, history = folder / "run.json", folder / _TENSORS, read_rows(folder / "history.jsonl")
    info = (read_json(file) if file.is_file() else None) or {}
    if not isinstance(info, Mapping):
        raise DistillError(f"Expected what was run, by name, in {file}, got {type(info).__name__}.")
    if not info and not history:
        raise DistillError(
            f"Expected run.json or history.jsonl in {folder}, got neither: name the output folder of kd-timm-train,"
            " kd-transformers-train or DistillationTrainer, or of a Trainer with"
            " kd_transformers.recording.RecordCallback."
        )
    if info.get("format", FORMAT) != FORMAT:
        raise DistillError(
            f"Expected a record of format {FORMAT} in {folder}, got format {info['format']}: make its page with the"
            " version of kd-plugins that wrote it."
        )
    numbers = [{k: x for k, given in row.items() if (x := _number(k, given)) is not None} for row in history]
    with told(f"{tensors} cannot be read", SafetensorError, OSError, remedy="it is damaged: remove it."):
        arrays = load_file(tensors) if tensors.is_file() else {}
    found = {key: x for key, x in arrays.items() if key.partition("/")[0] in info}
    empty: dict[str, Any] = {**{key: [] for key in _LISTS}, **{key: {} for key in _BY_NAME}}
    return Run(folder, empty | {key: x for key, x in info.items() if x or key not in empty}, numbers, found)


def _number(key: str, given: Any) -> float | None:
    """A number of a row; JSON has no NaN, so a measure that is none stands there as null."""
    if given is None and key not in ("step", "epoch"):
        return math.nan
    return float(given) if type(given) in (int, float) and abs(given) < 1e300 else None


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The folders of runs: each that is given, or all below it where it is none itself."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        is_run = any((folder / name).is_file() for name in _FILES)
        below = [] if is_run else sorted({path.parent for name in _FILES for path in folder.rglob(name)})
        for run in below or [folder]:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a history, one a line; the last may be in the making, or what a killed run left of it."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
