"""What a run leaves in its output folder: the student as safetensors, the resume state, the summary."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kd_plugins.errors import DistillError, told
from kd_plugins.states import check, newest, replacing, slots
from kd_timm.compat import save_config_for_hf

_logger = logging.getLogger("kd_timm.train")


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights of an unwrapped model as safetensors, under the keys that `timm.create_model` loads.

    Args:
        model: The model without DDP or compile wrappers.
        path: The file; it is replaced in one step.
    """
    # Tied parameters share memory, which the format refuses: each key gets a copy of its own.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def rank(kept: Sequence[float], decreasing: bool) -> tuple[float, float]:
    """Sorts metrics and their epochs, the best first: of equal ones the earlier is ahead, and NaN comes last."""
    metric, epoch = kept
    value = metric if decreasing else -metric
    return math.inf if math.isnan(value) else value, epoch


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
        self, model: nn.Module, data_config: Mapping[str, Any], classes: tuple[str, ...] | None, name: str
    ) -> None:
        """Writes `config.json`: architecture, arguments, normalisation and class names.

        Args:
            model: The unwrapped model.
            data_config: Its data configuration.
            classes: Its class names, where they are known.
            name: Of the file: that of a single file of weights, where another model has `config.json`.
        """
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        with replacing(self.folder / f"{name}.json") as partial:
            save_config_for_hf(
                model,
                str(partial),
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
        self.kept = sorted([*self.kept, (metric, epoch)], key=lambda kept: rank(kept, self.decreasing))
        for _, dropped in self.kept[self.history :]:
            self._path(dropped).unlink(missing_ok=True)
        self.kept = self.kept[: self.history]
        if (metric, epoch) in self.kept:
            copy_file(self.folder / "last.safetensors", self._path(epoch))
        if self.best == (metric, epoch):
            copy_file(self.folder / "last.safetensors", self.folder / "model_best.safetensors")

    def told(self) -> str:
        """What is kept, the best first, as timm's saver tells it."""
        kept = "".join(f" {(str(self._path(epoch)), metric)}\n" for metric, epoch in self.kept)
        return f"Current checkpoints:\n{kept}"

    def forget_later(self) -> None:
        """Removes the files of epochs that a state does not know, from which a run goes on."""
        later = {*self.folder.glob("checkpoint-*.safetensors")} - {self._path(epoch) for _, epoch in self.kept}
        for file in later:
            file.unlink()
        # Without any, model_best is this state's, whatever else was deleted by hand.
        if later:
            self.kept = [(metric, epoch) for metric, epoch in self.kept if self._path(epoch).is_file()]
        if later and self.best:
            copy_file(self._path(self.best[1]), self.folder / "model_best.safetensors")

    def restart(self) -> None:
        """Forgets the epochs so far: they belong to another student."""
        for _, epoch in self.kept:
            self._path(epoch).unlink(missing_ok=True)
        self.kept = []

    def _path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.safetensors"


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, which takes its place in one step."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def find_state(args: argparse.Namespace) -> Path | None:
    """The state that `--resume` means: of a run's folder the newest whole one, or the state itself; None for none.

    `auto` is the folder of `--output` and `--experiment`, and nothing where no state was written there yet.

    Raises:
        DistillError: There is none; that which was named is damaged.
    """
    named = output_folder(args)
    if not args.resume:
        return None
    auto = args.resume == "auto"
    if auto and not args.experiment:
        raise DistillError("--resume auto goes on with the run of --output and --experiment: name it, --experiment.")
    folder = named if auto else Path(args.resume)
    if (folder / "state.json").is_file():
        check(folder, slots(folder.parent))
        return folder
    found = newest(slots(folder), _logger.warning)
    if found is None and not (auto and not any(slot.is_dir() for slot in slots(folder)[1:])):
        raise DistillError(f"{folder} holds no whole state to continue from: --resume expects the folder of a run.")
    return found


def output_folder(args: argparse.Namespace) -> Path:
    """The folder that `--output` and `--experiment` name."""
    output = Path(args.output or "output/train")
    folder = output / args.experiment
    if not folder.resolve().is_relative_to(output.resolve()):
        raise DistillError(f"--experiment {args.experiment} leads out of {output}: name a folder in it, or --output.")
    return folder


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights that `save_weights` wrote."""
    remedy = "it is damaged, or of another model."
    with told(f"{path} cannot be loaded", OSError, RuntimeError, SafetensorError, remedy=remedy):
        model.load_state_dict(load_file(path))


def epoch_row(train: Mapping[str, float], evaluation: Mapping[str, float], lr: float) -> dict[str, Any]:
    """The numbers of an epoch by column."""
    named = {"train": train, "eval": evaluation}
    return {f"{kind}_{key}": value for kind, given in named.items() for key, value in given.items()} | {"lr": lr}


class Summary:
    """`summary.csv`, one row an epoch; columns may join later, as loss terms do that only some stages have.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Mapping[str, Any]] = []

    def read(self) -> None:
        """Takes up the rows of the file, where no state holds them."""
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                self.rows = [row for row in csv.DictReader(file) if (row["epoch"] or "").isdigit()]

    def add(self, epoch: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the row of an epoch and writes the file; returns the row with its epoch."""
        self.rows.append({"epoch": epoch, **row})
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        # As in timm's file: epoch, training, evaluation, rate.
        rank = {"epoch": 0, "train": 1, "eval": 2, "lr": 3}
        columns.sort(key=lambda column: rank[column.partition("_")[0]])
        with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return self.rows[-1]
