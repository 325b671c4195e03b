"""What a teacher is asked with, and options of `internal` that contradict each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, bind, create_distiller, make_optimizers
from kd_plugins.binding import connect
from kd_plugins.reading.network import adapt


class Reader(nn.Module):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.got: dict[str, Tensor] = {}

    def forward(self, **inputs: Tensor) -> Tensor:
        self.got = inputs
        return self.fc(inputs["input_ids"].float())


def ask(teacher_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    student, teacher = Reader(), Reader()
    inputs = {name: torch.ones(2, 3) for name in ("input_ids", "attention_mask", "token_type_ids")}
    nets = bind(create_distiller("kd"), student, teacher)
    nets.teacher(Batch.of(inputs, torch.tensor([0, 1]), teacher_kwargs=teacher_kwargs))
    return teacher.got


def test_other_tokens_of_a_teacher_come_without_the_students_masks() -> None:
    got = ask({"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(2, 3)})
    assert sorted(got) == ["attention_mask", "input_ids"]
    assert all(not value.any() for value in got.values())


def test_a_teachers_further_inputs_come_beside_the_students() -> None:
    got = ask({"position_ids": torch.zeros(2, 3)})
    assert sorted(got) == ["attention_mask", "input_ids", "position_ids", "token_type_ids"]


@pytest.mark.parametrize("schedule", ["all", "stacked"])
def test_freeze_lower_belongs_to_progressive(schedule: str) -> None:
    with pytest.raises(DistillError, match="schedule=progressive"):
        create_distiller("internal", schedule=schedule, freeze_lower=True)
    assert isinstance(create_distiller("internal", schedule="progressive", freeze_lower=True), Distiller)


@pytest.mark.parametrize("options", [{"threshold": 0.1}, {"phase_epochs": 1.0}])
def test_what_is_said_of_phases_needs_some(options: dict[str, float]) -> None:
    with pytest.raises(DistillError, match="schedule=all has none: leave them out"):
        create_distiller("internal", schedule="all", **options)
    assert isinstance(create_distiller("internal", schedule="stacked", **options), Distiller)


@pytest.mark.parametrize("known", [torch.zeros(2, 2), (torch.zeros(2, 2),)])
def test_the_cached_logits_of_one_teacher_are_not_those_of_another(known):
    nets = bind(create_distiller("kd"), Reader(), [Reader(), Reader()])
    batch = Batch.of(torch.ones(2, 3), torch.tensor([0, 1]), teacher_logits=known)
    with pytest.raises(DistillError, match="got that of 1 and a teacher number 2"):
        nets.teachers[1](batch)


@pytest.mark.parametrize("given", [{"forwards": [None] * 2}, {"transforms": [None] * 2}, {"orders": [None] * 2}])
def test_a_host_gives_no_more_than_there_are_networks(given):
    student, teacher = (adapt(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="longer"):
        connect(create_distiller("kd"), student, [teacher], **given)


@pytest.mark.parametrize("name", ["kd", "noisy"])
def test_what_a_loader_gives_is_refused_where_a_batch_is_asked_for(name: str) -> None:
    """Whether a method's turns are the default's or its own, in the first step and later."""
    student, images, labels = nn.Linear(4, 3), torch.randn(2, 4), torch.tensor([0, 1])
    distiller = create_distiller(name)
    nets = bind(distiller, student, nn.Linear(4, 3))
    for _ in range(2):
        with pytest.raises(
            DistillError, match=r"Expected a Batch, got tuple: make it with Batch\.of\(inputs, labels\)"
        ):
            next(iter(distiller.turns(nets, (images, labels))))
        with pytest.raises(DistillError, match="no rows: .*drop_last"):
            next(iter(distiller.turns(nets, Batch.of(images[:0], labels[:0]))))
        next(iter(distiller.turns(nets, Batch.of(images, labels))))


def test_a_first_input_that_is_one_number_has_rows_elsewhere() -> None:
    """Of a mapping without a name that is known, the first input is the main one."""

    class Scaled(nn.Linear):
        def forward(self, by: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return by * super().forward(x)

    distiller, student = create_distiller("kd"), Scaled(4, 3)
    nets = bind(distiller, student, Scaled(4, 3))
    inputs = {"by": torch.tensor(2.0), "x": torch.randn(2, 4)}
    turn = next(iter(distiller.turns(nets, Batch.of(inputs, torch.tensor([0, 1])))))
    turn["student"]["kd"].backward()
    assert student.weight.grad is not None


def test_two_classes_are_not_standardized() -> None:
    """Of two classes every row is 1 and -1, whose divergence is constant."""
    for classes, refused in ((2, True), (3, False)):
        student, teacher = nn.Linear(4, classes), nn.Linear(4, classes)
        distiller = create_distiller("kd", standardize=True)
        turns = distiller.turns(bind(distiller, student, teacher), Batch.of(torch.randn(2, 4), torch.tensor([0, 1])))
        if refused:
            with pytest.raises(DistillError, match="two classes, which teaches nothing: leave it out"):
                next(iter(turns))
        else:
            next(iter(turns))["student"]["kd"].backward()
            assert student.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["kd", "noisy"])
def test_soft_labels_without_a_weight_are_no_term(name: str) -> None:
    """0 times what cannot be compared, or is infinite, is no 0."""
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
    distiller, batch = create_distiller(name, standardize=True), Batch.of(torch.randn(2, 4), torch.tensor([0, 1]))
    nets = bind(distiller, student, teacher)
    distiller.alpha = 0.0
    ((terms,),) = [turn.values() for turn in distiller.turns(nets, batch)]
    assert list(terms) == ["task"]
    torch.testing.assert_close(terms["task"], batch.task_loss(nets.student(batch)))


def test_the_optimizer_of_a_group_that_is_not_there_is_refused() -> None:
    student = nn.Linear(4, 3)
    distiller = create_distiller("kd", **{"critic.lr": 1e-3})
    nets = bind(distiller, student, nn.Linear(4, 3))
    with pytest.raises(DistillError, match="group 'critic', but kd has no extra groups: leave them out"):
        make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets).groups  # noqa: B018
