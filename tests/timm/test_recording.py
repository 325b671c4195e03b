"""kd-timm-train leaves a record from which the report's page is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_report import load_run, render


def test_a_run_has_a_page(run):
    teacher = run("--epochs", "1", name="teacher")
    flags = ["--teacher", "resnet10t", "--teacher-checkpoint", str(teacher.folder / "model_best.safetensors")]
    nst = "--distill kd+nst --distill-args layers=2 --img-size 32".split()
    session = run(*nst, *flags, "--teacher-kwargs", *_kwargs(), name="student")
    found = load_run(session.folder)
    assert found.info["status"] == "finished"
    assert found.info["results"]["best_metric"] == session.results["best_metric"]
    assert [row["step"] for row in found.history] == [4, 8]
    assert {"train_distill/kd", "train_distill/nst", "eval_top1", "lr"} <= set(found.history[-1])
    # The whole evaluation set for the numbers, and a few rows of it for the layers of so short a training.
    assert found.part("after", "predictions", "teacher", "examples") == 26
    assert (found.part("after", "examples"), found.part("before")) == (8, None)
    accuracy = found.part("after", "predictions", "student", "accuracy")
    assert abs(100 * accuracy - session.results["evaluation"]["top1"]) < 1e-3
    agreement = found.part("after", "predictions", "student", "agreement")
    assert abs(100 * agreement - session.results["evaluation"]["agreement"]) < 1e-3
    assert found.info["cost"]["parts"]["teacher forward"] > 0
    page = render([session.folder])
    for key in ("results", "calibration", "curves", "features", "confusion", "cost"):
        assert f'id="{key}"' in page


def test_a_record_can_be_left_out(run):
    session = run("--epochs", "1", "--no-record")
    assert (session.folder / "results.json").exists()
    assert not any((session.folder / name).exists() for name in ("run.json", "history.jsonl", "analysis.safetensors"))


def test_every_peer_is_compared_with_the_student(run, monkeypatch):
    monkeypatch.setattr("kd_timm.recording.rows_to_analyse", lambda trained: 96)
    # The similarity of fewer examples is not drawn.
    monkeypatch.setattr("kd_timm.data.Digits.evaluated", 100)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    session = run("--distill", "timm_distillers:Ring", "--peer", "resnet10t", "--peer", "resnet10t")
    found = load_run(session.folder)
    assert {f"eval_peer{i}-resnet10t_{key}" for i in (1, 2) for key in ("top1", "loss", "agreement")} <= set(
        found.history[-1]
    )
    assert found.part("after", "peers") == ["peer1", "peer2"]
    for key, result in zip(("peer1", "peer2"), session.results["peers"], strict=True):
        own = found.part("after", "predictions", key)
        assert 100 * own["accuracy"] == pytest.approx(result["top1"], abs=1e-3)
        assert 100 * own["agreement"] == pytest.approx(result["agreement"], abs=1e-3)
    alike = found.array("after", "peers/similarity")
    assert alike.shape == (3, 3)
    assert alike.diagonal().tolist() == pytest.approx([1.0] * 3)
    assert alike[0, 1] == found.array("after", "cka")[-1, -1] != alike[0, 2]
    page = render([session.folder])
    assert page.count("<td>peer2: resnet10t") == 1
    assert f"{alike[0, 2]:.2f}" in page


def _kwargs() -> list[str]:
    return ["channels=(8,8,16,16)", "stem_width=8"]


def test_a_resumed_run_goes_on_with_its_record(run):
    whole = run("--epochs", "3", name="whole")
    part = run("--epochs", "3", name="part")
    (part.folder / "history.jsonl").write_text((whole.folder / "history.jsonl").read_text())
    resumed = run("--epochs", "3", "--resume", str(part.folder), name="part")
    info = json.loads((resumed.folder / "run.json").read_text())
    assert info["resumed"] == 1
    assert [row["epoch"] for row in load_run(resumed.folder).history] == [1, 2, 3]


def test_the_losses_of_epochs_that_are_not_evaluated_are_kept(run):
    session = run("--epochs", "3", "--val-interval", "5")
    history = load_run(session.folder).history
    assert [row["epoch"] for row in history if "train_loss" in row] == [1, 2, 3]
    assert [row["epoch"] for row in history if "eval_top1" in row] == [3]
