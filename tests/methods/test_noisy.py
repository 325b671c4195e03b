"""noisy: what each kind of noise does, that without any it is kd, and whom it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from kd_plugins import Batch, Distiller, DistillError, bind, create_distiller, host, make_optimizers
from kd_plugins.reading.nets import Nets
from kd_plugins.testing import TinyNet, tiny_batches


class Seen(TinyNet):
    """Remembers what it was asked."""

    asked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked = x.detach().clone()
        return super().forward(x)


class Dropped(TinyNet):
    def __init__(self) -> None:
        super().__init__(8)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.layer1(self.conv1(x).relu()))
        return self.head(self.drop(self.layer2(maps).mean((2, 3))))


class Text(nn.Module):
    """A classifier of token ids that remembers its embeddings with the noise; the padding's are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 64, padding_idx=0), nn.Linear(64, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.seen = self.embedding(input_ids)
        return self.head((self.seen * attention_mask.unsqueeze(-1)).mean(1))


class Functional(TinyNet):
    """Its dropout is a function and follows its own mode, as in timm's networks."""

    drop_rate = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.layer2(self.layer1(self.conv1(x).relu())).mean((2, 3))
        return self.head(nn.functional.dropout(maps, self.drop_rate, self.training))


def bound(options: dict[str, Any], student: nn.Module, *teachers: nn.Module) -> tuple[Distiller, Nets, Batch]:
    distiller, batch = create_distiller("noisy", **options), tiny_batches(1)[0]
    nets = bind(distiller, student, list(teachers), batch=batch, total_steps=3)
    distiller.host.seed(3)
    return distiller, nets, batch


def trained(name: str, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    student, teacher, batches = TinyNet(4), TinyNet(8), tiny_batches(3)
    distiller = create_distiller(name, **options)
    nets = bind(distiller, student, teacher, batch=batches[0], total_steps=3)
    run = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets)
    losses = [run.step(batch) for batch in batches]
    return [*losses, *(p.detach() for p in student.parameters())]


def test_without_noise_it_is_kd_to_the_last_bit(caplog: pytest.LogCaptureFixture) -> None:
    for a, b in zip(trained("noisy", fickle=False, sigma=0.0, messy=0.0), trained("kd"), strict=True):
        assert torch.equal(a, b)
    assert "without noise is kd" in caplog.text


@pytest.mark.parametrize("name", ["noisy", "noisy+nst"])
def test_every_noise_changes_the_training(name: str) -> None:
    given: dict[str, Any] = {"nst.layers": ("layer2",)} if "+" in name else {}
    prefix = "noisy." if "+" in name else ""
    plain = trained(name, **given)
    for option in ({"sigma": 0.2}, {"messy": 0.5}, {"logit_sigma": 0.5}):
        noisy, again = (trained(name, **given, **{prefix + k: v for k, v in option.items()}) for _ in range(2))
        assert not torch.equal(noisy[-1], plain[-1])
        assert all(torch.equal(a, b) for a, b in zip(noisy, again, strict=True))


def test_the_student_sees_noise_in_pixel_units_and_the_teacher_the_clean_image() -> None:
    student, teacher = Seen(4), Seen(8)
    distiller, nets, batch = bound({"sigma": 0.1}, student, teacher)
    next(iter(distiller.turns(nets, batch)))
    assert torch.equal(teacher.asked, batch.inputs)
    pixels = (student.asked - batch.inputs) * torch.as_tensor(batch.std).view(1, -1, 1, 1)
    assert pixels.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(pixels.mean().item()) < 4 * 0.1 / math.sqrt(pixels.numel())
    first = student.asked
    next(iter(distiller.turns(nets, batch)))
    assert not torch.equal(first, student.asked)


def test_noise_on_embeddings_does_not_follow_the_padding() -> None:
    student, ids, mask = Text(), torch.randint(1, 20, (8, 6)), torch.ones(8, 6, dtype=torch.long)
    expected = student.embedding(ids).std().item()
    for padding in (0, 30):
        given = {"input_ids": ids, "attention_mask": mask}
        batch = Batch.of({k: nn.functional.pad(v, (padding, 0)) for k, v in given.items()}, torch.arange(8) % 4)
        distiller = create_distiller("noisy", sigma=1.0)
        next(iter(distiller.turns(bind(distiller, student, Text()), batch)))
        noise = (student.seen - student.embedding(batch.inputs))[:, padding:]
        assert noise.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_noise_reaches_the_embeddings_that_run_or_it_is_said(tied: bool) -> None:
    """As in T5 and BART, where encoder and decoder have the weights of a module that is never called."""
    student, batch = Text(), Batch.of({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)})
    student.shared = nn.Embedding(20, 64)
    student.get_input_embeddings = lambda: student.shared
    if tied:
        student.embedding.weight = student.shared.weight
    distiller = create_distiller("noisy", sigma=1.0, alpha=1.0)
    turns = iter(distiller.turns(bind(distiller, student, Text()), batch))
    if not tied:
        with pytest.raises(DistillError, match="forward of Text called none of shared: let get_input_embeddings"):
            next(turns)
        return
    next(turns)
    assert (student.seen - student.embedding(batch.inputs)).std().item() > 0.1


def test_texts_of_other_lengths_have_other_noise_on_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank, length in ((0, 20), (1, 10)):
        monkeypatch.setattr(host, "world", lambda rank=rank: (rank, 2))
        distiller = create_distiller("noisy", sigma=1.0)
        distiller.host.seed(5)
        drawn.append(distiller._noise(torch.zeros(4, length, 16)))
    assert torch.isin(drawn[1], drawn[0]).float().mean() < 0.1


def test_messy_labels_are_wrong_ones_drawn_evenly_per_example_and_never_the_ignored() -> None:
    distiller, _, batch = bound({"messy": 0.3}, TinyNet(4), TinyNet(8))
    labels = torch.arange(4).repeat(5000)
    labels[:8] = batch.ignore_index
    drawn = distiller.messy_labels(Batch(labels=labels))
    changed = drawn != labels
    assert torch.equal(drawn[:8], labels[:8])
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.02)
    for label in range(4):
        wrong = drawn[(labels == label) & changed]
        assert set(wrong.tolist()) == set(range(4)) - {label}
        assert all(n == pytest.approx(len(wrong) / 3, rel=0.15) for n in wrong.unique(return_counts=True)[1].tolist())
    always, _, _ = bound({"messy": 1.0}, TinyNet(4), TinyNet(8))
    assert (always.messy_labels(Batch(labels=labels[8:])) != labels[8:]).all()


@pytest.mark.parametrize("teacher", [Dropped(), Functional(8)], ids=["layer", "function"])
def test_a_fickle_teacher_drops_out_and_keeps_its_statistics(teacher: nn.Module) -> None:
    _, nets, batch = bound({"fickle": True}, TinyNet(4), teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert not torch.equal(*(nets.teacher(batch, dropout=True).logits for _ in range(2)))
    assert torch.equal(*(nets.teacher(batch).logits for _ in range(2)))
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


class Recurrent(nn.Module):
    """Dropout between the layers of an LSTM, in a function; a path and a statistic that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob, self.norm = 0.5, nn.BatchNorm1d(4)
        self.norm.drop = nn.Dropout()  # as timm's layer of both
        self.body, self.head = nn.LSTM(3, 4, 2, dropout=0.4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.head(self.norm(self.body(x.flatten(2).transpose(1, 2).transpose(0, 1))[0][-1]))


def test_a_fickle_teacher_drops_out_in_functions_of_its_layers() -> None:
    teacher = Recurrent()
    _, nets, batch = bound({"fickle": True}, TinyNet(4), teacher)
    before = copy.deepcopy(teacher.state_dict())
    assert not torch.equal(*(nets.teacher(batch, dropout=True).logits for _ in range(2)))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(nets.teacher(batch).logits, teacher(batch.inputs))


def test_messy_labels_know_the_classes_of_every_batch() -> None:
    distiller, nets, batch = bound({"messy": 0.5}, TinyNet(4), TinyNet(8))
    for net in nets:
        net.module.head = nn.LazyLinear(6)
    with pytest.raises(DistillError, match="among the 4 classes that the first batch had, and this one has 6"):
        list(distiller.turns(nets, batch))
    distiller, nets, batch = bound({"messy": 0.5}, TinyNet(4), TinyNet(8))
    mixed = batch.with_labels(torch.nn.functional.one_hot(batch.labels, 4).float())
    for labels in (mixed, batch.with_labels(None)):  # hosts mix after the set-up
        with pytest.raises(DistillError, match="these labels are soft or missing: train without mixup"):
            list(distiller.turns(nets, labels))
    distiller, nets, batch = bound({}, TinyNet(4), TinyNet(8))
    distiller.messy = 0.5
    with pytest.raises(DistillError, match="messy was 0 when noisy was set up"):
        list(distiller.turns(nets, batch))


@pytest.mark.parametrize(("alpha", "warned"), [(1.0, True), (0.9, False)])
def test_labels_that_nothing_reads_are_warned_of(alpha: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    bound({"messy": 0.5, "alpha": alpha}, TinyNet(4), TinyNet(8))
    assert ("messy draws labels, and alpha=1 reads none" in caplog.text) == warned


def test_soft_labels_do_not_come_back_without_a_teacher() -> None:
    distiller, nets, batch = bound({"alpha": 0.0, "messy": 0.5}, TinyNet(4))
    distiller.alpha = 0.5
    with pytest.raises(DistillError, match="alpha was 0 when noisy was set up: begin with a value above 0"):
        list(distiller.turns(nets, batch))


def test_noise_on_the_teachers_logits_is_relative() -> None:
    distiller, nets, batch = bound({"logit_sigma": 0.5, "alpha": 1.0, "temperature": 1.0}, TinyNet(4), TinyNet(8))
    student, teacher = nets.student(batch), nets.teacher(batch)
    term = distiller.loss(student, teacher, batch)["kd"]
    distiller.host.seed(3)
    noisy = teacher.logits * (1 + 0.5 * distiller.host.randn(*teacher.logits.shape))
    p = noisy.double().softmax(1)
    expected = (p * (p.log() - student.logits.double().log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_network_is_trained_with_noise_and_without_a_teacher() -> None:
    distiller, nets, batch = bound({"alpha": 0.0, "messy": 0.5, "sigma": 0.1}, TinyNet(4))
    (turn,) = distiller.turns(nets, batch)
    assert list(turn["student"]) == ["task"]
    with pytest.raises(DistillError, match="alpha=0 takes no teacher"):
        create_distiller("noisy", alpha=0.0, fickle=True)


def test_refusals() -> None:
    with pytest.raises(DistillError, match="fickle=true needs a teacher with dropout"):
        bound({"fickle": True}, TinyNet(4), TinyNet(8))
    soft = Batch(torch.randn(2, 3, 12, 12), torch.rand(2, 4))
    with pytest.raises(DistillError, match="messy needs the number of the true class"):
        bind(create_distiller("noisy", messy=0.1), TinyNet(4), TinyNet(8), batch=soft)
    bare = Batch(torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    with pytest.raises(DistillError, match="mean and std"):
        bind(create_distiller("noisy", sigma=0.1), TinyNet(4), TinyNet(8), batch=bare)
    grey = Batch(torch.randn(2, 1, 12, 12), bare.labels, std=(0.5, 0.5, 0.5))
    with pytest.raises(DistillError, match=r"std of each channel, got 3 for images \[2, 1, 12, 12\]"):
        bind(create_distiller("noisy", sigma=0.1), TinyNet(4, channels=1), TinyNet(8, channels=1), batch=grey)
    cached = Batch(bare.inputs, bare.labels, teacher_logits=torch.randn(2, 4))
    with pytest.raises(DistillError, match="leave its cached logits out"):
        bind(create_distiller("noisy", fickle=True), TinyNet(4), Dropped(), batch=cached)
