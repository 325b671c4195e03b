"""What ensemble distribution distillation reads of its teachers, its schedule, and what uncertainty is worth."""

from __future__ import annotations

import itertools

import pytest
import torch

from kd_plugins import Batch, DistillError, View, create_distiller, uncertainty
from kd_plugins import functional as KF
from kd_plugins.evaluation import Answers, dirichlet_offset, doubts, uncertainty_metrics
from kd_report.measures import predictions


def scores(*shape: int, seed: int = 0) -> View:
    return View(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def members(*shape: int, count: int = 3) -> tuple[list[View], torch.Tensor]:
    views = [scores(*shape, seed=k + 1) for k in range(count)]
    return views, torch.stack([view.logits for view in views], 1)


def test_the_temperature_stays_falls_and_is_one() -> None:
    distiller = create_distiller("endd", temperature=10.0, cycle=0.5)
    with pytest.raises(DistillError, match="total_steps"):
        distiller.temperature_at(10.0)
    distiller.progress.total = 100
    for step, expected in ((0, 10.0), (25, 10.0), (30, 8.2), (40, 4.6), (50, 1.0), (99, 1.0)):
        distiller.progress.step = step
        assert distiller.temperature_at(10.0) == pytest.approx(expected)
    assert create_distiller("endd", cycle=0.0).temperature_at(10.0) == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("members", lambda s, m: KF.endd(s, m, 10.0, 1e-3)),
        ("reverse-proxy", lambda s, m: KF.endd_proxy(s, m)),
        ("forward-proxy", lambda s, m: KF.endd_proxy(s, m, direction="forward")),
        ("mean", lambda s, m: KF.end(s, m, 10.0)),
    ],
)
def test_targets_with_their_defaults(target, expected) -> None:
    student = scores(4, 5)
    views, stacked = members(4, 5)
    distiller = create_distiller("endd", target=target)
    distiller.progress.total = 9
    # Labels are not read.
    (term,) = distiller.taught(student, views, Batch(labels=torch.rand(4, 5))).values()
    torch.testing.assert_close(term, expected(student.logits, stacked))
    changed = create_distiller("endd", target=target, smoothing=0.1, temperature=2.0)
    changed.progress.total = 9
    assert changed.taught(student, views, Batch())["endd"] != term


@pytest.mark.parametrize(("classes", "target"), [(100, "members"), (101, "reverse-proxy")])
def test_many_classes_have_a_proxy(classes: int, target: str) -> None:
    student = scores(2, classes)
    views, _ = members(2, classes)
    auto, named = (create_distiller("endd", **options, cycle=0.0) for options in ({}, {"target": target}))
    assert auto.taught(student, views, Batch()) == named.taught(student, views, Batch())
    assert dirichlet_offset(auto, classes) == (0.0 if target == "members" else 1.0)


def test_tokens_that_do_not_count_are_left_out() -> None:
    labels = torch.tensor([[1, -100, 4], [0, -100, -100]])
    student, (views, stacked) = scores(2, 3, 5), members(2, 3, 5)
    batch = Batch(inputs=torch.ones(2, 3), labels=labels, task="token")
    found = create_distiller("endd", cycle=0.0).taught(student, views, batch)["endd"]
    torch.testing.assert_close(found, KF.endd(student.logits, stacked, mask=labels != -100))


def test_it_has_no_task_loss_and_combines() -> None:
    distiller = create_distiller("endd+dkd", cycle=0.0)
    student, batch = scores(4, 5), Batch(labels=torch.tensor([0, 4, 2, 2]))
    views, stacked = members(4, 5)
    student.logits.requires_grad_()
    terms = distiller.taught(student, views, batch)
    torch.testing.assert_close(terms["endd"], KF.endd(student.logits, stacked))
    assert set(terms) == {"endd", "dkd"}
    assert create_distiller("endd").task(student, batch) == {}
    assert dirichlet_offset(distiller, 5) == 0
    assert dirichlet_offset(create_distiller("endd", target="mean"), 5) is None
    assert dirichlet_offset(create_distiller("kd"), 5) is None


def test_two_classes_under_one_sigmoid_are_refused() -> None:
    with pytest.raises(DistillError, match="exclude each other"):
        create_distiller("endd", cycle=0.0).taught(scores(4, 1), [scores(4, 1)], Batch())


def share_above(high: torch.Tensor, low: torch.Tensor) -> float:
    """The area under the ROC curve, counted."""
    pairs = list(itertools.product(high.tolist(), low.tolist()))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("kind", ["softmax", "dirichlet", "ensemble"])
def test_metrics_are_counted_right(kind: str) -> None:
    shape = (40, 3, 4) if kind == "ensemble" else (40, 4)
    options = {"offset": 1.0} if kind == "dirichlet" else {}
    known, other = 2 * scores(*shape).logits, scores(*shape, seed=1).logits
    labels = torch.arange(40) % 4
    probs = {"softmax": known.softmax(-1), "dirichlet": (known.exp() + 1), "ensemble": known.softmax(-1)}[kind].double()
    probs = probs.mean(1) if kind == "ensemble" else probs / probs.sum(-1, keepdim=True)
    wrong = probs.argmax(-1) != labels
    found = uncertainty_metrics(doubts(known, labels, **options), doubts(other, **options))
    assert found["error"] == pytest.approx(wrong.double().mean().item())
    assert found["nll"] == pytest.approx(-probs[range(40), labels].log().mean().item(), rel=1e-5)
    measures = {"confidence": 1 - probs.amax(-1), "total": -(probs * probs.log()).sum(-1)}
    if kind != "softmax":
        parts = uncertainty(known.double(), members=kind == "ensemble", **options)
        measures |= {"data": parts.data, "knowledge": parts.knowledge}
    assert {name.rpartition("_")[2] for name in found} == {"error", "nll", "ece", *measures}
    for name, values in measures.items():
        assert found[f"errors_auroc_{name}"] == pytest.approx(share_above(values[wrong], values[~wrong]), abs=2e-3)
        kept = wrong[values.argsort()].double()
        rejection = sum(kept[: n + 1].mean().item() for n in range(40)) / 40
        assert found[f"rejection_{name}"] == pytest.approx(rejection, abs=1e-3)
        theirs = doubts(other, **options)[name]
        assert found[f"ood_auroc_{name}"] == pytest.approx(share_above(theirs, values), abs=2e-3)


def test_the_curve_of_a_report_ends_at_the_error() -> None:
    logits, labels = scores(200, 4).logits, torch.arange(200) % 4
    answers = Answers()
    answers.add("student", logits, labels)
    summary, arrays = predictions(answers.found(), 4)
    share, error = arrays["student/rejection"].T
    assert len(share) == 50
    assert share[-1] == 1
    assert error[-1] == pytest.approx(1 - summary["student"]["accuracy"])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    first = entropy.argsort()[: round(200 * share[20].item())]
    assert error[20] == pytest.approx((logits.argmax(1) != labels)[first].double().mean().item())


def test_without_errors_there_is_no_curve() -> None:
    logits = 9 * torch.eye(3)
    found = uncertainty_metrics(doubts(logits, torch.arange(3)))
    assert found["error"] == found["rejection_total"] == 0
    assert not any(name.startswith(("errors", "ood")) for name in found)
