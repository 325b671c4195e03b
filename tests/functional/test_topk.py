"""The top k of a teacher with the rest as one class: against loops in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_plugins import Batch, DistillError
from kd_plugins import functional as KF
from kd_plugins.methods.kd import soft_labels
from kd_plugins.reading.nets import Net
from kd_plugins.reading.network import Network
from kd_plugins.reading.view import Reads, TopK, View

torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 5, 7, dtype=torch.float64), 3 * torch.randn(2, 5, 7, dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def by_hand(student, teacher, k, temperature, mask) -> float:
    examples = []
    for b in range(len(student)):
        values = []
        for i in range(student.shape[1]):
            if not mask[b, i]:
                continue
            p, q = (np.exp(x[b, i].numpy() / temperature) for x in (teacher, student))
            p, q = p / p.sum(), q / q.sum()
            order = np.argsort(-p)
            groups = [[c] for c in order[:k]] + ([list(order[k:])] if k < len(p) else [])
            values.append(sum(p[g].sum() * np.log(p[g].sum() / q[g].sum()) for g in groups))
        examples.append(np.mean(values))
    return temperature**2 * float(np.mean(examples))


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_it_is_the_divergence_between_merged_distributions(k):
    scores, classes = KF.top_k(TEACHER, k, 2.0)
    student = STUDENT.clone().requires_grad_(True)
    loss = KF.kd(KF.merge_rest(student, classes, 2.0), scores, 2.0, mask=MASK)
    assert loss.item() == pytest.approx(by_hand(STUDENT, TEACHER, k, 2.0, MASK), rel=1e-9)
    whole = KF.kd(STUDENT, TEACHER, 2.0, mask=MASK)
    assert loss <= whole + 1e-12
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    if k == 7:
        other = STUDENT.clone().requires_grad_(True)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(gradient, torch.autograd.grad(KF.kd(other, TEACHER, 2.0, mask=MASK), other)[0])


def test_a_rest_without_mass_is_finite():
    teacher = torch.tensor([[50.0, 0.0, 0.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    scores, classes = KF.top_k(teacher, 1)
    KF.kd(KF.merge_rest(student, classes), scores, 1.0).backward()
    assert student.grad.isfinite().all()


def test_kd_reads_it_in_place_of_the_logits():
    labels = torch.where(MASK.bool(), 1, -100)
    batch = Batch(torch.zeros(2, 5), labels, task="token", mask=MASK)
    top = TopK(*KF.top_k(TEACHER, 3, 2.0), 2.0)
    found = soft_labels(View(STUDENT), View(top=top), batch, 2.0)
    assert found.item() == pytest.approx(by_hand(STUDENT, TEACHER, 3, 2.0, MASK), rel=1e-9)
    with pytest.raises(DistillError, match="at temperature 2, and the loss has 4"):
        soft_labels(View(STUDENT), View(top=top), batch, 4.0)
    with pytest.raises(DistillError, match="the 3 highest of the teacher's scores"):
        soft_labels(View(STUDENT), View(top=top), batch, 2.0, standardize=True)


def test_a_teacher_with_its_classes_in_another_order():
    order = [2, 0, 1]
    teacher = torch.tensor([[1.0, 5.0, 3.0]])
    net = Net(Network(torch.nn.Linear(1, 3)), Reads, frozen=True, order=order)
    whole = net(Batch(torch.zeros(1, 1), teacher_logits=teacher)).logits
    top = net(Batch(torch.zeros(1, 1), teacher_logits=TopK(*KF.top_k(teacher, 2)))).top
    torch.testing.assert_close(whole.gather(-1, top.classes), top.scores[:, :2])
