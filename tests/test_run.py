"""The engine in a bare loop: what is averaged, compiled, saved and resumed; and networks that must be apart."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from distributed_kit import keep, kept, on_two_processes
from torch import nn

from kd_accelerate import TurnPlayer
from kd_plugins import Batch, Distiller, DistillError, Run, Stage, bind, create_distiller, make_optimizers, play
from kd_plugins.testing import TinyNet, tiny_batches


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def pair(seed: int = 0) -> tuple[TinyNet, TinyNet]:
    torch.manual_seed(seed)
    return TinyNet(), TinyNet(6)


def steps(distiller, nets, run, batches):
    for batch in batches:
        for turn in distiller.turns(nets, batch):
            play(turn, run)


# --- networks of their own ------------------------------------------------------------------------------------------


def test_layers_taken_over_by_reference_are_refused_and_nothing_is_frozen():
    body = nn.Linear(4, 8)
    student, teacher = nn.Sequential(body, nn.Linear(8, 3)), nn.Sequential(body, nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(DistillError, match=r"2 that the student shares with the teacher .*copy.deepcopy"):
        bind(create_distiller("kd"), student, teacher)
    assert all(p.requires_grad for p in (*student.parameters(), *teacher.parameters()))


def assigned(student: nn.Module, teacher: nn.Module) -> None:
    student.load_state_dict(teacher.state_dict(), assign=True)


def pointed(student: nn.Module, teacher: nn.Module) -> None:
    student.weight.data = teacher.weight.data


@pytest.mark.parametrize("take_over", [assigned, pointed])
def test_weights_in_one_memory_are_refused(take_over):
    """The student's update would move the teacher."""
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    take_over(student, teacher)
    assert student.weight is not teacher.weight
    with pytest.raises(DistillError, match="that the student shares with the teacher"):
        bind(create_distiller("kd"), student, teacher)


def test_a_layer_that_finds_its_size_in_the_first_forward_is_taken():
    distiller, student = create_distiller("kd"), nn.LazyLinear(3)
    nets = bind(distiller, student, nn.Linear(4, 3))
    (turn,) = distiller.turns(nets, Batch.of(torch.randn(2, 4), torch.tensor([0, 1])))
    assert set(turn["student"]) == {"task", "kd"}


def test_the_student_is_not_the_teacher_nor_a_frozen_former_one():
    net, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(DistillError, match="shares with the teacher"):
        bind(create_distiller("kd"), net, net)
    bind(create_distiller("kd"), net, teacher)
    with pytest.raises(DistillError, match=r"all frozen, as a former teacher's are: call requires_grad_\(True\)"):
        bind(create_distiller("kd"), teacher, nn.Linear(4, 3))


# --- processes, compiled networks ----------------------------------------------------------------------------------


def ddp_worker(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    student, teacher = TinyNet(), TinyNet(6)
    torch.manual_seed(rank)
    wrapped = nn.parallel.DistributedDataParallel(student)
    distiller = create_distiller("kd+quest", words=4, layers=("layer2",))
    (batch,) = tiny_batches(1)
    mine = Batch.of(batch.inputs[rank::2], batch.labels[rank::2])
    nets = bind(distiller, wrapped, teacher, batch=mine, batches=[mine])
    run = make_optimizers(distiller, sgd(wrapped))
    steps(distiller, nets, run, [mine] * 2)
    x = torch.tensor([1.0 + rank, 3.0], requires_grad=True)
    (slope,) = torch.autograd.grad(distiller.host.mean(x).pow(3).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    means = {"slope": slope.detach(), "curvature": curvature}
    keep({**student.state_dict(), **distiller.state_dict(), **means}, folder)


def test_a_student_in_ddp_is_averaged_with_the_methods_parts(tmp_path):
    on_two_processes(__file__, str(tmp_path))
    first, second = kept(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # The mean over processes is m = (1.5, 3): of m^3 these are 3 m^2 and 6 m.
    assert first["slope"].tolist() == [6.75, 27]
    assert first["curvature"].tolist() == [9, 18]


# Of each what one process alone could draw: nothing, the noise of all rows, the first weights of a part.
ALIKE = {"kd": {}, "noisy": {"sigma": 0.1, "logit_sigma": 0.1}, "kd+fitnet": {"layers": ("layer2",)}}


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_are_one_on_the_whole_batch(name, tmp_path):
    on_two_processes(__file__, str(tmp_path), name)
    expected = alike(name, lambda net: net)
    for state in kept(tmp_path):
        assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in expected.items())


def alike(name: str, wrap, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """What two steps end with, set up by the first of them, on a process's own rows and with a seed of its own."""
    student, teacher = pair()
    torch.manual_seed(rank)
    wrapped, distiller = wrap(student), create_distiller(name, **ALIKE[name])
    nets, run = bind(distiller, wrapped, teacher), make_optimizers(distiller, sgd(wrapped))
    rows = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    mine = [dataclasses.replace(b, inputs=b.inputs[rows], labels=b.labels[rows], size=0) for b in tiny_batches(2)]
    steps(distiller, nets, run, mine)
    return {**student.state_dict(), **distiller.state_dict()}


def alike_worker(folder: str, name: str) -> None:
    torch.distributed.init_process_group("gloo")
    keep(alike(name, nn.parallel.DistributedDataParallel, torch.distributed.get_rank(), 2), folder)


@pytest.mark.parametrize("told", ["model", ""], ids=["of the model", "of the networks alone"])
def test_a_player_averages_a_student_that_is_asked_past_ddp(told, tmp_path):
    """As `bind` leaves it, where `nets.student.forward` is not set to the prepared model."""
    on_two_processes(__file__, str(tmp_path), "kd", "player", told)
    expected = alike("kd", lambda net: net)
    for state in kept(tmp_path):
        assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in expected.items())


def player_worker(folder: str, name: str, _: str, told: str) -> None:
    accelerator = Accelerator(cpu=True)
    student, teacher = pair()
    model, optimizer = accelerator.prepare(student, sgd(student))
    distiller = create_distiller(name)
    nets = bind(distiller, model, teacher)
    player = TurnPlayer(accelerator, distiller, nets, optimizer, model=model if told else None)
    rows = slice(accelerator.process_index * 4, accelerator.process_index * 4 + 4)
    for b in tiny_batches(2):
        player.step(dataclasses.replace(b, inputs=b.inputs[rows], labels=b.labels[rows], size=0))
    keep({**student.state_dict(), **distiller.state_dict()}, folder)


@pytest.mark.parametrize("make", [Run, lambda *given: TurnPlayer(Accelerator(cpu=True), given[0], given[2], given[1])])
def test_parts_that_are_not_built_yet_are_not_left_out_of_the_training(make):
    student, teacher = pair()
    distiller = create_distiller("fitnet", layers=("layer2",))
    nets, optimizer = bind(distiller, student, teacher), sgd(student)
    with pytest.raises(DistillError, match=r"no parts to train before it is set up: bind\(..., batch=one batch\)"):
        list(make(distiller, optimizer, nets))


def test_a_compiled_student_runs_compiled():
    calls = []

    def backend(graph, example):
        calls.append(1)
        return graph.forward

    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    distiller = create_distiller("kd")
    nets = bind(distiller, torch.compile(student, backend=backend), teacher)
    run = make_optimizers(distiller, sgd(student))
    before = student.weight.clone()
    steps(distiller, nets, run, [Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))])
    assert calls
    assert not torch.equal(student.weight, before)


def test_ddp_in_a_compiled_network_is_refused():
    around = torch.compile(nn.Linear(4, 3), backend="eager")
    around._orig_mod = object.__new__(nn.parallel.DistributedDataParallel)  # without a process group
    with pytest.raises(DistillError, match=r"DistributedDataParallel\(torch.compile\(student\)\)"):
        bind(create_distiller("kd"), around, nn.Linear(4, 3))


class OneNumber(Distiller):
    """A term of one number that has an axis of its own."""

    def loss(self, student, teacher, batch):
        return {"apart": (student.logits - teacher.logits).square().mean().reshape(1)}


def test_a_term_of_one_number_may_have_axes():
    distiller, batch = OneNumber(), tiny_batches(1)[0]
    student, teacher = pair()
    nets = bind(distiller, student, teacher, batch=batch)
    run = make_optimizers(distiller, sgd(student), nets)
    apart = (student(batch.inputs) - teacher(batch.inputs)).square().mean()
    task = torch.nn.functional.cross_entropy(student(batch.inputs), batch.labels)
    loss = run.step(batch)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(apart.item() + task.item())
    assert run.logs() == pytest.approx({"distill/apart": apart.item(), "distill/task": task.item()})


@pytest.mark.parametrize(("name", "options"), [("dfa", {}), ("afd", {"layer": "layer2"}), ("kd+dfa", {})])
def test_the_first_step_is_the_same_where_the_first_batch_sets_up(name, options):
    """DFA and AFD look at what set-up finds before they ask a network."""
    (batch,), found = tiny_batches(1, streams=["search"]), []
    for given in (batch, None):
        student, teacher = pair()
        distiller = create_distiller(name, **options)
        nets = bind(distiller, student, teacher, batch=given, total_steps=4)
        turns = distiller.turns(nets, batch)
        found.append([{group: {k: v.item() for k, v in x.items()} for group, x in turn.items()} for turn in turns])
    assert found[0] == found[1]
    assert len(found[0]) == 2


# --- a run is saved and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "peers"),
    [("kd+nst", {"layers": ("layer2",)}, 0), ("afd", {"layer": "layer2"}, 1), ("dfa", {}, 0)],
)
def test_a_bare_loop_resumes_to_the_last_bit(name, options, peers, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        distiller = create_distiller(name, **options)
        student, others = TinyNet(), [TinyNet(5) for _ in range(peers)]
        teacher = None if peers else TinyNet(6)
        if teacher is not None:
            teacher.load_state_dict(pair()[1].state_dict())
        batches = tiny_batches(6, streams=["search"])
        nets = bind(distiller, student, teacher, peers=others, batch=batches[0], total_steps=6, epoch_steps=1)
        return distiller, nets, make_optimizers(distiller, sgd(student)), batches

    distiller, nets, run, batches = start(0)
    steps(distiller, nets, run, batches[:4])
    run.save(tmp_path)
    steps(distiller, nets, run, batches[4:])
    again, others, resumed, _ = start(1)
    resumed.load(tmp_path)
    assert again.progress.step == 4
    steps(again, others, resumed, batches[4:])
    # Also what was added up for the next log.
    assert resumed.logs() == run.logs()
    ended = [[d, *(net.module for net in n.peers)] for d, n in ((distiller, nets), (again, others))]
    for whole, second in zip(*ended, strict=True):
        for key, value in whole.state_dict().items():
            assert torch.equal(value.nan_to_num(), second.state_dict()[key].nan_to_num()), key


def test_a_resumed_method_must_be_set_up_and_may_be_told_its_length_anew(tmp_path):
    """Set-up by the first batch would start the progress again."""
    student, teacher = pair()
    batch = tiny_batches(1)[0]

    def start(**given):
        distiller = create_distiller("dkd")
        return distiller, bind(distiller, student, teacher, **given), make_optimizers(distiller, sgd(student))

    distiller, nets, run = start()
    steps(distiller, nets, run, [batch])
    run.save(tmp_path)
    with pytest.raises(DistillError, match=r"before it is set up: bind\(..., batch=one batch\)"):
        start(total_steps=4)[2].load(tmp_path)
    distiller, _, run = start(batch=batch, total_steps=4)
    run.load(tmp_path)
    assert (distiller.progress.step, distiller.progress.fraction) == (1, 0.25)


# --- stages that train a method's part alone ------------------------------------------------------------------------


class Estimator(Distiller):
    """Trains an estimator of the teacher's logits `[B, K]` first, then the student on what it says; 2020."""

    def setup(self, nets, batch):
        self.estimator = nn.Linear(4, 4)

    def extras(self):
        return {"estimator": self.estimator}

    def stages(self):
        return [Stage("estimator", ends_with="estimator"), Stage("student")]

    def turns(self, nets, batch):
        s, t = nets.student(batch).logits, nets.teacher(batch).logits
        if self.progress.stage == 0:
            yield {"estimator": {"fit": F.cross_entropy(self.estimator(t), batch.labels)}}
            return
        yield {"student": {"learn": F.mse_loss(s, self.estimator(t).detach())}}


@pytest.mark.parametrize("whole", [False, True], ids=["turn by turn", "step by step"])
def test_a_stage_may_train_an_own_part_alone(whole):
    student, teacher = pair()
    distiller = Estimator()
    batches = tiny_batches(4)
    nets = bind(distiller, student, teacher, batch=batches[0], total_steps=4)
    run = make_optimizers(distiller, sgd(student))
    moved = []
    for batch in batches:
        before = copy.deepcopy([student.state_dict(), distiller.estimator.state_dict()])
        if whole:
            run.step(batch)
        else:
            steps(distiller, nets, run, [batch])
        after = [student.state_dict(), distiller.estimator.state_dict()]
        moved.append(tuple(any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(after, before, strict=True)))
    assert moved == [(False, True)] * 2 + [(True, False)] * 2
    assert distiller.progress.step == 4


def test_a_stage_of_an_own_part_alone_is_refused_under_fp16():
    """The scaler of the student's optimizer asserts that it has seen a gradient."""
    student, teacher = pair()
    distiller = Estimator()
    nets = bind(distiller, student, teacher, batch=tiny_batches(1)[0], total_steps=4)
    accelerator = SimpleNamespace(distributed_type="NO", mixed_precision="fp16", native_amp=True)
    with pytest.raises(DistillError, match="has a stage that leaves the student alone.*use bf16"):
        TurnPlayer(accelerator, distiller, nets, sgd(student))


# --- names of the base class ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generator", "schedule", "shared_part", "table", "at", "randn", "check"])
def test_a_part_of_an_author_is_what_its_name_gives(name):
    distiller = create_distiller("kd")
    part = nn.Linear(2, 2)
    setattr(distiller, name, part)
    assert getattr(distiller, name) is part
    assert f"{name}.weight" in distiller.state_dict()


@pytest.mark.parametrize(
    "name", ["shared", "task", "stages", "methods", "kind", "name", "data", "peers", "teachers", "networks"]
)
def test_names_that_mean_something_are_refused_for_parts(name):
    with pytest.raises(DistillError, match=f"{name} means something to Distiller"):
        setattr(create_distiller("kd"), name, nn.Linear(2, 2))


def test_what_the_host_gives_has_its_short_name_where_nothing_else_has():
    distiller = create_distiller("kd")
    assert distiller.generator() is distiller.host.generator()
    assert distiller.mean_over_processes == distiller.host.mean


def test_options_that_depend_on_each_other_follow():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    distiller = create_distiller("kd", alpha=0.9)
    nets, batch = bind(distiller, student, teacher), Batch.of(torch.randn(8, 4), torch.randint(3, (8,)))
    task = F.cross_entropy(student(batch.inputs), batch.labels).item()
    for alpha in (0.9, 0.2):
        distiller.alpha = alpha
        (turn,) = distiller.turns(nets, batch)
        assert turn["student"]["task"].item() == pytest.approx((1 - alpha) * task, rel=1e-5)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    (player_worker if sys.argv[3:] else alike_worker if sys.argv[2:] else ddp_worker)(*sys.argv[1:])
