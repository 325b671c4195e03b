"""What a teacher is asked with, and options of `internal` that contradict each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, bind, create_distiller
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
