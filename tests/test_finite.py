"""NaN and infinity stop a training, and are refused in a teacher, in every host through the engine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kd_plugins import Batch, Distiller, DistillError, bind, create_distiller, make_optimizers, states
from kd_plugins.finite import Watch, check_loss


class Breaks(Distiller):
    """Its term is NaN from a step on, or in single steps."""

    def __init__(self, *, steps: tuple[int, ...] = (), on: int = 10**9) -> None:
        super().__init__()

    def loss(self, student, teacher, batch):
        bad = self.progress.step >= self.on or self.progress.step in self.steps
        return {"breaks": student.logits.sum() * (math.nan if bad else 1e-3)}


def start(**options):
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    distiller = Breaks(**options)
    nets = bind(distiller, student, nn.Linear(4, 3))
    run = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets)
    batch = Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))
    return student, run, lambda: run.step(batch)


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_last_state(tmp_path):
    student, run, step = start(on=14)
    for i in range(14):
        step()
        if i == 11:
            run.save(tmp_path)
    good = student.weight.clone()
    for _ in range(5):
        step()
    with pytest.raises(DistillError, match=r"since step 15 \(epoch .*\), in .*distill/breaks: lower the learning rate"):
        step()
    assert run.distiller.progress.step == 20
    with pytest.raises(DistillError, match="The student|student has a NaN or an infinity in weight"):
        run.save(tmp_path)
    assert states.damage(tmp_path / "state") == ""
    again = start()
    again[2]()
    again[1].load(tmp_path)
    assert again[0].weight.isfinite().all()
    assert good.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation_whose_loss_is_no_number_is_told(value):
    check_loss(3.0)
    with pytest.raises(DistillError, match=f"evaluation set is {value}: lower the learning rate"):
        check_loss(value)


def test_where_a_host_looks_it_stops_at_once_and_it_may_go_on():
    _, run, step = start(on=0)
    for _ in range(3):
        step()
    with pytest.raises(DistillError, match="since step 1 "):
        run.logs()
    _, run, step = start(on=0)
    run.watch.stops = False
    for _ in range(25):
        step()
    assert math.isnan(run.logs()["distill/breaks"])


def test_single_steps_that_a_scaler_would_skip_are_left_alone():
    watch = Watch()
    for step in range(1, 41):
        watch.see({"loss": torch.tensor(math.inf if step % 3 else 1.0)})
        watch.see({"other": torch.tensor(1.0)})
        watch.update(step, 0.0)
    watch.look()
    for step in range(41, 44):
        watch.see({"loss": torch.tensor(math.inf)})
        watch.update(step, 0.0)
    with pytest.raises(DistillError, match="since step 4[01] "):
        watch.look()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_with_a_weight_that_is_no_number_is_refused(value):
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        teacher[1].weight[2] = value
    with pytest.raises(DistillError, match=r"The teacher has a NaN or an infinity in 1\.weight"):
        bind(create_distiller("kd"), nn.Linear(4, 3), teacher)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x: x.mean(), 'by name, {"name": term}, got Tensor'),
        (lambda x: None, "got NoneType"),
        (lambda x: {"a": 1.0}, "'a' of the group 'student' .* one number, got float"),
        (lambda x: {"a": x}, r"got shape \[8, 3\]"),
    ],
)
def test_an_authors_terms_are_named_scalars(loss, words):
    class Wrong(Distiller):
        def __init__(self) -> None:
            super().__init__()

        def loss(self, student, teacher, batch):
            return loss(student.logits)

    student, distiller = nn.Linear(4, 3), Wrong()
    nets = bind(distiller, student, nn.Linear(4, 3))
    run = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets)
    with pytest.raises(DistillError, match=words):
        run.step(Batch.of(torch.randn(8, 4), torch.randint(3, (8,))))
