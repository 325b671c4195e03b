"""Class scores are read in one way, whatever the task: which rows, which classes, what is left out."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, View, bind, create_distiller
from kd_plugins.reading.scores import class_scores

T = 2.0


def rows_kl(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """`T^2 KL` of each row, in float64, from the definition."""
    p = torch.softmax(teacher.detach().double() / T, dim)
    return T**2 * (p * (p.log() - torch.log_softmax(student.double() / T, dim))).sum(dim)


def kd(batch: Batch, student: Tensor, teacher: Tensor) -> float:
    distiller = create_distiller("kd", temperature=T, alpha=1.0)
    return distiller.loss(View(student), View(teacher), batch)["kd"].item()


def logits(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def per_example(values: Tensor, mask: Tensor) -> float:
    values, mask = values.flatten(1), mask.flatten(1).double()
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).mean().item()


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (2, 5, 9)], ids=["map", "line"])
@pytest.mark.parametrize("ignored", [-100, 255])
def test_classes_of_maps_are_the_second_axis_and_ignored_labels_are_left_out(shape, ignored):
    s, t = logits(*shape)
    labels = torch.randint(5, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    labels[0, 0], labels[1] = ignored, ignored
    batch = Batch.of(torch.zeros(2, 3), labels, ignore_index=ignored)
    expected = per_example(rows_kl(s, t, 1), labels != ignored)
    assert kd(batch, s, t) == pytest.approx(expected, rel=1e-5)


def test_labels_of_another_size_are_read_at_the_centre_of_each_position():
    s, t = logits(1, 3, 2, 2)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    # The centre of the upper left of 2 x 2 positions lies in row 1, column 1 of 4 x 4 labels.
    labels[0, 1, 1] = -100
    labels[0, 0, 3] = -100
    mask = torch.tensor([[[False, True], [True, True]]])
    batch = Batch.of(torch.zeros(1, 3), labels, task="segmentation")
    assert kd(batch, s, t) == pytest.approx(per_example(rows_kl(s, t, 1), mask), rel=1e-5)


def test_a_teachers_map_of_another_size_is_resized_to_the_students():
    s, t = logits(2, 3, 4, 4)[0], logits(2, 3, 8, 8, seed=3)[0]
    expected = rows_kl(s, F.interpolate(t.double(), (4, 4), mode="bilinear", align_corners=False), 1).mean().item()
    assert kd(Batch.of(torch.zeros(2, 3), task="segmentation"), s, t) == pytest.approx(expected, rel=1e-5)


def test_a_bare_loop_over_maps_gets_both_terms_over_the_classes():
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    x, y = torch.randn(2, 3, 6, 7), torch.randint(5, (2, 6, 7))
    distiller = create_distiller("kd", temperature=T, alpha=0.5)
    (turn,) = distiller.turns(bind(distiller, student, teacher), Batch.of(x, y))
    soft = rows_kl(student(x), teacher(x), 1).mean().item()
    assert turn["student"]["kd"].item() == pytest.approx(0.5 * soft, rel=1e-5)
    assert turn["student"]["task"].item() == pytest.approx(0.5 * F.cross_entropy(student(x), y).item(), rel=1e-5)


@pytest.mark.parametrize("task", ["token", "causal-lm"])
def test_tokens_count_where_they_are_real_and_labelled(task):
    s, t = logits(3, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    labels = torch.randint(4, (3, 6))
    labels[0, :2] = -100
    real = (labels != -100) & mask.bool()
    rows = rows_kl(s, t, -1)
    after = real[:, 1:] & mask[:, :-1].bool()
    expected = per_example(rows[:, :-1], after) if task == "causal-lm" else per_example(rows, real)
    batch = Batch.of(torch.zeros(3, 6), labels, mask=mask, task=task)
    assert kd(batch, s, t) == pytest.approx(expected, rel=1e-5)


def test_one_score_alone_is_the_logit_of_a_sigmoid():
    s, t = logits(8, 1)
    p = torch.stack([t.double() / T, torch.zeros_like(t).double()], -1)
    q = torch.stack([s.double() / T, torch.zeros_like(s).double()], -1)
    expected = T**2 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    assert expected > 0.01
    assert kd(Batch.of(torch.zeros(8, 2), torch.ones(8, 1)), s, t) == pytest.approx(expected, rel=1e-5)


def test_the_scores_of_a_regression_are_numbers():
    s, t = logits(8, 1)
    batch = Batch.of(torch.zeros(8, 2), torch.ones(8), task="regression")
    assert kd(batch, s, t) == pytest.approx((s - t).double().square().mean().item(), rel=1e-6)
    assert kd(batch, s.squeeze(1), t) == kd(batch, s, t.squeeze(1)) == kd(batch, s, t)
    rows = class_scores(View(s), View(t), batch)
    assert rows.labels is None
    with pytest.raises(DistillError, match=r"\[8, 1, 1\] of a regression: use kd"):
        rows.exclusive("dkd")


def test_labels_tell_where_the_classes_are():
    s, t = logits(2, 4, 6)
    batch = Batch.of(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long), criterion=lambda view, labels: s.sum())
    assert class_scores(View(s), View(t), batch).student.shape == (2, 4, 6)
    # Two numbers for each text say nothing of its tokens; the mask does.
    spans = Batch.of(torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.long), mask=torch.ones(2, 4))
    assert class_scores(View(s), View(t), spans).student.shape == (2, 4, 6)


@pytest.mark.parametrize("criterion", [None, lambda view, labels: view.logits.sum()])
@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((2, 4, 4), torch.zeros(2, 4, dtype=torch.long)),
        ((2, 4, 6), torch.full((2, 4, 6), 0.25)),  # shares over the second axis, or numbers over the third
        ((2, 1, 6), torch.ones(2, 1, 6)),
        ((2, 4, 6), torch.zeros(2, 12, dtype=torch.long)),
        ((2, 4, 6), None),
    ],
    ids=["square", "shares", "one score", "another size", "none"],
)
def test_doubt_about_the_axis_of_the_classes_is_refused(shape, labels, criterion):
    s, t = logits(*shape)
    batch = Batch.of(torch.zeros(2, 3), labels, criterion=criterion)
    with pytest.raises(DistillError, match="which axis holds the classes"):
        class_scores(View(s), View(t), batch)
    if labels is None:
        with pytest.raises(DistillError, match=r"\[2, 4, 6\] of a segmentation without labels .*\[B, 1, H, W\]"):
            class_scores(View(s), View(t), Batch.of(torch.zeros(2, 3), task="segmentation"))
        s, t = (x.unsqueeze(2) for x in (s, t))
        told = Batch.of(torch.zeros(2, 3), task="segmentation")
        assert class_scores(View(s), View(t), told).student.shape == (2, 6, 4)
        return
    for task, rows in (("token", (*shape[:2], shape[2])), ("segmentation", (shape[0], shape[2], shape[1]))):
        told = Batch.of(torch.zeros(2, 3), labels, task=task, criterion=criterion)
        assert class_scores(View(s), View(t), told).student.shape == rows


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
@pytest.mark.parametrize("axis", [True, False], ids=["an axis of their own", "none"])
@pytest.mark.parametrize("task", ["segmentation", "token"])
def test_ignored_labels_of_one_score_are_left_out(dtype, axis, task):
    shape = (2, 1, 5, 7) if task == "segmentation" else (2, 9, 1)
    s, t = logits(*shape)
    labels, dim = torch.randint(2, shape).to(dtype), 1 if task == "segmentation" else -1
    labels.squeeze(dim)[0, 2] = 255
    both = [torch.stack([x / T, torch.zeros_like(x)], -1).double() for x in (s, t)]
    q, p = (x.log_softmax(-1) for x in both)
    rows = T**2 * (p.exp() * (p - q)).sum(-1).squeeze(dim)
    given = labels if axis else labels.squeeze(dim)
    batch = Batch.of(torch.zeros(2, 3), given, task=task, ignore_index=255)
    assert kd(batch, s, t) == pytest.approx(per_example(rows, labels.squeeze(dim) != 255), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
@pytest.mark.parametrize("axis", [False, True])
def test_maps_of_one_class_need_no_axis_for_it(dtype, axis):
    s, t = logits(2, 5, 7)
    labels = torch.randint(2, (2, 5, 7), generator=torch.Generator().manual_seed(1)).to(dtype)
    labels[0, 2] = 255
    given = {"labels": labels.unsqueeze(1) if axis else labels, "task": "segmentation", "ignore_index": 255}
    expected = kd(Batch.of(torch.zeros(2, 3), **given), s.unsqueeze(1), t.unsqueeze(1))
    assert kd(Batch.of(torch.zeros(2, 3), **given), s, t) == pytest.approx(expected, rel=1e-6)
    assert class_scores(View(s), View(t), Batch.of(torch.zeros(2, 3), **given)).binary


def test_tokens_of_a_causal_model_may_have_more_axes():
    """As of a model that scores every choice of a row."""
    s, t = logits(2, 3, 6, 5)
    labels = torch.randint(5, (2, 3, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 1, :4] = -100
    expected = per_example(rows_kl(s, t, -1)[:, :, :-1], labels[:, :, 1:] != -100)
    assert kd(Batch.of(torch.zeros(2, 3), labels, task="causal-lm"), s, t) == pytest.approx(expected, rel=1e-5)


def test_a_number_of_a_regression_may_have_the_value_of_the_ignored_label():
    s, t = logits(2, 3, 1)
    batch = Batch.of(torch.zeros(2, 3), torch.full((2, 3), -100.0), task="regression", mask=torch.ones(2, 3))
    assert kd(batch, s, t) == pytest.approx((s - t).square().mean().item(), rel=1e-5)
    square = Batch.of(torch.zeros(2, 3), torch.zeros(2, 4, 4), task="regression", mask=torch.ones(2, 4))
    s, t = logits(2, 4, 4)
    assert kd(square, s, t) == pytest.approx((s - t).square().mean().item(), rel=1e-5)


def test_a_probability_may_have_the_value_of_the_ignored_label():
    s, t = logits(2, 9, 1)
    shares = Batch.of(torch.zeros(2, 3), torch.zeros(2, 9), task="token", ignore_index=0)
    assert class_scores(View(s), View(t), shares).mask is None


@pytest.mark.parametrize("task", ["depth", "detection", "other", "multi-label"])
def test_scores_of_a_task_that_has_no_classes_are_refused(task):
    z = torch.zeros(2, 4, 4)
    with pytest.raises(DistillError, match=f"one of the tasks .*, got those of '{task}'"):
        class_scores(View(z), View(z), Batch.of(torch.zeros(2, 3), torch.zeros(2, 4, 4), task=task))


def test_scores_of_other_classes_are_refused():
    with pytest.raises(DistillError, match="same classes"):
        class_scores(View(torch.zeros(2, 3)), View(torch.zeros(2, 4)), Batch.of(torch.zeros(2, 3)))


class Auxiliary(NamedTuple):
    """What torchvision's Inception returns in training."""

    logits: Tensor
    aux_logits: Tensor


@pytest.mark.parametrize(
    ("several", "task"),
    [
        (lambda z: (z, z + 1), "classification"),
        (lambda z: Auxiliary(z, z + 1), "classification"),
        (lambda z: (z, [z + 1]), "classification"),
        (
            lambda z: (z[:, :, None, None].expand(-1, -1, 4, 4), z[:, :, None, None].expand(-1, -1, 2, 2)),
            "segmentation",
        ),
        (lambda z: (z.unsqueeze(1), z.unsqueeze(1)), "token"),
    ],
    ids=["pair", "named", "list", "maps", "tokens"],
)
def test_a_network_of_several_scores_is_refused(several, task):
    class Two(nn.Linear):
        def forward(self, x):
            return several(super().forward(x))

    distiller = create_distiller("kd")
    nets = bind(distiller, Two(4, 3), nn.Linear(4, 3))
    with pytest.raises(DistillError, match="one tensor of scores, got 2"):
        next(iter(distiller.turns(nets, Batch.of(torch.randn(2, 4), torch.tensor([0, 1]), task=task))))


@pytest.mark.parametrize("method", ["kd", "noisy"])
@pytest.mark.parametrize(
    ("task", "shape", "expected"),
    [("classification", (2, 5), 4.0), ("segmentation", (2, 5, 3, 3), 4.0), ("token", (2, 3, 5), 4.0)]
    + [("causal-lm", (2, 3, 5), 1.0)],
)
def test_the_default_temperature_is_that_of_the_task(
    method: str, task: str, shape: tuple[int, ...], expected: float
) -> None:
    views, batch = [View(x) for x in logits(*shape)], Batch(size=2, task=task)
    default, named = create_distiller(method), create_distiller(method, temperature=expected)
    assert default.loss(*views, batch)["kd"] == named.loss(*views, batch)["kd"]
    default.host.task = task
    assert default.needs() == named.needs()
