"""CRD's memory on one process and on two, and what the method makes of it."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kd_plugins import DistillError, bind, create_distiller
from kd_plugins import functional as KF
from kd_plugins.nn.bank import MemoryBank, OtherRows
from kd_plugins.testing import TinyNet, tiny_batches, tiny_tokens, tiny_transformer

PATHS = {"layers": ("layer2",)}


@pytest.mark.parametrize("kind", [torch.long, torch.uint8])
def test_the_term_is_both_sides_of_the_memory(kind):
    """Followed for two steps by hand: heads, memory, draws, constants of the first step."""
    student, teacher = TinyNet(), TinyNet(6)
    batches = [batch.with_labels(batch.labels.to(kind)) for batch in tiny_batches(2)]
    distiller = create_distiller("crd", negatives=5, dim=3, temperature=0.5, weight=2.0, **PATHS)
    nets = bind(distiller, student, teacher, batch=batches[0])
    part = distiller.connectors[0]
    banks, classes = [bank.vectors.clone() for bank in part.banks], torch.full((16,), -1)
    generator, log_z = torch.Generator().manual_seed(torch.initial_seed() % 2**63), None
    for batch in batches:
        (turn,) = distiller.turns(nets, batch)
        maps = [net(batch).features["layer2"] for net in (nets.student, nets.teacher)]
        embedded = [F.normalize(head(x.mean((2, 3))), dim=1).detach() for head, x in zip(part.heads, maps, strict=True)]
        for bank, new in zip(banks, embedded, strict=True):
            bank[batch.index] = F.normalize(0.5 * bank[batch.index] + 0.5 * new, dim=1)
        classes[batch.index] = batch.labels.long()
        uniform, rows = torch.rand(8, 5, dtype=torch.float64, generator=generator), []
        order = sorted(range(16), key=lambda row: int(classes[row]))
        for label, numbers in zip(batch.labels, uniform, strict=True):
            allowed = [row for row in order if classes[row] != label]
            rows.append([allowed[int(u * len(allowed))] for u in numbers])
        rows = torch.tensor(rows)
        sides = (*embedded, banks[1]), (*embedded[::-1], banks[0])
        log_z = log_z or [KF.crd_log_z(own, bank, rows, temperature=0.5) for own, _, bank in sides]
        expected = [KF.crd(*side, rows, temperature=0.5, log_z=z) for side, z in zip(sides, log_z, strict=True)]
        torch.testing.assert_close(turn["student"]["crd"], 2 * sum(expected))
    torch.testing.assert_close(part.log_z, torch.stack(log_z))


def test_tokens_are_embedded_by_the_mean_of_those_that_are_real():
    batch = dataclasses.replace(tiny_tokens(1)[0], rows=16)
    distiller = create_distiller("crd", negatives=5, dim=3, layers=("bert.encoder.layer.1",))
    nets = bind(distiller, tiny_transformer(2), tiny_transformer(2), batch=batch)
    tokens = nets.student(batch, reads=distiller.needs().student).features["bert.encoder.layer.1"]
    means = torch.stack([x[m.bool()].mean(0) for x, m in zip(tokens, batch.mask, strict=True)])
    part, given = distiller.connectors[0], []
    part.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    (turn,) = distiller.turns(nets, batch)
    assert turn["student"]["crd"].isfinite()
    torch.testing.assert_close(given[0][0], means)


def test_refusals():
    batch = tiny_batches(1)[0]
    for given in (dataclasses.replace(batch, rows=0), dataclasses.replace(batch, index=None)):
        distiller = create_distiller("crd", **PATHS)
        with pytest.raises(DistillError, match="rows=M"):
            # A pass before the training may have no row numbers.
            list(distiller.turns(bind(distiller, TinyNet(), TinyNet(), batch=given), given))
    mixed = batch.with_labels(F.one_hot(batch.labels).float())
    distiller = create_distiller("crd", others="classes", **PATHS)
    with pytest.raises(DistillError, match="others=rows"):
        list(distiller.turns(bind(distiller, TinyNet(), TinyNet(), batch=batch), mixed))
    distiller = create_distiller("crd", others="rows", **PATHS)
    (turn,) = distiller.turns(bind(distiller, TinyNet(), TinyNet(), batch=batch), mixed)
    assert turn["student"]["crd"].isfinite()


def test_the_memory_is_the_same_on_all_processes(monkeypatch):
    """Two threads with a gloo group each stand for two processes, whose batches are unequal and share row 1."""
    groups, store, sizes = threading.local(), dist.HashStore(), []

    def gather(parts, x):
        sizes.append(len(x))
        groups.mine.allgather([parts], [x]).wait()

    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("all_gather", gather)):
        monkeypatch.setattr(dist, name, value)
    rows, vectors = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    begin = MemoryBank(5, 2)

    def process(rank):
        groups.mine = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
        bank, others, mine = copy.deepcopy(begin), OtherRows(5), slice(2 * rank, 2 + 2 * rank)
        bank.update(rows[mine], vectors[mine].requires_grad_(), 0.5)
        others.update(rows[mine], 3 + rows[mine])
        return {**bank.state_dict(), **others.state_dict()}

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(process, range(2)))
    expected = begin.vectors.clone()
    for row, vector in ((0, vectors[0]), (1, vectors[2])):
        expected[row] = F.normalize(0.5 * expected[row] + 0.5 * vector, dim=0)
    for state in found:
        torch.testing.assert_close(state["vectors"], expected)
        assert state["classes"].tolist() == [3, 4, -1, -1, -1]
        assert state["order"].tolist() == [2, 3, 4, 0, 1]
    assert max(sizes) == 2


def test_its_momentum_may_change_in_the_training():
    (batch,) = tiny_batches(1)
    distiller = create_distiller("crd", layers=("layer2",), momentum=0.5)
    nets = bind(distiller, TinyNet(), TinyNet(6), batch=batch)
    before = distiller.connectors[0].banks[0].vectors.clone()
    distiller.momentum = 1.0
    list(distiller.turns(nets, batch))
    torch.testing.assert_close(distiller.connectors[0].banks[0].vectors, before)
