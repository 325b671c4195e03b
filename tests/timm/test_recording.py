"""kd-timm-train leaves a record from which the report's page is made."""

from __future__ import annotations

import json

from kd_plugins.report import load_run, render


def test_a_run_has_a_page(run):
    teacher = run("--epochs", "1", name="teacher")
    flags = ["--teacher", "resnet10t", "--teacher-checkpoint", str(teacher.folder / "model_best.safetensors")]
    session = run("--distill", "kd+nst", *flags, "--teacher-kwargs", *_kwargs(), "--img-size", "32", name="student")
    found = load_run(session.folder)
    assert found.info["status"] == "finished"
    assert found.info["results"]["best_metric"] == session.results["best_metric"]
    assert [row["step"] for row in found.history] == [4, 8]
    assert {"train_distill/kd", "train_distill/nst", "eval_top1", "lr"} <= set(found.history[-1])
    assert found.part("after", "examples") == 100
    accuracy = found.part("after", "predictions", "student", "accuracy")
    assert abs(100 * accuracy - session.results["evaluation"]["top1"]) < 1e-3
    agreement = found.part("after", "predictions", "agreement")
    assert abs(100 * agreement - session.results["evaluation"]["agreement"]) < 1e-3
    assert found.info["cost"]["parts"]["teacher forward"] > 0
    page = render([session.folder])
    for key in ("results", "calibration", "curves", "similarity", "features", "confusion", "cost"):
        assert f'id="{key}"' in page


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
