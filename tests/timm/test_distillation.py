"""kd-timm-train --distill: equal to a bare loop, exact resume, streams and stages, teachers, clear errors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from distributed_kit import on_two_processes
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed

import kd_plugins
from kd_plugins import Batch
from kd_plugins.evaluation import doubts, uncertainty_metrics
from kd_timm import data, distillation, engine, teachers, train
from kd_timm.arguments import parse_args
from kd_timm.build import check_model_name
from kd_timm.teachers import InputTransform, create_teacher

WIDE = ["--model-kwargs", "channels=(8,8,16,16)", "stem_width=16"]
CONFIG = dict(input_size=(3, 16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The output folder of the teacher, which is trained once."""
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture
def teacher(run, kept) -> list[str]:
    """The flags that name a teacher which was trained by the same command."""
    path = kept / "teacher" / "model_best.safetensors"
    if not path.is_file():
        run(*WIDE, "--output", str(kept), name="teacher")
    return ["--teacher", "resnet10t", "--teacher-checkpoint", str(path)]


def methods(name: str) -> list[str]:
    """A method's flags; the last maps of these networks have one position, which NST refuses."""
    return [name, "--distill-args", "layers=2", "weight=1"] if "nst" in name else [name]


def interrupted(run, monkeypatch, flags: list[str], epochs: int, into: str = "parts"):
    """A run, `parts`, that stops in the evaluation of an epoch, and is taken up again."""
    evaluate, calls = train.evaluate, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == epochs + 1:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", stop)
    first = run(*flags, name="parts")
    assert first.results == {}
    monkeypatch.setattr(train, "evaluate", evaluate)
    return run(*flags, "--resume", str(first.folder), name=into)


@pytest.mark.parametrize("name", ["kd", "kd+nst"])
def test_equals_a_bare_loop(run, teacher, name):
    session = run("--distill", *methods(name), *teacher)

    made = create_teacher("resnet10t", teacher[3], {}, config=CONFIG, num_classes=10, classes=None)
    sample = Batch.of(torch.randn(2, 3, 16, 16))
    # From here on as in the command: teachers and set-up leave no trace in the random state.
    random_seed(42, 0)
    student = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    common = dict(input_size=(3, 16, 16), batch_size=16, num_workers=0, device=torch.device("cpu"))
    loader = create_loader(
        data.Digits("train"),
        is_training=True,
        scale=(0.8, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.0,
        color_jitter=0.0,
        interpolation="random",
        **common,
    )
    evaluation = create_loader(data.Digits("val"), **common)
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.02, weight_decay=2e-5, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=2, warmup_epochs=0)
    criterion = LabelSmoothingCrossEntropy(0.1)
    distiller = kd_plugins.create_distiller(name, **({"layers": (2,), "weight": 1.0} if "nst" in name else {}))
    nets = kd_plugins.bind(distiller, student, made.module, batch=sample)
    groups = kd_plugins.make_optimizers(distiller, optimizer, nets)
    for epoch in range(2):
        student.train()
        for images, labels in loader:
            batch = Batch.of(images, labels, criterion=lambda view, target: criterion(view.logits, target))
            for turn in distiller.turns(nets, batch):
                kd_plugins.play(turn, groups)
        next(iter(evaluation))
        scheduler.step(epoch + 1)
    trained = load_file(session.folder / "state" / "model.safetensors")
    for key, value in student.state_dict().items():
        torch.testing.assert_close(trained[key], value, atol=1e-6, rtol=1e-5)
    assert session.results["evaluation"]["agreement"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--distill kd+nst --distill-args nst.weight=10 layers=2 --grad-accum-steps 3 --model-ema --model-ema-decay 0.9",
        "--distill timm_distillers:Adversary --distill-args critic.lr=0.02 --clip-grad 1 --opt adamw --workers 1"
        " --no-persistent-workers",
        "--distill timm_distillers:Search --epochs 4",
    ],
)
def test_resume_is_exact(run, stopped, teacher, flags, monkeypatch):
    flags = ["--epochs", "3", *flags.split(), *teacher]
    whole = run(*flags, name="whole")
    stopped(6, *flags, name="parts")
    parts = run(*flags, "--resume", str(whole.folder.parent / "parts"), name="parts")
    for name in ("last.safetensors", "state/model.safetensors", "state/distiller/distiller.safetensors"):
        assert same(load_file(whole.folder / name), load_file(parts.folder / name)), name
    assert (whole.folder / "summary.csv").read_text() == (parts.folder / "summary.csv").read_text()
    columns = next(csv.reader((whole.folder / "summary.csv").open()))
    assert "train_distill/task" in columns


@pytest.mark.parametrize("sched", [[], ["--sched-on-updates"]])
def test_a_stage_goes_on_at_its_own_learning_rate(run, teacher, sched):
    """Where the run goes on otherwise than it would have, the rate is found anew, in the curve of the stage."""
    flags = ["--distill", "timm_distillers:Search", *teacher, "--epochs", "6", *sched]
    whole, parts = run(*flags, name="whole"), run(*flags, "--stop-epoch", "4", name="parts")
    # Clips nothing, and counts as another training.
    parts = run(*flags, "--resume", str(parts.folder), "--clip-grad", "1e9", name="parts")
    assert same(load_file(whole.folder / "last.safetensors"), load_file(parts.folder / "last.safetensors"))


def test_states_within_an_epoch(run, teacher):
    flags = "--distill", "kd", *teacher, "--epochs", "1", "--recovery-interval", "3"
    folder = run(*flags).folder
    place = torch.load(folder / "state.old" / "place-0.pt", weights_only=True)["place"]
    assert place["sums"] == (3, 48, 2)
    assert not list(folder.glob("recovery-*"))


@pytest.mark.parametrize("name", [pytest.param("kd", marks=pytest.mark.slow), "kd+nst"])
def test_compiled_training_equals_eager(run, teacher, name):
    flags = ["--distill", *methods(name), *teacher]
    plain = run(*flags, name="plain")
    compiled = run(*flags, "--torchcompile", "aot_eager", name="compiled")
    trained = load_file(compiled.folder / "state" / "model.safetensors")
    for key, value in load_file(plain.folder / "state" / "model.safetensors").items():
        torch.testing.assert_close(trained[key], value, atol=1e-5, rtol=1e-4)


def test_what_is_exported_is_the_bare_student(run, teacher):
    session = run("--distill", "timm_distillers:Adversary", *teacher)
    path = session.folder / "model_best.safetensors"
    model = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), stem_width=8, checkpoint_path=path)
    assert load_file(path).keys() == model.state_dict().keys()
    seen = session.distillation.distiller.seen
    assert seen.sum() == 2 * 64
    assert seen.max() == 2


def test_stages_have_rows_curve_and_student_of_their_own(run, teacher):
    import timm_distillers

    timm_distillers.Search.rows = {}
    session = run("--distill", "timm_distillers:Search", "--epochs", "6", "--checkpoint-hist", "9", *teacher)
    rows = timm_distillers.Search.rows
    assert not rows["search"] & rows["held out"]
    assert len(rows["search"] | rows["held out"]) == 64
    assert len(rows["distill"]) == 64
    table = session.distillation.table
    assert table.starts == [0, 8]
    summary = list(csv.DictReader((session.folder / "summary.csv").open()))
    rates = [float(row["lr"]) for row in summary]
    # Cosine over two epochs, then over four: each begins at the full rate.
    assert rates[0] == rates[2] == 0.02
    assert rates[1] == rates[4] == pytest.approx(0.01)
    assert summary[0]["train_distill/held_out"] != ""
    assert summary[2]["train_distill/held_out"] == ""
    # Checkpoints of the first student are gone, and what was told of it.
    assert sorted(row["epoch"] for row in session.told) == [2, 3, 4, 5]
    assert {p.stem for p in session.folder.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 3, 4, 5)}


def test_without_an_evaluation_the_last_student_is_kept(run, teacher):
    """In the stage of the estimators the student rests, at a loss of 0; a schedule that follows the loss still does."""
    method = ["--distill", "ksanc", "--distill-args", "estimator_share=0.3", "layers=2", "hidden=8"]
    session = run(*method, *teacher, "--epochs", "3", "--val-split", "", "--sched", "plateau")
    assert session.told[0]["train"]["loss"] == 0
    assert session.results["best_epoch"] == 2
    best, last = (load_file(session.folder / f"{name}.safetensors") for name in ("model_best", "last"))
    assert same(best, last)
    plateau = session.scheduler.lr_scheduler
    assert (plateau.mode, plateau.best) == ("min", min(row["train"]["loss"] for row in session.told[1:]))


def test_the_moving_average_begins_anew_with_a_fresh_student_alone(run, teacher, monkeypatch):
    steps, update = [], ModelEmaV3.update
    monkeypatch.setattr(ModelEmaV3, "update", lambda ema, model, step: steps.append(step) or update(ema, model, step))
    run("--distill", "timm_distillers:Impatient", "--epochs", "5", "--model-ema")
    assert steps == list(range(1, 21))
    steps.clear()
    run("--distill", "timm_distillers:Search", "--epochs", "3", "--model-ema", *teacher)
    assert steps == [*range(1, 5), *range(1, 9)]


def test_a_stage_that_ends_early_leaves_whole_epochs(run):
    session = run("--distill", "timm_distillers:Impatient", "--epochs", "5")
    assert session.distillation.table.starts == [0, 4, 12]
    rates = [float(row["lr"]) for row in csv.DictReader((session.folder / "summary.csv").open())]
    assert rates[1] == rates[3] == 0.02


def test_peers_train_together(run):
    session = run("--distill", "timm_distillers:Pair", "--peer", "resnet10t")
    assert set(load_file(session.folder / "state" / "distiller" / "peer1.safetensors")) == set(
        session.student.state_dict()
    )
    (result,) = session.results["peers"]
    assert result["model"] == "resnet10t"
    rows = list(csv.DictReader((session.folder / "summary.csv").open()))
    column = [float(row["eval_peer1-resnet10t_top1"]) for row in rows]
    assert result["top1"] == max(column) == column[result["best_epoch"]]
    # What was exported is what was evaluated, and timm loads it.
    exported = timm.create_model(
        "resnet10t",
        num_classes=10,
        channels=(8, 8, 16, 16),
        stem_width=8,
        checkpoint_path=session.folder / result["file"],
    )
    student, counts = session.student.eval(), torch.zeros(3)
    with torch.no_grad():
        for images, labels in session.data.evaluation:
            ours, theirs = exported.eval()(images).argmax(1), student(images).argmax(1)
            counts += torch.tensor([len(labels), (ours == labels).sum(), (ours == theirs).sum()])
    assert 100 * counts[1] / counts[0] == pytest.approx(result["top1"])
    assert 100 * counts[2] / counts[0] == pytest.approx(result["agreement"])


def test_a_peer_of_the_same_architecture_starts_elsewhere(run, monkeypatch):
    seen = {}

    def stop(session):
        seen["nets"] = [net.module.state_dict() for net in session.distillation.nets.peers]
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Session, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        run("--distill", "timm_distillers:Pair", "--peer", "resnet10t", "--peer", "resnet10t")
    for i, ours in enumerate(seen["nets"]):
        for theirs in seen["nets"][:i]:
            same = [key for key, value in ours.items() if value.dim() > 1 and torch.equal(value, theirs[key])]
            assert not same


def test_peers_resume_with_their_best_epoch(run, monkeypatch):
    flags = ["--distill", "timm_distillers:Pair", "--peer", "resnet10t", "--epochs", "3"]
    whole = run(*flags, name="whole")
    parts = interrupted(run, monkeypatch, flags, epochs=2)
    assert whole.results["peers"] == parts.results["peers"]
    assert (whole.folder / "summary.csv").read_text() == (parts.folder / "summary.csv").read_text()
    file = whole.results["peers"][0]["file"]
    assert same(load_file(whole.folder / file), load_file(parts.folder / file))


def test_a_run_that_goes_on_elsewhere_brings_its_files(run, monkeypatch):
    flags = ["--distill", "timm_distillers:Pair", "--peer", "resnet10t", "--epochs", "2"]
    # No epoch is better than the first.
    for module in ("checkpoint", "peers"):
        monkeypatch.setattr(f"kd_timm.{module}.rank", lambda kept, decreasing: kept[1])
    second = interrupted(run, monkeypatch, flags, epochs=1, into="after")
    first = second.folder.parent / "parts"
    assert second.results["best_epoch"] == second.results["peers"][0]["best_epoch"] == 0
    for name in ("model_best.safetensors", second.results["peers"][0]["file"]):
        assert same(load_file(first / name), load_file(second.folder / name))
    assert len((second.folder / "summary.csv").read_text().splitlines()) == 3


def test_peers_have_arguments_of_their_own(run):
    """The student's are for its architecture alone."""
    flags = ["--epochs", "1", "--distill", "timm_distillers:Pair", "--peer"]
    session = run(*flags, "resnet8")
    student = sum(p.numel() for p in session.student.parameters())
    assert session.results["peers"][0]["parameters"] != student
    wide = run(*flags, "resnet10t", "--peer-kwargs", "channels=(8,8,16,32)", "stem_width=8", name="wide")
    assert wide.results["peers"][0]["parameters"] > student


def test_a_peers_best_epoch_is_of_the_run_that_goes_on(run, monkeypatch):
    """Epochs behind the milestone were better, and another run's."""
    flags = ["--distill", "timm_distillers:Pair", "--peer", "resnet10t", "--epochs", "3", "--save-epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("kd_timm.peers.rank", lambda kept, decreasing: -kept[1])
        first = run(*flags, name="parts")
    assert first.results["peers"][0]["best_epoch"] == 2
    monkeypatch.setattr("kd_timm.peers.rank", lambda kept, decreasing: kept[1])
    milestone = first.folder / "milestone-1"
    again = run(*flags, "--resume", str(milestone), "--stop-epoch", "2", "--clip-grad", "1", name="parts")
    peer = again.results["peers"][0]
    assert peer["best_epoch"] == 0
    assert peer["top1"] == float(again.summary.rows[0]["eval_peer1-resnet10t_top1"])
    assert same(load_file(again.folder / peer["file"]), load_file(milestone / peer["file"]))


def test_no_optimizer_goes_on_where_none_should(run):
    flags = ["--distill", "timm_distillers:Pair", "--peer", "resnet10t", "--stop-epoch", "1"]
    run(*flags, name="parts")
    again = run(*flags, "--resume", "auto", "--no-resume-opt", name="parts")
    assert not again.optimizer.state
    assert not again.distillation.player["peer1"].optimizer.state


def test_peers_are_made_for_the_students_images():
    def peer(name: str, size: int) -> torch.nn.Module:
        flags = ["--model", "cifar_resnet8", "--num-classes", "10", "--distill", "timm_distillers:Pair", "--peer", name]
        config = CONFIG | {"input_size": (3, size, size)}
        student = timm.create_model("cifar_resnet8", num_classes=10)
        sets = data.Datasets(None, None, None)
        return distillation.Distillation(parse_args(flags), student, config, sets, torch.device("cpu")).peers[0]

    assert peer("vit_tiny_patch16_224", 32).patch_embed.img_size == (32, 32)
    with pytest.raises(kd_plugins.DistillError, match="lenet5 does not take images of 16 x 16 pixels"):
        peer("lenet5", 16)


def test_layer_decay_leaves_the_methods_parts_at_the_full_rate(run, teacher):
    flags = ["--epochs", "1", "--layer-decay", "0.5", "--distill", "fitnet", "--distill-args", "layers=1"]
    session = run(*flags, *teacher, "--teacher-kwargs", "stem_width=16")
    groups = session.optimizer.param_groups
    assert len({group["lr_scale"] for group in groups}) > 1
    (own,) = session.distillation.player["own"].optimizer.param_groups
    assert groups[own["follows"]]["lr_scale"] == 1.0


def test_layer_decay_knows_the_layers_of_the_student_alone(run):
    flags = ["--epochs", "1", "--layer-decay", "0.5", "--distill", "timm_distillers:Pair", "--peer"]
    with pytest.raises(kd_plugins.DistillError, match="the peer resnet14t has others: drop it, or take peers of the"):
        run(*flags, "resnet14t")
    session = run(*flags, "resnet10t")
    groups = {g["follows"]: len(g["params"]) for g in session.distillation.player["peer1"].optimizer.param_groups}
    assert groups == {i: len(group["params"]) for i, group in enumerate(session.optimizer.param_groups)}


def test_adaptive_clipping_leaves_the_classifiers_of_peers_alone(run, monkeypatch):
    clipped = set()
    monkeypatch.setattr(engine, "dispatch_clip_grad", lambda found, **options: clipped.update(map(id, found)))
    flags = ["--epochs", "1", "--clip-grad", "0.1", "--clip-mode", "agc", "--distill", "timm_distillers:Pair"]
    session = run(*flags, "--peer", "resnet10t")
    for net in session.distillation.nets.peers:
        spared = {name for name, p in net.module.named_parameters() if id(p) not in clipped}
        assert spared == {"fc.weight", "fc.bias"}


def test_the_pass_before_the_training_has_the_loaders_workers(run, teacher, monkeypatch):
    made, workers = distillation.plain_loader, []
    monkeypatch.setattr(
        distillation, "plain_loader", lambda *a, **k: (workers.append(k["num_workers"]), made(*a, **k))[1]
    )
    run(*"--epochs 1 --workers 1 --distill quest --distill-args layers=1 words=4".split(), *teacher)
    # The first batch alone is not worth them.
    assert workers == [0, 1]


def test_a_method_that_makes_its_own_data_gets_none(run, teacher):
    unused = "--scale 0.08 1.0 --hflip 0.5 --color-jitter 0.4".split()  # as they are where nothing is said
    session = run(
        "--distill", "timm_distillers:Dreams", "--epoch-updates", "4", "--num-classes", "10", *unused, *teacher
    )
    rows = list(csv.DictReader((session.folder / "summary.csv").open()))
    assert float(rows[1]["train_distill/gap"]) < float(rows[0]["train_distill/gap"])


def test_training_without_data_keeps_the_last_student(teacher, tmp_path, capsys):
    flags = "--model resnet10t --model-kwargs channels=(8,8,16,16) stem_width=16 --num-classes 10 --img-size 16 -b 16"
    flags += " --device cpu --workers 0 --epochs 2 --warmup-epochs 0 --distill dafl --distill-args latent=4 width=4"
    flags = [*flags.split(), "--epoch-updates", "2", *teacher]
    assert train.main([*flags, "--output", str(tmp_path), "--experiment", "whole"]) == 0
    folder = tmp_path / "whole"
    assert json.loads((folder / "results.json").read_text())["metric"] == "epoch"
    assert same(load_file(folder / "model_best.safetensors"), load_file(folder / "last.safetensors"))
    # The best epoch of the session comes last.
    assert [row["epoch"] for row in json.loads(capsys.readouterr().out.partition("--result")[2])] == [0, 1]
    for more, words in (
        ("--mixup 0.5 --tta 2 --save-images", "--mixup, --save-images, --tta would do nothing"),
        ("--best-on-eval", "none is named"),
    ):
        assert train.main([*flags, *more.split()]) != 0
        assert words in capsys.readouterr().err


def test_vision_transformers_distil_their_attention(run):
    vit = "--model vit_tiny_patch16_224 --model-kwargs patch_size=4 embed_dim=32 num_heads=2".split()
    vit += "--opt adamw --lr 1e-3".split()
    teacher = run(*vit[:-4], "depth=4", *vit[-4:], name="teacher")
    path = str(teacher.folder / "model_best.safetensors")
    flags = ["--teacher", "vit_tiny_patch16_224", "--teacher-checkpoint", path]
    session = run(
        *vit[:-4],
        "depth=2",
        *vit[-4:],
        "--epochs",
        "4",
        *flags,
        "--distill",
        "internal",
        "--distill-args",
        "schedule=all",
    )
    rows = list(csv.DictReader((session.folder / "summary.csv").open()))
    assert float(rows[0]["train_distill/kl_attention"]) > 0


# Teachers


def test_images_are_normalised_as_the_teacher_knows_them():
    pixels = torch.rand(2, 3, 8, 8)
    ours = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), input_size=(3, 8, 8))
    theirs = dict(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25), input_size=(3, 8, 8))

    def normalised(config):
        mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        return (pixels - mean) / std

    torch.testing.assert_close(InputTransform(ours, theirs, False)(normalised(ours)), normalised(theirs))
    larger = InputTransform(ours, {**theirs, "input_size": (3, 12, 12)}, True)(normalised(ours))
    assert larger.shape == (2, 3, 12, 12)
    assert InputTransform(ours, {**theirs, "input_size": (3, 12, 12)}, False)(pixels).shape == (2, 3, 8, 8)


def test_grey_and_colour_meet():
    """A grey image is one of three equal colours; a coloured one is seen by its luminance."""
    colour = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), input_size=(3, 8, 8))
    grey = dict(mean=(0.1,), std=(0.5,), input_size=(1, 8, 8))

    def normalised(pixels, config):
        mean, std = (torch.tensor(config[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
        return (pixels - mean) / std

    pixels = torch.rand(2, 3, 8, 8)
    luminance = (pixels[:, 0] * 0.299 + pixels[:, 1] * 0.587 + pixels[:, 2] * 0.114).unsqueeze(1)
    torch.testing.assert_close(
        InputTransform(grey, colour, False)(normalised(luminance, grey)),
        normalised(luminance.expand(-1, 3, -1, -1), colour),
    )
    torch.testing.assert_close(
        InputTransform(colour, grey, False)(normalised(pixels, colour)), normalised(luminance, grey)
    )


@pytest.mark.parametrize(("student", "teacher"), [(1, 3), (3, 1)])
def test_a_teacher_of_other_colours(run, tmp_path, caplog, student, teacher):
    small = [f"in_chans={teacher}", "channels=(8,8,16,16)", "stem_width=8"]
    options = dict(in_chans=teacher, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    save_file(timm.create_model("resnet10t", **options).state_dict(), tmp_path / "teacher.safetensors")
    flags = ["--teacher", "resnet10t", "--teacher-checkpoint", str(tmp_path / "teacher.safetensors")]
    session = run("--in-chans", str(student), "--distill", "kd", *flags, "--teacher-kwargs", *small, "--epochs", "1")
    (row,) = csv.DictReader((session.folder / "summary.csv").open())
    assert float(row["train_distill/kd"]) > 0
    assert "does not match" not in caplog.text


def test_a_teacher_keeps_the_configuration_it_was_trained_with(run):
    session = run(*WIDE, "--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1", name="teacher")
    path = session.folder / "model_best.safetensors"
    made = create_teacher("resnet10t", str(path), {}, config=CONFIG, num_classes=10, classes=tuple("0123456789"))
    assert made.module.conv1[0].weight.shape == session.student.conv1[0].weight.shape
    images = torch.zeros(1, 3, 4, 4)
    expected = (torch.tensor(CONFIG["mean"]) - torch.tensor([0.1, 0.2, 0.3])).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(made.transform(images), expected)
    assert made.order is None
    assert not any(p.requires_grad for p in made.module.parameters())
    swapped = create_teacher("resnet10t", str(path), {}, config=CONFIG, num_classes=10, classes=tuple("1023456789"))
    assert swapped.order == [1, 0, *range(2, 10)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--distill kdd", "Did you mean kd"),
        ("--distill kd --distill-args temprature=3", "temprature"),
        ("--distill kd", "--teacher"),
        ("--teacher resnet18", "--distill"),
        ("--distill kd --teacher resnet181", "no model named"),
        ("--distill kd --teacher resnet10t --teacher-checkpoint /does/not/exist", "--teacher-checkpoint"),
        ("--distill kd --teacher resnet8", "no published weights"),
        ("--distill kd --teacher resnet18 --teacher-kwargs num_classes=10", "head would be random"),
        ("--distill timm_distillers:ForText --teacher resnet18", "token"),
        ("--distill timm_distillers:Pair", "--peer"),
        ("--distill timm_distillers:Pair --peer resnet10", "--peer: timm has no model named"),
        ("--distill timm_distillers:Impatient --epochs 2", "--epochs"),
    ],
)
def test_bad_input_is_refused_before_training(tiny, few_digits, tmp_path, flags, words, capsys):
    status = train.main([*tiny, "--output", str(tmp_path), *flags.split()])
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_teacher_that_does_not_fit_is_refused(run, teacher, tiny, tmp_path, capsys, monkeypatch):
    path = Path(teacher[3])

    def message(*flags: str) -> str:
        assert train.main([*tiny, "--output", str(tmp_path), "--distill", *flags]) == 2
        return " ".join(capsys.readouterr().err.split())

    given = ["--teacher", "resnet10t", "--teacher-checkpoint"]
    assert "holds a resnet10t" in message("kd", "--teacher", "resnet18", *teacher[2:])
    # Weights without the head: it would be random.
    headless = tmp_path / "headless.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("fc.")}, headless)
    arguments = ["--teacher-kwargs", "channels=(8,8,16,16)", "stem_width=16"]
    assert "fc.weight" in message("kd", *given, str(headless), *arguments)
    # Seven classes.
    seven = {k: v[:7] if k.startswith("fc.") else v for k, v in load_file(path).items()}
    save_file(seven, tmp_path / "seven.safetensors")
    assert "7 classes" in message("kd", *given, str(tmp_path / "seven.safetensors"), *arguments)
    # Other names.
    config = json.loads(path.with_name("config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"label_names": list("abcdefghij")}))
    save_file(load_file(path), other / "weights.safetensors")
    assert "does not know the student's classes" in message("kd", *given, str(other / "weights.safetensors"))
    assert "layer9" in message("nst", *teacher, "--distill-args", "layers=layer9")
    assert "attention" in message("internal", *teacher)
    assert "holds some out" in message("dfa", *teacher, "--aug-splits", "3")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(teachers.timm, "create_model", lambda *a, **k: offline() if k.get("pretrained") else None)
    with pytest.raises(kd_plugins.DistillError, match="no network.*--teacher-checkpoint"):
        create_teacher("resnet18", "", {}, config=CONFIG, num_classes=1000, classes=None)


@pytest.mark.parametrize(("classes", "head"), [(7, "num_classes=7"), (0, "num_classes=0")])
def test_feature_methods_take_a_teacher_of_other_classes(run, tmp_path, classes, head):
    torch.manual_seed(0)
    wide = timm.create_model("resnet10t", num_classes=classes, channels=(8, 8, 16, 16), stem_width=16)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    flags = ["--teacher", "resnet10t", "--teacher-checkpoint", str(tmp_path / "wide.safetensors"), "--teacher-kwargs"]
    flags += ["channels=(8,8,16,16)", "stem_width=16", head, "--epochs", "1"]
    session = run("--distill", *methods("nst"), *flags)
    (row,) = csv.DictReader((session.folder / "summary.csv").open())
    assert float(row["train_distill/nst"]) > 0
    # Nothing to agree with.
    assert "agreement" not in session.results["evaluation"]
    with pytest.raises(kd_plugins.DistillError, match="7 classes apart" if classes else "has no classifier"):
        run("--distill", *methods("kd+nst"), *flags)


def test_methods_know_the_size_of_the_training_set(run, monkeypatch):
    rows = []
    made = distillation.image_batch
    monkeypatch.setattr(distillation, "image_batch", lambda *a, **k: (rows.append(k["rows"]), made(*a, **k))[1])
    run("--epochs", "1", "--distill", "timm_distillers:Pair", "--peer", "resnet10t")
    assert set(rows) == {64}


@pytest.mark.distributed
@pytest.mark.parametrize("name", [pytest.param("kd+nst", marks=pytest.mark.slow), "timm_distillers:Adversary"])
def test_two_processes(run, teacher, tiny, tmp_path, name):
    flags = [*tiny, "--distill", *methods(name), *teacher, "-b", "8", "--epochs", "1", "--drop", "0.1"]
    flags += ["--train-split", "train[:325]", "--val-split", "validation[:101]"]
    flags += ["--output", str(tmp_path), "--experiment"]
    on_two_processes("-m", "kd_timm.train", *flags, "two")
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["evaluation"]["agreement"] > 0
    assert (tmp_path / "two" / "state" / "distiller" / "distiller_random_1.safetensors").is_file()

    # A signal to one of them ends both after the tenth update, with batch statistics of their own.
    stopping = tmp_path / "stopping.py"
    stopping.write_text(STOPPING)
    on_two_processes(str(stopping), *flags, "parts", "--recovery-interval", "3")
    on_two_processes("-m", "kd_timm.train", *flags, "parts", "--resume", "auto")
    two, parts = tmp_path / "two", tmp_path / "parts"
    assert json.loads((parts / "run.json").read_text())["resumed"] == 1
    for name in ("last.safetensors", "state/distiller/distiller.safetensors"):
        assert same(load_file(two / name), load_file(parts / name)), name
    assert (two / "summary.csv").read_text() == (parts / "summary.csv").read_text()


STOPPING = """
import os, signal, sys
from kd_timm import engine, train

step, calls = engine.PlainStep.__call__, []

def interrupted(*args):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)

engine.PlainStep.__call__ = interrupted
assert train.main(sys.argv[1:]) == 143
assert len(calls) == 10
"""


def test_an_ensemble_teaches_and_uncertainty_is_told(run, teacher, tmp_path):
    """Two snapshots of one training; the images of another kind are a folder."""
    best, folder = Path(teacher[3]), tmp_path / "others"
    folder.mkdir()
    for i in range(6):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    other = shutil.copytree(best.parent, tmp_path / "other") / "last.safetensors"
    save_file({k: v + 0.02 * (k == "fc.bias") for k, v in load_file(best).items()}, other)
    snapshots = [*teacher, *teacher[:3], str(other)]
    flags = ["--distill", "endd", "--clip-grad", "10", "--ood-dataset", str(folder), *snapshots]
    session = run(*flags, "--epochs", "1")
    student, teachers_ = session.results["uncertainty"]["student"], session.results["uncertainty"]["teachers"]
    assert student["error"] == pytest.approx(1 - session.results["evaluation"]["top1"] / 100)
    # Against a bare pass over both sets.
    asked = session.distillation.asked()
    known = [(torch.stack([ask(x) for ask in asked], 1), y) for x, y in session.data.evaluation]
    others = torch.cat([torch.stack([ask(x) for ask in asked], 1) for x, _ in session.data.other])
    whole = [doubts(torch.cat([z for z, _ in known]), torch.cat([y for _, y in known]))]
    assert teachers_ == pytest.approx(uncertainty_metrics(*whole, doubts(others)))
    session.student.eval()
    with torch.no_grad():
        logits = torch.cat([session.student(x) for x, _ in session.data.evaluation])
        theirs = torch.cat([session.student(x) for x, _ in session.data.other])
    alone = doubts(logits, torch.cat([y for _, y in known]), offset=0.0)
    assert student == pytest.approx(uncertainty_metrics(alone, doubts(theirs, offset=0.0)))
    assert len(theirs) == 6
    recipe = run(*flags, "--epochs", "1", "--bce-loss", name="bce")  # by which its student does not learn
    assert recipe.results["uncertainty"] == session.results["uncertainty"]


def test_digits_may_be_the_images_of_another_kind():
    other = data._other_kind(parse_args(["--ood-dataset", "digits", "--ood-split", "train[:30]"]), 1)
    assert (len(other), other[0][0].mode) == (30, "L")


def test_images_of_another_kind_must_be_there(tiny, few_digits, tmp_path, capsys):
    for flags, words in (
        (["--ood-dataset", "nowhere"], "--ood-dataset: expected digits, a folder of images or <type>/<name>"),
        (["--ood-dataset", "/nowhere"], "wds, got /nowhere."),
        (["--ood-dataset", str(tmp_path), "--bce-loss"], "--loss bce trains none"),
        (["--ood-dataset", str(tmp_path), "--val-split", ""], "--val-split"),
    ):
        assert train.main([*tiny, "--output", str(tmp_path / "o"), *flags]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_several_weights_is_no_teacher(run, kept, teacher):
    with pytest.raises(
        kd_plugins.DistillError, match="expected a folder with one file of weights, .* --teacher-checkpoint"
    ):
        run("--distill", "kd", "--teacher", f"local-dir:{kept / 'teacher'}")
    # It tells of a network, whatever lies in it.
    check_model_name(f"local-dir:{kept / 'teacher'}", "--model")
