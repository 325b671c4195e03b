"""Trainings that share a card, here on the CPU: the images they see, who waits for whom, and what is left of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file

import kd_timm.models  # noqa: F401

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import card, quality  # noqa: E402

COMMON = "--device cpu --num-classes 4 -b 8 --epochs 2 --decay-milestones 1 --log-epochs 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of noise, of four classes, and twelve of a test split."""
    path, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        images = [random.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(count)]
        features = Features({"picture": Image(), "label": ClassLabel(num_classes=4)})
        rows = Dataset.from_dict({"picture": images, "label": [i % 4 for i in range(count)]}, features=features)
        rows.to_parquet(path / f"{split}.parquet")
    return path


def test_an_epoch_is_every_image_once_cropped_and_flipped(folder: Path) -> None:
    args = card.parse(f"{COMMON} --data {folder} --model cifar_resnet8 --output out".split())
    raw, labels = card.read(str(folder), "train", None, "cpu", 0)
    epoch, seen = card.Epoch(args), []
    epoch.begin()
    for _ in range(epoch.steps):
        images, targets, rows = epoch.batch()
        assert torch.equal(targets, labels[rows])
        for image, row in zip(images, rows.tolist(), strict=True):
            black = torch.zeros(3, 40, 40, dtype=torch.uint8)
            black[:, 4:36, 4:36] = raw[row]
            down, right = epoch.place[len(seen)].tolist()
            expected = black[:, down : down + 32, right : right + 32]
            assert torch.equal(image, expected.flip(2) if epoch.flipped[len(seen)] else expected)
            seen.append(row)
    assert sorted(seen) == list(range(40))
    assert epoch.order.tolist() == seen != sorted(seen)
    assert 0 < int(epoch.flipped.sum()) < 40
    assert len(epoch.place.unique(dim=0)) > 20


def test_images_are_normalised_as_the_network_says_and_grey_ones_by_the_mean(folder: Path) -> None:
    model = card.network("cifar_resnet8.cifar100", card.parse(f"{COMMON} --data x --model x --output x".split()))
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), strict=True)]
    torch.testing.assert_close(card.normalised(images, model)[0, :, 0, 0], torch.tensor(expected))
    grey = (1 - (0.5071 + 0.4867 + 0.4408) / 3) / ((0.2675 + 0.2565 + 0.2761) / 3)
    torch.testing.assert_close(card.normalised(images[:, :1], model)[0, :, 0, 0], torch.tensor([grey]))


def test_a_list_on_a_card_trains_its_teacher_first_and_nothing_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = "--model cifar_resnet8 --teacher cifar_resnet8 --teacher-checkpoint {teacher}/last.safetensors"
    spec = {
        "on_card": True,
        "seeds": [0],
        "metrics": {"accuracy": "evaluation.top1", "agreement": "evaluation.agreement"},
        "baseline": "alone",
        "common": f"{COMMON} --data {folder} --device {{device}} --seed {{seed}} --output {{out}}",
        "before": {"teacher": "{common} --model cifar_resnet8 --lr 0.1", "unused": "{common} --model nonsense"},
        "rows": {"kd": f"{of} --distill kd", "alone": of, "bad": f"{of} --distill nst --distill-args layers=nowhere"},
    }
    path, target = tmp_path / "list.yaml", tmp_path / "list.json"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    argv = [str(path), "--output", str(tmp_path), "--json", str(target), "--jobs", "4", "--device", "cpu"]
    assert quality.main(argv) == 0
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "nowhere" in said
    rows = json.loads(target.read_text())["rows"]
    assert list(rows) == ["kd", "alone"]
    assert [rows[row]["agreement"].keys() for row in rows] == [{"0"}, {"0"}]
    assert not (tmp_path / "list" / "unused").exists()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.safetensors")}
    assert len(written) == 3
    assert quality.main([*argv, "--only", "kd", "alone"]) == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.safetensors")} == written

    # The rate was a tenth in the second epoch, and the weights are those that are evaluated.
    weights = load_file(tmp_path / "list" / "kd" / "seed0" / "last.safetensors")
    model = card.network("cifar_resnet8", card.parse(f"{COMMON} --data x --model x --output x".split()))
    model.load_state_dict(weights)
    images, labels = card.read(str(folder), "test", None, "cpu", 0)
    found = 100 * (card.choices(model, images) == labels).double().mean().item()
    assert rows["kd"]["accuracy"]["0"] == pytest.approx(found)


def test_alone_is_what_a_loop_by_hand_gives(folder: Path, tmp_path: Path) -> None:
    argv = f"{COMMON} --data {folder} --model cifar_resnet8 --output {tmp_path / 'run'} --seed 3".split()
    card.train_all([argv], 1)
    torch.manual_seed(3)
    args = card.parse(argv)
    model, epoch = card.network("cifar_resnet8", args).train(), card.Epoch(args)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for number in range(2):
        optimizer.param_groups[0]["lr"] = (0.05, 0.005)[number]
        epoch.begin()
        for _ in range(5):
            images, labels, _ = epoch.batch()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(card.normalised(images, model)), labels).backward()
            optimizer.step()
    found = load_file(tmp_path / "run" / "last.safetensors")
    torch.testing.assert_close(found, {k: v.contiguous() for k, v in model.state_dict().items()}, rtol=0, atol=0)


def test_a_student_without_its_teachers_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    argv = f"{COMMON} --data {folder} --model cifar_resnet8 --output {tmp_path} --teacher cifar_resnet8"
    with pytest.raises(SystemExit, match="the teachers' weights, found none at .*nowhere"):
        card.train_all([f"{argv} --teacher-checkpoint {tmp_path}/nowhere --distill kd".split()], 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_are_those_that_are_not(folder: Path, tmp_path: Path) -> None:
    argv = f"{COMMON} --data {folder} --device cuda --model cifar_resnet8 --output {tmp_path}"
    card.train_all([f"{argv}/eager --eager".split(), f"{argv}/captured".split()], 2)
    eager, captured = (load_file(tmp_path / name / "last.safetensors") for name in ("eager", "captured"))
    torch.testing.assert_close(eager, captured, rtol=1e-2, atol=1e-2)
