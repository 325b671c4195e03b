"""Files of others: no code in them runs, nothing in a record becomes part of a page, no link leads out of a folder."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_plugins import DistillError, states
from kd_plugins.catalog.cli import main as kd_plugins_main
from kd_report import load_run, render
from kd_report.record import RunRecord

TIMM = "--model lenet5 --in-chans 1 -b 512 -j 0 --device cpu --epochs 2 --warmup-epochs 0 --lr 0.01 --no-record".split()


class Payload:
    """What makes a folder where a pickle is read without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture
def ran(tmp_path):
    """The folder that a payload makes; a test ends without it."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory):
    from kd_timm.train import main

    folder = tmp_path_factory.mktemp("run")
    assert main([*TIMM, "--output", str(folder), "--experiment", "run"]) == 0
    return folder / "run"


def test_a_payload_runs_where_a_pickle_is_read_without_care(tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "flags",
    [
        ["--initial-checkpoint", "FILE"],
        ["--resume", "FILE"],
        ["--pretrained-path", "FILE"],
        ["--distill", "kd", "--teacher", "lenet5", "--teacher-checkpoint", "FILE"],
        ["--loss", "bce", "--loss-pos-weight", "FILE"],
        ["--class-stats", "FILE"],
        ["--config", "FILE"],
        ["--class-map", "FILE", "--data-dir", "FOLDER"],
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors", ".npy", ".yaml"])
def test_kd_timm_train_runs_no_code_of_a_file(flags, suffix, ran, tmp_path, capsys):
    from kd_timm.train import main

    file = tmp_path / f"a{suffix}"
    torch.save({"state_dict": Payload(ran), "model": Payload(ran)}, file)
    if suffix == ".yaml":
        file.write_text(f"!!python/object/apply:os.mkdir ['{ran}']\n")
    words = [{"FILE": str(file), "FOLDER": str(tmp_path)}.get(word, word) for word in flags]
    try:
        status = main([*TIMM, "--output", str(tmp_path), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer.pt", "random-0.pt", "model.safetensors", "state.json"])
def test_kd_timm_train_runs_no_code_of_a_state(name, ran, tmp_path, timm_run, capsys):
    """Not even where somebody has sealed it anew."""
    from kd_timm.train import main

    shutil.copytree(timm_run, tmp_path / "run")
    torch.save(Payload(ran), tmp_path / "run" / "state" / name)
    states.seal(tmp_path / "run" / "state")
    assert main([*TIMM, "--resume", str(tmp_path / "run")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"])
def test_kd_transformers_train_runs_no_code_of_a_teacher(name, ran, tmp_path, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    from kd_transformers.train import main

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60)
    config = BertConfig(**sizes, num_labels=2, max_position_embeddings=32)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    if name == "pytorch_model.bin":
        (tmp_path / "teacher" / "model.safetensors").unlink()
    torch.save(Payload(ran), tmp_path / "teacher" / name)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,x\nb,y\na b,x\nb a,y\n")
    words = ["--train_file", str(rows), "--validation_file", str(rows), "--cache_dir", str(tmp_path / "cache")]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--max_steps", "1", "--max_seq_length", "8"]
    words += ["--distill", "kd", "--teacher", str(tmp_path / "teacher"), "--disable_tqdm", "True"]
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer.pt", "random_0.pt", "distiller_optimizers.pt", "distiller.safetensors"])
def test_the_engine_runs_no_code_of_a_state(name, ran, tmp_path):
    from kd_plugins import Batch, bind, create_distiller, make_optimizers

    def start() -> Any:
        student, distiller = nn.Linear(4, 3), create_distiller("kd")
        batch = Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))
        nets = bind(distiller, student, nn.Linear(4, 3), batch=batch)
        return make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets)

    start().save(tmp_path / "run")
    torch.save(Payload(ran), tmp_path / "run" / "state" / name)
    states.seal(tmp_path / "run" / "state")
    with pytest.raises(DistillError, match="cannot be read"):
        start().load(tmp_path / "run")


# Records and pages


def record(folder: Path) -> Path:
    run = RunRecord(folder, host="loop", nets=nn.Linear(4, 2), command=["x"])
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.4, "eval_top1": 50.0})
    run.finish({"top1": 50.0})
    return folder


def test_a_page_takes_the_place_of_a_link_and_follows_none(tmp_path, capsys):
    run = record(tmp_path / "run")
    for name in ("report.html", "report.html.partial"):
        (tmp_path / f"outside {name}").write_text("mine")
        (run / name).symlink_to(tmp_path / f"outside {name}")
    assert kd_plugins_main(["report", str(run)]) == 0
    assert not (run / "report.html").is_symlink()
    assert [p.read_text() for p in tmp_path.glob("outside*")] == ["mine"] * 2


@pytest.mark.parametrize("name", ["run.json", "history.jsonl", "analysis.safetensors"])
def test_a_record_that_is_a_link_out_of_its_folder_is_refused(name, tmp_path, capsys):
    run = record(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (run / name).symlink_to(tmp_path / "secret")
    assert kd_plugins_main(["report", str(run)]) == 2
    assert f"{name} is a link out of the run's folder" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_link_to_itself_is_no_file(tmp_path):
    run = record(tmp_path / "run")
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").symlink_to("history.jsonl")
    assert kd_plugins_main(["report", str(run)]) == 0


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '"x"', "{", "[" * 100_000, '{"format": 9}', '{"student": 3}', "\x00", '{"results": "x"}']
)
def test_a_malformed_record_is_a_sentence_or_a_page(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "history.jsonl").write_text('{"step": 1, "loss": 1e999, "a": 1' + "0" * 400 + "}\n[1]\n{\n")
    sentence_or_page(tmp_path)


def sentence_or_page(folder: Path) -> None:
    try:
        shown = render([folder])
    except DistillError as error:
        shown = str(error)
    assert shown.startswith("<!DOCTYPE html>") != (str(folder) in shown)
    assert "<script" not in shown.partition("<body>")[2]


def test_a_record_with_any_value_changed_is_a_sentence_or_a_page(tmp_path):
    record(tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    info |= {
        "pictures": [{"kind": "bars", "title": "t", "values": [["a", 1.0]], "caption": ""}],
        "peers": [{"name": "p"}],
    }
    script = "<script>alert(1)</script>"
    draw, others = random.Random(0), [None, 3, -1.5, "x", [], {}, [[1]], {"a": script}, script, 10**400, True]

    def changed(value: Any) -> Any:
        if draw.random() < 0.08:
            return draw.choice(others)
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list) else value

    for _ in range(40):
        found = changed(info)
        (tmp_path / "run.json").write_text(json.dumps(found))
        sentence_or_page(tmp_path)
    assert load_run(record(tmp_path)).status == "finished"
