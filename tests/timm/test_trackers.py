"""Trackers get the rows of summary.csv, loss terms included, and are closed at the end."""

from __future__ import annotations

import csv

import pytest
from accelerate import tracking

from kd_plugins import DistillError
from kd_timm import parts
from kd_timm.arguments import parse_args


@pytest.fixture
def seen(monkeypatch):
    """Registers the trackers `notes` and `wandb`, which note what they are told."""
    calls = []

    class Notes(tracking.GeneralTracker):
        name = "notes"
        requires_logging_directory = True

        def __init__(self, project, folder=None, **options):
            super().__init__()
            calls.append(("start", project, folder, options))

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            calls.append(("settings", values))

        def log(self, values, step=None, **kwargs):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    class Wandb(Notes):
        name = "wandb"
        requires_logging_directory = False

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    return calls


def rows(folder):
    return list(csv.DictReader((folder / "summary.csv").open()))


def test_a_tracker_gets_the_rows_of_the_summary(run, seen):
    first = run("--epochs", "1", name="teacher")
    path = str(first.folder / "model_best.safetensors")
    teacher = ["--teacher", "resnet10t", "--teacher-checkpoint", path]
    session = run("--distill", "kd", *teacher, "--report-to", "notes", "--drop", "0.1")
    (_, project, folder, _), (_, settings), *logged, last = seen
    assert (project, folder) == ("kd-timm-train", str(session.folder / "logs"))
    assert (settings["drop"], settings["distill"], settings["teacher"]) == (0.1, "kd", "['resnet10t']")
    assert last == ("finish",)
    assert [step for _, step, _ in logged] == [0, 1]
    for (_, _, values), row in zip(logged, rows(session.folder), strict=True):
        assert {key: float(value) for key, value in row.items()} == values
        assert {"train_loss", "train_distill/kd", "train_distill/task", "eval_top1", "lr"} <= values.keys()


def test_wandb_is_called_as_timm_calls_it(run, seen, monkeypatch):
    flags = "--log-wandb --wandb-project p --wandb-tags a b --wandb-resume-id x1".split()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_timm.train.train_one_epoch", stop)
    assert run(*flags, name="w").results == {}
    assert seen[0] == ("start", "p", None, {"name": "w", "tags": ["a", "b"], "id": "x1", "resume": "must"})
    assert seen[-1] == ("finish",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--report-to nothing", "no such tracker"),
        ("--report-to mlflow", "mlflow: that tracker is not installed: pip install mlflow"),
        ("--wandb-tags a", "--wandb-tags does nothing without wandb"),
    ],
)
def test_refused_before_training(flags, words, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(DistillError, match=words):
        parts.tracker_names(parse_args(flags.split()))


def test_a_tracker_that_cannot_start_is_refused(run, seen, monkeypatch):
    def offline(self, values):
        raise OSError("no server")

    monkeypatch.setattr(tracking.LOGGER_TYPE_TO_CLASS["notes"], "store_init_configuration", offline)
    with pytest.raises(DistillError, match="notes cannot start .OSError: no server"):
        run("--report-to", "notes")


def test_tensorboard_shows_the_loss_terms(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    session = run("--epochs", "2", "--report-to", "tensorboard")
    events = EventAccumulator(str(session.folder / "logs" / "kd-timm-train")).Reload()
    for key in ("train_loss", "eval_top1", "lr"):
        found = [event.value for event in events.Scalars(key)]
        assert found == pytest.approx([float(row[key]) for row in rows(session.folder)], rel=1e-5)
