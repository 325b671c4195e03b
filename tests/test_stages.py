"""Stages and progress: which step belongs to which stage, and what begins with one."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_plugins import Batch, Distiller, DistillError, Needs, Progress, Reads, Stage, bind, make_optimizers, play
from kd_plugins.binding import needs_in, schedule
from kd_plugins.stages import StageTable
from kd_plugins.testing import TinyNet, tiny_batches

shares = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


def table(*parts: float, total: int, **options) -> StageTable:
    return StageTable.resolve([Stage(f"s{i}", share) for i, share in enumerate(parts)], total, **options)


@given(shares, st.integers(0, 200))
def test_stages_cover_all_steps_in_order_and_none_is_empty(parts, extra):
    total = len(parts) + extra
    resolved = table(*parts, total=total)
    bounds = [resolved.bounds(i) for i in range(len(parts))]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(start < end for start, end in bounds)
    assert all(end == following for (_, end), (following, _) in zip(bounds, bounds[1:], strict=False))
    assert all(bounds[resolved.index(step)][0] <= step < bounds[resolved.index(step)][1] for step in range(total))


@given(shares, st.integers(1000, 5000))
def test_long_trainings_follow_the_shares(parts, total):
    resolved = table(*parts, total=total)
    for i, share in enumerate(parts):
        start, end = resolved.bounds(i)
        assert abs((end - start) - total * share / sum(parts)) <= 1 + len(parts)


@given(shares, st.integers(1, 50), st.integers(0, 10))
def test_stages_begin_with_an_epoch_where_there_are_enough(parts, epoch, extra):
    resolved = table(*parts, total=epoch * (len(parts) + extra), epoch=epoch)
    assert all(start % epoch == 0 for start in resolved.starts)


def test_with_fewer_epochs_than_stages_steps_are_split():
    assert table(1, 1, 2, total=8, epoch=4).starts == [0, 2, 4]
    assert table(1, 1, total=9, epoch=4).starts == [0, 4]  # no whole number of epochs
    with pytest.raises(DistillError, match=r"one for each of the 3 stages \(s0, s1, s2\), got .*: train for"):
        table(1, 1, 2, total=8, epoch=4, whole_epochs=True)


def test_fixed_lengths_are_taken_first():
    stages = [Stage("a", epochs=1), Stage("b", 1.0), Stage("c", 3.0)]
    assert StageTable.resolve(stages, 90, epoch=10).starts == [0, 10, 30]
    with pytest.raises(DistillError, match="length of an epoch is unknown"):
        StageTable.resolve(stages, 90)
    with pytest.raises(DistillError, match="take 1 epochs of 1, which leaves nothing for the others"):
        StageTable.resolve(stages, 10, epoch=10)


def test_trainings_that_are_too_short_and_bad_shares_are_refused():
    with pytest.raises(DistillError, match=r"at least one step for each of the 3 stages \(s0, s1, s2\), got 2 steps"):
        table(1, 1, 1, total=2)
    with pytest.raises(DistillError, match="positive shares"):
        table(1, 0, total=5)


@given(shares.filter(lambda s: len(s) > 1), st.integers(20, 100), st.data())
def test_a_stage_that_ends_early_leaves_its_steps_to_the_later_ones(parts, total, data):
    resolved = table(*parts, total=total)
    current = data.draw(st.integers(0, len(parts) - 2))
    start, end = resolved.bounds(current)
    step = data.draw(st.integers(start + 1, end))
    resolved.end_stage(step)
    assert resolved.index(step) == current + 1
    assert resolved.index(step - 1) == current
    bounds = [resolved.bounds(i) for i in range(len(parts))]
    assert all(a < b for a, b in bounds)
    assert bounds[-1][1] == total


def test_the_later_stages_begin_with_whole_units():
    resolved = table(3, 1, 2, total=32, epoch=4)
    resolved.end_stage(4, unit=4)
    # Seven epochs are left: a third of them, 2.33, and two thirds.
    assert resolved.starts == [0, 4, 12]
    short = table(1, 1, 1, total=12, epoch=4)
    short.end_stage(8, unit=4)
    assert short.starts == [0, 4, 8]
    few = table(2, 1, 1, total=14)
    few.end_stage(7, unit=4)
    assert few.starts == [0, 7, 10]  # one unit is left for two stages


def test_fixed_lengths_stay_when_a_stage_ends_early():
    stages = [Stage("a", 2.0), Stage("b", epochs=1), Stage("c", 1.0)]
    resolved = StageTable.resolve(stages, 40, epoch=10)
    assert resolved.starts == [0, 20, 30]
    resolved.end_stage(10, unit=10)
    assert resolved.starts == [0, 10, 20]


def test_the_last_stage_does_not_end_early():
    resolved = table(1, 1, total=10)
    resolved.end_stage(8)
    assert resolved.starts == [0, 5]


def test_a_table_survives_its_checkpoint():
    saved = table(1, 1, total=10)
    saved.end_stage(3)
    fresh = table(1, 1, total=10)
    assert fresh.restore(json.loads(json.dumps(saved.to_json())))
    assert fresh.starts == [0, 3]
    assert not fresh.restore(saved.to_json())
    with pytest.raises(DistillError, match=r"checkpoint has the stages \['s0', 's1'\], this run has \['s0'\]"):
        table(1, total=10).restore(saved.to_json())


# --- Progress ---------------------------------------------------------------------------------------------------------


def test_fractions_run_from_0_to_1():
    progress = Progress(total=10)
    assert progress.fraction == 0
    progress.step = 5
    assert progress.fraction == progress.stage_fraction == 0.5
    progress.stage_start, progress.stage_end = 4, 6
    assert progress.stage_fraction == 0.5
    progress.step = 20
    assert progress.fraction == progress.stage_fraction == 1
    with pytest.raises(DistillError, match=r"bind\(..., total_steps=n\), .* DistillationTask\(..., total_steps=n\)"):
        _ = Progress().fraction


class Phased(Distiller):
    """Two stages: features, then logits."""

    def __init__(self, *, fresh_student: bool = False, fresh_optimizer: bool = True, done: bool = False) -> None:
        super().__init__()
        self.kind_ = [Stage("features", 1.0, None, fresh_optimizer)]
        self.kind_ += [Stage("logits", 1.0, None, fresh_optimizer, fresh_student)]
        self.began: list[str] = []
        self.trace: list[tuple[int, int, float]] = []
        self.done = done

    def stages(self):
        return self.kind_

    def needs(self):
        first = self.progress.stage == 0
        reads = Reads(logits=not first, features=("layer1",) if first else ())
        return Needs(reads, Reads(logits=not first, features=("layer2:in",) if first else ()))

    def begin_stage(self, stage):
        self.began.append(stage.name)

    def task(self, student, batch):
        return {}

    def loss(self, student, teacher, batch):
        self.trace.append((self.progress.step, self.progress.stage, self.progress.stage_fraction))
        if self.progress.stage == 0:
            return {"features": (student.features["layer1"] - teacher.features["layer2:in"]).pow(2).mean()}
        return {"logits": (student.logits - teacher.logits).pow(2).mean()}


def run(distiller, steps=6, *, momentum=0.9):
    torch.manual_seed(0)
    student, teacher = TinyNet(), TinyNet()
    batches = tiny_batches(2)
    nets = bind(distiller, student, teacher, batch=batches[0], total_steps=steps)
    groups = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.05, momentum=momentum), nets)
    states = []
    for step in range(steps):
        for turn in distiller.turns(nets, batches[step % 2]):
            play(turn, groups)
        states.append({k: v.clone() for k, v in student.state_dict().items()})
    return student, groups, states


def test_a_bare_loop_walks_through_the_stages():
    distiller = Phased()
    run(distiller)
    assert distiller.trace == [(0, 0, 0), (1, 0, 1 / 3), (2, 0, 2 / 3), (3, 1, 0), (4, 1, 1 / 3), (5, 1, 2 / 3)]
    assert distiller.began == ["logits"]
    assert distiller.progress.step == 6
    assert distiller.progress.fraction == 1


def test_a_stage_changes_only_where_it_begins():
    distiller = Phased()
    schedule(distiller, 10)
    assert distiller.progress.next_stage() is None
    distiller.progress.at(5)
    assert distiller.progress.stage == 0
    assert distiller.progress.next_stage().name == "logits"
    distiller.progress.enter()
    assert (distiller.progress.stage, distiller.progress.stage_start, distiller.progress.stage_end) == (1, 5, 10)
    assert needs_in(distiller, 0).student.features == ("layer1",)
    assert distiller.progress.stage == 1


def test_what_a_stage_does_not_train_stays_untouched():
    _, _, states = run(Phased())
    assert all(torch.equal(states[0][k], states[2][k]) for k in states[0] if k.startswith(("head", "layer2")))
    assert not torch.equal(states[2]["head.weight"], states[3]["head.weight"])


def test_fresh_optimizer_state_and_fresh_student():
    kept, fresh = (run(Phased(fresh_optimizer=flag))[2] for flag in (False, True))
    assert all(torch.equal(kept[2][k], fresh[2][k]) for k in kept[2])
    assert not torch.equal(kept[3]["conv1.weight"], fresh[3]["conv1.weight"])

    distiller = Phased(fresh_student=True)
    student, groups, states = run(distiller, 4)
    torch.manual_seed(0)
    initial = TinyNet().state_dict()
    # The last update of the first stage is undone as soon as the second begins.
    assert all(torch.equal(states[1][k], initial[k]) for k in initial)
    assert all(torch.equal(groups.initial[k], initial[k]) for k in initial)
    assert not torch.equal(student.state_dict()["head.weight"], initial["head.weight"])


def test_a_fresh_student_is_found_through_the_networks_that_the_method_was_bound_to():
    distiller = Phased(fresh_student=True)
    student = TinyNet()
    initial = {k: v.clone() for k, v in student.state_dict().items()}
    nets = bind(distiller, student, TinyNet(), batch=tiny_batches(1)[0], total_steps=2)
    groups = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1))
    play(next(distiller.turns(nets, tiny_batches(1)[0])), groups)
    assert distiller.progress.stage == 1
    assert all(torch.equal(value, initial[key]) for key, value in student.state_dict().items())


def test_stages_without_a_length_are_refused():
    nets = bind(Phased(), TinyNet(), TinyNet())
    with pytest.raises(
        DistillError, match=r"trains in 2 stages and needs to know how long.*bind\(..., total_steps=n\)"
    ):
        nets.student(Batch.of(torch.randn(2, 3, 8, 8)))
