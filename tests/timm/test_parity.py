"""kd-timm-train gives the numbers of timm's own pieces, put together as timm's train.py does."""

from __future__ import annotations

import argparse
import csv
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import AugMixDataset, FastCollateMixup, Mixup, MultiLabelTarget, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationEvaluator,
    evaluator,
)
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad, random_seed

from kd_plugins import DistillError
from kd_timm import data, train
from kd_timm.arguments import parse_args

MODEL = dict(num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
CPU = torch.device("cpu")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def timm_loop(
    *,
    accumulate=1,
    clip=None,
    mixing="",
    ema=False,
    amp=None,
    opt="sgd",
    epochs=2,
    on_updates=False,
    size=16,
    start=0,
    task=None,
    criterion=None,
    split=0,
    dtype=torch.float32,
    scale=lambda rows: 1.0,
    **loading,
):
    """What timm's train.py does with its task, written out."""
    random_seed(42, 0)
    model = timm.create_model("resnet10t", **MODEL)
    if split:
        model = convert_splitbn_model(model, split)
        loading["num_aug_splits"] = split
    model.to(dtype)
    mix = dict(mixup_alpha=0.3, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=10)
    digits = data.Digits("train")
    common = dict(num_workers=0, device=CPU, img_dtype=dtype)
    loader = create_loader(
        AugMixDataset(digits, split) if split else digits,
        input_size=(3, size, size),
        batch_size=16,
        is_training=True,
        scale=(0.8, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.0,
        color_jitter=0.0,
        interpolation="random",
        re_mode="pixel",
        collate_fn=FastCollateMixup(**mix) if mixing == "collate" else None,
        **common | loading,
    )
    mixup = Mixup(**mix) if mixing == "device" else None
    reading = common | {key: loading[key] for key in ("use_prefetcher", "num_workers") if key in loading}
    evaluation = create_loader(
        data.Digits("val"), (3, size, size), 16, crop_pct=1.0, interpolation="bicubic", **reading
    )
    criterion = criterion or (SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(0.1))
    task = (task or ClassificationTask)(model, criterion=criterion, verbose=False)
    trained = task.get_trainable_module()
    optimizer = create_optimizer_v2(trained, opt=opt, lr=0.02, weight_decay=2e-5, momentum=0.9)
    average = ModelEmaV3(model, decay=0.9) if ema else None
    updates = -(-len(loader) // accumulate)
    scheduler, total = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=epochs,
        warmup_epochs=0,
        step_on_epochs=not on_updates,
        updates_per_epoch=updates,
    )
    assert total == epochs
    if start:
        scheduler.step(start)
    step, rows = start * updates, []
    for epoch in range(start, epochs):
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        trained.train()
        remainder = len(loader) % accumulate
        for i, (inputs, targets) in enumerate(loader):
            if mixup is not None:
                inputs, targets = mixup(inputs, targets)
            need = i == len(loader) - 1 or (i + 1) % accumulate == 0
            share = remainder if remainder and i >= len(loader) - remainder else accumulate
            with nullcontext() if amp is None else torch.autocast("cpu", amp):
                loss = task(inputs, targets)["loss"] / share
            (scale(len(inputs)) * loss).backward(create_graph=opt == "adahessian")
            if need:
                if clip is not None:
                    dispatch_clip_grad(task.get_clip_parameters(), value=clip, mode="norm")
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if average is not None:
                    average.update(model, step=step)
                scheduler.step_update(num_updates=step)
        rows.append([_evaluate(net, evaluation, amp) for net in (model, average and average.module) if net is not None])
        scheduler.step(epoch + 1)
    return SimpleNamespace(model=model, average=average, optimizer=optimizer, task=task, rows=rows)


def _evaluate(model, loader, amp):
    model.eval()
    judge = evaluator.ClassificationEvaluator()
    with torch.inference_mode(), nullcontext() if amp is None else torch.autocast("cpu", amp):
        for inputs, targets in loader:
            judge.update(model(inputs), targets)
    return dict(judge.compute())


def summary(session):
    return list(csv.DictReader((session.folder / "summary.csv").open()))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("--grad-accum-steps 3 --clip-grad 0.5", {"accumulate": 3, "clip": 0.5}),
        ("--mixup 0.3 --opt adamw --sched-on-updates", {"mixing": "collate", "opt": "adamw", "on_updates": True}),
        # At 16 pixels torch's bfloat16 convolution on the CPU gives a gradient that does not repeat.
        ("--amp --amp-dtype bfloat16 --img-size 32", {"amp": torch.bfloat16, "size": 32}),
        ("--amp --img-size 32 --epochs 1", {"amp": torch.float16, "size": 32, "epochs": 1}),
        ("--model-dtype bfloat16 --img-size 32 --epochs 1", {"dtype": torch.bfloat16, "size": 32, "epochs": 1}),
        ("--opt adahessian --epochs 1", {"opt": "adahessian", "epochs": 1}),
        (
            "--epochs 2 --start-epoch 1 --loss poly --poly-epsilon 1",
            {"start": 1, "criterion": PolyCrossEntropy(epsilon=1, smoothing=0.1)},
        ),
        ("--no-prefetcher --mixup 0.3 --reprob 0.4", {"use_prefetcher": False, "mixing": "device", "re_prob": 0.4}),
        ("--workers 1 --reprob 0.4", {"num_workers": 1, "re_prob": 0.4}),
        (
            "--workers 1 --use-multi-epochs-loader --bce-loss --smoothing 0",
            {"num_workers": 1, "use_multi_epochs_loader": True, "criterion": BinaryCrossEntropy(smoothing=0)},
        ),
        (
            "--aug-splits 3 --jsd-loss --split-bn --resplit --reprob 0.5 --aa rand-m9-mstd0.5 --epochs 1",
            dict(
                split=3,
                criterion=JsdCrossEntropy(3, smoothing=0.1),
                auto_augment="rand-m9-mstd0.5",
                re_prob=0.5,
                re_split=True,
                epochs=1,
            ),
        ),
        (
            "--train-img-sizes 16 24 --train-batch-sizes 16 8 --variable-batch-loss-scale sqrt --reprob 0.2",
            dict(
                input_size_choices=(16, 24),
                batch_size_choices=(16, 8),
                batch_choice_seed=42,
                scale=lambda rows: (rows / 12) ** 0.5,
                re_prob=0.2,
            ),
        ),
    ],
)
def test_equals_a_loop_around_timms_task(run, flags, options):
    session = run(*flags.split())
    reference = timm_loop(**options)
    trained = load_file(session.folder / "state" / "model.safetensors")
    assert same(trained, reference.model.state_dict())
    assert same(load_file(session.folder / "last.safetensors"), trained)
    found = [[float(row[f"eval_{key}"]) for key in ("loss", "top1", "top5")] for row in summary(session)]
    torch.testing.assert_close(found, [list(row[0].values()) for row in reference.rows])


def test_the_student_is_evaluated_beside_its_moving_average(run):
    session = run("--model-ema", "--model-ema-decay", "0.9", "--reprob", "0.5")
    reference = timm_loop(ema=True, re_prob=0.5)
    assert same(load_file(session.folder / "last.safetensors"), reference.average.module.state_dict())
    for row, (raw, average) in zip(summary(session), reference.rows, strict=True):
        assert float(row["eval_loss"]) == pytest.approx(average["loss"])
        assert float(row["eval_raw_loss"]) == pytest.approx(raw["loss"])


@pytest.mark.parametrize("overlay", [{"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": (3, 16, 24)}])
def test_evaluation_images_are_cropped_as_in_timms_script(overlay):
    config = resolve_data_config({}, model=timm.create_model("test_resnet", pretrained_cfg_overlay=overlay))
    common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    theirs = create_loader(data.Digits("val"), batch_size=4, is_training=False, num_workers=0, device=CPU, **common)
    ours = data.plain_loader(data.Digits("val"), config, 4, num_workers=0, device=CPU)
    assert torch.equal(next(iter(ours))[0], next(iter(theirs))[0])


@pytest.mark.slow
def test_batch_statistics_of_a_moving_average_on_the_cpu_stay(few_digits, tiny, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(train, "distribute_bn", lambda model, *_: told.append(model))
    flags = f"--model-ema --model-ema-force-cpu --epochs 1 --output {tmp_path}".split()
    session = train.Session(parse_args([*tiny, *flags]))
    session.processes = 2
    session.model.require_forward_param_sync = True  # as DistributedDataParallel has it
    session.fit()
    assert told == [session.student]


def test_a_moving_average_on_the_cpu_is_not_evaluated(run):
    session = run("--model-ema", "--model-ema-force-cpu", "--epochs", "1")
    assert same(load_file(session.folder / "last.safetensors"), load_file(session.folder / "state/model.safetensors"))
    assert "eval_raw_top1" not in summary(session)[0]


@pytest.fixture
def teacher(tmp_path):
    """A teacher as timm finds it by name."""
    torch.manual_seed(1)
    made = MODEL | {"channels": (8, 8, 16, 24)}
    args = {key: made[key] for key in ("channels", "stem_width")}
    save_for_hf(timm.create_model("resnet10t", **made), str(tmp_path / "t"), model_args=args)
    return f"local-dir:{tmp_path / 't'}"


@pytest.mark.parametrize(
    ("flags", "kind", "options"),
    [
        (
            "--kd-temperature 2 --task-loss-weight 0.3",
            LogitDistillationTask,
            dict(temperature=2.0, task_loss_weight=0.3),
        ),
        ("--kd-distill-type feature --clip-grad 0.5", FeatureDistillationTask, {}),
    ],
)
def test_timms_own_distillation(run, teacher, flags, kind, options):
    session = run("--kd-model-name", teacher, *flags.split())
    clip = 0.5 if "--clip-grad" in flags else None
    reference = timm_loop(task=lambda model, **more: kind(model, teacher, **options, **more), clip=clip)
    assert same(load_file(session.folder / "last.safetensors"), reference.model.state_dict())


def test_resuming_timms_own_distillation_is_exact(run, teacher):
    flags = ["--kd-model-name", teacher, "--kd-distill-type", "feature"]
    whole = run(*flags, name="whole")
    run(*flags, "--stop-epoch", "1", name="parts")
    parts = run(*flags, "--resume", str(whole.folder.parent / "parts"), name="parts")
    assert same(load_file(whole.folder / "last.safetensors"), load_file(parts.folder / "last.safetensors"))


def torch_weights(path, kind):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)[kind]


def test_a_checkpoint_of_timms_script_is_taken_up(run, tmp_path):
    """Weights, optimizer and moving average of its own saver, and the epoch to go on with."""
    reference = timm_loop(ema=True, epochs=1)
    reference.task.trainable_module_ema = reference.average
    saver = CheckpointSaver(
        reference.model,
        reference.optimizer,
        SimpleNamespace(model="resnet10t"),
        checkpoint_dir=tmp_path,
        task=reference.task,
    )
    saver.args = None
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    session = run("--resume", path, "--model-ema", "--epochs", "3", "--stop-epoch", "2", "--checkpoint-format", "both")
    assert [row["epoch"] for row in summary(session)] == ["1"]
    buffers = [state["momentum_buffer"] for state in session.optimizer.state_dict()["state"].values()]
    assert len(buffers) == len(list(reference.model.parameters()))
    path = str(session.folder / "model_best.pth.tar")
    assert same(load_file(session.folder / "state" / "model.safetensors"), torch_weights(path, "state_dict"))
    assert same(load_file(session.folder / "last.safetensors"), torch_weights(path, "state_dict_ema"))
    fresh = run("--resume", path, "--no-resume-opt", "--epochs", "3", name="fresh")
    assert [row["epoch"] for row in summary(fresh)] == ["2"]
    with pytest.raises(DistillError, match="holds no state of a method"):
        run("--resume", path, "--distill", "kd", "--teacher", "resnet10t")


def test_milestones_and_recovery(run):
    whole = run(name="whole")
    session = run("--save-epochs", "1", "--val-interval", "5", "--recovery-interval", "2", name="kept")
    # A milestone is evaluated, whatever the interval says.
    assert [row["epoch"] for row in summary(session)] == ["0", "1"]
    again = run("--resume", str(session.folder / "milestone-1"), "--val-interval", "5", name="again")
    assert same(load_file(whole.folder / "last.safetensors"), load_file(again.folder / "last.safetensors"))
    assert sorted(path.name for path in session.folder.glob("recovery-*")) == [
        "recovery-1-1.pth.tar",
        "recovery-1-3.pth.tar",
    ]


class Several(torch.utils.data.Dataset):
    """Digits with two labels each: itself, and whether it is even."""

    def __init__(self, split):
        self.digits = data.Digits(split)
        self.encode = MultiLabelTarget(11)

    transform = property(lambda self: self.digits.transform, lambda self, made: setattr(self.digits, "transform", made))

    def __getitem__(self, row):
        image, label = self.digits[row]
        return image, self.encode([label, 10] if label % 2 == 0 else [label])

    def __len__(self):
        return len(self.digits)


def test_several_labels_an_image(run, monkeypatch, tmp_path):
    monkeypatch.setattr(data.timm.data, "create_dataset", lambda name, split, **_: Several(split))
    flags = ["--task", "multilabel", "--num-classes", "11", "--dataset", "hfds/x", "--epochs", "1", "--loss", "asl"]
    session = run(*flags, "--asl-clip", "0", "--crop-pct", "1", "--interpolation", "bicubic")
    judge = MultiLabelClassificationEvaluator()
    session.student.eval()
    with torch.inference_mode():
        for images, targets in session.data.evaluation:
            judge.update(session.student(images), targets)
    for key, value in judge.compute().items():
        assert session.results["evaluation"][key] == pytest.approx(value)
    assert session.results["metric"] == "map"
    with pytest.raises(DistillError, match="--eval-metric top1"):
        run(*flags, "--eval-metric", "top1")


def test_tta_averages_neighbours_and_images_are_saved(run):
    session = run("--tta", "2", "--epochs", "1", "--save-images", "--fast-norm", "--synchronize-step")
    scores = []
    session.student.eval()
    with torch.inference_mode():
        for images, targets in session.data.evaluation:
            found = session.student(images)
            scores.append(((found[0::2] + found[1::2]) / 2).argmax(-1) == targets[::2])
    assert session.results["evaluation"]["top1"] == pytest.approx(100 * torch.cat(scores).float().mean().item())
    assert list(session.folder.glob("train-batch-*.jpg"))


def test_tta_averages_rows_that_come_together(run, monkeypatch):
    """Others would be of several images: processes take every second row."""
    with pytest.raises(DistillError, match=r"--tta 4 .*: let --validation-batch-size \(16\) and the .* \(26\) be"):
        run("--tta", "4")
    with pytest.raises(DistillError, match=r"rows of what is evaluated \(26, 26\) be multiples"):
        run("--tta", "4", "--ood-dataset", "digits")
    monkeypatch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(DistillError, match="processes take turns at them: use one"):
        data.check_average(parse_args(["--tta", "2", "-b", "16"]), range(26))


def test_a_script_of_the_student_trains_alike(run):
    plain, scripted = (run("--epochs", "1", *flags, name=f"run{len(flags)}") for flags in ([], ["--torchscript"]))
    assert same(load_file(scripted.folder / "last.safetensors"), load_file(plain.folder / "last.safetensors"))


def test_naflex_batches(run):
    network = "--model naflexvit_base_patch16_gap --model-kwargs depth=1 embed_dim=16 num_heads=2 patch_size=4"
    flags = f"{network} --img-size 16 --naflex-loader --naflex-train-seq-lens 9 16 --naflex-max-seq-len 16 --epochs 1"
    session = run(*flags.split())
    inputs, labels = next(iter(session.data.evaluation))
    assert inputs["patches"].shape == (16, 16, 48)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(session.student.eval()(inputs), labels)
    assert 0 < session.results["evaluation"]["loss"] < 5
    assert loss.isfinite()
