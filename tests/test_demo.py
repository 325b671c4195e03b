"""The demo with its own command lines, on fewer rows and epochs."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import threading

import pytest
import torch
from accelerate_kit import fresh_accelerate
from markupsafe import Markup
from rich.console import Console

from kd_plugins import DistillError, demo
from kd_plugins.catalog import cli

SHORT = {
    "images": "--epochs 1 --val-split validation[:100]",
    "text": "--num_train_epochs 3 --max_train_samples 32 --max_eval_samples 16",
}
# Of the runs that take the longest.
SHORTER = {"images teacher": "--train-split train[:256]", "images dafl, no data": "--epoch-updates 8"}


@pytest.mark.parametrize("part", sorted(demo.PARTS))
def test_the_demo_runs(part, tmp_path, monkeypatch):
    whole = demo.PARTS[part]

    def shortened(name: str, flags: str) -> str:
        """Of two flags of one name the later one counts, and a run's own flags are the last."""
        return f"{flags} {SHORT[part]} {SHORTER.get(f'{part} {name}', '')}"

    students = {name: shortened(name, flags) for name, flags in whole.students.items()}
    teacher = shortened("teacher", whole.teacher)
    short = dataclasses.replace(whole, teacher=teacher, students=students, seeds=dict.fromkeys(students, 1))
    with monkeypatch.context() as patch:
        # Drawing takes longer than training; the page of all runs has their charts.
        patch.setattr("kd_report.charts._svg", lambda axes, label: Markup("<svg></svg>"))
        for name, words in demo.commands(short, tmp_path).items():
            assert demo.train(short.script, words, tmp_path / name) == 0
            fresh_accelerate()

    console = Console(file=io.StringIO(), width=200)
    console.print(demo.table(short, tmp_path))
    table = console.file.getvalue()
    for row in ("teacher", *whole.students):
        assert f" {row} " in table
    page = demo.report(tmp_path, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert page.count('<svg class="chart"') > len(whole.students)
    assert len(list(tmp_path.glob("*/report.html"))) == 1 + len(whole.students)


def test_students_wait_for_their_teacher_and_for_no_other(tmp_path, monkeypatch):
    images, text = tmp_path / "images", tmp_path / "text"
    begun, taught, over = threading.Event(), threading.Event(), []

    def run(script, words, log, threads):
        if log == text / "teacher.log":
            assert begun.wait(60)
        elif log.parent == images and log.stem != "teacher":
            assert images / "teacher.log" in over
            begun.set()
            assert taught.wait(60)
        elif log.parent == text:
            assert text / "teacher.log" in over
            taught.set()
        over.append(log)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo.play({images: demo.PARTS["images"], text: demo.PARTS["text"]}, Console(file=io.StringIO()))
    assert len(over) == len(set(over)) == 2 + sum(len(demo.PARTS[name].runs) for name in ("images", "text"))


def test_short_trainings_come_last(tmp_path, monkeypatch):
    over = []
    monkeypatch.setattr(demo, "run", lambda script, words, log, threads: over.append(log.parent.name))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo.play({tmp_path / name: demo.PARTS[name] for name in ("images", "text")}, Console(file=io.StringIO()))
    counts = {name: len(part.runs) for name, part in demo.PARTS.items()}
    assert over == ["images", "text"] + ["text"] * counts["text"] + ["images"] * counts["images"]


def test_after_a_failure_no_training_begins(tmp_path, monkeypatch):
    images, text = tmp_path / "images", tmp_path / "text"
    stopped, begun, end = threading.Event(), [], demo.ThreadPoolExecutor.shutdown

    class Pool(demo.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            end(self, wait=False, cancel_futures=cancel_futures)
            stopped.set()
            end(self, wait=wait)

    def run(script, words, log, threads):
        begun.append(log)
        if log.parent == images:
            raise DistillError("no room")
        assert stopped.wait(60)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DistillError, match="no room"):
        demo.play({images: demo.PARTS["images"], text: demo.PARTS["text"]}, Console(file=io.StringIO()))
    # The text's teacher ran then, and a student may have waited for it.
    assert len(begun) <= 3


def test_a_run_that_fails_is_told_by_the_last_line_of_its_log(tmp_path):
    with pytest.raises(DistillError, match=r"status 2; .*alone.log ends with: .*--epoch"):
        demo.run("kd_timm.train", ["--epochs", "x"], tmp_path / "alone.log", 1)


def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "play", stopped)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "kd-plugins: stopped.\n"


def test_the_page_of_a_run_shows_its_own_command(tmp_path, monkeypatch):
    from kd_report.record import _command

    monkeypatch.setattr(demo, "train", lambda *_: 0)
    monkeypatch.setattr(sys, "argv", ["kd-plugins", "demo"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit):
        demo._train("kd_timm.train", ["--epochs", "1"], tmp_path / "kd-0.log", torch.get_num_threads())
    assert _command() == ["kd-timm-train", "--epochs", "1"]
