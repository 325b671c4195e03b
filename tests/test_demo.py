"""The demo with its own command lines, on fewer rows and epochs."""

from __future__ import annotations

import dataclasses
import io
from importlib import import_module

import pytest
from accelerate_kit import fresh_accelerate
from rich.console import Console

from kd_plugins import demo

SHORT = {
    "images": "--epochs 1",
    "text": "--num_train_epochs 3 --max_train_samples 64 --max_eval_samples 32",
}


@pytest.mark.parametrize("part", sorted(demo.PARTS))
def test_the_demo_runs(part, tmp_path, monkeypatch):
    def go(script, commands, folder, console):
        for words in commands.values():
            assert import_module(script).main(list(words)) == 0
            fresh_accelerate()

    monkeypatch.setattr(demo, "run", go)
    whole = demo.PARTS[part]
    # Of two flags of one name the later one counts, and a run's own flags are the last.
    students = {name: f"{flags} {SHORT[part]}" for name, flags in whole.students.items()}
    short = dataclasses.replace(whole, teacher=f"{whole.teacher} {SHORT[part]}", students=students)

    console = Console(file=io.StringIO(), width=200)
    console.print(demo.play(short, tmp_path, console, seeds=[0]))
    table = console.file.getvalue()
    for row in ("teacher", *whole.students):
        assert f" {row} " in table
    page = demo.report(short, tmp_path).read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert len(list(tmp_path.glob("*/report.html"))) == 1 + len(whole.students)
