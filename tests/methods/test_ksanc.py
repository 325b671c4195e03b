"""KSANC: each term by hand, its ablations, its stages and processes, and the networks that it fits."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_kit import keep, kept, on_two_processes
from precision_kit import share_of_the_way
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, bind, create_distiller, make_optimizers, play
from kd_plugins.testing import CLAUSES, TinyNet, check_distiller, tiny_batches, tiny_tokens, tiny_transformer

LAYERS = {"layers": ("layer1", "layer2")}
BERT = {"layers": ("bert.encoder.layer.0",), "teacher_layers": ("bert.encoder.layer.2",)}
ALL = {"classes", "fooled", "l1", "l2", "tell"}


def start(total: int = 4, *, batch: Batch | None = None, wrap: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    student, teacher = TinyNet(), TinyNet(6)
    distiller = create_distiller("ksanc", **{"estimator_share": 0.5, **LAYERS, **options})
    with torch.no_grad():
        teacher.head.weight.mul_(20)
    module = student if wrap is None else wrap(student)
    nets = bind(distiller, module, teacher, batch=batch or tiny_batches(1)[0], total_steps=total)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return distiller, nets, make_optimizers(distiller, sgd)


def train(distiller: Any, nets: Any, run: Any, batches: list[Batch]) -> list[Any]:
    turns = []
    for batch in batches:
        for turn in distiller.turns(nets, batch):
            turns.append(turn)
            play(turn, run)
    return turns


def second_stage(**options: Any) -> tuple[Any, Any, Any]:
    """A training that is past its first stage, if it has one."""
    distiller, nets, run = start(**options)
    train(distiller, nets, run, tiny_batches(2))
    return distiller, nets, run


def state(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.detach().clone() for i, m in enumerate(modules) for k, v in m.state_dict().items()}


# The terms


def by_hand(estimator: Any, features: Tensor, logits: Tensor) -> Tensor:
    """The descriptors of a map `[B, C, H, W]`, example by example."""
    found = []
    for x, z in zip(features, logits, strict=True):
        local = x.flatten(1).T @ estimator.local.weight.T + estimator.local.bias
        scores = torch.tanh(local + estimator.overall.weight @ z) @ estimator.score.weight[0]
        shares = scores.exp() / scores.exp().sum()
        found.append((shares[:, None] * local).sum(0))
    return torch.stack([v / v.square().sum().sqrt() for v in found])


def test_every_term_is_the_equation():
    weights = {"weight": 2.0, "logit_weight": 3.0, "adversarial_weight": 0.7, "task_weight": 0.5, "fooled": 0.3}
    options = {"l1": 0.01, "l2": 0.02, "class_weight": 1.5, "dim": 3, "hidden": (5, 6)}
    distiller, nets, run = start(**weights, **options)
    x, y = (batch := tiny_batches(3)[2]).inputs, batch.labels
    student, teacher = nets.student.module, nets.teacher.module
    scale = teacher(tiny_batches(1)[0].inputs).square().mean().sqrt()
    assert scale > 1

    def read(net: TinyNet) -> tuple[list[Tensor], Tensor]:
        first = net.layer1(net.conv1(x).relu())
        second = net.layer2(first)
        z = net.head(second.mean((2, 3)))
        z = z / scale
        return [first, second], z

    maps, z_t = read(teacher)
    (turn,) = distiller.turns(nets, batch)
    assert set(turn["estimators"]) == {"classes_0", "classes_1"}
    for i, features in enumerate(maps):
        said = distiller.heads[i](by_hand(distiller.estimators[i], features, z_t)).log_softmax(1)
        torch.testing.assert_close(turn["estimators"][f"classes_{i}"], -said[range(8), y].mean())

    train(distiller, nets, run, tiny_batches(2))
    maps_s, z_s = read(student)
    judge, step = distiller.discriminator, distiller.turns(nets, batch)
    (judged,) = next(step).values()
    numbers = torch.cat([p.detach().flatten() for p in judge.parameters()])

    def classes(z: Tensor) -> Tensor:
        return -judge(z)[:, 1:].log_softmax(1)[range(8), y].mean()

    p_t, p_s = (judge(z)[:, 0].sigmoid() for z in (z_t, z_s))
    expected = {
        "tell": -p_t.log().mean() - (1 - p_s).log().mean(),
        "fooled": -0.3 * p_s.log().mean(),
        "l1": 0.01 * numbers.abs().sum(),
        "l2": 0.02 * numbers.square().sum(),
        "classes": 1.5 * (classes(z_t) + classes(z_s)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(judged[name], value, msg=name)
    assert set(judged) == set(expected)
    # The logits that it judges are cut from the student, and its update comes before the student's.
    total = sum(judged.values())
    assert torch.autograd.grad(total, student.head.weight, allow_unused=True, retain_graph=True) == (None,)
    play({"discriminator": judged}, run)
    (terms,) = next(step).values()
    squeezed = [
        (by_hand(own, a, z_s) - by_hand(other, b, z_t)).square().sum(1).mean()
        for own, a, other, b in zip(distiller.connectors, maps_s, distiller.estimators, maps, strict=True)
    ]
    torch.testing.assert_close(terms["descriptors"], 2 * sum(squeezed))
    torch.testing.assert_close(terms["logits"], 3 * (z_s - z_t).square().mean())
    told = -judge(z_s)[:, 0].sigmoid().log().mean() + 1.5 * classes(z_s)
    torch.testing.assert_close(terms["adversarial"], 0.7 * told)
    torch.testing.assert_close(terms["task"], 0.5 * F.cross_entropy(student(x), y))
    with torch.no_grad():
        numbers_after = torch.cat([p.flatten() for p in judge.parameters()])
    assert not torch.equal(numbers, numbers_after)


@pytest.mark.parametrize(
    ("options", "groups", "judged", "terms"),
    [
        ({}, {"own", "estimators", "discriminator"}, ALL, {"task", "descriptors", "logits", "adversarial"}),
        ({"weight": 0}, {"discriminator"}, ALL, {"task", "logits", "adversarial"}),
        ({"logit_weight": 0}, {"own", "estimators", "discriminator"}, ALL, {"task", "descriptors", "adversarial"}),
        ({"adversarial_weight": 0}, {"own", "estimators"}, set(), {"task", "descriptors", "logits"}),
        ({"weight": 0, "adversarial_weight": 0, "task_weight": 0}, set(), set(), {"logits"}),
        (
            {"weight": 0, "fooled": 0, "l1": 0, "l2": 0, "class_weight": 0},
            {"discriminator"},
            {"tell"},
            {"task", "logits", "adversarial"},
        ),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_each_loss_can_be_left_out(options, groups, judged, terms):
    """With its parts, its stage and what is read for it; the other terms stay."""
    distiller, nets, run = second_stage(**options)
    assert set(run.groups) == groups
    assert [s.name for s in distiller.stages()] == (["estimators", "distill"] if "own" in groups else ["distill"])
    assert bool(distiller.needs().teacher.features) == ("own" in groups)
    turns = list(distiller.turns(nets, tiny_batches(3)[2]))
    assert set(turns[-1]["student"]) == terms
    assert [set(turn["discriminator"]) for turn in turns[:-1]] == ([judged] if judged else [])
    if options.get("class_weight") == 0:
        assert distiller.discriminator[-1].out_features == 1


def test_without_labels_the_classes_are_left_out_and_estimators_learn_the_teachers():
    distiller, nets, run = start(task_weight=0.0)
    bare = [batch.with_labels(None) for batch in tiny_batches(3)]
    (turn,) = distiller.turns(nets, bare[0])
    view = nets.teacher(bare[0])
    (said, _) = (
        head(v) for head, v in zip(distiller.heads, distiller.descriptors(view, bare[0], teacher=True), strict=True)
    )
    expected = -(view.logits.softmax(1) * said.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(turn["estimators"]["classes_0"], expected)
    turns = train(distiller, nets, run, bare)
    assert turns[-2]["discriminator"]["classes"].item() == 0
    assert set(turns[-1]["student"]) == {"descriptors", "logits", "adversarial"}
    mixed = bare[0].with_labels(torch.full((8, 4), 0.25))
    assert next(iter(distiller.turns(nets, mixed)))["discriminator"]["classes"].item() > 0


def test_examples_whose_label_is_ignored_have_no_class():
    distiller, nets, run = start()
    train(distiller, nets, run, tiny_batches(2))
    batch = tiny_batches(3)[2]
    labels = batch.labels.clone()
    labels[:3] = 255
    known = dataclasses.replace(batch.with_labels(labels), ignore_index=255)
    step = distiller.turns(nets, known)
    judged = next(step)["discriminator"]["classes"]
    said = [
        distiller.discriminator(net.module(batch.inputs) / distiller.scale)[3:, 1:].log_softmax(1)
        for net in (nets.teacher, nets.student)
    ]
    right = batch.labels[3:]
    torch.testing.assert_close(judged, -sum(x[range(5), right].mean() for x in said))
    without = dataclasses.replace(known, labels=None)
    seen, classless = (distiller.loss(nets.student(b), nets.teacher(b), b)["adversarial"] for b in (known, without))
    torch.testing.assert_close(seen - classless, -0.1 * said[1][range(5), right].mean())
    distiller.progress.stage = 0
    view = nets.teacher(known)
    said = [h(v) for h, v in zip(distiller.heads, distiller.descriptors(view, known, teacher=True), strict=True)]
    for i, scores in enumerate(said):
        expected = -scores[3:].log_softmax(1)[range(5), right].mean()
        torch.testing.assert_close(distiller.informed(view, known)[f"classes_{i}"], expected)


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.long, -100), (torch.long, 255), (torch.uint8, 255)])
def test_a_batch_of_ignored_labels_alone_has_no_classes_and_stays_finite(dtype, ignored):
    distiller, nets, run = start()
    batches = [
        dataclasses.replace(b.with_labels(torch.full((8,), ignored, dtype=dtype)), ignore_index=ignored, criterion=zero)
        for b in tiny_batches(4)
    ]
    turns = train(distiller, nets, run, batches)
    assert turns[0]["estimators"]["classes_0"] == 0
    assert turns[-2]["discriminator"]["classes"] == 0
    assert all(p.isfinite().all() for p in (*distiller.parameters(), *nets.student.module.parameters()))


def zero(view, labels):
    return 0 * view.logits.sum()


# The stages


def test_the_teachers_estimators_learn_first_alone_and_are_frozen_then():
    distiller, nets, run = start(6)
    student = nets.student.module
    teachers = nn.ModuleList([distiller.estimators, distiller.heads])
    for step, batch in enumerate(tiny_batches(6)):
        before = state(teachers), state(student, distiller.connectors, distiller.discriminator)
        train(distiller, nets, run, [batch])
        after = state(teachers), state(student, distiller.connectors, distiller.discriminator)
        moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True)]
        assert moved == [step < 3, step >= 3]


def test_the_teachers_descriptors_tell_the_classes():
    """A student that learns them cannot draw them to anything that says less."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = 0.5 * torch.randn(64, 3, 12, 12)
    # The class is a bright patch somewhere, in one colour or all.
    for i, label in enumerate(labels.tolist()):
        row, column = torch.randint(0, 9, (2,)).tolist()
        images[i, slice(None) if label == 3 else label, row : row + 3, column : column + 3] += 3
    batch = Batch.of(images, labels)
    teacher, student = TinyNet(8), TinyNet()
    adam = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        adam.step()
    assert float((teacher(images).argmax(1) == labels).float().mean()) > 0.9
    alone = {"logit_weight": 0, "adversarial_weight": 0}
    distiller = create_distiller("ksanc", layers=("layer2",), estimator_share=0.6, dim=4, **alone)
    distiller.optim_overrides = {"estimators": {"lr": 0.03}}
    nets = bind(distiller, student, teacher, batch=batch, total_steps=100)
    run = make_optimizers(distiller, torch.optim.Adam(student.parameters(), lr=0.02))

    def told() -> tuple[float, Tensor]:
        with torch.no_grad():
            (v,) = distiller.descriptors(nets.teacher(batch), batch, teacher=True)
            return float((distiller.heads[0](v).argmax(1) == labels).float().mean()), v

    assert told()[0] < 0.6
    train(distiller, nets, run, [batch] * 60)
    share, v = told()
    assert share > 0.8
    turns = train(distiller, nets, run, [batch] * 40)
    assert told()[0] == share
    torch.testing.assert_close(told()[1], v)
    apart = [turn["student"]["descriptors"].item() for turn in turns if "student" in turn]
    # The student's distance is below that of the best constant.
    assert apart[-1] < 0.8 * float(v.var(0, correction=0).sum()) < apart[0]


@pytest.mark.parametrize("stopped", [1, 3], ids=["first stage", "second stage"])
def test_resume_is_exact_in_both_stages(stopped, tmp_path):
    batches = tiny_batches(5)
    distiller, nets, run = start(5)
    train(distiller, nets, run, batches[:stopped])
    assert distiller.progress.stage == (stopped > 2)
    run.save(tmp_path)
    train(distiller, nets, run, batches[stopped:])
    again, others, resumed = start(5)
    for parameter in (*others.student.module.parameters(), *again.parameters()):
        parameter.data.add_(1)
    resumed.load(tmp_path)
    train(again, others, resumed, batches[stopped:])
    ended = state(distiller, nets.student.module)
    for name, value in state(again, others.student.module).items():
        assert torch.equal(value, ended[name]), name


def test_bfloat16_goes_the_way_of_float32():
    def ended(half: bool) -> tuple[list[Tensor], list[Tensor]]:
        distiller, nets, run = start(8)
        student = nets.student.module
        begin = [p.detach().clone() for p in student.parameters()]
        for batch in tiny_batches(8):
            turns = distiller.turns(nets, batch)
            while True:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    turn = next(turns, None)
                if turn is None:
                    break
                play(turn, run)
        return begin, [p.detach() for p in student.parameters()]

    begin, exact = ended(False)
    assert 0 < share_of_the_way(begin, exact, ended(True)[1]) < 0.1


def worker(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = [Batch.of(b.inputs[rank::2], b.labels[rank::2]) for b in tiny_batches(4)]
    distiller, nets, run = start(batch=mine[0], wrap=nn.parallel.DistributedDataParallel)
    train(distiller, nets, run, mine)
    keep(state(nets.student.module, distiller), folder)


@pytest.mark.distributed
def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    on_two_processes(__file__, str(tmp_path))
    distiller, nets, run = start()
    train(distiller, nets, run, tiny_batches(4))
    expected = state(nets.student.module, distiller)
    for found in kept(tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0, msg=name)


# Networks


def texts(**changes: Any) -> tuple[Any, Any, Batch]:
    distiller = create_distiller("ksanc", estimator_share=0.5, **BERT)
    batch = dataclasses.replace(tiny_tokens(1)[0], **changes)
    torch.manual_seed(0)
    return distiller, bind(distiller, tiny_transformer(2), tiny_transformer(4), batch=batch, total_steps=2), batch


def test_tokens_of_padding_count_nothing():
    """What stands there is another token, and longer padding changes nothing."""
    distiller, nets, batch = texts()
    mask = batch.mask
    ids = torch.where(mask == 1, batch.inputs, (batch.inputs + 7) % 40)
    more = {"token_type_ids": F.pad(batch.kwargs["token_type_ids"], (0, 3)), "attention_mask": F.pad(mask, (0, 3))}
    longer = dataclasses.replace(batch, inputs=F.pad(ids, (0, 3), value=3), kwargs=more, mask=F.pad(mask, (0, 3)))
    for stage in range(2):
        distiller.progress.stage = stage
        terms = [
            {k: v for turn in distiller.turns(nets, b) for group in turn.values() for k, v in group.items()}
            for b in (batch, longer)
        ]
        for name, value in terms[0].items():
            torch.testing.assert_close(terms[1][name], value, msg=name)


def test_a_teacher_with_tokens_of_its_own_has_its_own_mask():
    own = tiny_tokens(1, seed=3)[0]
    columns = {"input_ids": F.pad(own.inputs, (0, 2)), "attention_mask": F.pad(own.mask, (0, 2))}
    distiller, nets, batch = texts(teacher_kwargs=columns)
    view = nets.teacher(batch)
    (found,) = distiller.descriptors(view, batch, teacher=True)
    (estimator,), (tokens,) = distiller.estimators, view.features.values()
    expected = torch.stack(
        [
            estimator(x[None, :n], z[None] / distiller.scale)[0]
            for x, z, n in zip(tokens, view.logits, own.mask.sum(1).tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(found, expected)


def test_keeps_the_contract_on_texts_and_with_kd():
    networks = {"student": tiny_transformer(2), "teacher": tiny_transformer(4), "batches": tiny_tokens()}
    assert check_distiller("ksanc", options=BERT, **networks) == CLAUSES
    assert check_distiller("kd+ksanc", options={"kd.alpha": 0.5, "dim": 3}) == CLAUSES


def test_maps_of_any_size_and_a_student_in_bfloat16():
    distiller, nets, _ = start(layers=("layer1",), teacher_layers=("layer2",))
    nets.student.module.bfloat16()
    batch = tiny_batches(3)[2]
    distiller.progress.stage = 1
    half = dataclasses.replace(batch, inputs=batch.inputs.bfloat16())
    terms = list(distiller.turns(nets, half))[-1]["student"]
    assert all(value.isfinite() and value.requires_grad for value in terms.values())


@pytest.mark.parametrize(
    ("options", "student", "words"),
    [
        (LAYERS, TinyNet(classes=5), r"same K >= 2 classes, got \[8, 5\] from the student and \[8, 4\]"),
        ({"layers": ("head",)}, TinyNet(), r"maps \[B, C, H, W\] or tokens \[B, L, C\], got \[8, 4\] at 'head'"),
        ({"layers": ("layer1", "layer2"), "teacher_layers": ("layer1",)}, TinyNet(), "as many teacher_layers"),
        ({"weight": 0, "logit_weight": 0, "adversarial_weight": 0}, TinyNet(), "nothing to distil"),
    ],
    ids=str,
)
def test_refusals(options, student, words):
    with pytest.raises(DistillError, match=words):
        bind(create_distiller("ksanc", **options), student, TinyNet(6), batch=tiny_batches(1)[0], total_steps=4)


def test_several_labels_of_an_example_are_no_shares_of_classes():
    several = dataclasses.replace(tiny_batches(1)[0], labels=torch.ones(8, 4), task="multilabel")
    with pytest.raises(DistillError, match="of the task multilabel: use classifiers with one label for each example"):
        bind(create_distiller("ksanc", **LAYERS), TinyNet(), TinyNet(6), batch=several, total_steps=4)


def test_labels_and_masks_that_do_not_fit():
    distiller, nets, _ = start()
    batch = tiny_batches(1)[0]
    for labels in (batch.labels[:, None], ["a"] * 8):
        with pytest.raises(DistillError, match=r"class numbers \[B\] or shares of the classes"):
            list(distiller.turns(nets, batch.with_labels(labels)))
    distiller, nets, batch = texts()
    with pytest.raises(DistillError, match="a vector for each token of the input"):
        list(distiller.turns(nets, dataclasses.replace(batch, mask=torch.ones(4, 9))))


def test_a_copy_trains_as_the_first():
    """Options, parts and groups go along."""
    distiller, nets, run = second_stage()
    other = copy.deepcopy(distiller)
    assert set(other.extras()) == set(distiller.extras())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in distiller.state_dict().items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(str(Path(sys.argv[1])))
