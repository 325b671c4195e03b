"""What the short methods read of a batch; their values are in tests/functional."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kd_plugins import Batch, DistillError, View, bind, create_distiller
from kd_plugins import functional as KF
from kd_plugins.reading.view import Features
from kd_plugins.testing import TinyNet


def scores(*shape: int, seed: int = 0) -> View:
    return View(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def test_dkd_grows_over_its_warm_up_and_needs_classes() -> None:
    student, teacher, batch = scores(4, 5), scores(4, 5, seed=1), Batch(labels=torch.tensor([0, 4, 2, 2]))
    full = KF.dkd(student.logits, teacher.logits, batch.labels, 0.5, 2.0, 3.0)
    distiller = create_distiller("dkd", alpha=0.5, beta=2.0, temperature=3.0, warmup=0.2)
    with pytest.raises(DistillError, match="total_steps"):
        distiller.loss(student, teacher, batch)
    distiller.progress.total = 100
    for step, share in ((0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)):
        distiller.progress.step = step
        torch.testing.assert_close(distiller.loss(student, teacher, batch)["dkd"], share * full)
    with pytest.raises(DistillError, match="dkd needs the number of the true class"):
        distiller.loss(student, teacher, Batch(labels=torch.rand(4, 5)))


@pytest.mark.parametrize(
    ("name", "weights"),
    [("rkd", ("distance_weight", "angle_weight")), ("dist", ("beta", "gamma")), ("dkd", ("alpha", "beta"))],
)
def test_one_of_two_weights_is_above_0(name: str, weights: tuple[str, str]) -> None:
    for weight in weights:
        create_distiller(name, **{weight: 0})
    with pytest.raises(DistillError, match=f"{name} has nothing to distil where {', '.join(weights)} are 0: give one"):
        create_distiller(name, **dict.fromkeys(weights, 0))


def test_dkd_and_dist_leave_out_ignored_tokens() -> None:
    student, teacher = scores(2, 3, 5), scores(2, 3, 5, seed=1)
    labels = torch.tensor([[1, -100, 4], [0, -100, -100]])
    batch, mask = Batch(inputs=torch.ones(2, 3), labels=labels, task="token"), labels != -100
    s, t = student.logits, teacher.logits
    expected = {
        "dkd": KF.dkd(s, t, labels, mask=mask),
        "dist": KF.dist(s, t, mask=mask),
    }
    for name, value in expected.items():
        torch.testing.assert_close(create_distiller(name).loss(student, teacher, batch)[name], value)


@pytest.mark.parametrize("ignored", [-100, 255])
def test_examples_without_a_class_have_no_part_in_dkd(ignored: int) -> None:
    student, teacher = scores(4, 5), scores(4, 5, seed=1)
    labels = torch.tensor([0, ignored, 2, ignored])
    rows, mask = torch.tensor([0, 2]), torch.tensor([1, 0, 1, 0])
    found = create_distiller("dkd").loss(student, teacher, Batch(labels=labels, ignore_index=ignored))["dkd"]
    torch.testing.assert_close(found, KF.dkd(student.logits, teacher.logits, labels, mask=mask))
    torch.testing.assert_close(found, KF.dkd(student.logits[rows], teacher.logits[rows], labels[rows]) / 2)


@pytest.mark.parametrize("name", ["rkd", "pkt"])
def test_padding_is_no_part_of_an_embedding(name: str) -> None:
    tokens = {name: torch.randn(4, 6, width) for name, width in (("student", 3), ("teacher", 5))}
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    distiller, batch = create_distiller(name, layers=("encoder",)), Batch(torch.ones(4, 6), mask=mask)

    def term(fill: float, batch: Batch) -> torch.Tensor:
        views = [View(features=Features({"encoder": x.where(mask[..., None], fill)})) for x in tokens.values()]
        return distiller.loss(*views, batch)[name]

    for fill in (9.0, torch.nan):
        torch.testing.assert_close(term(0.0, batch), term(fill, batch))
    for columns in ({"attention_mask": torch.ones(4, 6)}, {"input_ids": torch.ones(4, 6)}):
        # Of a teacher with tokens of its own all count, where it has no mask of its own.
        own = Batch(torch.ones(4, 6), name="input_ids", mask=mask, teacher_kwargs=columns)
        assert own.teacher_mask is columns.get("attention_mask")
        assert term(0.0, own) != term(9.0, own)


@pytest.mark.parametrize("name", ["rkd", "pkt", "crd"])
def test_tokens_that_come_before_the_examples_are_refused(name: str) -> None:
    class First(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).transpose(0, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = First(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x).mean(0))

    batch = Batch(torch.randn(4, 6, 3), torch.zeros(4).long(), mask=torch.ones(4, 6), index=torch.arange(4), rows=4)
    for mask, words in ((batch.mask, r"mask \[4, 6\], got \[6, 4, 3\]"), (None, r"got \[6, 4, 3\] .*batch_first=True")):
        given = dataclasses.replace(batch, mask=mask)
        with pytest.raises(DistillError, match=f"{name} reads tokens .*{words}"):
            bind(create_distiller(name, layers=("layer",)), Net(), Net(), batch=given)


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt"])
def test_relations_need_examples(name: str) -> None:
    batch = Batch(torch.randn(1, 3, 8, 8), torch.zeros(1).long())
    networks: list[nn.Module] = [TinyNet(4), TinyNet(6)]
    with pytest.raises(DistillError, match=rf"{name} compares the examples .* one of 1 has too few"):
        bind(create_distiller(name, layers=("layer2",)), *networks, batch=batch)
