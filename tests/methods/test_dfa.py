"""DFA: against a loop written by hand, its searches, its baselines, its files and pictures."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dfa_kit import LR, MOMENTUM, Net, batches, pair
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, bind, make_optimizers, play
from kd_plugins.methods.dfa import DFA
from kd_plugins.reading.network import adapt
from kd_plugins.testing.runs import Setting, Training, difference


def start(student: nn.Module, teacher: nn.Module, steps: int = 8, **options: Any) -> tuple[DFA, Any, Any]:
    torch.manual_seed(3)
    distiller = DFA(**options)
    nets = bind(distiller, student, teacher, batch=batches(1)[0], total_steps=steps)
    sgd = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM)
    return distiller, nets, make_optimizers(distiller, sgd, nets)


def train(student: nn.Module, teacher: nn.Module, steps: int = 8, until: int | None = None, **options: Any) -> DFA:
    distiller, nets, optimizers = start(student, teacher, steps, **options)
    for step in range(steps if until is None else until):
        for turn in distiller.turns(nets, batches()[step % 4]):
            play(turn, optimizers)
    return distiller


def distance(a: nn.Module, b: nn.Module) -> float:
    return difference(a.state_dict(), b.state_dict())[0]


# The mathematics


def mixed(maps: list[Tensor], alpha: Tensor) -> Tensor:
    return torch.einsum("n,nbchw->bchw", alpha, torch.stack(maps))


def distil_by_hand(student: Net, teacher: Net, parts: DFA, alphas: list[Tensor], steps: range, weight: float) -> None:
    sgd = torch.optim.SGD([*student.parameters(), *parts.connectors.parameters()], lr=LR, momentum=MOMENTUM)
    for step in steps:
        batch = batches()[step % 4]
        ours, theirs = student.blocks(batch.inputs), teacher.blocks(batch.inputs)
        loss = F.cross_entropy(student(batch.inputs), batch.labels)
        for i, alpha in enumerate(alphas):
            loss = loss + weight * F.mse_loss(parts.connectors[str(i)](ours[i][-1]), mixed(theirs[i], alpha))
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def by_hand(student: Net, teacher: Net, parts: DFA, bounds: list[tuple[int, int]], **weights: float) -> list[Tensor]:
    """The searches of both groups, then the distillation of the student as it was; returns the two betas."""
    fresh = copy.deepcopy(student.state_dict())
    betas = [torch.zeros(3, requires_grad=True) for _ in range(2)]

    def bridge(batch: Batch, i: int, alpha: Tensor) -> Tensor:
        target = mixed(teacher.blocks(batch.inputs)[i], alpha)
        entered = parts.to_student[str(i)](target)
        scores = student.above(student.layer2(entered) if i == 0 else entered)
        mapped = parts.to_teacher[str(i)](student.blocks(batch.inputs)[i][-1])
        st, ts = F.mse_loss(mapped, target), F.cross_entropy(scores, batch.labels)
        return weights["st_weight"] * st + weights["ts_weight"] * ts

    for i, beta in enumerate(betas):
        moved = [*student.parameters(), *parts.to_teacher[str(i)].parameters(), *parts.to_student[str(i)].parameters()]
        sgd = torch.optim.SGD(moved, lr=LR, momentum=MOMENTUM)
        adam = torch.optim.Adam([beta], lr=1e-2, betas=(0.5, 0.999))
        for step in range(*bounds[i]):
            batch = batches()[step % 4]
            held_out = bridge(batch.streams["search"], i, beta.softmax(0))
            loss = held_out + weights["regularizer"] * beta.square().sum()
            (beta.grad,) = torch.autograd.grad(loss, [beta])
            adam.step()
            sgd.zero_grad()
            bridge(batch, i, beta.detach().softmax(0)).backward()
            sgd.step()
    student.load_state_dict(fresh)
    alphas = [beta.detach().softmax(0) for beta in betas]
    distil_by_hand(student, teacher, parts, alphas, range(*bounds[2]), weights["weight"])
    return betas


def test_equals_a_loop_by_hand():
    options = {"st_weight": 0.7, "ts_weight": 1.3, "regularizer": 0.2, "weight": 2.0, "search_share": 0.6}
    (ours, teacher), (theirs, _) = pair(), pair()
    parts, _, _ = start(theirs, teacher, 20, **options)
    bounds = [parts.progress.table.bounds(i) for i in range(3)]
    assert bounds == [(0, 6), (6, 12), (12, 20)]
    del options["search_share"]
    betas = by_hand(theirs, teacher, parts, bounds, **options)
    trained = train(ours, teacher, 20, search_share=0.6, **options)
    assert distance(ours, theirs) < 2e-6
    for i, beta in enumerate(betas):
        assert float((trained.betas[str(i)] - beta).detach().abs().max()) < 2e-6
        assert float(beta.detach().abs().max()) > 5e-3
    for key in ("connectors", "to_teacher", "to_student"):
        assert distance(getattr(trained, key), getattr(parts, key)) < 2e-6
    assert distance(ours, pair()[0]) > 1e-2


def test_the_last_layer_alone_is_plain_feature_distillation(tmp_path):
    """Also where a search.json says so."""
    (ours, teacher), (theirs, _), (read, _) = pair(), pair(), pair()
    parts, _, _ = start(theirs, teacher, aggregation="last")
    last = torch.tensor([0.0, 0.0, 1.0])
    distil_by_hand(theirs, teacher, parts, [last, last], range(8), 1.0)
    distiller = train(ours, teacher, aggregation="last")
    assert distance(ours, theirs) < 2e-6
    assert [stage.name for stage in distiller.stages()] == ["distill"]
    distiller.export(tmp_path)
    assert [g["alpha"] for g in json.loads((tmp_path / "search.json").read_text())["groups"]] == [[0, 0, 1]] * 2
    train(read, teacher, weights=str(tmp_path / "search.json"))
    assert distance(ours, read) == 0.0


def test_uniform_and_random_weights():
    _, teacher = pair()
    uniform, _, _ = start(pair()[0], teacher, aggregation="uniform")
    assert torch.equal(uniform.alpha(0), torch.full((3,), 1 / 3))
    drawn = [start(pair()[0], teacher, aggregation="random", seed=seed)[0] for seed in (0, 0, 1)]
    alphas = [torch.stack([d.alpha(i) for i in range(2)]) for d in drawn]
    assert torch.equal(alphas[0], alphas[1])
    assert not torch.allclose(alphas[0], alphas[2])
    assert not torch.allclose(alphas[0][0], alphas[0][1])
    for alpha in alphas:
        assert bool((alpha > 0).all())
        torch.testing.assert_close(alpha.sum(1), torch.ones(2))
    for distiller in (uniform, *drawn):
        assert not distiller.extras()
        assert not distiller.needs().streams


def test_normalized_layers_do_not_depend_on_their_size():
    student, teacher = pair()
    distiller, nets, _ = start(student, teacher, normalize=True, aggregation="uniform")
    batch = batches(1)[0]
    view = nets.teacher(batch)
    expected = torch.stack([m / m.square().mean().sqrt() for m in teacher.blocks(batch.inputs)[1]]).mean(0)
    torch.testing.assert_close(
        distiller.aggregate(1, view, distiller.alpha(1), student.blocks(batch.inputs)[1][-1]), expected
    )


def test_maps_of_other_sizes_are_averaged_where_layers_are_named():
    student, teacher = pair()
    options = {"layers": ("layer2",), "teacher_layers": ("layer1.*",), "aggregation": "uniform"}
    distiller, nets, _ = start(student, teacher, **options)
    batch = batches(1)[0]
    (turn,) = distiller.turns(nets, batch)
    target = F.avg_pool2d(torch.stack(teacher.blocks(batch.inputs)[0]).mean(0), 2)
    expected = F.mse_loss(distiller.connectors["0"](student.blocks(batch.inputs)[1][-1]), target)
    torch.testing.assert_close(turn["student"]["features"], expected)


def test_a_sum_has_the_size_of_the_students_map_in_its_batch():
    """Batches of other sizes than the first, in a search and in the distillation, in one forward for each path."""
    student, teacher = pair()
    wide, held_out = (Batch.of(torch.randn(3, 3, n, 12), torch.randint(4, (3,))) for n in (12, 16))
    options = {"layers": ("layer2",), "teacher_layers": ("layer1.*",)}
    distiller, nets, _ = start(student, teacher, aggregation="uniform", **options)
    (turn,) = distiller.turns(nets, wide)
    target = F.avg_pool2d(torch.stack(teacher.blocks(wide.inputs)[0]).mean(0), 2)
    expected = F.mse_loss(distiller.connectors["0"](student.blocks(wide.inputs)[1][-1]), target)
    torch.testing.assert_close(turn["student"]["features"], expected)
    distiller, nets, _ = start(student, teacher, **options)
    calls: list[int] = []
    student.stem.register_forward_hook(lambda *_: calls.append(1))
    learned, last = distiller.turns(nets, Batch.of(wide.inputs, wide.labels, streams={"search": held_out}))
    assert len(calls) == 4
    for terms, batch in ((learned["beta"], held_out), (last["student"], wide)):
        target = F.avg_pool2d(torch.stack(teacher.blocks(batch.inputs)[0]).mean(0), 2)
        scores = student.above(distiller.to_student["0"](target))
        torch.testing.assert_close(terms["ts"], F.cross_entropy(scores, batch.labels))
        mapped = distiller.to_teacher["0"](student.blocks(batch.inputs)[1][-1])
        torch.testing.assert_close(terms["st"], F.mse_loss(mapped, target))


# The search


def test_options_take_effect_in_the_training():
    distiller, nets, _ = start(*pair(), ts_weight=0.0)
    before = list(distiller.turns(nets, batches()[0]))[-1]["student"]["st"]
    distiller.st_weight = 0.5
    torch.testing.assert_close(list(distiller.turns(nets, batches()[0]))[-1]["student"]["st"], before / 2)
    distiller.ts_weight = 1.0
    with pytest.raises(DistillError, match="path to_student had no weight when dfa was set up"):
        list(distiller.turns(nets, batches()[0]))


def test_each_search_moves_its_own_group_and_the_rest_stays():
    student, teacher = pair()
    first = copy.deepcopy(student)
    distiller, nets, optimizers = start(student, teacher, 12, search_share=0.5)
    assert [s.name for s in distiller.stages()] == ["search layer1", "search layer2", "distill"]
    states = [copy.deepcopy(distiller.state_dict())]
    for stage in range(3):
        needs = distiller.needs()
        assert bool(needs.streams) == (stage < 2)
        assert not needs.teacher.logits
        assert needs.teacher.features == tuple(f"layer{k}.{j}" for k in ((1,), (2,), (1, 2))[stage] for j in range(3))
        while distiller.progress.stage == stage and distiller.progress.step < 12:
            for turn in distiller.turns(nets, batches()[distiller.progress.step % 4]):
                play(turn, optimizers)
        states.append(copy.deepcopy(distiller.state_dict()))
        if stage == 1:
            assert distance(student, first) == 0.0
    moved = [
        {k.partition(".")[0] + k[-1:] if k[0] == "b" else ".".join(k.split(".")[:2]) for k in a if not same(a[k], b[k])}
        for a, b in zip(states[:-1], states[1:], strict=True)
    ]
    assert moved == [
        {"betas0", "to_teacher.0", "to_student.0", "trace0"},
        {"betas1", "to_teacher.1", "to_student.1", "trace1"},
        {"connectors.0", "connectors.1"},
    ]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_the_losses_move_their_own_groups():
    """The student's turn leaves beta alone, and CE of the second path does not reach the layers below the group."""
    student, teacher = pair()
    distiller, nets, _ = start(student, teacher)
    learned, last = distiller.turns(nets, batches()[0])
    assert list(learned) == ["beta"]
    assert list(last) == ["student"]
    beta = distiller.betas["0"]
    for term in learned["beta"].values():
        assert bool(torch.autograd.grad(term, beta, retain_graph=True)[0].any())
    terms = last["student"]
    assert set(terms) == {"st", "ts"}
    assert all(torch.autograd.grad(t, beta, retain_graph=True, allow_unused=True)[0] is None for t in terms.values())

    def reached(term: Tensor, module: nn.Module) -> bool:
        found = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g.any()) for g in found)

    assert [reached(terms["st"], m) for m in (student.layer1, student.layer2, student.head)] == [True, False, False]
    assert [reached(terms["ts"], m) for m in (student.layer1, student.layer2, student.head)] == [False, True, True]
    assert reached(terms["ts"], distiller.to_student["0"])
    assert reached(terms["st"], distiller.to_teacher["0"])


def test_the_search_prefers_the_layer_that_tells_the_classes():
    """One teacher layer says the class, the others are noise: the path through the student's head finds it."""

    class Says(nn.Module):
        """The class, which is the value of the image; or noise."""

        def __init__(self, seed: int | None) -> None:
            super().__init__()
            self.seed = seed

        def forward(self, x: Tensor) -> Tensor:
            if self.seed is None:
                said = F.one_hot(x[:, 0].mean((1, 2)).round().long().clamp(0, 3), 4).float()
                return said[:, :, None, None].expand(-1, -1, *x.shape[2:]).clone()
            return torch.randn(len(x), 4, *x.shape[2:], generator=torch.Generator().manual_seed(self.seed))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Says(1), Says(None), Says(2)])

        def forward(self, x: Tensor) -> Tensor:
            return sum(says(x).mean((2, 3)) for says in self.layer)

    student, teacher = Net(4, 1, 0), Layer().eval()
    torch.manual_seed(3)
    distiller = DFA(search_only=True, layers=("layer1",), teacher_layers=("layer.0+layer.1+layer.2",), st_weight=0.1)
    distiller.optim_overrides = {"beta": {"lr": 0.1}}

    def batch() -> Batch:
        labels = torch.randint(4, (32,), generator=generator)
        images = torch.zeros(32, 3, 8, 8)
        images[:, 0] = labels[:, None, None].float()
        return Batch.of(images, labels)

    generator = torch.Generator().manual_seed(0)
    nets = bind(distiller, student, teacher, batch=batch(), total_steps=60)
    optimizers = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM), nets)
    for _ in range(60):
        held_out = batch()
        one = batch()
        for turn in distiller.turns(nets, Batch.of(one.inputs, one.labels, streams={"search": held_out})):
            play(turn, optimizers)
    assert float(distiller.alpha(0).detach()[1]) > 0.7


def test_resumes_in_the_middle_of_a_search(tmp_path):
    student, teacher = pair()

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    def make() -> DFA:
        return DFA(search_share=0.6, regularizer=0.1)

    setting = Setting(make, student, [teacher], [], batches(), 20, sgd, adapt)
    whole = Training(setting).train()
    assert [whole.distiller.progress.table.bounds(i) for i in range(3)] == [(0, 8), (8, 12), (12, 20)]
    for stop in (3, 8, 10, 12, 15):
        folder = str(tmp_path / str(stop))
        Training(setting).train(stop=stop).run.save(folder)
        resumed = Training(setting, seed=1, refit=False).resume(folder).train()
        assert difference(whole.state(), resumed.state())[0] == 0.0, stop


def test_beta_stays_in_float32_under_autocast():
    student, teacher = pair()
    distiller, nets, optimizers = start(student, teacher)
    turns = iter(distiller.turns(nets, batches()[0]))
    with torch.autocast("cpu", torch.bfloat16):
        learned = next(turns)
        assert distiller.alpha(0).dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in learned["beta"].values())
    play(learned, optimizers)
    assert distiller.betas["0"].dtype == torch.float32
    assert 0 < float(distiller.betas["0"].detach().abs().max()) < 0.1


# Files, pictures, lists


def test_search_only_leaves_weights_for_another_run(tmp_path):
    student, teacher = pair()
    distiller = train(student, teacher, 8, search_only=True, normalize=True)
    assert [s.name for s in distiller.stages()] == ["search layer1", "search layer2"]
    assert len(distiller.connectors) == 0
    distiller.export(tmp_path)
    file = tmp_path / "search.json"
    again, _, optimizers = start(pair()[0], teacher, weights=str(file))
    assert [s.name for s in again.stages()] == ["distill"]
    assert not again.stages()[0].fresh_student
    assert not again.extras()
    assert optimizers.initial is None
    for i in range(2):
        torch.testing.assert_close(again.alpha(i), distiller.alpha(i).detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(again.get_buffer(f"scale{i}"), distiller.get_buffer(f"scale{i}"))
        assert float(distiller.alpha(i).detach().sub(1 / 3).abs().max()) > 1e-3
    assert again.groups == distiller.groups
    # Another student has other names for its layers.
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))
    named, _, _ = start(other, teacher, weights=str(file), layers=("0", "1"))
    assert [group.student for group in named.groups] == ["0", "1"]


def test_pictures_show_the_weights_and_their_way():
    student, teacher = pair()
    distiller = train(student, teacher, 20, search_share=0.6)
    bars, maps = [p.to_json() for p in distiller.pictures()][:2], [p.to_json() for p in distiller.pictures()][2:]
    assert [b["kind"] for b in bars] == ["bars"] * 2
    assert [m["kind"] for m in maps] == ["heatmap"] * 2
    for i in range(2):
        alpha = distiller.alpha(i).tolist()
        assert bars[i]["values"] == list(zip([f"layer{i + 1}.{j}" for j in range(3)], alpha, strict=True))
        assert bars[i]["mark"] == pytest.approx(1 / 3)
        way = torch.tensor(maps[i]["values"])
        assert way.shape == (3, 7)
        assert maps[i]["columns"] == ["0 %", "15 %", "30 %", "50 %", "65 %", "80 %", "100 %"]
        assert way[:, 0].tolist() == pytest.approx([1 / 3] * 3)
        assert way[:, -1].tolist() == alpha
    plain = train(pair()[0], teacher, aggregation="uniform")
    assert [p.kind for p in plain.pictures()] == ["bars", "bars"]


def test_groups_are_listed_before_the_training(caplog):
    student, teacher = pair()
    with caplog.at_level(logging.INFO, "kd_plugins.dfa"):
        start(student, teacher)
    lines = [record.getMessage() for record in caplog.records]
    names = "layer1.0, layer1.1, layer1.2"
    assert lines[0] == f"dfa, layer group 1: student layer1 [4, 8, 8], teacher {names} [6, 8, 8], searched"
    assert len(lines) == 2
    caplog.clear()
    with caplog.at_level(logging.INFO, "kd_plugins.dfa"):
        start(student, teacher, aggregation="last", teacher_layers=("layer2.*",))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("teacher layer2.0, layer2.1, layer2.2 [12, 4, 4], weights [0.0, 0.0, 1.0]")


def test_groups_of_one_layer_need_no_search():
    student, teacher = pair(depth=1)
    distiller, _, _ = start(student, teacher)
    assert [s.name for s in distiller.stages()] == ["distill"]
    assert [distiller.alpha(i).tolist() for i in range(2)] == [[1.0]] * 2
    with pytest.raises(DistillError, match=r"nothing to search: take a deeper one.* leave out search_only\."):
        start(student, teacher, search_only=True)
    with pytest.raises(DistillError, match=r"leave out search_epochs, held_out\."):
        start(student, teacher, search_epochs=2.0, held_out=0.25)


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "search.json", "aggregation": "uniform"}, "leave aggregation and search_only out"),
        ({"weights": "search.json", "search_only": True}, "leave aggregation and search_only out"),
        ({"weights": "search.json", "normalize": True}, "leave those options out"),
        ({"aggregation": "last", "search_only": True}, "aggregation=last has none"),
        ({"st_weight": 0.0, "ts_weight": 0.0}, "st_weight or ts_weight above"),
        ({"regularizer": -1.0}, "regularizer to be float from 0"),
        ({"search_share": 1.0}, "search_share to be float above 0 below 1"),
        ({"search_epochs": 0.0}, "search_epochs to be float above 0"),
        ({"aggregation": "uniform", "st_weight": 0.5, "held_out": 0.3}, "st_weight, held_out: only a search"),
        ({"weights": "search.json", "search_epochs": 1.0}, "search_epochs: only a search"),
        ({"seed": 1}, "seed is of random weights"),
        ({"search_epochs": 1.0, "search_only": True}, "leave search_epochs out"),
        ({"held_out": 0.0}, "held_out to be float above 0 below 1"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(DistillError, match=words):
        DFA(**options)


def test_networks_and_files_that_do_not_fit(tmp_path):
    student, teacher = pair()
    with pytest.raises(DistillError, match=r"layers \['layer1.2', 'layer2.0'\] have \[6, 12\] channels"):
        start(student, teacher, layers=("layer2",), teacher_layers=("layer1.2+layer2.0",))
    with pytest.raises(DistillError, match=r"no maps of one spatial size"):
        start(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(196, 4)), teacher)
    with pytest.raises(DistillError, match=r"Expected the search.json of a run with dfa, got .*nowhere.json"):
        start(student, teacher, weights=str(tmp_path / "nowhere.json"))
    file = tmp_path / "search.json"
    file.write_text('{"groups": [{"student": "layer1", "teacher": ["layer1.0"], "alpha": [0.5, 0.5], "scale": [1.0]}]}')
    with pytest.raises(DistillError, match=r"an alpha and a scale for each teacher layer"):
        start(student, teacher, weights=str(file))
    for alpha in ("[0.5]", "[NaN]", '["one"]'):
        file.write_text(
            f'{{"groups": [{{"student": "layer1", "teacher": ["layer1.0"], "alpha": {alpha}, "scale": [1]}}]}}'
        )
        with pytest.raises(DistillError, match=r"sum to 1 in each group|Expected the search.json"):
            start(student, teacher, weights=str(file))
    file.write_text('{"options": {}}')
    with pytest.raises(DistillError, match=r"Expected the search.json of a run with dfa"):
        start(student, teacher, weights=str(file))
    distiller, nets, _ = start(student, teacher)
    alone = Batch.of(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(DistillError, match=r"reads the stream 'search'"):
        list(distiller.turns(nets, alone))


def test_epochs_of_a_search_in_a_bare_loop():
    student, teacher = pair()
    distiller = DFA(search_epochs=1.0)
    bind(distiller, student, teacher, batch=batches()[0], total_steps=12, epoch_steps=3)
    assert distiller.progress.table.starts == [0, 3, 6]
