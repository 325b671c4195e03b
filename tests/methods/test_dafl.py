"""dafl: the joint step, its switches, its generator, and that nothing of it needs data."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_kit import keep, kept, on_two_processes
from torch import Tensor, nn

import kd_plugins
from kd_plugins import Batch, Distiller, DistillError
from kd_plugins import functional as KF
from kd_plugins.host import Host
from kd_plugins.nn.generator import Generator
from kd_plugins.reading.nets import Nets
from kd_plugins.run import Run
from kd_plugins.testing import TinyNet

BATCH = Batch.of(size=16, shape=(3, 12, 12), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)


def bound(
    student: nn.Module, teacher: nn.Module, steps: int = 4, epoch: int | None = None, **options: Any
) -> tuple[Distiller, Nets, Run]:
    distiller = kd_plugins.create_distiller("dafl", **{"latent": 6, "width": 4, **options})
    nets = kd_plugins.bind(distiller, student, teacher, batch=BATCH, total_steps=steps, epoch_steps=epoch)
    distiller.host.seed(1)
    return distiller, nets, kd_plugins.make_optimizers(distiller, torch.optim.SGD(student.parameters(), 0.1), nets)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 64), (224, 224), (299, 299), (12, 20)])
def test_images_have_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images = Generator(3, (2, *size), 8)(torch.randn(4, 3))
    assert images.shape == (4, 2, *size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    assert (images.var((0, 2, 3), unbiased=False) > 0.1).all()


def test_a_step_is_that_of_the_released_code() -> None:
    torch.manual_seed(0)
    student, teacher = TinyNet(4), TinyNet(8)
    options = {"one_hot": 0.5, "activation": 0.2, "information": 3.0, "temperature": 2.0}
    distiller, nets, run = bound(student, teacher, **options)
    distiller.host.seed(1)
    images = distiller.images(distiller.host.randn(16, 6))
    y = teacher(images)
    features = teacher.layer2(teacher.layer1(teacher.conv1(images).relu())).mean((2, 3))
    p = y.softmax(1).mean(0)
    expected_g = (
        0.5 * nn.functional.cross_entropy(y, y.argmax(1)) - 0.2 * features.abs().mean() + 3.0 * (p * p.log10()).sum()
    )
    expected_s = KF.kd(student(images.detach()), y.detach(), 2.0)
    distiller.host.seed(1)
    (turn,) = distiller.turns(nets, BATCH)
    torch.testing.assert_close(sum(turn["generator"].values()), expected_g)
    torch.testing.assert_close(sum(turn["student"].values()), expected_s)
    reached = torch.autograd.grad(
        sum(turn["student"].values()), list(distiller.images.parameters()), allow_unused=True, retain_graph=True
    )
    assert all(g is None for g in reached)
    before = [p.detach().clone() for p in (*student.parameters(), *distiller.images.parameters())]
    fixed = {k: v.clone() for k, v in teacher.state_dict().items()}
    run.step(BATCH)
    after = [*student.parameters(), *distiller.images.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) // 2
    assert all(torch.equal(v, fixed[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("off", ["one_hot", "activation", "information"])
def test_each_loss_can_be_switched_off(off: str) -> None:
    distiller, nets, _ = bound(TinyNet(4), TinyNet(8), **{off: 0.0})
    (turn,) = distiller.turns(nets, BATCH)
    assert set(turn["generator"]) == {"one_hot", "activation", "information"} - {off}


@pytest.mark.parametrize("options", [dict.fromkeys(("one_hot", "activation", "information"), 0.0), {"inputs": "noise"}])
def test_an_untrained_generator_and_noise_as_baselines(options: dict[str, Any]) -> None:
    distiller, _, run = bound(TinyNet(4), TinyNet(8), **options)
    before = [p.detach().clone() for p in distiller.images.parameters()]
    run.step(BATCH)
    assert list(run.groups) == []
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.images.parameters(), strict=True))


def test_options_stand_over_presets() -> None:
    distiller = kd_plugins.create_distiller("dafl", preset="mmrazor", one_hot=0.3, **{"generator.lr": 0.5})
    assert (distiller.one_hot, distiller.temperature) == (0.3, 6)
    _, _, run = bound(TinyNet(4), TinyNet(8), preset="mmrazor", latent=6)
    assert run["generator"].optimizer.param_groups[0]["lr"] == 1e-3


def test_options_take_effect_in_the_training() -> None:
    distiller, nets, _ = bound(TinyNet(4), TinyNet(8), temperature=1.0)
    (before,) = distiller.turns(nets, BATCH)
    distiller.host.seed(1)
    distiller.one_hot, distiller.activation, distiller.temperature = 2 * distiller.one_hot, 0.0, 4.0
    (after,) = distiller.turns(nets, BATCH)
    assert set(after["generator"]) == {"one_hot", "information"}
    torch.testing.assert_close(after["generator"]["one_hot"], 2 * before["generator"]["one_hot"])
    assert not torch.equal(after["student"]["kd"], before["student"]["kd"])
    distiller, nets, _ = bound(TinyNet(4), TinyNet(8), one_hot=0.0, activation=0.0, information=0.0)
    distiller.information = 5.0
    with pytest.raises(DistillError, match="information was 0 when dafl was set up: begin with a value above 0"):
        list(distiller.turns(nets, BATCH))


@pytest.mark.parametrize(
    ("epoch", "names"), [(3, [f"epoch {n}" for n in range(1, 5)]), (None, [f"step {n}" for n in range(2, 13, 2)])]
)
def test_it_shows_images_of_each_epoch_and_goes_on_from_its_state(
    epoch: int | None, names: list[str], tmp_path: Path
) -> None:
    batch = dataclasses.replace(BATCH, shape=(3, 12, 130))

    def begun() -> Run:
        torch.manual_seed(0)
        student, distiller = TinyNet(4), kd_plugins.create_distiller("dafl", latent=6, width=4)
        nets = kd_plugins.bind(distiller, student, TinyNet(8), batch=batch, total_steps=12, epoch_steps=epoch)
        distiller.host.seed(1)
        return kd_plugins.make_optimizers(distiller, torch.optim.SGD(student.parameters(), 0.1), nets)

    whole, cut, resumed = begun(), begun(), begun()
    assert whole.distiller.pictures() == []
    for step in range(12):
        whole.step(batch)
        if step < 7:
            cut.step(batch)
    cut.save(tmp_path)
    resumed.load(tmp_path)
    assert len(resumed.distiller.pictures()[0].rows) == 7 // (epoch or 2)
    for _ in range(5):
        resumed.step(batch)
    (expected,), (found,) = (run.distiller.pictures() for run in (whole, resumed))
    assert list(found.rows) == list(expected.rows) == names
    for name in names:
        assert found.rows[name][0].shape == (3, 6, 64)  # of 12 x 130
        assert all(map(torch.equal, found.rows[name], expected.rows[name]))


def test_images_of_many_epochs_are_of_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["kd_plugins.methods.dafl"], "_EPOCHS", 3)
    distiller, _, run = bound(TinyNet(4), TinyNet(8), steps=10, epoch=2)
    for _ in range(10):
        run.step(BATCH)
    assert list(distiller.pictures()[0].rows) == ["epoch 2", "epoch 4"]


def test_a_state_without_images_is_refused_in_a_sentence(tmp_path: Path) -> None:
    distiller, _, run = bound(TinyNet(4), TinyNet(8), steps=4)
    del distiller.grids
    run.save(tmp_path)
    _, _, resumed = bound(TinyNet(4), TinyNet(8), steps=4)
    with pytest.raises(DistillError, match=r"(?s)does not fit the distiller of this run.*grids"):
        resumed.load(tmp_path)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        kd_plugins.create_distiller("dafl").load_state_dict(resumed.distiller.state_dict())


def test_a_dead_generator_ends_the_training() -> None:
    distiller, _, run = bound(TinyNet(4), TinyNet(8), steps=100)
    for step in range(60):
        if step == 20:
            # As Adam at a high rate leaves it: every pixel's tanh is 1.
            with torch.no_grad():
                distiller.images.layers[-3].bias.fill_(1e4)
        if step == 50:
            with pytest.raises(
                DistillError, match=r"one image of every noise at step 50.*generator\.lr.*more than 50 updates ago"
            ):
                run.step(BATCH)
            break
        run.step(BATCH)


def test_refusals() -> None:
    with pytest.raises(DistillError, match="must know how many and of what shape"):
        kd_plugins.bind(kd_plugins.create_distiller("dafl"), TinyNet(4), TinyNet(8), batch=Batch.of(size=4))
    with pytest.raises(DistillError, match="same K >= 2 classes"):
        bound(TinyNet(4), TinyNet(8, classes=5))
    with pytest.raises(DistillError, match="same K >= 2 classes"):
        bound(TinyNet(4, classes=1), TinyNet(8, classes=1))  # whose softmax is always 1
    with pytest.raises(DistillError, match="above 1"):
        kd_plugins.create_distiller("dafl", log_base=1.0)


def test_a_teacher_with_adapters_says_what_it_says_without() -> None:
    """Adapters begin with nothing; the layer before the classifier is found in the model that they are in."""
    peft, hf = (pytest.importorskip(name, reason=f"{name} is not installed") for name in ("peft", "transformers"))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 12, "patch_size": 6}
    teacher = hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_hidden_layers=1, num_labels=4))
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    told = []
    for network in (teacher, peft.get_peft_model(copy.deepcopy(teacher), config)):
        torch.manual_seed(0)
        distiller = kd_plugins.create_distiller("dafl", width=4, latent=5)
        batch = Batch.of(size=4, shape=(3, 12, 12))
        nets = kd_plugins.bind(distiller, TinyNet(4), network, batch=batch, total_steps=2)
        told.append(next(iter(distiller.turns(nets, batch)))["generator"])
    assert told[0] == told[1]


def spread(rows: slice) -> tuple[Tensor, Tensor]:
    """The spread over the classes of some rows of a batch, and its gradient."""
    logits = (3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))[rows].requires_grad_()
    loss = KF.dafl_information(logits, mean=Host().mean)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


class ClassifierFirst(nn.Module):
    """Its last linear layer is not the one that makes the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.project = nn.Linear(6, 4), nn.Conv2d(3, 8, 3), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.project(self.conv(x).mean((2, 3))).relu())
        return scores


def test_a_layer_that_does_not_make_the_scores_is_not_taken_for_the_classifier() -> None:
    with pytest.raises(DistillError, match=r"last linear layer, project, does not make them.*layer="):
        bound(TinyNet(4), ClassifierFirst())
    assert bound(TinyNet(4), ClassifierFirst(), layer="fc:in")[0].features == "fc:in"


def test_the_layer_that_makes_the_scores_may_be_a_convolution_or_of_another_precision() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    batch = Batch.of(size=2, shape=(3, 32, 32))
    distiller = kd_plugins.create_distiller("dafl", width=4, latent=5)
    kd_plugins.bind(distiller, TinyNet(4), timm.create_model("dla46_c", num_classes=4), batch=batch)
    assert distiller.features == "fc:in"
    teacher = TinyNet(8).bfloat16()
    teacher.register_forward_hook(lambda _module, _args, scores: scores.float())
    bound(TinyNet(4), teacher)


def test_the_class_mean_is_that_of_all_processes(tmp_path: Path) -> None:
    on_two_processes(__file__, str(tmp_path))
    loss, gradient = spread(slice(0, 8))
    for rank, (found, own) in enumerate(kept(tmp_path)):
        torch.testing.assert_close(found, loss)
        # Gradients are averaged over the processes, each of which has half of the rows.
        torch.testing.assert_close(own / 2, gradient[4 * rank : 4 * rank + 4])


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    first = 4 * torch.distributed.get_rank()
    keep(spread(slice(first, first + 4)), sys.argv[1])
