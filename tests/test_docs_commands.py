"""The training commands of README and docs run as they stand, on a few rows that stand for their data sets.

Replaced are what a machine without a network lacks (data sets, published weights) and what takes hours: the length of a
training, the size of images and networks, the codebook's number of words.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from accelerate_kit import fresh_accelerate
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from test_docs import PAGES, ROOT, blocks, command_lines

import kd_timm.models  # noqa: F401
from kd_timm.train import main as timm_main
from kd_transformers.train import main as transformers_main

CLASSES = 10
TIMM = "--device cpu -j 0 -b 4 --log-interval 100 --val-interval 100".split()
# What has stages: they take an epoch or two each.
EPOCHS = {"search_epochs": "7", "search_only": "4", "distill internal": "4", "distill ksanc": "2"}
TRANSFORMERS = (
    "--use_cpu --max_train_samples 16 --max_eval_samples 8 --max_seq_length 16 --per_device_train_batch_size 8"
    " --disable_tqdm True --save_strategy no"
).split()


def commands(program: str) -> dict[str, list[str]]:
    """The lines that start a program, by page."""
    found = {}
    for page in PAGES:
        mine = [line for line in command_lines(page) if line.startswith(program + " ")]
        if mine:
            found[str(page.relative_to(ROOT))] = mine
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that stands for $DATA, with images as folders and as parquet files, and sentences."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 1), ("validation", 1)):
        for label in range(CLASSES):
            folder = root / "imagenet" / split / f"n{label:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    (root / "cifar10").mkdir()
    for split, count in (("train", 16), ("test", 8)):
        pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(count)]
        rows = {"img": pictures, "label": [i % CLASSES for i in range(count)]}
        Dataset.from_dict(rows).to_parquet(root / "cifar10" / f"{split}.parquet")
    words = "a quick film of slow brown people over lazy dogs and warm weather".split()
    (root / "mnist").mkdir()
    grey = [Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)) for _ in range(8)]
    Dataset.from_dict({"image": grey, "label": [i % CLASSES for i in range(8)]}).to_parquet(root / "mnist/test.parquet")
    for task in ("sst2", "cola"):
        (root / "glue" / task).mkdir(parents=True)
        for split, count in (("train", 64), ("validation", 16)):
            rows = {
                "sentence": [" ".join(rng.permutation(words)) for _ in range(count)],
                "label": [0, 1] * (count // 2),
            }
            Dataset.from_dict(rows).to_parquet(root / "glue" / task / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files that stand for a teacher's published weights."""
    folder = tmp_path_factory.mktemp("weights")

    def of(model: str) -> Path:
        path = folder / f"{model}.safetensors"
        if not path.is_file():
            torch.manual_seed(1)
            save_file(timm.create_model(model, num_classes=CLASSES).state_dict(), path)
        return path

    return of


@pytest.fixture(autouse=True)
def _my_method(tmp_path, monkeypatch):
    """The loose file of docs/extend.md, in the folder where the commands are started."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_method.py").write_text(blocks(ROOT / "docs" / "extend.md", "python")[0])


@pytest.mark.parametrize("page", commands("kd-timm-train"))
def test_timm_commands(page, data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", str(data))
    lines = commands("kd-timm-train")[page]
    for i, line in enumerate(lines):
        argv = [os.path.expandvars(word) for word in shlex.split(_small(line))[1:]]
        folders = {"DATA": data / "imagenet", "OTHER_IMAGES": data / "imagenet" / "validation"}
        argv = [str(folders.get(word, word)) for word in argv]
        for given in [argv[j + 1] for j, word in enumerate(argv) if word == "--teacher-checkpoint"]:
            if Path(given).exists():  # of an earlier line
                continue
            Path(given).parent.mkdir(parents=True, exist_ok=True)
            _copy(weights(argv[argv.index("--teacher") + 1]), Path(given))
        if "--teacher" in argv and "--teacher-checkpoint" not in argv:
            argv += ["--teacher-checkpoint", str(weights(argv[argv.index("--teacher") + 1]))]
        if "quest" in line:
            _few_words(argv)
        if "--epoch-updates" in argv:
            argv += ["--epoch-updates", "1"]
            _narrow(argv)
        argv += ["--epochs", next((epochs for word, epochs in EPOCHS.items() if word in line), "1")]
        digits = "hfds" not in line and not {"--data-dir", "--epoch-updates"} & {*argv}
        rows = ["--train-split", "train[:64]"] if digits and "--train-split" not in argv else []
        rows += ["--val-split", "validation[:50]", "-vb", "100"] if digits else []
        size = ["--img-size", "32" if "dfa" in line else "64"]
        size = [] if any(word in line for word in ("patch16_224", "cifar_", "lenet")) else size
        folder = [] if "--output" in argv else ["--output", "output", "--experiment", str(i)]
        assert timm_main([*argv, *TIMM, *rows, *size, *folder, "--num-classes", str(CLASSES)]) == 0, line
        fresh_accelerate()
    assert len(list(tmp_path.rglob("results.json"))) == len(lines)


def _small(line: str) -> str:
    """A command with small networks; a search needs several blocks in a stage."""
    model = "cifar_resnet20" if "dfa" in line else "test_resnet"
    line = line.replace(" convnext_tiny", " test_convnext").replace(" cifar_resnet56", " cifar_resnet20")
    return re.sub(r"(--(?:model|teacher|peer) )resnet\w+", rf"\1{model}", line).replace("depth=6", "depth=2")


def _copy(weights: Path, to: Path) -> None:
    if to.suffix == ".safetensors":
        to.write_bytes(weights.read_bytes())
    else:
        torch.save(load_file(weights), to)


def _narrow(argv: list[str]) -> None:
    """A generator of four channels."""
    if "--distill-args" not in argv:
        argv += ["--distill-args"]
    argv[:] = [word for word in argv if not word.startswith("width=")]
    argv.insert(argv.index("--distill-args") + 1, "width=4")


def _few_words(argv: list[str]) -> None:
    """A codebook of eight words: there are fewer images than a published one has words."""
    options = argv.index("--distill-args") if "--distill-args" in argv else None
    if options is None:
        argv += ["--distill-args", "words=8"]
        return
    argv[:] = [word for word in argv if not word.startswith("words=")]
    argv.insert(options + 1, "words=8")


@pytest.fixture(scope="module")
def published(data, tmp_path_factory):
    """Tiny models in folders that are called as those of the hub, trained on the sentences for two steps."""
    folder = tmp_path_factory.mktemp("published")
    rows = ["--dataset_name", str(data / "glue" / "sst2"), "--max_steps", "2", "--vocab_size", "300"]
    small = "--student_layers 6 --student_hidden_size 16 --student_heads 2".split()
    assert transformers_main([*rows, *small, *TRANSFORMERS, "--output_dir", str(folder / "bert-base-uncased")]) == 0
    fresh_accelerate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert-base-uncased")
    small = {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2, "max_position_embeddings": 64}
    student = transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=len(tokenizer), **small))
    student.save_pretrained(folder / "distilbert-base-uncased")
    tokenizer.save_pretrained(folder / "distilbert-base-uncased")
    return folder


@pytest.mark.parametrize("page", commands("kd-transformers-train"))
def test_transformers_commands(page, data, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.setenv("TEACHER", str(published / "bert-base-uncased"))
    for name in ("bert-base-uncased", "distilbert-base-uncased"):
        (tmp_path / name).symlink_to(published / name)
    for name in ("MEMBER1", "MEMBER2"):
        (tmp_path / name).symlink_to(published / "bert-base-uncased")
    for split, name in (("train", "train.csv"), ("validation", "test.csv")):
        Dataset.from_parquet(str(data / "glue" / "sst2" / f"{split}.parquet")).to_csv(tmp_path / name)
    for i, line in enumerate(commands("kd-transformers-train")[page]):
        line = line.replace("--task_name sst2", "--dataset_name $DATA/glue/sst2")
        argv = [os.path.expandvars(word) for word in shlex.split(line)[1:]]
        assert transformers_main([*argv, *TRANSFORMERS, "--output_dir", f"output/{i}"]) == 0, line
        assert (tmp_path / "output" / str(i) / "model.safetensors").is_file()
        fresh_accelerate()
