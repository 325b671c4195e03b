"""kd-timm-train without a distiller: timm's recipe to the bit, exact resume, clean exports, clear errors."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate_kit import fresh_accelerate
from distributed_kit import on_two_processes
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.data import create_loader
from torch import nn

from kd_plugins import DistillError, states
from kd_timm import build, checkpoint, data, engine, progress, resume, train
from kd_timm.arguments import parse_args
from kd_timm.batches import Batches
from kd_timm.digits import Digits
from kd_timm.distillation import Distillation

MODEL = dict(num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
MODEL_FLAGS = ("channels=(8,8,16,16)", "stem_width=8")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 3",
        "--epochs 3 --mixup 0.2 --reprob 0.3 --opt adamw --model-ema --drop 0.2 --workers 1 --no-persistent-workers",
        "--epochs 3 --sched plateau --patience-epochs 0 --lr-noise 0.1 1",
        "--epochs 3 --opt adahessian -b 32",
        "--epochs 3 --mixup 0.2 --no-prefetcher --grad-accum-steps 2 -b 8 --model-dtype bfloat16 --model-ema",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_resume_is_exact(run, stopped, flags, monkeypatch):
    """Of a run that is stopped within an epoch, and then in an evaluation."""
    whole = run(*flags.split(), name="whole")
    stopped(2, *flags.split(), name="parts")
    evaluate, calls = train.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    resume = "--resume", str(whole.folder.parent / "parts")
    monkeypatch.setattr(train, "evaluate", interrupted)
    assert run(*flags.split(), *resume, name="parts").results == {}
    monkeypatch.setattr(train, "evaluate", evaluate)
    parts = run(*flags.split(), *resume, name="parts")
    for name in ("last.safetensors", "model_best.safetensors", "state/model.safetensors"):
        assert same(load_file(whole.folder / name), load_file(parts.folder / name))
    assert (whole.folder / "summary.csv").read_text() == (parts.folder / "summary.csv").read_text()
    rows = list(csv.DictReader((parts.folder / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert whole.checkpoints.kept == parts.checkpoints.kept


@pytest.mark.parametrize("terminal", [False, True])
def test_the_log_is_that_of_timms_script(run, monkeypatch, caplog, terminal):
    caplog.set_level("INFO")
    screen = io.StringIO()
    narrow = Console(file=screen, force_terminal=terminal, width=60)
    monkeypatch.setattr(progress, "Console", lambda **_: narrow)
    session = run("--epochs", "2", "--val-interval", "2")
    two = r"Loss: +{0} \( *{0}\)  Acc@1: +{0} \( *{0}\)  Acc@5: +{0} \( *{0}\)".format(r"\d+\.\d{3}")
    tested = re.findall(rf"Test: \[ +\d/1\]  Time: [\d.]+ \([\d.]+\)  {two}\n", caplog.text)
    trained = re.findall(r"Train: 0 \[ +(\d)/4 .*  Loss: .*  Time: .*  LR: 2.000e-02  Data: ", caplog.text)
    assert len(tested) == 2
    assert trained == (["3"] if terminal else ["0", "3"])
    for line in (
        "Training with a single process on 1 device (cpu).",
        "AMP not enabled. Training in torch.float32.",
        "ClassificationTask: criterion=LabelSmoothingCrossEntropy",
        "Skipping eval and checkpointing ",
    ):
        assert line in caplog.messages
    best = session.checkpoints.best
    assert f"Current checkpoints:\n ('{session.folder}/checkpoint-1.safetensors', {best[0]})\n" in caplog.messages
    # What does not fit beside the bar stands below it.
    shown = re.search(r"epoch 0 .*4/4.*0:00:0\d.*0:00:0\d\S*\s+loss 2\.\d+  lr 0\.02", screen.getvalue())
    assert bool(shown) is terminal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_state(few_digits, tiny, tmp_path, monkeypatch, caplog, capsys, number, status):
    caplog.set_level("INFO")
    words = [*tiny, "--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    step, left = engine.PlainStep.__call__, [0]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(engine.PlainStep, "__call__", interrupted)
    # Four steps an epoch; behind the last one the epoch is trained, and not evaluated.
    for left[0] in (3, 2, 3):
        assert train.main(words) == status
        assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
        assert states.damage(tmp_path / "run" / "state") == ""
    assert train.main(words) == 0
    places = re.findall("Continuing with (.*) from", caplog.text)
    assert places == ["epoch 0, update 3", "epoch 1, update 1", "epoch 1"]


def test_a_run_that_ends_early_has_no_results_of_the_one_before(run, stopped):
    whole = run("--epochs", "3")
    stopped(7, "--epochs", "3", "--lr", "0.01", name="run")
    assert not (whole.folder / "results.json").exists()
    assert [path.name for path in whole.folder.glob("checkpoint-*")] == ["checkpoint-0.safetensors"]


@pytest.mark.parametrize("long", [False, True])
def test_a_signal_in_an_evaluation_loses_no_epoch(few_digits, tiny, tmp_path, monkeypatch, caplog, long):
    """It waits for the evaluation, unless the epoch took so long that its state was written before."""
    caplog.set_level("INFO")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0 if long else 60.0)
    words = [*tiny, "--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    evaluate, calls = train.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append("begun")
        if calls.count("begun") == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        found = evaluate(*args, **kwargs)
        calls.append("done")
        return found

    monkeypatch.setattr(train, "evaluate", interrupted)
    assert train.main(words) == 143
    assert calls == (["begun"] if long else ["begun", "done"])
    assert train.main(words) == 0
    assert re.findall("Continuing with (.*) from", caplog.text) == ["epoch 0" if long else "epoch 1"]


def test_a_signal_before_the_training_leaves_nothing(few_digits, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Recorder", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main([*tiny, "--output", str(tmp_path), "--experiment", "run"]) == 143
    assert "the training had not begun" in capsys.readouterr().err


def test_a_rate_by_update_goes_on_behind_an_epoch_that_was_not_evaluated(run, monkeypatch):
    """Where the run goes on otherwise than it would have, the rate is found anew."""
    flags = ["--epochs", "3", "--sched-on-updates"]
    whole = run(*flags, name="whole")
    evaluate = train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", 0.0)
        left = iter([evaluate])
        patch.setattr(train, "evaluate", lambda *a, **k: next(left, _interrupt)(*a, **k))
        parts = run(*flags, name="parts")
    # Clips nothing, and counts as another training.
    parts = run(*flags, "--resume", str(parts.folder), "--clip-grad", "1e9", name="parts")
    assert same(load_file(whole.folder / "last.safetensors"), load_file(parts.folder / "last.safetensors"))
    assert (whole.folder / "summary.csv").read_text() == (parts.folder / "summary.csv").read_text()


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("flags", "updates"), [("-b 8", 8), ("--use-multi-epochs-loader", 4)])
def test_other_batches_begin_the_epoch_anew(run, stopped, tmp_path, caplog, flags, updates):
    stopped(6, *(flags.split() if "use" in flags else ()), name="parts")
    session = run("--resume", str(tmp_path / "parts"), *flags.split(), name="parts")
    assert "Epoch 1 begins anew" in caplog.text
    assert f"because of {'--batch-size' if '-b' in flags else flags}." in caplog.text
    assert session.updates == 4 + 2 + updates


def test_a_place_in_fewer_batches_is_refused():
    rows = Batches([1, 2, 3])
    assert [next(rows), next(rows)] == [1, 2]
    again = Batches([1, 2, 3])
    again.take_up(rows.place())
    assert list(again) == [3]
    with pytest.raises(DistillError, match="had read 2 batches of its epoch, and there are 1"):
        Batches([1]).take_up(rows.place())


@pytest.mark.parametrize("flags", [[], ["--use-multi-epochs-loader"]])
def test_workers_that_live_on_end_mixup(run, monkeypatch, flags):
    play, mixed = engine.PlainStep.__call__, []

    def seen(step, inputs, targets, *args):
        mixed.append(bool((targets.max(1).values < 1).any()))
        return play(step, inputs, targets, *args)

    monkeypatch.setattr(engine.PlainStep, "__call__", seen)
    run(*"--workers 1 --mixup 9 --smoothing 0 --mixup-off-epoch 1".split(), *flags)
    assert all(mixed[:4])
    # A worker has two batches ready.
    assert not any(mixed[6 if flags else 4 :])


def test_epochs_between_evaluations_are_saved(run, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    flags = "--epochs", "3", "--val-interval", "3"
    whole, begin = run(*flags, name="whole"), train.train_one_epoch

    def interrupted(session, epoch, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return begin(session, epoch, **options)

    monkeypatch.setattr(train, "train_one_epoch", interrupted)
    assert run(*flags, name="parts").results == {}
    monkeypatch.setattr(train, "train_one_epoch", begin)
    # Without --experiment: in the folder of the run.
    folder = whole.folder.parent / "parts"
    parts = run(*flags, "--resume", str(folder), "--experiment", "")
    assert parts.folder.samefile(folder)
    assert same(load_file(whole.folder / "last.safetensors"), load_file(folder / "last.safetensors"))
    assert (whole.folder / "summary.csv").read_text() == (folder / "summary.csv").read_text()


def test_resume_refuses_the_folder_of_a_third_run(tmp_path):
    """Whose best weights would stand for those of the run that goes on."""
    before, folder = tmp_path / "before", tmp_path / "other"
    for run in (before, folder):
        run.mkdir()
        (run / "model_best.safetensors").write_text(run.name)
    (folder / "last.safetensors").touch()
    with pytest.raises(DistillError, match="other holds another run"):
        resume._bring_along(before, folder)


def test_a_run_that_goes_on_otherwise_exports_its_own_best_epoch(run, monkeypatch):
    """Epochs behind the milestone were better, and another run's."""
    flags = ["--epochs", "3", "--save-epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("kd_timm.checkpoint.rank", lambda kept, decreasing: -kept[1])
        first = run(*flags, name="parts")
    assert first.results["best_epoch"] == 2
    monkeypatch.setattr("kd_timm.checkpoint.rank", lambda kept, decreasing: kept[1])
    milestone = str(first.folder / "milestone-1")
    again = run(*flags, "--resume", milestone, "--stop-epoch", "2", "--clip-grad", "1", name="parts")
    assert again.results["best_epoch"] == 0
    assert again.results["evaluation"]["top1"] == again.results["best_metric"]
    kept = [path.name for path in sorted(again.folder.glob("checkpoint-*"))]
    assert kept == ["checkpoint-0.safetensors", "checkpoint-1.safetensors"]
    assert same(load_file(again.folder / "model_best.safetensors"), load_file(again.folder / kept[0]))


@pytest.mark.parametrize("patterns", ["*.conv1.weight", "['*.conv1.weight']"])
def test_muon_leaves_what_a_pattern_names_to_its_fallback(patterns):
    student = timm.create_model("resnet10t")
    args = parse_args(["--opt", "muon", "--lr", "0.1", "--opt-kwargs", f"fallback_list={patterns}"])
    groups = build.create_optimizer(args, student).param_groups
    left = {id(p) for group in groups if group.get("use_fallback") for p in group["params"]}
    assert {n for n, p in student.named_parameters() if id(p) in left} == {
        f"layer{i}.0.conv1.weight" for i in range(1, 5)
    }


@pytest.mark.parametrize("name", ["parts", "elsewhere"])
def test_so_do_timms_checkpoints(run, monkeypatch, name):
    flags = ["--epochs", "3", "--save-epochs", "1", "--checkpoint-format", "both", "--eval-metric", "loss"]
    losses = iter([3.0, 2.0, 1.0, 5.0, 4.0])
    monkeypatch.setattr(train.Session, "_evaluate", lambda self: {"loss": next(losses)})
    first = run(*flags, name="parts")
    assert first.results["best_epoch"] == 2
    again = run(*flags, "--resume", str(first.folder / "milestone-1"), "--clip-grad", "1", name=name)
    assert again.results["best_epoch"] == 0
    best = load_file(again.folder / "model_best.safetensors")
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps the arguments
        theirs = torch.load(again.folder / "model_best.pth.tar", weights_only=True)
    assert (theirs["epoch"], again.saver.best_epoch) == (0, 0)
    assert same(best, theirs["state_dict"])
    assert len([*again.folder.glob("checkpoint-*.pth.tar")]) == 3


def test_resume_refuses_other_settings(run):
    first = run()
    config = (first.folder / "config.json").read_text()
    with pytest.raises(DistillError, match="img_size"):
        run("--img-size", "24", "--resume", str(first.folder))
    assert (first.folder / "config.json").read_text() == config
    with pytest.raises(DistillError, match="lr"):
        run("--lr", "0.5", "--resume", str(first.folder))
    assert "lr: 0.02" in (first.folder / "args.yaml").read_text()
    with pytest.raises(DistillError, match=r"cannot change: drop.*--initial-checkpoint .*last.safetensors"):
        run("--drop", "0.5", "--resume", str(first.folder))
    with pytest.raises(DistillError, match="no whole state to continue from"):
        run("--resume", str(first.folder.parent / "nothing"))


def test_a_run_over_an_earlier_one_leaves_no_state_of_it(run, tmp_path):
    earlier = run("--epochs", "2", name="parts")
    assert (earlier.folder / "state.old").is_dir()
    weights = load_file(earlier.folder / "last.safetensors")
    weights["fc.bias"].fill_(math.nan)
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(DistillError, match="has a NaN or an infinity in"):
        run("--initial-checkpoint", str(tmp_path / "broken.safetensors"), name="parts")
    assert (earlier.folder / "state.old").is_dir()
    run("--epochs", "1", "--seed", "3", name="parts")
    assert not (earlier.folder / "state.old").exists()


def test_a_damaged_state_is_skipped_for_the_one_before_it(run, caplog):
    whole = run("--epochs", "3", name="whole")
    parts = run("--epochs", "3", "--resume", "auto", name="parts")
    (parts.folder / "summary.csv").write_text("epoch")
    with (parts.folder / "state" / "optimizer.pt").open("r+b") as file:
        file.seek(500)
        file.write(b"x")
    with pytest.raises(DistillError, match=r"optimizer.pt holds other bytes .* take \S+state.old instead"):
        run("--epochs", "3", "--resume", str(parts.folder / "state"), name="parts")
    again = run("--epochs", "3", "--resume", "auto", name="parts")
    assert "Skipped" in caplog.text
    for name in ("last.safetensors", "model_best.safetensors", "state/model.safetensors"):
        assert same(load_file(whole.folder / name), load_file(again.folder / name))
    for name in ("summary.csv", "history.jsonl"):
        assert (whole.folder / name).read_text() == (again.folder / name).read_text()
    for name in ("state", "state.old"):
        (again.folder / name / "random-0.pt").unlink()
    with pytest.raises(DistillError, match="no whole state"):
        run("--epochs", "3", "--resume", "auto", name="parts")
    with pytest.raises(DistillError, match="name it, --experiment"):
        run("--resume", "auto", "--experiment", "")
    with pytest.raises(DistillError, match="leads out of"):
        run("--experiment", "../x")


@pytest.mark.parametrize("flags", ["", "--distill kd --teacher"])
def test_a_loss_that_stays_nan_stops_the_run(run, flags):
    words = flags.split()
    if words:
        teacher = run("--epochs", "1", name="teacher").folder / "model_best.safetensors"
        words += ["resnet10t", "--teacher-checkpoint", str(teacher)]
    with pytest.raises(
        DistillError, match=r"NaN or infinite since step \d+ \(epoch .*, in (loss|distill/kd|distill/task)"
    ):
        run("--lr", "1e30", *words)
    assert run("--lr", "1e30", "--allow-nonfinite", *words, name="on").results["best_epoch"] >= 0


@pytest.mark.parametrize("method", [[], ["--distill", "kd", "--teacher", "resnet10t"]])
def test_a_run_is_made_longer(run, method, caplog):
    """The schedule is that of the longer run from there on; other evaluation batches change nothing."""
    if method:
        teacher = run(name="teacher").folder / "model_best.safetensors"
        method = [*method, "--teacher-checkpoint", str(teacher), "--teacher-kwargs", *MODEL_FLAGS]
    short = run(*method, "--opt", "adamw", name="short")
    caplog.clear()
    longer = run(*method, "--opt", "adamw", "--epochs", "4", "-vb", "12", "--resume", str(short.folder), name="longer")
    assert "otherwise than it would have, because of --epochs." in caplog.text
    rates = [float(row["lr"]) for row in csv.DictReader((longer.folder / "summary.csv").open())]
    whole = run(*method, "--opt", "adamw", "--epochs", "4", name="whole")
    expected = [float(row["lr"]) for row in csv.DictReader((whole.folder / "summary.csv").open())]
    assert rates[2:] == pytest.approx(expected[2:])
    if method:
        assert longer.distillation.distiller.progress.total == 4 * longer.updates_per_epoch


def test_the_export_is_a_timm_checkpoint(run):
    session = run("--checkpoint-hist", "1")
    path = session.folder / "model_best.safetensors"
    model = timm.create_model("resnet10t", checkpoint_path=path, **MODEL).eval()
    images = torch.randn(4, 3, 16, 16)
    session.student.eval()
    best = load_file(path)
    session.student.load_state_dict(best)
    assert torch.equal(model(images), session.student(images))
    assert len(list(session.folder.glob("checkpoint-*.safetensors"))) == 1
    config = json.loads((session.folder / "config.json").read_text())
    assert config["architecture"] == "resnet10t"
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    results = json.loads((session.folder / "results.json").read_text())
    assert results["evaluation"]["top1"] == pytest.approx(results["best_metric"])
    assert results["parameters"] == sum(p.numel() for p in model.parameters())


def test_evaluation_counts_every_image(run):
    session = run("-vb", "8")
    session.student.eval()
    with torch.no_grad():
        right = [(session.student(images).argmax(-1) == targets).float() for images, targets in session.data.evaluation]
    assert session.results["evaluation"]["top1"] == pytest.approx(100 * torch.cat(right).mean().item())


def test_digits_are_split_once_and_for_all():
    train_set, held_out = Digits("train"), Digits("validation")
    assert (len(train_set), len(held_out)) == (1297, 500)
    assert not {i.tobytes() for i in train_set.images} & {i.tobytes() for i in held_out.images}
    assert set(held_out.targets) == set(range(10))
    with pytest.raises(DistillError, match="train or validation"):
        Digits("tets")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model resnet81", "Did you mean"),
        ("--num-classes 4", "--num-classes 10"),
        ("--amp --distill kd --teacher resnet14t", "--amp-dtype bfloat16"),
        ("--device tpu", "--device"),
        ("--aug-splits 1", "at least 2"),
        ("--split-bn", "--aug-splits N"),
        ("--aug-repeats 3", "RepeatAugment"),
        ("--loss db", "multi-label"),
        ("--loss bce --loss-pos-weight 1,2", "Expected 10 weights"),
        ("--train-num-samples 5", "where --train-num-samples would do nothing"),
        ("--model lenet5 --model-kwargs --train-img-sizes 16", "lenet5 does not take images of 16 x 16 pixels"),
        ("--input-img-mode foo", "name a mode of PIL"),
        ("--opt adamw --opt-betas 0.9", "it has more --opt-betas"),
        ("--opt sdg", "names them all. Did you mean sgd"),
        ("--opt lookahead_adamw --opt-kwargs foo=3", "these arguments: AdamW.__init__() got an unexpected"),
        ("--save-epochs 9", "at most the 2 epochs"),
        ("--class-map x", "Digits are read from scikit-learn, where --class-map would do nothing"),
        ("--stop-epoch 3", "at most the 2 epochs"),
        ("--task multilabel", "a digit has one label"),
        ("--gp nothing", "Invalid pool type"),
        ("-b 63 --mixup 0.3", "give an even number"),
        ("--train-img-sizes 16 24 --train-batch-sizes 6 5 --mixup 0.3 --no-prefetcher", "A batch of 5"),
        ("--in-chans 5", "--input-img-mode"),
        ("--naflex-loader", "choose a NaFlex model"),
        ("--std 0 1 1", "a positive std"),
        ("--opt nothing", "--opt nothing"),
        ("-b 4096", "--batch-size"),
        ("--data-dir /does/not/exist --dataset=", "does not exist"),
        ("--initial-checkpoint /does/not/exist", "does not exist"),
    ],
)
def test_bad_input_is_refused_before_training(tiny, few_digits, tmp_path, flags, words, capsys):
    status = train.main([*tiny, "--output", str(tmp_path), *flags.split()])
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("kd-timm-train: error: ")
    assert words in message


def test_files_of_other_models_are_refused(tiny, few_digits, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    own, other, junk, listed = (tmp_path / name for name in ("own/w.safetensors", "w.safetensors", "w.pth", "l/w.pth"))
    for path, model in ((own, timm.create_model("resnet10t", **MODEL)), (other, timm.create_model("cifar_resnet8"))):
        path.parent.mkdir(exist_ok=True)
        save_file(model.state_dict(), path)
    third = tmp_path / "third.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), third)
    part = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(own).items() if "layer4" not in key}, part)
    for path in (junk, listed):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"e")
    (listed.parent / "config.json").write_text("[1]")
    teacher = "--teacher-kwargs channels=(8,8,16,16) stem_width=8 --teacher resnet10t --teacher-checkpoint"
    refused = {
        f"--initial-checkpoint {other}": " ...",
        f"--initial-checkpoint {junk}": f"--initial-checkpoint {junk} cannot be read",
        f"--pretrained-path {third}": "of resnet10t, such as conv1.0.weight: it is of another model",
        f"--pretrained-path {part}": "for 3 layers of resnet10t, such as layer4.0.conv1.weight",
        f"--distill kd {teacher} {junk}": "does not fill the teacher resnet10t",
        f"--distill kd {teacher} {listed}": "got list",
        f"--distill kd --num-classes 12 {teacher} {own}": "(--num-classes 10)",
        f"--distill dfa --epochs 1 {teacher} {own}": "raise --epochs from 1 to at least 2",
    }
    for flags, words in refused.items():
        fresh_accelerate()
        assert train.main([*tiny, "--output", str(tmp_path), *flags.split()]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert len(message) < 900
    loaded = build.create_student(
        parse_args([*tiny, "--num-classes", "10", "--pretrained-path", str(own)]), verbose=True
    )[0]
    assert torch.equal(loaded.conv1[0].weight, load_file(own)["conv1.0.weight"])
    assert "Data processing configuration for current model + dataset:" in caplog.text


def test_flags_of_streamed_data_are_refused_where_images_are_counted(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / split / "a" / "0.png")
    for flag, data_free in (("val-num-samples", True), ("val-num-samples", False), ("epoch-repeats", False)):
        args = parse_args(["--data-dir", str(tmp_path), f"--{flag}", "5"])
        with pytest.raises(DistillError, match="is no streamed data set"):
            data.create_datasets(args, 1, data_free)


def test_sync_bn_converts_the_student_and_its_peers(tiny, monkeypatch):
    args = parse_args([*tiny, "--num-classes", "10", "--sync-bn", "--distill", "afd", "--peer", "resnet10t"])
    monkeypatch.setattr(build, "PartialState", lambda: SimpleNamespace(num_processes=2))
    student, config = build.create_student(args)
    distillation = Distillation(args, student, config, data.Datasets(None, None, None), torch.device("cpu"))
    for network in (student, *distillation.peers):
        kinds = {type(m) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert kinds
        assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)


def test_a_model_reads_its_own_files_of_numpy(tiny, tmp_path, monkeypatch):
    def read(model: nn.Module, path: str) -> None:
        with torch.no_grad():
            model.head.bias.copy_(torch.from_numpy(np.load(path)["head/bias"]))

    monkeypatch.setattr(timm.models.VisionTransformer, "load_pretrained", read)
    path, bias = tmp_path / "w.npz", np.arange(10, dtype=np.float32)
    np.savez(path, **{"head/bias": bias})
    args = parse_args(["--model", "test_vit", "--num-classes", "10", "--initial-checkpoint", str(path)])
    assert build.create_student(args)[0].head.bias.tolist() == bias.tolist()
    with pytest.raises(DistillError, match="NotImplementedError: Model cannot load numpy checkpoint"):
        build.create_student(parse_args([*tiny, "--initial-checkpoint", str(path)]))
    with pytest.raises(DistillError, match=r"--pretrained-path .*w.npz cannot be read .*: name a file of weights"):
        build.create_student(parse_args([*tiny, "--pretrained-path", str(path)]))


def test_a_file_with_more_than_the_model_is_told_of_with_a_number(tiny, tmp_path, caplog):
    weights = timm.create_model("resnet10t", **MODEL).state_dict()
    save_file(
        weights | {"layer4.1.bn1.bias": torch.zeros(1), "layer4.1.a": torch.zeros(1)}, tmp_path / "more.safetensors"
    )
    args = parse_args([*tiny, "--pretrained-path", str(tmp_path / "more.safetensors"), "--num-classes", "10"])
    build.create_student(args)
    assert "fills resnet10t and has 2 tensors more, such as layer4.1.a" in caplog.text
    assert caplog.text.count("Unexpected keys") == 1


def test_an_evaluation_of_the_training_images_is_told(tmp_path, caplog):
    for folder in ("train/a", "validation/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    for folder, told in ((tmp_path, False), (tmp_path / "train", True)):
        caplog.clear()
        data.create_datasets(parse_args(["--data-dir", str(folder)]), 1)
        assert ("read the same images" in caplog.text) is told
    for flags, match in (
        ("--val-split other", "no folder other, but train, validation"),
        ("--train-split train[:9]", "parts"),
    ):
        with pytest.raises(DistillError, match=match):
            data.create_datasets(parse_args(["--data-dir", str(tmp_path), *flags.split()]), 1)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [([], "max"), (["--eval-metric", "loss"], "min"), (["--val-split", ""], "min")],
)
def test_plateau_knows_which_metric_is_better(run, flags, mode):
    """Without an evaluation it follows the training loss, whatever `--eval-metric` is."""
    flags = ["--sched", "plateau", "--train-split", "train[:16]", "--epochs", "1", *flags]
    assert run(*flags).scheduler.lr_scheduler.mode == mode


def test_epochs_are_ranked_in_one_order(run, capsys):
    """Of equal ones the earlier is ahead, NaN comes last; `--result` is that of timm's script."""
    epochs = [(math.nan, 0), (0.5, 1), (2.0, 2), (2.0, 3), (-1.0, 4)]
    for decreasing, order in ((True, [4, 1, 2, 3, 0]), (False, [2, 3, 1, 4, 0])):
        assert [epoch for _, epoch in sorted(epochs, key=lambda kept: checkpoint.rank(kept, decreasing))] == order
    session = run("--epochs", "1", "--train-split", "train[:16]")
    session.told = [{"epoch": epoch, "train": {}, "validation": {"top1": float(epoch % 4)}} for epoch in range(12)]
    capsys.readouterr()
    session._tell()
    told = json.loads(capsys.readouterr().out.partition("--result")[2])
    # As timm's script sorts and cuts them.
    assert told == sorted(session.told, key=lambda row: row["validation"]["top1"])[-10:]


@pytest.mark.distributed
def test_two_processes(tiny, tmp_path):
    """Two processes, with an odd number of evaluation images: every process counts its own, none counts twice."""
    flags = ["--epochs", "1", "-vb", "33", "--train-split", "train[:325]", "--val-split", "validation[:101]"]
    flags += ["--output", str(tmp_path), "--experiment", "two"]
    on_two_processes("-m", "kd_timm.train", *tiny, *flags)
    folder = Path(tmp_path) / "two"
    results = json.loads((folder / "results.json").read_text())
    state = json.loads((folder / "state" / "state.json").read_text())
    # 325 rows in two shares of 163, in batches of 16.
    assert (state["processes"], state["updates"]) == (2, 10)
    model = timm.create_model("resnet10t", checkpoint_path=folder / "model_best.safetensors", **MODEL).eval()
    args = parse_args([*tiny])
    args.dataset = "digits"
    loader = create_loader(
        Digits("validation[:101]"),
        (3, 16, 16),
        50,
        interpolation="bicubic",
        crop_pct=1.0,
        device=torch.device("cpu"),
        num_workers=0,
    )
    with torch.no_grad():
        right = torch.cat([(model(images).argmax(-1) == targets).float() for images, targets in loader])
    assert results["evaluation"]["top1"] == pytest.approx(100 * right.mean().item(), abs=1e-4)


def test_arguments_of_the_model_win_over_flags(run):
    session = run(
        "--model-kwargs", "channels=(8,8,16,16)", "stem_width=8", "in_chans=1", "drop_rate=0.5", "num_classes=12"
    )
    assert session.student.drop_rate == 0.5
    assert session.data.config["input_size"] == (1, 16, 16)
    assert session.args.num_classes == session.student.num_classes == 12


@pytest.fixture
def parity(monkeypatch):
    """The digits as odd and even ones."""
    given = data.Digits.__init__

    def init(self, *args):
        given(self, *args)
        self.targets = [target % 2 for target in self.targets]

    monkeypatch.setattr(data.Digits, "__init__", init)
    monkeypatch.setattr(data.Digits, "classes", ("even", "odd"))


def test_one_logit_is_a_binary_classifier(run, parity):
    one = run("--num-classes", "1", "--bce-loss", "--epochs", "1", "--mixup", "0.4")
    student, right, loss, count = one.student.eval(), 0, 0.0, 0
    with torch.no_grad():
        for images, labels in one.data.evaluation:
            probability = torch.sigmoid(student(images)[:, 0].double())
            right += ((probability > 0.5) == labels.bool()).sum().item()
            chosen = torch.where(labels.bool(), probability, 1 - probability)
            loss -= chosen.log().sum().item()
            count += len(labels)
    assert one.results["evaluation"]["top1"] == pytest.approx(100 * right / count)
    assert one.results["evaluation"]["loss"] == pytest.approx(loss / count, rel=1e-4)


def test_the_loss_of_one_logit():
    scores, labels = torch.tensor([[1.5], [-0.5]]), torch.tensor([1, 0])
    criterion = build.create_criterion(parse_args(["--num-classes", "1", "--bce-loss", "--smoothing", "0.1"]))
    p = torch.sigmoid(scores[:, 0])
    target = torch.tensor([0.95, 0.05])
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(criterion(scores, labels), expected)
    mixed = build.create_criterion(parse_args(["--num-classes", "1", "--bce-loss", "--mixup", "1"]))
    torch.testing.assert_close(mixed(scores, torch.tensor([[0.05, 0.95], [0.95, 0.05]])), expected)
    with pytest.raises(DistillError, match="got the label 3"):
        build.create_criterion(parse_args(["--num-classes", "1", "--bce-loss"]))(scores, torch.tensor([0, 3]))
    with pytest.raises(DistillError, match="--loss bce"):
        build.create_criterion(parse_args(["--num-classes", "1"]))


def test_two_heads_are_refused(run):
    two = type("Two", (torch.nn.Module,), {"forward": lambda self, x: (x.mean((2, 3)), x.mean((2, 3)))})
    session = run("--epochs", "1")
    with pytest.raises(DistillError, match="Two returns 2 scores in training.*aux_logits=False"):
        train.evaluate(session, two())
    session.model = two()
    images, labels = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    with pytest.raises(DistillError, match="returns 2 scores"):
        session.step(images, labels, 1, True)


def test_compiled_training_equals_eager(run):
    # One size of batches in an evaluation: every other one is compiled anew.
    plain = run("-vb", "26", name="plain")
    compiled = run("-vb", "26", "--torchcompile", "aot_eager", name="compiled")
    for key, value in load_file(plain.folder / "state" / "model.safetensors").items():
        torch.testing.assert_close(load_file(compiled.folder / "state" / "model.safetensors")[key], value)
    assert compiled.results["evaluation"] == pytest.approx(plain.results["evaluation"])


def test_parts_of_the_digits_are_named_as_those_of_datasets():
    whole, few, rest = (Digits(split, "L") for split in ("train", "train[:100]", "train[100:]"))
    assert few.targets + rest.targets == whole.targets
    assert len(set(few.targets)) == 10
    assert len(Digits("validation[:10%]", "L")) == 50
    assert len(Digits("validation[-10:500]", "L")) == 10
    for split in ("train[:x]", "train[5:5]", "tests[:3]", "train[:2000]"):
        with pytest.raises(DistillError, match="Expected (a part of )?the digits"):
            Digits(split, "L")


def test_epochs_that_are_trained_again_take_the_place_of_those_before(run):
    first = run("--epochs", "3")
    again = run("--epochs", "3", "--resume", str(first.folder), "--start-epoch", "1")
    epochs = [epoch for _, epoch in again.checkpoints.kept]
    assert sorted(epochs) == [0, 1, 2]
    best, kept = (load_file(again.folder / f"{name}.safetensors") for name in ("model_best", f"checkpoint-{epochs[0]}"))
    assert all(torch.equal(best[name], kept[name]) for name in kept)
    metrics = {row["epoch"]: row["eval_top1"] for row in again.summary.rows}
    assert {epoch: metric for metric, epoch in again.checkpoints.kept} == metrics


def test_the_schedule_of_a_stage_is_that_of_the_run_drawn_together():
    words = "--sched rsqrt --epochs 40 --warmup-epochs 8 --lr-stable-timescale 4 --decay-epochs 8"
    part = build.of_stage(parse_args(words.split()), 10, of=40)
    assert (part.epochs, part.warmup_epochs, part.decay_epochs, part.lr_stable_timescale) == (10, 2, 2, 1)
