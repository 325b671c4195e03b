"""The third-party plug-in, installed by pip, works by its name: in the list, in both scripts, under the contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_plugins import list_distillers
from kd_plugins.catalog.cli import main as cli
from kd_plugins.testing import check_distiller

NAMES = ("example_attention_transfer", "example_logit_regression")
pytestmark = pytest.mark.skipif(
    not set(NAMES) <= set(list_distillers()),
    reason="the example plug-in is not installed: pip install --no-deps tests/plugins/kd_plugins_example",
)


def test_the_list_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert "kd-plugins-example 0.1.0" in shown


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name: str) -> None:
    assert check_distiller(name)


@pytest.mark.parametrize(
    ("name", "options"), [(NAMES[0], ["weight=100", "layers=-1"]), (f"kd+{NAMES[1]}", [f"{NAMES[1]}.weight=0.1"])]
)
def test_kd_timm_train_takes_it_by_name(name: str, options: list[str], tmp_path: Path) -> None:
    from kd_timm.train import main

    common = "--device cpu --in-chans 1 -b 256 -j 0 --warmup-epochs 0 --lr 0.01 --epochs 1 --log-interval 100"
    words = [*common.split(), "--output", str(tmp_path)]
    assert main([*words, "--model", "lenet5", "--experiment", "teacher"]) == 0
    teacher = ["--teacher", "lenet5", "--teacher-checkpoint", str(tmp_path / "teacher" / "model_best.safetensors")]
    student = ["--model", "lenet5_half", "--experiment", "student", "--distill", name, "--distill-args", *options]
    assert main([*words, *teacher, *student]) == 0
    header = (tmp_path / "student" / "summary.csv").read_text().splitlines()[0]
    assert f"distill/{'attention' if name == NAMES[0] else 'logits'}" in header
    assert "agreement" in json.loads((tmp_path / "student" / "results.json").read_text())["evaluation"]


def test_kd_transformers_train_takes_it_by_name(tmp_path: Path) -> None:
    from kd_transformers.train import main

    common = "--max_steps 4 --max_train_samples 64 --max_eval_samples 32 --max_seq_length 16 --vocab_size 300 --use_cpu"
    common += " --per_device_train_batch_size 8 --disable_tqdm True --save_strategy no --logging_steps 1"
    teacher = "--train_teacher --teacher_layers 2 --teacher_hidden_size 16 --teacher_heads 2 --student_layers 1"
    words = [*common.split(), *teacher.split(), "--output_dir", str(tmp_path / "out"), "--distill", NAMES[1]]
    assert main([*words, "--distill-args", "weight=0.5"]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("distill/logits" in row for row in history)
