"""Files that outlive a kill: written in one step, sealed by a manifest, found again where they are whole."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kd_plugins import DistillError, states


def state(folder: Path, text: str) -> None:
    """A new state of a run, with a file in a folder of its own."""
    new = states.open_state(folder)
    (new / "parts").mkdir()
    (new / "weights").write_text(text)
    (new / "parts" / "own").write_text(text * 2)
    states.close_state(folder, run="a")


def found(folder: Path) -> tuple[str, list[str]]:
    said: list[str] = []
    newest = states.newest(states.slots(folder), said.append)
    return (newest / "weights").read_text() if newest else "", said


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "weights").write_text("TWO"), "weights holds other bytes"),
        (lambda f: (f / "weights").write_text("tw"), "weights has 2 bytes and was written with 3"),
        (lambda f: (f / "parts" / "own").unlink(), "parts/own is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"weights": 3}}'), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(tmp_path, harm, words):
    state(tmp_path, "one")
    state(tmp_path, "two")
    assert found(tmp_path) == ("two", [])
    harm(tmp_path / "state")
    taken, (said,) = found(tmp_path)
    assert taken == "one"
    assert words in said
    assert str(tmp_path / "state") in said
    with pytest.raises(DistillError, match="state.old instead") as refused:
        states.check(tmp_path / "state", states.slots(tmp_path))
    assert words in str(refused.value)
    states.check(tmp_path / "state.old", states.slots(tmp_path))


def test_what_a_state_must_have_is_asked_for(tmp_path):
    (tmp_path / "weights").write_text("one")
    states.seal(tmp_path, step=3)
    (tmp_path / "later").write_text("not sealed")
    assert states.damage(tmp_path) == ""
    assert states.facts(tmp_path) == {"step": 3}
    assert "optimizer is missing" in states.damage(tmp_path, ["optimizer"])
    assert "later is not in" in states.damage(tmp_path, ["later"])


def test_a_kill_between_any_two_steps_of_a_save_leaves_a_whole_state(tmp_path, monkeypatch):
    """And so does a second one, in the save of the run that goes on."""

    class Killed(BaseException):
        pass

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    left = [0]
    monkeypatch.setattr(states.shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(states.os, "replace", counted(os.replace))
    monkeypatch.setattr(states.os, "fsync", counted(os.fsync))
    for text in "012":
        left[0] = 1000
        state(tmp_path / "whole", text)
    for first in range(1000 - left[0] + 1):
        for second in (1, 2, 3, 5, 8):
            folder, done = tmp_path / f"{first}-{second}", 1
            left[0] = 1000
            state(folder, "0")
            state(folder, "1")
            for calls_left in (first, second):
                left[0] = calls_left
                with suppress(Killed):
                    state(folder, str(done + 1))
                    done += 1
                taken = found(folder)[0]
                assert taken in (str(done), str(done + 1))
                done = int(taken)


def test_two_runs_may_write_one_file_of_a_cache(tmp_path):
    path = tmp_path / "a"
    with states.replacing(path, shared=True) as one, states.replacing(path, shared=True) as two:
        one.write_text("1")
        two.write_text("1")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "1")]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    states.write_json(path, {"a": 1})
    path.with_name("a.json.partial").mkdir()
    with pytest.raises(DistillError, match=r"a.json cannot be written \(IsADirectoryError"):
        states.write_json(path, {"a": 2})
    path.with_name("a.json.partial").rmdir()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    path.write_text("{")
    with pytest.raises(DistillError, match="a.json cannot be read"):
        states.read_json(path)


@pytest.mark.parametrize("said", [states.writing, states.taking_up])
def test_what_a_file_does_is_told_and_what_a_program_does_wrong_is_not(said):
    # As torch's writer says of a full disk.
    with pytest.raises(DistillError, match=r"a cannot be (written|read) \(\w+Error: .*unexpected pos"), said("a"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 13632 vs 13520")
    with pytest.raises(AttributeError), said("a"):
        raise AttributeError("'NoneType' object has no attribute 'step'")


def test_torchs_writer_is_told_from_other_faults(tmp_path):
    with pytest.raises(DistillError, match="x.pt cannot be written .*make room"), states.writing(tmp_path / "x.pt"):
        torch.save({}, tmp_path / "gone" / "x.pt")
    with pytest.raises(RuntimeError, match="out of memory"), states.writing("a"):
        raise RuntimeError("CUDA error: out of memory")
