"""What a run leaves in its output folder: the student as safetensors, the resume state, the summary."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kd_plugins.errors import DistillError
from kd_timm.compat import save_config_for_hf


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights of an unwrapped model as safetensors, under the keys that `timm.create_model` loads.

    Args:
        model: The model without DDP or compile wrappers.
        path: The file; it is replaced in one step.
    """
    # Tied parameters share memory, which the format refuses: each key gets a copy of its own.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    # Others may read it, as they may a checkpoint of timm's; the library allows its owner alone.
    partial.chmod(0o644)
    os.replace(partial, path)


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's random generators."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, list(map(int, keys)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Sets all random generators to a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def forked_random_state() -> Iterator[None]:
    """Runs a block whose draws of random numbers leave no trace outside it."""
    state = random_state()
    try:
        yield
    finally:
        load_random_state(state)


class Checkpoints:
    """The files of one run, written by its first process.

    `model_best.safetensors` and `last.safetensors` hold what was evaluated (the moving average where there is one),
    `checkpoint-N.safetensors` the best `history` epochs, `config.json` the model in timm's own format, which goes with
    all of them; `state/` holds what `--resume` needs.

    Args:
        folder: Output folder of the run.
        history: Number of `checkpoint-N` files to keep.
        decreasing: Whether a lower metric is better.
    """

    def __init__(self, folder: Path, history: int, decreasing: bool) -> None:
        self.folder, self.history, self.decreasing = folder, history, decreasing
        self.kept: list[tuple[float, int]] = []

    @property
    def best(self) -> tuple[float, int] | None:
        """Best metric and its epoch."""
        return self.kept[0] if self.kept else None

    def describe(
        self, model: nn.Module, data_config: Mapping[str, Any], classes: tuple[str, ...] | None, name: str = "config"
    ) -> None:
        """Writes `config.json`: architecture, arguments, normalisation and class names.

        Args:
            model: The unwrapped model.
            data_config: Its data configuration.
            classes: Its class names, where they are known.
            name: Of the file: that of a single file of weights, where another model has `config.json`.
        """
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        save_config_for_hf(
            model,
            str(self.folder / f"{name}.json"),
            model_config={"label_names": list(classes)} if classes else None,
            data_config={key: data_config[key] for key in keys},
        )

    def save(self, model: nn.Module, epoch: int, metric: float) -> None:
        """Writes the weights of an epoch and forgets those that fell out of the history.

        Args:
            model: The unwrapped model that was evaluated.
            epoch: The epoch that ended.
            metric: Its metric.
        """
        save_weights(model, self.folder / "last.safetensors")
        # Of equal epochs the earlier one stays ahead.
        self.kept = sorted([*self.kept, (metric, epoch)], key=lambda k: (k[0] if self.decreasing else -k[0], k[1]))
        for _, dropped in self.kept[self.history :]:
            self._path(dropped).unlink(missing_ok=True)
        self.kept = self.kept[: self.history]
        if (metric, epoch) in self.kept:
            shutil.copyfile(self.folder / "last.safetensors", self._path(epoch))
        if self.best == (metric, epoch):
            shutil.copyfile(self.folder / "last.safetensors", self.folder / "model_best.safetensors")

    def restart(self) -> None:
        """Forgets the epochs so far: they belong to another student."""
        for _, epoch in self.kept:
            self._path(epoch).unlink(missing_ok=True)
        self.kept = []

    def _path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.safetensors"

    @property
    def new_state(self) -> Path:
        """The folder that a resume state is written to."""
        return self.folder / "state.new"

    def open_state(self) -> Path:
        """Makes an empty `new_state`."""
        shutil.rmtree(self.new_state, ignore_errors=True)
        self.new_state.mkdir(parents=True)
        return self.new_state

    def close_state(self) -> None:
        """Lets `new_state` take the place of the state before; one of the two is whole at any time."""
        current, old = self.folder / "state", self.folder / "state.old"
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            os.replace(current, old)
        os.replace(self.new_state, current)
        shutil.rmtree(old, ignore_errors=True)


def find_state(path: str) -> Path:
    """The state folder that `--resume PATH` means: of an output folder, or the state folder itself."""
    for candidate in (Path(path), Path(path) / "state", Path(path) / "state.old"):
        if (candidate / "state.json").is_file():
            return candidate
    raise DistillError(f"--resume {path} holds no state to continue from: name the output folder of a run.")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights that `save_weights` wrote."""
    model.load_state_dict(load_file(path))


def epoch_row(train: Mapping[str, float], evaluation: Mapping[str, float], lr: float) -> dict[str, Any]:
    """The numbers of an epoch by column."""
    named = {"train": train, "eval": evaluation}
    return {f"{kind}_{key}": value for kind, given in named.items() for key, value in given.items()} | {"lr": lr}


class Summary:
    """`summary.csv`, one row an epoch; columns may join later, as loss terms do that only some stages have.

    Args:
        path: The file.
        start_epoch: First epoch of this run; rows of later epochs are dropped.
    """

    def __init__(self, path: Path, start_epoch: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if start_epoch and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < start_epoch]

    def add(self, epoch: int, train: Mapping[str, float], evaluation: Mapping[str, float], lr: float) -> dict[str, Any]:
        """Adds the row of an epoch and writes the file; returns the row."""
        row = {"epoch": epoch} | epoch_row(train, evaluation, lr)
        self.rows.append(row)
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        # As in timm's file: epoch, training, evaluation, rate.
        rank = {"epoch": 0, "train": 1, "eval": 2, "lr": 3}
        columns.sort(key=lambda column: rank[column.partition("_")[0]])
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return row
