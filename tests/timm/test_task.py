"""DistillationTask in the loop of timm's train.py."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kd_plugins
from kd_plugins import Batch, Distiller, DistillError, Needs, Reads, Stage, View
from kd_timm import DistillationTask

SMALL = dict(num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
LARGE = dict(num_classes=10, channels=(8, 8, 16, 24), stem_width=8)
CONFIG = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


class Connected(Distiller):
    """Regression of the last stage through a learned map."""

    def __init__(self, *, after: float = 0.0) -> None:
        super().__init__()
        self.connector = nn.LazyConv2d(24, 1)
        self.updates = 0

    def needs(self) -> Needs:
        return Needs(student=Reads(features=(-1,)), teacher=Reads(features=(-1,)))

    def setup(self, nets, batch: Batch) -> None:
        self.connector(nets.student(batch).features[-1])

    def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
        return {"regress": (self.connector(student.features[-1]) - teacher.features[-1]).pow(2).mean()}

    def after_update(self) -> None:
        self.updates += 1


class TwoTurns(Distiller):
    """Yields a turn of another group before the student's."""

    def turns(self, nets, batch: Batch):
        yield {"critic": {"x": nets.student(batch).logits.mean()}}
        yield {"student": {"y": nets.student(batch).logits.mean()}}


class Staged(Distiller):
    """Has two stages."""

    def stages(self) -> list[Stage]:
        return [Stage("a"), Stage("b")]


class WithCritic(Distiller):
    """Has an optimizer of its own."""

    def __init__(self, *, width: int = 3) -> None:
        super().__init__()
        self.critic = nn.Linear(width, 1)

    def extras(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = timm.create_model("resnet10t", **LARGE)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return timm.create_model("resnet10t", **SMALL), teacher


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(n)
    ]


def timms_loop(task: DistillationTask, data) -> torch.optim.Optimizer:
    """The order of calls in timm's train_one_epoch."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9)
    task.get_trainable_module().train()
    for step, (images, labels) in enumerate(data, 1):
        result = task(images, labels)
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    return optimizer


@pytest.mark.parametrize("name", ["kd", "nst", "kd+nst"])
def test_equals_a_bare_loop(networks, name):
    student, teacher = networks
    start = {k: v.clone() for k, v in student.state_dict().items()}
    options = {"layers": (2,)} if "nst" in name else {}
    task = DistillationTask(student, name, teacher, distiller_args=options, data_config=CONFIG, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9)
    task.get_trainable_module().train()
    for images, labels in batches():
        task(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    trained = {k: v.clone() for k, v in student.state_dict().items()}

    student.load_state_dict(start)
    distiller = kd_plugins.create_distiller(name)
    mean, std = (torch.tensor(CONFIG[k]).view(1, 3, 1, 1) for k in ("mean", "std"))

    class InPixels(nn.Module):
        """The teacher takes pixels as they are: its own mean is 0 and std 1."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self, images: Tensor) -> Tensor:
            return self.teacher(images * std + mean)

    layers = {} if name == "kd" else {"layers": "layer2", "teacher_layers": "teacher.layer2"}
    distiller = kd_plugins.create_distiller(name, **layers)
    nets = kd_plugins.bind(distiller, student, InPixels(), batch=Batch.of(*batches(1)[0]))
    plain = create_optimizer_v2(student, opt="sgd", lr=0.1, momentum=0.9)
    optimizers = kd_plugins.make_optimizers(distiller, plain, nets)
    student.train()
    for images, labels in batches():
        for turn in distiller.turns(nets, Batch.of(images, labels)):
            kd_plugins.play(turn, optimizers)
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value, trained[key], atol=1e-6, rtol=1e-5)


def test_connectors_train_with_the_student_and_are_task_state(networks, tmp_path):
    student, teacher = networks
    task = DistillationTask(student, Connected(), teacher, data_config=CONFIG, verbose=False)
    before = task.distiller.connector.weight.clone()
    task.setup_ema(decay=0.5)
    optimizer = timms_loop(task, batches())
    assert not torch.equal(before, task.distiller.connector.weight)
    assert task.distiller.updates == 3
    assert task.get_eval_model() is student
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training

    CheckpointSaver(student, optimizer, task=task, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert saved["state_dict"].keys() == student.state_dict().keys() == saved["state_dict_ema"].keys()
    assert saved["task_state"]["distiller"].keys() == {"connector.weight", "connector.bias"}
    assert "task_state_ema" in saved
    model = timm.create_model("resnet10t", checkpoint_path=tmp_path / "last.pth.tar", **SMALL)
    assert torch.equal(model.fc.weight, task.get_eval_model(ema=True).fc.weight)

    again = DistillationTask(timm.create_model("resnet10t", **SMALL), Connected(), teacher, verbose=False)
    again.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    assert torch.equal(again.distiller.connector.weight, task.distiller.connector.weight)


def test_result_has_scores_and_terms(networks):
    student, teacher = networks
    task = DistillationTask(student, "kd", teacher, verbose=False)
    images, labels = batches(1)[0]
    result = task(images, labels)
    assert result["output"].shape == (8, 10)
    assert {"loss", "output", "task", "kd"} <= result.keys()
    torch.testing.assert_close(result["loss"], result["task"] + result["kd"])


def test_layer_decay_reaches_the_student(networks):
    student, teacher = networks
    task = DistillationTask(student, Connected(), teacher, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    alone = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    for group in alone.param_groups:
        assert all(scale[id(p)] == group["lr_scale"] for p in group["params"])
    assert scale[id(task.distiller.connector.weight)] == 1.0


@pytest.mark.parametrize(
    ("distiller", "words"),
    [
        (TwoTurns(), "more than one turn"),
        (Staged(), "several stages"),
        (WithCritic(), "optimizers of its own"),
        ("cwd", "timm's train.py trains classifiers: choose a method that fits"),
    ],
)
def test_what_one_backward_cannot_play_is_refused(networks, distiller, words):
    student, teacher = networks
    with pytest.raises(DistillError, match=words):
        DistillationTask(student, distiller, teacher, verbose=False)(*batches(1)[0])


def test_other_classes_are_refused(networks):
    student, _ = networks
    with pytest.raises(DistillError, match="classes"):
        DistillationTask(student, "kd", timm.create_model("resnet10t", **{**SMALL, "num_classes": 7}), verbose=False)
    with pytest.raises(DistillError, match="teacher"):
        DistillationTask(student, "kd", verbose=False)


@pytest.mark.parametrize("classes", [7, 0])
def test_feature_methods_take_a_teacher_of_other_classes(networks, classes):
    student, _ = networks
    teacher = timm.create_model("resnet10t", **{**SMALL, "num_classes": classes})
    task = DistillationTask(student, "nst", teacher, distiller_args={"layers": (2,)}, verbose=False)
    assert task(*batches(1)[0])["nst"] > 0
    with pytest.raises(DistillError, match="7 classes apart" if classes else "has no classifier"):
        DistillationTask(student, "kd+nst", teacher, distiller_args={"nst.layers": (2,)}, verbose=False)


@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy()])
def test_one_logit_of_a_softmax_is_refused(criterion):
    student, teacher = (timm.create_model("resnet10t", **{**SMALL, "num_classes": 1}) for _ in range(2))
    with pytest.raises(DistillError, match="softmax of one class is always 1"):
        DistillationTask(student, "kd", teacher, criterion=criterion, verbose=False)
    loss = nn.BCEWithLogitsLoss()
    task = DistillationTask(student, "kd", teacher, criterion=loss, data_config=CONFIG, verbose=False)
    result = task(batches(1)[0][0], torch.zeros(8, 1))
    torch.testing.assert_close(result["task"], 0.1 * loss(result["output"], torch.zeros(8, 1)))


def test_one_output_under_a_distance_is_a_number():
    student, teacher = (timm.create_model("resnet10t", **{**SMALL, "num_classes": 1}) for _ in range(2))
    task = DistillationTask(student, "kd", teacher, criterion=nn.MSELoss(), verbose=False)
    images = batches(1)[0][0]
    with torch.no_grad():
        target = teacher.eval()(images)
        result = task(images, torch.zeros(8, 1))
    torch.testing.assert_close(result["kd"], 0.9 * (result["output"] - target).square().mean())


def test_a_teacher_that_names_its_classes_is_read_in_the_students_order(networks):
    student, teacher = networks
    names = [f"class {i}" for i in range(10)]
    teacher.pretrained_cfg["label_names"] = names[::-1]
    task = DistillationTask(student, "kd", teacher, data_config=CONFIG, classes=names, verbose=False)
    student.eval()
    images, labels = batches(1)[0]
    with torch.no_grad():
        scores = task._nets.teachers[0](task._batch(images, labels), reads=Reads()).logits
        theirs = teacher(task._nets.teachers[0].transform(images))
    assert torch.equal(scores, theirs.flip(1))
    teacher.pretrained_cfg["label_names"] = [*names[1:], "another"]
    with pytest.raises(DistillError, match="does not know the student's classes class 0"):
        DistillationTask(student, "kd", teacher, data_config=CONFIG, classes=names, verbose=False)


def test_a_teacher_of_images_that_are_no_numbers_is_refused(networks):
    student, teacher = networks
    teacher.pretrained_cfg["std"] = (0.2, 0.0, 0.2)
    with pytest.raises(DistillError, match="The teacher ResNet: expected a finite mean and a positive std"):
        DistillationTask(student, "kd", teacher, data_config=CONFIG, verbose=False)


def test_two_heads_are_refused():
    small = dict(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **small)
    task = DistillationTask(model, "kd", timm.create_model("resnet10t", **SMALL), verbose=False)
    model.train()
    assert task(*batches(1)[0])["output"].shape == (8, 10)
    model.set_distilled_training(True)
    with pytest.raises(DistillError, match="returns 2 scores in training"):
        task(*batches(1)[0])


def test_one_process_of_ddp_gives_the_same_gradients(networks):
    student, teacher = networks
    task = DistillationTask(student, Connected(), teacher, data_config=CONFIG, verbose=False)
    student.eval()
    images, labels = batches(1)[0]
    task(images, labels)["loss"].backward()
    alone = [p.grad.clone() for p in task.get_clip_parameters()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        task.prepare_distributed()
        assert isinstance(task.trainable_module, DistributedDataParallel)
        assert task.get_eval_model() is student
        for parameter in task.get_clip_parameters():
            parameter.grad = None
        task(images, labels)["loss"].backward()
        for parameter, gradient in zip(task.get_clip_parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()
