"""Lists of runs: their commands parse, what is done is not run again, and printed tables are those of the results."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from torch import nn

from kd_plugins import Batch
from kd_plugins.catalog.installed import entries_by_name, ours

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import card, idx_data, quality, results, speed  # noqa: E402
from benchmarks.__main__ import NAMES  # noqa: E402

LISTS = sorted((ROOT / "benchmarks" / "lists").glob("*.yaml"))


def commands(path: Path) -> list[str]:
    """All commands of a list; those that share a card with their program's name before them."""
    spec: dict[str, Any] = yaml.safe_load(path.read_text())
    program = "card " if spec.get("on_card") else ""
    before = spec.get("before") or {}
    variants = (spec.get("variants") or {"": ""}).values()
    found = [
        *(command.replace("{common}", spec["common"]) for command in before.values()),
        *(f"{spec['common']} {row} {more}" for row in spec["rows"].values() for more in variants),
    ]
    folders = dict.fromkeys(before, "a/teacher")
    filled = [command.format(out="a/run", seed=0, device="cpu", **folders) for command in found]
    return [program + os.path.expandvars(command) for command in filled]


def test_speed_asks_networks_by_the_names_of_their_inputs():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=input_ids * attention_mask)

    inputs = speed.tokens(3, 2)
    batch = Batch.of(inputs, inputs.pop("labels"))
    assert torch.equal(speed.logits(Model(), batch), inputs["input_ids"])
    images = speed.pictures(2)
    assert speed.logits(nn.Identity(), images) is images.inputs


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_the_commands_of_the_lists_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("DATA", "data")
    monkeypatch.setenv("MINILM", "minilm")
    for command in commands(path):
        program, *argv = shlex.split(command)
        if program == "python":
            assert argv[:2] == ["-m", "benchmarks"]
            assert argv[2] in NAMES
            continue
        if program == "card":
            args = card.parse(argv)
            name, options = args.distill, args.distill_args
        elif program == "kd-timm-train":
            from kd_timm.arguments import parse_args as parse_timm

            args = parse_timm(argv)
            name, options = args.distill, args.distill_args
        else:
            from kd_transformers.arguments import parse_args as parse_transformers

            arguments = parse_transformers(argv)
            name, options = arguments.distillation.distill, arguments.distillation.distill_args
        if name:
            from kd_plugins import create_distiller
            from kd_plugins.catalog.registry import options_from_strings

            create_distiller(name, **options_from_strings(name, options))


def test_a_list_runs_once_and_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "out, value, seed = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])\n"
        "count = out / 'count.txt'\n"
        "count.write_text(str(int(count.read_text()) + 1 if count.is_file() else 1))\n"
        "(out / 'results.json').write_text(json.dumps({'evaluation': {'top1': value + seed}}))\n"
    )
    spec = {
        "seeds": [0, 2],
        "metrics": {"accuracy": "evaluation.top1", "agreement": "evaluation.agreement"},
        "common": f"{sys.executable} {script} {{out}}",
        "rows": {"low": "0.25 {seed}", "high, wide": "0.5 {seed}"},
        "scale": 10,
        "baseline": "low",
        "published": {"low, one": 12.5},
        "before": {"teacher": "{common} 1.0 {seed}"},
        "variants": {"one": "", "two": "{teacher}"},
    }
    path, target = tmp_path / "list.yaml", tmp_path / "list.json"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(SystemExit):
        quality.main([str(path), "--only", "highest"])
    assert "expected rows of the list, got ['highest']" in capsys.readouterr().err
    for more in (["--only", "low, one"], [], ["--only", "low, one"], ["--collect"]):
        assert quality.main([str(path), "--output", str(tmp_path), "--json", str(target), "--jobs", "2", *more]) == 0
    report = json.loads(target.read_text())
    assert report["rows"]["low, one"]["accuracy"] == {"0": 2.5, "2": 22.5}
    head, low, high, other, _ = quality.table(report)
    assert head == ["", "accuracy", "agreement", "against low", "published", "seeds", "CPU seconds"]
    assert (low[3], low[4], other[0], other[3]) == ("-", 12.5, "low, two", "-")
    assert high[:6] == ["high, wide, one", "15.0 ± 14.1", "-", "+2.5 ± 0.0", "-", 2]
    assert {p.read_text() for p in tmp_path.rglob("count.txt")} == {"1"}
    assert "high, wide" in capsys.readouterr().out
    # On a machine without these runs: a third seed and a row whose flags are others now are all there is to do.
    spec["seeds"] = [0, 2, 4]
    spec["rows"] = {"low": "0.25 {seed}", "high, wide": "0.75 {seed}"}
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    there = tmp_path / "there"
    quality.main([str(path), "--output", str(there), "--json", str(target), "--keep"])
    assert json.loads(target.read_text())["rows"]["low, one"]["accuracy"] == {"0": 2.5, "2": 22.5, "4": 42.5}
    assert json.loads(target.read_text())["rows"]["high, wide, two"]["accuracy"] == {"0": 7.5, "2": 27.5, "4": 47.5}
    assert len(list(there.rglob("count.txt"))) == 1 + 2 + 6
    # What every row is given is a row's flags too.
    spec["common"] += " "
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    quality.main([str(path), "--output", str(tmp_path / "third"), "--json", str(target), "--keep"])
    assert len(list((tmp_path / "third").rglob("count.txt"))) == 1 + 12


def test_metrics_are_found_by_dotted_keys() -> None:
    results = {"evaluation": {"top1": 60}, "peers": [{"top1": 61.5}]}
    keys = ("evaluation.top1", "peers.0.top1", "peers.1.top1", "evaluation.agreement", "teacher.top1")
    assert [quality.find(results, key) for key in keys] == [60.0, 61.5, None, None, None]


def test_a_failed_run_is_told_and_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "import sys; open(sys.argv[1] + '/results.json', 'w').write('{\"top1\": 1}')"
    # What it leaves is of its training alone.
    bad = f"{good}; raise SystemExit('no such flag')"
    spec = {
        "seeds": [0],
        "metrics": {"accuracy": "top1"},
        "common": f"{sys.executable} -c",
        "rows": {
            name: shlex.quote(code).replace("{", "{{").replace("}", "}}") + " {out}"
            for name, code in {"bad": bad, "good": good}.items()
        },
    }
    path, target = tmp_path / "list.yaml", tmp_path / "list.json"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    quality.main([str(path), "--output", str(tmp_path), "--json", str(target), "--jobs", "1"])
    assert list(json.loads(target.read_text())["rows"]) == ["good"]
    out = capsys.readouterr().out
    assert "FAILED" in out
    quality.main([str(path), "--output", str(tmp_path), "--json", str(target), "--jobs", "1", "--collect"])
    assert "FAILED" not in capsys.readouterr().out
    assert "no such flag" in out
    quality.main([str(path), "--output", str(tmp_path), "--json", str(target), "--jobs", "1"])
    assert list(json.loads(target.read_text())["rows"]) == ["good"]
    again = capsys.readouterr().out
    assert "FAILED" in again
    assert "done" not in again


def test_the_page_of_results_is_that_of_the_files() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert results.BLOCK.search(page)
    assert results.fill(page) == page, "run: python -m benchmarks results"


def test_every_method_of_the_same_task_is_in_the_one_table() -> None:
    spec = yaml.safe_load((ROOT / "benchmarks" / "methods.yaml").read_text())
    named = {
        method.partition(",")[0].partition("+")[0] for files in spec.values() for of in files.values() for method in of
    }
    known = {name for name, (entry, *_) in entries_by_name().items() if ours(entry)}
    # Without data, of several teachers, and of every pixel: with sections of their own.
    assert named - {"alone"} == known - {"dafl", "endd", "structured", "cwd"}


def test_idx_files_become_images(tmp_path: Path) -> None:
    pixels = bytes(range(2 * 3 * 4))
    for split in ("train", "t10k"):
        for what, sizes, data in (("images-idx3", (2, 3, 4), pixels), ("labels-idx1", (2,), b"\x03\x01")):
            head = b"\x00\x00\x08" + bytes([len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
            with gzip.open(tmp_path / f"{split}-{what}-ubyte.gz", "wb") as file:
                file.write(head + data)
    assert idx_data.main([str(tmp_path), str(tmp_path / "out")]) == 0
    rows = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"train": 2, "test": 2}
    assert rows["train"]["label"] == [3, 1]
    assert np.asarray(rows["test"][1]["image"]).tolist() == np.frombuffer(pixels[12:], np.uint8).reshape(3, 4).tolist()
