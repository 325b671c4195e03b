"""The contract: every registered distiller keeps it, and so do tiny distillers of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_kit import Adversarial, Honest
from torch import nn

from kd_plugins import Distiller, DistillError, Needs, Reads, Stage
from kd_plugins.catalog.installed import distribution_of, list_distillers
from kd_plugins.testing import CLAUSES, TinyNet, check_distiller, tiny_batches, tiny_tokens, tiny_transformer

# --- who keeps it -----------------------------------------------------------------------------------------------------


BUILT_IN = [name for name in list_distillers() if distribution_of(name).name == "kd-plugins"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_registered_method_keeps_the_contract(name):
    assert check_distiller(name) == CLAUSES


# Further options and compositions that are worth it; on transformers where it is said, though the method reads any.
FURTHER: list[tuple[str, dict[str, Any], bool]] = [
    ("kd", {"alpha": 1.0, "temperature": 1.0}, False),
    ("kd", {}, True),
    ("nst", {"kernel": "linear", "layers": ("layer1", "layer2")}, False),
    ("nst", {"kernel": "gaussian", "layers": ("conv1", "layer2.0"), "spatial": "pool"}, False),
    ("quest", {"words": 8, "layers": ("layer1", "layer2"), "sharpness": 0.6, "weight": 2.0}, False),
    ("kd+quest", {"words": 8, "quest.layers": ("layer2",), "teacher_layers": ("layer1",)}, False),
    ("internal", {"schedule": "all"}, False),
    ("internal", {"schedule": "progressive", "freeze_lower": True}, False),
    ("internal", {"schedule": "stacked", "phase_epochs": 1.0, "gold": 0.5, "layers": "1:1,2:4"}, False),
    ("kd+internal", {"schedule": "all"}, False),
    ("afd", {"logit_only": True, "topology": "all"}, False),
    ("afd", {"discriminators": "one", "layer": "layer1", "peer_layers": ("conv1",), "hidden": 8}, False),
    ("afd", {"feature_loss": "l1", "adversarial_only": True}, False),
    ("dfa", {"search_only": True, "regularizer": 0.1}, False),
    ("dfa", {"layers": ("layer1", "layer2"), "teacher_layers": ("layer1.0", "layer2.0")}, False),  # no search
    ("dfa", {"aggregation": "random", "layers": ("layer2",), "teacher_layers": ("layer1.*",)}, False),
    ("kd+dfa", {}, False),
    ("structured", {"pixel": 0.0, "pair": 0.0, "holistic": 1.0, "conditional": False}, False),
    ("structured", {"holistic": 0.0, "layers": ("layer1", "layer2"), "neighbours": 5}, False),
    ("cwd", {"layers": ("layer1", "layer2"), "logit_weight": 0.0}, False),
]


@pytest.mark.parametrize(("name", "options", "text"), FURTHER, ids=lambda value: str(value))
def test_so_do_their_other_options(name, options, text):
    given: dict[str, Any] = {}
    if text:
        given = {"student": tiny_transformer(2), "teacher": tiny_transformer(4), "batches": tiny_tokens()}
    assert check_distiller(name, options=options, **given) == CLAUSES


class Staged(Honest):
    """As `Honest`, in two stages, on two streams, over `[B, C, H, W]`; 2020.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """

    untrained = ()

    def stages(self):
        return [Stage("features", 1.0, fresh_student=True), Stage("labels", 2.0)]

    def needs(self):
        streams = {"search": 0.5} if self.progress.stage == 0 else {}
        reads = Reads(logits=self.progress.stage == 1 or not self.ready, features=(self.layer,))
        return Needs(reads, reads, streams)

    def loss(self, student, teacher, batch):
        if self.progress.stage:
            return {"logits": (student.logits.float() - teacher.logits.float()).pow(2).mean()}
        distance = self.connector(student.features[self.layer]).float() - teacher.features[self.layer].float()
        return {"features": self.weight * distance.pow(2).mean()}

    def turns(self, nets, batch):
        batch = batch.stream("search") if self.progress.stage == 0 else batch
        s, t = nets.student(batch), nets.teacher(batch)
        yield {"student": self.loss(s, t, batch)}


class Peers(Distiller):
    """Mutual learning: peers draw each other's logits `[B, K]`; 2020."""

    teachers = 0
    peers = True

    def turns(self, nets, batch):
        student, other = nets.peers[0](batch), nets.peers[1](batch)
        pull = (student.logits.float() - other.logits.float()).pow(2).mean()
        loss = F.cross_entropy(other.logits.float(), batch.labels)
        yield {"peer1": {"task": loss, "pull": pull}, "student": {**self.task(student, batch), "pull": pull}}


class Many(Distiller):
    """Draws the logits `[B, K]` to the mean of several teachers'; 2020."""

    teachers = "many"

    def turns(self, nets, batch):
        s = nets.student(batch)
        mean = torch.stack([teacher(batch).logits.float() for teacher in nets.teachers]).mean(0)
        yield {"student": {**self.task(s, batch), "mean": (s.logits.float() - mean).pow(2).mean()}}


class DataFree(Distiller):
    """Trains on what a generator makes of noise `[B, Z]`; 2020."""

    data = False

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(5, 3 * 8 * 8)

    def extras(self):
        return {"maker": self.maker}

    def turns(self, nets, batch):
        images = self.maker(self.randn(batch.size, 5)).view(-1, 3, 8, 8)
        t = nets.teacher(batch.with_inputs(images), input_grad=True).logits.float()
        yield {"maker": {"confident": -t.softmax(1).amax(1).mean()}}
        batch = batch.with_inputs(images.detach())
        s, t = nets.student(batch).logits.float(), nets.teacher(batch).logits.float()
        yield {"student": {"logits": (s - t).pow(2).mean()}}


class Features(Honest):
    """Features `[B, C, H, W]` alone, so that the student's head is not trained; 2020.

    Args:
        weight: Weight of the term.
        layer: Module path of the features.
    """

    untrained = ("student.head.*",)
    task_weight = 0.0

    def needs(self):
        return Needs(Reads(False, features=(self.layer,)), Reads(False, features=(self.layer,)))

    def loss(self, student, teacher, batch):
        distance = self.connector(student.features[self.layer]).float() - teacher.features[self.layer].float()
        return {"features": distance.pow(2).mean()}


class Codebook(Distiller):
    """Draws the logits `[B, K]` to the teacher's mean, which it prepares; 2020."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(()))

    def prepare(self, nets, batches):
        self.mean = torch.cat([nets.teacher(batch).logits for batch in batches]).mean(0)

    def loss(self, student, teacher, batch):
        return {"mean": (student.logits.float() - self.mean).pow(2).mean() * (1 + self.seen)}

    def after_update(self):
        self.seen += 0.1


@pytest.mark.parametrize("cls", [Honest, Adversarial, Staged, Peers, Many, DataFree, Features, Codebook])
def test_shapes_of_all_kinds_keep_it(cls):
    assert check_distiller(cls) == CLAUSES


def test_a_class_a_distiller_and_a_function_will_do():
    check_distiller(Honest, options={"layer": "layer1"})
    check_distiller(Honest(layer="layer1"))
    check_distiller(lambda: Honest(layer="layer1"), student=TinyNet(3), batches=tiny_batches(2))
    with pytest.raises(DistillError, match="options with a name or a class"):
        check_distiller(Honest(), options={"layer": "layer1"})


def test_what_the_check_was_given_is_left_as_it_was():
    given, state = Honest(), torch.get_rng_state()
    student, teacher = TinyNet(4), TinyNet(6)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    torch.set_rng_state(state)
    check_distiller(given, student=student, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in (*student.parameters(), *teacher.parameters()))
    assert not any(m._forward_hooks for m in student.modules())
    assert not given.ready


def test_accelerate_keeps_the_callers_state():
    from accelerate.state import AcceleratorState, PartialState

    before = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    check_distiller("kd")
    assert (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)) == before
