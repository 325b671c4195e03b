"""kd-transformers-train from the command line to the folder it leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from distributed_kit import on_two_processes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)

from kd_plugins import Distiller, DistillError
from kd_plugins import functional as KF
from kd_report import load_run
from kd_transformers import students, train
from kd_transformers.arguments import build_parser, parse_args
from kd_transformers.data import read_labels
from kd_transformers.docstrings import DOCSTRINGS_DEFAULTS, load_docstrings
from kd_transformers.students import check_length, copy_layers, in_order_of, load_teacher, shrink
from kd_transformers.train import Session, main

TINY = [
    *"--max_steps 4 --max_train_samples 64 --max_eval_samples 32 --max_seq_length 16 --vocab_size 300".split(),
    *"--per_device_train_batch_size 8 --learning_rate 1e-3 --disable_tqdm True --save_strategy no --use_cpu".split(),
]
SCRATCH = "--student_layers 1 --student_hidden_size 16 --student_heads 2".split()
TEACHER = "--train_teacher --teacher_layers 4 --teacher_hidden_size 16 --teacher_heads 2".split()


@pytest.fixture
def run(tmp_path):
    """Runs the command with tiny settings; later flags win."""

    def go(*words: str, name: str = "out") -> tuple[Path, dict]:
        folder = tmp_path / name
        assert main([*TINY, "--output_dir", str(folder), *words]) == 0
        return folder, json.loads((folder / "all_results.json").read_text())

    return go


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a teacher of four layers, trained for a few steps."""
    folder = tmp_path_factory.mktemp("taught")
    words = [*TINY, *"--student_layers 4 --student_hidden_size 16 --student_heads 2".split()]
    assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


def fails(capsys, words: list[str]) -> str:
    """What the command says when it gives up, in one line."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return re.sub(r"\s+", " ", error)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def untimed(numbers: dict[str, float]) -> dict[str, float]:
    timed = ("runtime", "per_second", "preparation_time", "seconds_per_step")
    return {name: value for name, value in numbers.items() if not name.endswith(timed)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Plain training


def test_the_embedded_data_need_no_flags(run):
    folder, results = run(*SCRATCH)
    docstrings = load_docstrings()
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    names = docstrings["train"].features["label"].names
    assert [model.config.id2label[i] for i in range(12)] == names
    assert model(**tokenizer("An event loop.", return_tensors="pt")).logits.shape == (1, 12)
    assert results["parameters"] == model.num_parameters()
    assert results["bytes"] == (folder / "model.safetensors").stat().st_size
    assert results["seconds_per_step"] > 0
    assert (results["train_samples"], results["eval_samples"]) == (64, 32)
    record = load_run(folder)
    assert record.info["status"] == "finished"
    assert record.info["results"]["eval_accuracy"] == results["eval_accuracy"]
    # Else runs on other rows, or of other inputs, would count as seeds of one experiment.
    settings = record.info["settings"]
    assert (settings["max_train_samples"], settings["max_seq_length"], settings["use_cpu"]) == (64, 16, True)
    # The accuracy is that of the folder that was saved.
    rows = docstrings["validation"].select(range(32))
    inputs = tokenizer(list(rows["text"]), truncation=True, max_length=16, padding=True, return_tensors="pt")
    with torch.no_grad():
        right = model.eval()(**inputs).logits.argmax(-1) == torch.tensor(rows["label"])
    assert results["eval_accuracy"] == pytest.approx(right.float().mean().item())


@pytest.fixture
def colours(tmp_path) -> list[str]:
    """Flags of a data set that is learnt in seconds: which colour a text names."""
    names = ("red", "green", "blue")
    texts = [f"{word} {colour} {other}" for colour in names for word in "abcdefgh" for other in "pqrstuvw"]
    Dataset.from_dict({"text": texts, "label": [text.split()[1] for text in texts]}).to_csv(tmp_path / "rows.csv")
    file = str(tmp_path / "rows.csv")
    rows = ["--max_train_samples", "192", "--max_eval_samples", "192"]
    return ["--train_file", file, "--validation_file", file, "--cache_dir", str(tmp_path / "cache"), *rows]


def test_training_learns(run, colours):
    _, results = run(*SCRATCH, *colours, *"--student_hidden_size 32 --max_steps 100 --learning_rate 1e-2".split())
    assert results["eval_accuracy"] > 0.9
    assert results["eval_f1"] > 0.9


def test_accumulation_does_not_inflate_the_loss(run, tmp_path):
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(tmp_path / "config")
    words = ["--config_name", str(tmp_path / "config" / "config.json")]
    whole, one = run(*words, name="whole")
    parts, two = run(*words, *"--per_device_train_batch_size 2 --gradient_accumulation_steps 4".split(), name="parts")
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], atol=1e-5), name


def test_a_run_continues_from_its_checkpoint_exactly_and_another_seed_is_another_run(run):
    steps = "--save_strategy steps --save_steps 2".split()
    whole, _ = run(*SCRATCH, *steps, name="whole")
    resumed, _ = run(*SCRATCH, "--resume_from_checkpoint", str(whole / "checkpoint-2"), name="resumed")
    assert same(weights(whole), weights(resumed))
    other, _ = run(*SCRATCH, "--seed", "1", name="other")
    assert not same(weights(whole), weights(other))


def test_distillation_continues_from_the_last_checkpoint_exactly(run, taught):
    words = ["--distill", "internal", "--teacher", str(taught), *"--save_strategy steps --save_steps 2".split()]
    whole, _ = run(*words)
    expected = weights(whole)
    shutil.rmtree(whole / "checkpoint-4")
    (whole / "model.safetensors").unlink()
    resumed, _ = run(*words, "--resume_from_checkpoint", "true")
    assert same(weights(resumed), expected)


def test_a_signal_ends_the_run_with_a_checkpoint(run, tmp_path, monkeypatch, capsys):
    whole, _ = run(*SCRATCH)
    words = [*TINY, *SCRATCH, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "auto"]
    end = train._Stop.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(train._Stop, "on_step_end", interrupted)
    assert main(words) == 143
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert load_run(tmp_path / "parts").info["status"] == "interrupted"
    monkeypatch.setattr(train._Stop, "on_step_end", end)
    assert main(words) == 0
    assert same(weights(whole), weights(tmp_path / "parts"))
    assert load_run(tmp_path / "parts").info["status"] == "finished"


def test_what_a_kill_or_a_bad_disk_leaves_is_made_anew(run, capsys):
    """A teacher without its record, half a file of results, a checkpoint without its schedule, half a row."""
    words = [*TEACHER, *"--distill kd --save_strategy steps --save_steps 2".split(), "--resume_from_checkpoint", "auto"]
    whole, first = run(*words)
    expected, history = weights(whole), load_run(whole).history
    for path, text in (("teacher/teacher.json", ""), ("all_results.json", "{"), ("history.jsonl", '{"step": 1')):
        (whole / path).write_text(text)
    (whole / "checkpoint-4" / "scheduler.pt").unlink()
    again, results = run(*words)
    assert same(weights(again), expected)
    assert untimed(results) == untimed(first)
    assert [*map(untimed, load_run(again).history)] == [*map(untimed, history)]
    split = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --student_layers 1".split()
    other = fails(capsys, [*TINY, "--output_dir", str(whole), *words, *split])
    assert "is of a run with student_layers None (here 1); per_device_train_batch_size 8 (here 4); gradient" in other
    (whole / "checkpoint-4" / "optimizer.pt").unlink()
    words[-1] = str(whole / "checkpoint-4")
    error = fails(capsys, [*TINY, "--output_dir", str(whole), *words])
    assert "optimizer.pt is missing; take" in error
    assert "checkpoint-2 instead" in error


def test_distillation_with_evaluations_and_the_best_checkpoint(run, taught):
    best = "--save_strategy epoch --eval_strategy epoch --load_best_model_at_end".split()
    best += "--num_train_epochs 2 --max_steps -1".split()
    folder, results = run("--distill", "kd", "--teacher", str(taught), *best)
    assert 0 <= results["eval_teacher_agreement"] <= 1
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["epoch"] for entry in log if "eval_loss" in entry][:2] == [1.0, 2.0]


def test_every_row_is_evaluated(run, taught):
    dropping = "--dataloader_drop_last True --per_device_eval_batch_size 20".split()
    kept, results = run("--distill", "kd", "--teacher", str(taught), *dropping, name="a")
    _, whole = run("--do_eval", "--model_name_or_path", str(kept), "--teacher", str(taught), name="b")
    assert results["eval_samples"] == 32
    for name in ("eval_accuracy", "eval_teacher_accuracy", "eval_teacher_agreement"):
        assert results[name] == whole[name]


def test_evaluation_alone(run, taught):
    _, trained = run("--model_name_or_path", str(taught), "--do_eval", name="evaluated")
    assert trained["eval_accuracy"] == json.loads((taught / "all_results.json").read_text())["eval_accuracy"]
    assert "train_loss" not in trained


def test_a_student_from_a_checkpoint_or_a_configuration(run, taught, tmp_path):
    folder, _ = run("--model_name_or_path", str(taught), name="tuned")
    assert not same(weights(folder), weights(taught))
    assert weights(folder).keys() == weights(taught).keys()
    config = BertConfig(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    config.save_pretrained(tmp_path / "config")
    folder, results = run("--config_name", str(tmp_path / "config" / "config.json"), name="configured")
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.hidden_size == 24


def test_pairs_regression_and_vocabularies(run, tmp_path, capsys):
    rows = Dataset.from_dict(
        {"sentence1": ["one two", "three"] * 8, "sentence2": ["two one", "four"] * 8, "score": [0.5, 4.0] * 8}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]) + "\n")
    file = str(tmp_path / "rows.parquet")
    words = ["--train_file", file, "--validation_file", file, "--tokenizer_name", str(tmp_path / "vocab.txt")]
    folder, results = run(*SCRATCH, *words, "--cache_dir", str(tmp_path / "cache"))
    assert -1 <= results["eval_pearsonr"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.problem_type, model.config.num_labels, model.config.vocab_size) == ("regression", 1, 7)
    words += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "o")]
    error = fails(capsys, [*TINY, *SCRATCH, *words, "--label_smoothing_factor", "0.1"])
    assert "--label_smoothing_factor smooths classes, and the labels" in error


def test_the_longest_input_of_a_network():
    """RoBERTa's positions begin behind its padding, and XLNet has no last one."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    roberta = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=9, max_position_embeddings=20))
    length = check_length(roberta, 64, SimpleNamespace(model_max_length=512))
    assert roberta(torch.full((1, length), 5)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, length + 1), 5))
    xlnet = SimpleNamespace(config=XLNetConfig(d_model=8, n_head=2), named_modules=list)
    assert check_length(xlnet, 64, SimpleNamespace(model_max_length=512)) == 64


# With a teacher


def test_a_teacher_is_trained_once_and_taught_from(run, capsys):
    words = [*TEACHER, "--teacher_epochs", "1", "--student_layers", "2", "--distill", "internal"]
    folder, results = run(*words, "--distill-args", "schedule=progressive", "gold=0.5")
    teacher = weights(folder / "teacher")
    assert AutoModelForSequenceClassification.from_pretrained(folder / "teacher").config.num_hidden_layers == 4
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == 2
    assert 0 <= results["eval_teacher_agreement"] <= 1
    options = json.loads((folder / "distiller.json").read_text())
    assert "progressive" in json.dumps(options)
    assert "0.5" in json.dumps(options)
    capsys.readouterr()
    again, second = run(*words, "--distill-args", "schedule=progressive", "gold=0.5")
    assert "Training the teacher" not in capsys.readouterr().out
    assert same(teacher, weights(again / "teacher"))
    # A teacher that was there and one that was trained in this run give the same student.
    assert second["eval_loss"] == results["eval_loss"]
    error = fails(capsys, [*TINY, *words, "--output_dir", str(folder), "--teacher_learning_rate", "0.1"])
    assert "another learning_rate" in error
    other = "--weight_decay 0.5 --neftune_noise_alpha 5".split()
    error = fails(capsys, [*TINY, *words, "--output_dir", str(folder), *other])
    assert "another weight_decay, neftune_noise_alpha: take" in error


def test_the_teacher_trains_at_its_own_pace_and_the_student_learns_from_it(run, colours):
    pace = "--teacher_epochs 3 --teacher_learning_rate 1e-2 --learning_rate 0".split()
    words = [*colours, *TEACHER, *pace, "--student_layers", "2", "--distill", "kd"]
    _, still = run(*words)
    assert still["eval_teacher_accuracy"] > 0.9
    # In the same folder: its teacher is there.
    _, results = run(*words, *"--learning_rate 5e-3 --max_steps 60".split())
    assert results["eval_accuracy"] > max(0.9, still["eval_accuracy"] - 0.01)
    assert results["eval_teacher_agreement"] > 0.9


def test_the_student_takes_the_teachers_layers(taught):
    teacher = AutoModelForSequenceClassification.from_pretrained(taught)
    labels = parse_and_build(taught).labels
    student = shrink(teacher, labels, 2)
    assert copy_layers(student, teacher) == {1: 2, 2: 4}
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, value in ours.items():
        origin = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        assert torch.equal(value, theirs[origin]), name


def parse_and_build(taught: Path, *words: str) -> Session:
    output = str(taught.parent / "unused")
    return Session(
        parse_args([*TINY, "--output_dir", output, "--teacher", str(taught), "--student_init", "teacher", *words])
    )


def test_the_feed_forward_layers_of_a_smaller_student_are_smaller():
    labels = read_labels(load_docstrings()["train"], "label")
    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "num_labels": 12}
    student = shrink(AutoModelForSequenceClassification.from_config(DistilBertConfig(**sizes)), labels, hidden_size=16)
    assert student.distilbert.transformer.layer[0].ffn.lin1.weight.shape == (32, 16)


def test_a_student_with_all_layers_starts_as_its_teacher(run, taught):
    _, results = run("--teacher", str(taught), *"--student_init teacher --student_layers 4 --learning_rate 0".split())
    assert results["eval_teacher_agreement"] == 1
    assert results["eval_accuracy"] == results["eval_teacher_accuracy"]


def test_a_student_from_scratch_beside_its_teacher(run, taught):
    words = "--student_init scratch --student_layers 2 --student_hidden_size 8 --distill kd".split()
    folder, _ = run("--teacher", str(taught), *words)
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 8, 16)


def permuted(taught: Path, folder: Path) -> Path:
    """The same teacher with its classes in another order."""
    model, order = AutoModelForSequenceClassification.from_pretrained(taught), list(range(1, 12)) + [0]
    names = [model.config.id2label[i] for i in order]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(taught).save_pretrained(folder)
    return folder


def test_a_teacher_with_its_classes_in_another_order_teaches_the_same(run, taught, tmp_path):
    other = permuted(taught, tmp_path / "permuted")
    words = ["--distill", "kd", "--student_layers", "2"]
    first, plain = run("--teacher", str(taught), *words, name="a")
    second, turned = run("--teacher", str(other), *words, name="b")
    assert plain["eval_teacher_accuracy"] == turned["eval_teacher_accuracy"] > 0
    for name, value in weights(first).items():
        assert torch.allclose(value, weights(second)[name], atol=1e-6), name


def test_evaluation_counts_in_the_order_of_the_checkpoints_classes(run, taught, tmp_path):
    other = permuted(taught, tmp_path / "permuted")
    _, plain = run("--model_name_or_path", str(taught), "--do_eval", name="a")
    _, turned = run("--model_name_or_path", str(other), "--do_eval", name="b")
    assert turned["eval_accuracy"] == plain["eval_accuracy"] > 0
    assert turned["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_a_student_that_is_trained_further_keeps_its_classes(run, taught, tmp_path):
    """Its classes are numbered as the data has them: the rows of its head follow."""
    other = permuted(taught, tmp_path / "permuted")
    words = "--learning_rate 0 --do_train --do_eval".split()
    _, plain = run("--model_name_or_path", str(taught), *words, name="a")
    folder, turned = run("--model_name_or_path", str(other), *words, name="b")
    assert turned["eval_accuracy"] == plain["eval_accuracy"] > 0
    assert same(weights(folder), weights(taught))


def test_labels_in_the_order_of_a_model():
    labels = read_labels(Dataset.from_dict({"label": ["no", "yes", "perhaps"]}), "label")
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "Yes", 1: "No", 2: "Perhaps"}))
    turned = in_order_of(labels, model)
    assert turned.names == ("Yes", "No", "Perhaps")
    assert [turned.encode(value) for value in ("yes", "no", "perhaps")] == [0, 1, 2]
    several = read_labels(Dataset.from_dict({"label": [["no"], ["yes", "perhaps"]]}), "label")
    assert in_order_of(several, model).encode(["yes", "perhaps"]) == [1.0, 0.0, 1.0]
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(DistillError, match="trained on these classes"):
        in_order_of(labels, model)


def test_several_teachers_and_weights_of_their_own(run, taught, tmp_path):
    save_file({k: v + 0.01 for k, v in weights(taught).items()}, tmp_path / "w.safetensors")
    model = load_teacher(str(taught), str(tmp_path / "w.safetensors"), parse_and_build(taught).labels)
    expected = {k: v + 0.01 for k, v in weights(taught).items()}
    assert same({k: v for k, v in model.state_dict().items() if k in expected}, expected)
    torch.save(expected, tmp_path / "w.bin")
    again = load_teacher(str(taught), str(tmp_path / "w.bin"), parse_and_build(taught).labels)
    assert same(model.state_dict(), again.state_dict())


def test_two_teachers_of_a_method_that_takes_several(taught, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensemble", SimpleNamespace(Ensemble=Ensemble))
    words = ["--distill", "ensemble:Ensemble", "--teacher", str(taught), "--teacher", str(taught)]
    results = Session(parse_args([*TINY, "--output_dir", str(tmp_path / "o"), *words])).run()
    assert results["eval_teacher_accuracy"] == json.loads((taught / "all_results.json").read_text())["eval_accuracy"]


class Mutual(Distiller):
    """Two peers that learn from the labels and from each other."""

    teachers = 0
    peers = True

    def turns(self, nets, batch):
        ours, theirs = (peer(batch) for peer in nets.peers)
        yield {
            "student": {"task": batch.task_loss(ours), "mutual": KF.kd(ours.logits, theirs.logits.detach())},
            "peer1": {"task": batch.task_loss(theirs), "mutual": KF.kd(theirs.logits, ours.logits.detach())},
        }


class Ensemble(Distiller):
    """Learns from the mean of several teachers."""

    teachers = "many"

    def turns(self, nets, batch):
        ours, taught = nets.student(batch), [teacher(batch).logits for teacher in nets.teachers]
        assert len(taught) == 2
        yield {"student": {"mean": KF.kd(ours.logits, sum(taught) / 2)}}


def test_a_peer_learns_together_with_the_student(taught, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mutual", SimpleNamespace(Mutual=Mutual))
    words = ["--distill", "mutual:Mutual", "--peer", str(taught), "--model_name_or_path", str(taught)]
    session = Session(parse_args([*TINY, "--output_dir", str(tmp_path / "o"), *words]))
    results = session.run()
    before, peer = weights(taught), session.peers[0].state_dict()
    assert all(not torch.equal(before[name], peer[name]) for name in before if name.startswith("classifier"))
    assert "eval_teacher_agreement" not in results


@pytest.mark.distributed
def test_two_processes_train_as_one(run, colours, tmp_path):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    folder, _ = run(*SCRATCH, *colours, name="start")
    config = json.loads((folder / "config.json").read_text()) | dict.fromkeys(names, 0.0)
    (folder / "config.json").write_text(json.dumps(config))
    words = [*TINY, *colours, "--train_teacher", "--teacher", str(folder), "--distill", "kd", "--student_layers", "1"]
    words += ["--train_sampling_strategy", "sequential", "--optim", "sgd"]
    one, results = run(*words, "--per_device_train_batch_size", "16", name="one")
    two = tmp_path / "two"
    on_two_processes("-m", "kd_transformers.train", *words, "--output_dir", str(two))
    for part in ("teacher", "."):
        for name, value in weights(one / part).items():
            assert torch.allclose(value, weights(two / part)[name], atol=1e-5), (part, name)
    parallel = json.loads((two / "all_results.json").read_text())
    assert parallel["eval_accuracy"] == pytest.approx(results["eval_accuracy"])
    assert parallel["eval_teacher_agreement"] == pytest.approx(results["eval_teacher_agreement"])


def test_multi_label_problems_distil(run, tmp_path):
    words = ["red sky", "blue sea", "red and blue flag", "green field"] * 4
    labels = [["red"], ["blue"], ["red", "blue"], []] * 4
    Dataset.from_dict({"text": words, "labels": labels}).to_json(tmp_path / "rows.jsonl")
    file = str(tmp_path / "rows.jsonl")
    files = ["--train_file", file, "--validation_file", file, "--cache_dir", str(tmp_path / "cache")]
    folder, results = run(*files, *TEACHER, "--student_layers", "2", "--distill", "kd")
    assert {"eval_accuracy", "eval_f1", "eval_teacher_agreement"} <= results.keys()
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert config.problem_type == "multi_label_classification"
    assert set(config.label2id) == {"red", "blue"}


# Arguments


def test_flags_take_dashes_underscores_and_repetition():
    words = "--distill kd --distill-args temperature=2 --teacher a --teacher b --teacher-checkpoint x --output_dir o"
    args = parse_args([*words.split(), "--student-layers", "3"])
    assert args.distillation.teacher == ["a", "b"]
    assert args.distillation.teacher_checkpoint == ["x"]
    assert args.distillation.distill_args == ["temperature=2"]
    assert args.model.student_layers == 3
    assert args.training.do_train
    assert args.training.do_eval
    assert parse_args([]).distillation.teacher == []


def test_the_embedded_data_have_defaults_of_their_own_and_flags_win(tmp_path):
    plain, other = parse_args([]), parse_args(["--task_name", "cola"])
    for name, value in DOCSTRINGS_DEFAULTS.items():
        holder = next(part for part in plain if hasattr(part, name))
        assert getattr(holder, name) == value
    assert other.training.learning_rate == 5e-5
    assert parse_args(["--learning_rate", "0.5"]).training.learning_rate == 0.5


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_of_arguments_stands_first_and_flags_win(tmp_path, kind):
    import yaml

    values = {
        "distill": "internal",
        "distill_args": {"schedule": "progressive", "gold": 0.5, "project": True},
        "teacher": ["here"],
        "learning-rate": 1e-3,
        "bf16": False,
        "train_teacher": True,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "output_dir": "o",
        "seed": 5,
        "run_name": None,
    }
    path = tmp_path / f"args.{kind}"
    path.write_text(json.dumps(values) if kind == "json" else yaml.safe_dump(values))
    for words in ([str(path), "--seed", "7"], ["--seed=7", "--config", str(path)]):
        args = parse_args(words)
        assert sorted(args.distillation.distill_args) == ["gold=0.5", "project=true", "schedule=progressive"]
        assert args.distillation.teacher == ["here"]
        assert args.distillation.train_teacher
        assert (args.training.learning_rate, args.training.seed) == (1e-3, 7)
        assert args.training.lr_scheduler_kwargs == {"num_cycles": 2}
    # A list on the command line replaces the file's.
    assert parse_args([str(path), "--distill_args", "gold=1"]).distillation.distill_args == ["gold=1"]


def test_a_wrong_file_of_arguments(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    assert "Did you mean learning_rate" in fails(capsys, [str(tmp_path / "a.yaml")])
    (tmp_path / "b.yaml").write_text("learning_rate: fast\n")
    assert "invalid float value: 'fast'" in fails(capsys, ["--config", str(tmp_path / "b.yaml")])
    (tmp_path / "c.json").write_text("[1]")
    assert "expected a mapping" in fails(capsys, [str(tmp_path / "c.json")])
    assert "cannot be read" in fails(capsys, [str(tmp_path / "absent.json")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distil kd", "Did you mean --distill"),
        ("--teacher a", "expected --distill with a teacher"),
        ("--distill kd --teacher a --teacher_layers 2", "--teacher_layers belongs to --train_teacher"),
        ("--distill kd --teacher_checkpoint a", "more of them"),
        ("--distill_args a=1", "--distill, which is not given"),
        ("--ood_split test", "--ood_split belongs to --ood_dataset"),
        ("--neftune_noise_alpha -1", "--neftune_noise_alpha: expected a number, at least 0"),
        ("--save_steps 0", "--save_steps: expected a number above 0"),
        ("--label_names nix", "--label_names: the rows have"),
        ("--model_revision v1", "--model_revision belongs to --model_name_or_path"),
        ("--dataloader_multiprocessing_context fork", "belongs to --dataloader_num_workers"),
        ("--activation_checkpointing_kwargs=-1", "--activation_checkpointing_kwargs: expected JSON"),
        ("--do_eval --distill kd --teacher a --cache_teacher", "add --do_train"),
        ("--model_name_or_path a --student_init scratch", "whole student"),
        ("--model_name_or_path a --student_heads 2", "--student_heads shape a new student: add --student_init scratch"),
        ("--task_name cola --train_file a.csv", "one source of data"),
        ("--validation_file a.csv", "add --train_file"),
        ("--student_init teacher", "expected a teacher, got none"),
        ("--model_name_or_path a --student_layers 2", "whole student"),
        ("--student_layers 0", "expected a positive number, got 0"),
        ("--do_predict", "not supported"),
        ("--eval_do_concat_batches False", "--eval_do_concat_batches: the metrics are of all predictions"),
        ("--prediction_loss_only True", "--prediction_loss_only: the metrics are of all predictions"),
        ("--student_init magic", "invalid choice"),
    ],
)
def test_arguments_that_cannot_go_together(capsys, words, message):
    assert message in fails(capsys, words.split())


def test_help_shows_every_group():
    text = build_parser().format_help()
    for flag in ("--distill-args", "--teacher_checkpoint", "--student_layers", "--per_device_train_batch_size"):
        assert flag in text
    assert "(default: None)" not in text


# What cannot work is said before anything is trained


def headless(taught: Path, folder: Path) -> Path:
    BertModel.from_pretrained(taught).save_pretrained(folder)
    AutoTokenizer.from_pretrained(taught).save_pretrained(folder)
    return folder


def test_a_teacher_without_a_head_is_refused(taught, tmp_path, capsys):
    bare = headless(taught, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text()) | {"id2label": {str(i): f"c{i}" for i in range(12)}}
    (bare / "config.json").write_text(json.dumps(config))
    words = [*TINY, "--output_dir", str(tmp_path / "o"), "--distill", "kd", "--teacher", str(bare)]
    error = fails(capsys, words)
    assert "no weights for classifier.bias, classifier.weight" in error
    assert "--train_teacher" in error
    assert main([*words, "--train_teacher", "--student_layers", "2"]) == 0


def test_a_teacher_with_other_classes_is_refused(taught, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(taught, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(taught).save_pretrained(tmp_path / "three")
    words = [*TINY, "--output_dir", str(tmp_path / "o"), "--distill", "kd"]
    assert "has 3 classes and the data 12" in fails(capsys, [*words, "--teacher", str(tmp_path / "three")])
    several = AutoModelForSequenceClassification.from_pretrained(taught, problem_type="multi_label_classification")
    several.save_pretrained(tmp_path / "three")
    for cached in ([], ["--cache_teacher"]):
        error = fails(capsys, [*words, *cached, "--teacher", str(tmp_path / "three")])
        assert "trained on a multi label classification problem, and the labels of the data make a single" in error


def test_another_tokenizer_is_refused(taught, tmp_path, capsys):
    other = tmp_path / "other"
    AutoModelForSequenceClassification.from_pretrained(taught).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words[-1], words[-2] = words[-2], words[-1]
    from transformers import BertTokenizer

    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(other)
    flags = ["--distill", "kd", "--teacher", str(taught), "--model_name_or_path", str(other)]
    assert "2 of 300 tokens differ" in fails(capsys, [*TINY, "--output_dir", str(tmp_path / "o"), *flags])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distill kdd", "Did you mean kd"),
        ("--distill kd --distill-args temprature=2", "Did you mean temperature"),
        ("--distill kd --student_layers 5", "at most the teacher's 4"),
        ("--distill kd --student_init scratch --student_hidden_size 15", "that 2 heads divide"),
        ("--distill kd --resume_from_checkpoint true", "there is no checkpoint"),
        ("--distill kd --teacher_checkpoint nowhere", "no weights at nowhere"),
    ],
)
def test_errors_that_a_user_can_mend(taught, tmp_path, capsys, words, message):
    flags = [*TINY, "--output_dir", str(tmp_path / "o"), "--teacher", str(taught), *words.split()]
    assert message in fails(capsys, flags)
    assert not (tmp_path / "o" / "model.safetensors").exists()


def test_a_method_that_does_not_fit_the_task_is_refused_before_the_teacher_is_trained(tmp_path, capsys):
    rows = Dataset.from_dict({"text": ["a b", "c d"] * 4, "label": [0.5, 1.0] * 4})
    rows.to_csv(tmp_path / "rows.csv")
    file = str(tmp_path / "rows.csv")
    words = [*TINY, *TEACHER, "--output_dir", str(tmp_path / "o"), "--train_file", file, "--validation_file", file]
    error = fails(capsys, [*words, "--cache_dir", str(tmp_path / "cache"), "--distill", "dkd"])
    assert "dkd fits classification, token" in error
    assert not (tmp_path / "o" / "teacher").exists()


def test_no_student_to_evaluate_is_an_error(taught, tmp_path, capsys):
    assert "give --model_name_or_path" in fails(capsys, [*TINY, "--do_eval", "--output_dir", str(tmp_path / "o")])


def test_sessions_raise_what_the_command_prints(taught):
    with pytest.raises(DistillError, match="at most the teacher's 4"):
        parse_and_build(taught, "--student_layers", "9")
    assert np.isfinite(parse_and_build(taught).trainer.args.learning_rate)


def test_the_teacher_is_asked_once_where_it_says_the_same(run, taught, capsys):
    words = ["--teacher", str(taught), "--student_layers", "2", "--distill", "kd", "--num_train_epochs", "2"]
    plain, _ = run(*words, name="plain")
    cached, _ = run(*words, "--cache_teacher", name="cached")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], value, rtol=0, atol=1e-5)
    words = ["--student_layers", "1", "--cache_teacher"]
    assert "--cache_teacher expects --distill and a teacher" in fails(capsys, words)


def test_a_warm_cache_trains_the_same_without_loading_the_teacher(run, colours, caplog, monkeypatch):
    size = "--student_layers 2 --student_hidden_size 16 --student_heads 2".split()
    teacher, alone = run(*colours, *size, name="teacher")
    loads = []
    monkeypatch.setattr(students, "load_teacher", lambda *given, **hub: loads.append(1) or load_teacher(*given, **hub))

    def train_student(name: str) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
        loads.clear()
        words = [*"--train_sampling_strategy group_by_length --student_layers 1 --student_init scratch".split()]
        words += [*"--distill kd --cache_teacher --teacher".split()]
        folder, results = run(*colours, *words, str(teacher), name=name)
        return weights(folder), untimed(results), len(loads)

    first, told, loaded = train_student("first")
    assert loaded == 2, "for the training rows, and for those of the evaluation"
    second, again, loaded = train_student("second")
    assert loaded == 0
    assert same(first, second)
    assert again == told
    assert "eval_teacher_agreement" in told
    # What is cached is in the order of the rows, whatever the order of an evaluation.
    for measure in ("nll", "errors_auroc_total"):
        assert told[f"eval_teacher_{measure}"] == pytest.approx(alone[f"eval_{measure}"], rel=1e-4)
    # A damaged file is made anew.
    block = max(Path(colours[5]).rglob("teacher-*.arrow"), key=lambda file: file.stat().st_size)
    block.write_bytes(block.read_bytes()[:-8] + b"\1" * 8)
    third, again, loaded = train_student("third")
    assert loaded == 1
    assert same(first, third)
    # So is everything of a teacher whose weights have changed.
    changed = weights(teacher)
    changed["classifier.bias"] += torch.tensor([1.0, 0.0, -1.0])
    save_file(changed, teacher / "model.safetensors", metadata={"format": "pt"})
    fourth, again, loaded = train_student("fourth")
    assert loaded == 2
    assert "these have changed: teacher's weights." in caplog.text
    assert not same(first, fourth)


def test_an_ensemble_teaches_and_uncertainty_is_told(run, taught, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("text\n" + "\n".join(f"word {i} and {i * 7}" for i in range(20)))
    checkpoints = ["--teacher", str(taught), "--teacher", str(taught), "--student_layers", "2"]
    words = ["--distill", "endd", "--cache_teacher", "--ood_dataset", str(other)]
    folder, results = run(*checkpoints, *words)
    found = {name for name in results if "auroc" in name}
    measures = ("confidence", "total", "data", "knowledge")
    assert found == {
        f"eval_{who}{what}_auroc_{m}" for who in ("", "teacher_") for what in ("errors", "ood") for m in measures
    }
    assert results["eval_error"] == pytest.approx(1 - results["eval_accuracy"])
    assert results["eval_teacher_error"] == pytest.approx(1 - results["eval_teacher_accuracy"])
    # Two members that are one have nothing to disagree about.
    assert results["eval_teacher_ood_auroc_knowledge"] == pytest.approx(0.5, abs=0.3)
    # The folder tells that the student has a Dirichlet distribution.
    words = ["--model_name_or_path", str(folder), "--do_eval", "--ood_dataset", str(other)]
    _, again = run(*words, "--ood_split", "validation", name="again")
    assert again["eval_ood_auroc_knowledge"] == pytest.approx(results["eval_ood_auroc_knowledge"])
    assert "--ood_dataset is compared with the evaluation split" in fails(
        capsys, [*TINY, *SCRATCH, "--do_train", "--ood_dataset", str(other), "--output_dir", str(tmp_path / "o")]
    )
    missing = [*TINY, *SCRATCH, "--ood_dataset", str(tmp_path / "no.csv"), "--output_dir", str(tmp_path / "o")]
    assert "--ood_dataset" in fails(capsys, missing)
    (tmp_path / "other.xls").write_text("text")
    wrong = [*TINY, *SCRATCH, "--ood_dataset", str(tmp_path / "other.xls"), "--output_dir", str(tmp_path / "o")]
    assert "error: --ood_dataset: expected a file ending in" in fails(capsys, wrong)
