"""The contract: every registered distiller keeps it, and whoever breaks a clause is told which and how to mend it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_plugins import Batch, Distiller, DistillError, Needs, OptimSpec, Paper, Reads, Stage
from kd_plugins.registry import list_distillers
from kd_plugins.testing import CLAUSES, ContractError, TinyNet, check_distiller, tiny_batches

# --- who keeps it -----------------------------------------------------------------------------------------------------


def bert(layers: int, *, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def token_batches(count: int = 2, size: int = 4, length: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        inputs = {
            "input_ids": torch.randint(1, 40, (size, length), generator=generator),
            "token_type_ids": torch.randint(2, (size, length), generator=generator),
            "attention_mask": (torch.arange(length) < lengths).long(),
        }
        made.append(Batch.of(inputs, torch.randint(3, (size,), generator=generator)))
    return made


def transformers_pair() -> dict[str, Any]:
    return {"student": bert(2, seed=0), "teacher": bert(4, seed=1), "batches": token_batches()}


KEEPERS: list[tuple[str, dict[str, Any], bool]] = [
    ("kd", {}, False),
    ("kd", {"alpha": 1.0, "temperature": 1.0}, False),
    ("kd", {}, True),
    ("nst", {}, False),
    ("nst", {"kernel": "linear", "layers": ("layer1", "layer2")}, False),
    ("nst", {"kernel": "gaussian", "layers": ("conv1", "layer2.0"), "spatial": "pool"}, False),
    ("kd+nst", {"kd.temperature": 2.0}, False),
    ("internal", {"schedule": "all"}, True),
    ("internal", {"schedule": "stacked"}, True),
    ("internal", {"schedule": "progressive", "freeze_lower": True}, True),
    ("internal", {"schedule": "stacked", "phase_epochs": 1.0, "gold": 0.5, "layers": "1:1,2:4"}, True),
    ("kd+internal", {"schedule": "all"}, True),
]


@pytest.mark.parametrize(("name", "options", "text"), KEEPERS, ids=lambda value: str(value))
def test_the_methods_keep_the_contract(name, options, text):
    assert check_distiller(name, options=options, **(transformers_pair() if text else {})) == CLAUSES


def test_every_registered_method_is_checked():
    checked = {part for name, _, _ in KEEPERS for part in name.split("+")}
    built_in = {name for name in list_distillers() if name != "example-at"}
    assert built_in <= checked, "add the new method to KEEPERS"


class Honest(Distiller):
    """Draws the logits `[B, K]` and a projection of the features `[B, C, H, W]` to the teacher's.

    Nobody, "A method for tests", 2020.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """

    def __init__(self, *, weight: float = 1.0, layer: str = "layer2") -> None:
        super().__init__()
        self.weight, self.layer = weight, layer
        self.connector = nn.LazyConv2d(1, 1)

    def needs(self) -> Needs:
        return Needs(Reads(features=(self.layer,)), Reads(features=(self.layer,)))

    def setup(self, nets, batch):
        s, t = nets.student(batch).features[self.layer], nets.teacher(batch).features[self.layer]
        self.connector = nn.Conv2d(s.shape[1], t.shape[1], 1)

    def loss(self, student, teacher, batch):
        features = self.connector(student.features[self.layer]).float() - teacher.features[self.layer].float()
        logits = student.logits.float() - teacher.logits.float()
        return {"features": self.weight * features.pow(2).mean(), "logits": self.weight * logits.pow(2).mean()}


class Adversarial(Honest):
    """As `Honest`, with a critic of the logits `[B, K]` that has an optimizer of its own; 2020.

    Args:
        weight: Weight of all terms.
        layer: Module path of the features.
    """

    def __init__(self, *, weight: float = 1.0, layer: str = "layer2") -> None:
        super().__init__(weight=weight, layer=layer)
        self.critic = nn.Linear(4, 1)

    def extras(self):
        return {"critic": self.critic}

    def optimizers(self):
        return {"critic": OptimSpec("SGD", lr=0.01)}

    def judge(self, logits):
        with torch.autocast("cpu", enabled=False):
            return self.critic(logits.float()).tanh().mean()

    def turns(self, nets, batch):
        s, t = nets.student(batch), nets.teacher(batch)
        noise = 0.1 * torch.randn(s.logits.shape, generator=self.generator())
        yield {"critic": {"critic": self.judge(s.logits.detach() + noise) - self.judge(t.logits)}}
        yield {"student": {**self.task(s, batch), **self.loss(s, t, batch), "fool": -self.judge(s.logits)}}


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


# --- who breaks it ----------------------------------------------------------------------------------------------------


class Undocumented(Honest):
    pass


class Uncited(Honest):
    """Has shapes `[B]` and no citation.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """


class WrongPaper(Uncited):
    """Has shapes `[B]`, the year 2017 and no author.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """

    paper = Paper("Like What You Like", ("Zehao Huang", "Naiyan Wang"), "arXiv", 2017)


class Shapeless(Honest):
    """Nobody, 2020.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """


class UndocumentedOption(Honest):
    """Logits `[B, K]`, 2020.

    Args:
        weight: Weight of both terms.
    """

    def __init__(self, *, weight: float = 1.0, power: float = 2.0) -> None:
        super().__init__(weight=weight)


class PositionalOption(Honest):
    """Logits `[B, K]`, 2020.

    Args:
        weight: Weight of both terms.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight=weight)


class MistypedOption(Honest):
    """Logits `[B, K]`, 2020.

    Args:
        layers: A list that comes back as a tuple.
    """

    def __init__(self, *, layers: tuple[str, ...] = ["layer2"]) -> None:  # noqa: B006
        super().__init__(layer=layers[0])


class UnwritableOption(Honest):
    """Logits `[B, K]`, 2020.

    Args:
        scale: What JSON cannot hold.
    """

    def __init__(self, *, scale: torch.Tensor = torch.ones(1)) -> None:  # noqa: B008
        super().__init__()


class Broken(Honest):
    """Breaks a clause in some method, over `[B, C, H, W]`; 2020.

    Args:
        weight: Weight of both terms.
        layer: Module path of the features.
    """


class HiddenParameter(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.scales = [{"deep": nn.Parameter(torch.ones(1))}]


class HiddenInClosure(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        head = nn.Linear(2, 2)
        self.project = lambda x: head(x)


class UnregisteredExtra(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.made = nn.Linear(2, 2)

    def extras(self):
        return {"critic": nn.Linear(2, 2)} if self.ready else {}


class TwoGroups(Adversarial):
    __doc__ = Broken.__doc__

    def extras(self):
        return {"critic": self.critic, "judge": nn.ModuleList([self.critic])}


class FrozenParameter(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)


class ReservedGroup(Adversarial):
    __doc__ = Broken.__doc__

    def extras(self):
        return {"student": self.critic}


class MisnamedOptimizer(Adversarial):
    __doc__ = Broken.__doc__

    def optimizers(self):
        return {"critics": OptimSpec()}


class StoresStudent(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.student = nets.student.module


class StoresNets(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        self.kept = {"nets": nets}
        yield from super().turns(nets, batch)


class StoresTeacherHead(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.head = [nets.teacher.module.head]


class NeedsNothingThere(Broken):
    __doc__ = Broken.__doc__

    def stages(self):
        return [Stage("a"), Stage("b")]

    def needs(self):
        missing = ("layer9",) if self.progress.stage else ()
        return super().needs() | Needs(Reads(features=missing))


class GreedyStream(Broken):
    __doc__ = Broken.__doc__

    def needs(self):
        return super().needs() | Needs(streams={"search": 1.0})


class WritesInSetup(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        nets.student.module.head.weight.zero_()


class NoStudentTurn(Adversarial):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        yield next(iter(super().turns(nets, batch)))


class StudentNotLast(Adversarial):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        critic, student = super().turns(nets, batch)
        yield student
        yield critic


class StudentTwice(Adversarial):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        for _ in range(2):
            s, t = nets.student(batch), nets.teacher(batch)
            yield {"student": self.loss(s, t, batch)}


class VectorTerm(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        return {"each": (student.logits - teacher.logits).pow(2).mean(1)}


class ListTurn(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        yield [batch.task_loss(nets.student(batch))]


class UnknownGroup(Adversarial):
    __doc__ = Broken.__doc__

    def extras(self):
        return {"critics": self.critic}

    def optimizers(self):
        return {}


class YieldsInNoGrad(Adversarial):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        with torch.no_grad():
            t = nets.teacher(batch)
            yield {"student": self.loss(nets.student(batch), t, batch)}


class YieldsInAutocast(Adversarial):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        with torch.autocast("cpu", torch.bfloat16):
            s, t = nets.student(batch), nets.teacher(batch)
            yield {"student": self.loss(s, t, batch)}


class CallsBackward(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        terms = super().loss(student, teacher, batch)
        terms["features"].backward(retain_graph=True)
        return terms


class LeavesGrad(Broken):
    __doc__ = Broken.__doc__

    def after_update(self):
        for p in self.connector.parameters():
            p.grad = torch.zeros_like(p)


class ChangesTeacher(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        nets.teacher.module.head.bias.data += 1e-7
        yield from super().turns(nets, batch)


class ThawsTeacher(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        nets.teacher.module.head.requires_grad_(True)
        yield from super().turns(nets, batch)


class WakesTeacher(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        yield from super().turns(nets, batch)
        nets.teacher.module.layer1.train()


class LullsStudent(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        nets.student.module.eval()
        yield from super().turns(nets, batch)


class NeverTrained(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.forgotten = nn.Linear(2, 2)


class ZeroGradient(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        terms = super().loss(student, teacher, batch)
        return {**terms, "features": 0 * terms["features"]}


class StudentUntrained(Features):
    __doc__ = Broken.__doc__
    untrained = ()


class Detached(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        s, t = nets.student(batch), nets.teacher(batch)
        yield {"student": {"logits": (s.logits.detach() - t.logits).pow(2).mean()}}


class NotFinite(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        return {**super().loss(student, teacher, batch), "log": student.logits.sum() * 0 / 0}


class InfiniteGradient(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        return {**super().loss(student, teacher, batch), "root": (student.logits * 0).abs().sqrt().sum()}


class ForgetsItsState(Broken):
    __doc__ = Broken.__doc__
    seen = 0.0

    def loss(self, student, teacher, batch):
        return {name: (1 + self.seen) * term for name, term in super().loss(student, teacher, batch).items()}

    def after_update(self):
        self.seen += 0.1


class RandomButNotSaved(Broken):
    __doc__ = Broken.__doc__

    def setup(self, nets, batch):
        super().setup(nets, batch)
        self.direction = torch.randn(4)

    def loss(self, student, teacher, batch):
        return {**super().loss(student, teacher, batch), "random": (student.logits.float() @ self.direction).mean()}


class ShapedInPrepare(Broken):
    __doc__ = Broken.__doc__

    def prepare(self, nets, batches):
        self.register_buffer("mean", torch.zeros(4))


class ExtraState(Broken):
    __doc__ = Broken.__doc__

    def get_extra_state(self):
        return {"seen": 1}

    def set_extra_state(self, state):
        pass


class UpdatesItself(Broken):
    __doc__ = Broken.__doc__

    def turns(self, nets, batch):
        import sys

        yield from super().turns(nets, batch)
        if sys._getframe(1).f_code.co_name == "_advance":  # the player's frame: what a host does must not matter
            with torch.no_grad():
                nets.student.module.head.bias += 1e-3


class HalfPrecision(Broken):
    __doc__ = Broken.__doc__

    def loss(self, student, teacher, batch):
        s = student.logits if student.logits.dtype != torch.float16 else student.logits * 1e5
        return {**super().loss(student, teacher, batch), "squares": s.float().clamp(-9, 9).pow(2).mean() + 0 * s.sum()}


BREAKERS = [
    (Undocumented, "docstring", "Undocumented has no docstring"),
    (Uncited, "docstring", "Uncited cites nothing — name authors, venue and year"),
    (WrongPaper, "docstring", "does not name the first author of its paper, Huang — cite it: Huang & Wang, arXiv 2017"),
    (Shapeless, "docstring", "Shapeless gives no shapes"),
    (
        UndocumentedOption,
        "options",
        r"the option 'power' of UndocumentedOption has no help — add `power: ...` under Args",
    ),
    (PositionalOption, "options", "keyword-only, annotated and defaulted, got 'weight'"),
    (MistypedOption, "config", r"'layers' of MistypedOption = \['layer2'\] comes back from JSON as \('layer2',\)"),
    (UnwritableOption, "config", "'scale' of UnwritableOption = tensor.* cannot be written down"),
    (HiddenParameter, "registered", r"self\.scales\[0\]\['deep'\] of hiddenparameter .* — register it"),
    (HiddenInClosure, "registered", r"self\.project\(\)\.weight of hiddeninclosure"),
    (UnregisteredExtra, "registered", r"weight of extras\(\)\['critic'\] of unregisteredextra is not registered"),
    (TwoGroups, "one group", r"parameter critic\.weight of twogroups is in the groups 'critic' and 'judge'"),
    (FrozenParameter, "one group", "parameter mean of frozenparameter does not require a gradient.* make it a buffer"),
    (ReservedGroup, "one group", "has a group 'student'"),
    (MisnamedOptimizer, "one group", r"names \['critics'\], its extra groups are \['critic'\]"),
    (StoresStudent, "no network inside", r"self\.student of storesstudent is student — keep nothing of a network"),
    (StoresNets, "no network inside", r"self\.kept\['nets'\].* of storesnets is student"),
    (StoresTeacherHead, "no network inside", r"self\.head\[0\] of storesteacherhead is teacher\.head"),
    (NeedsNothingThere, "needs", "in the stage 'b' names what the student has not: .*layer9.*Did you mean layer"),
    (GreedyStream, "needs", r"take the shares \{'search': 1\.0\}"),
    (WritesInSetup, "networks untouched", r"changes the value of head\.weight of TinyNet"),
    (NoStudentTurn, "student last", "yields no turn with the group 'student'"),
    (StudentNotLast, "student last", r"yields a turn of \['critic'\] after the student's in step 0"),
    (StudentTwice, "student last", r"yields a turn of \['student'\] after the student's"),
    (VectorTerm, "turns", r"the term 'each' of the group 'student' of vectorterm is torch.Size\(\[8\]\)"),
    (ListTurn, "turns", "listturn yields list in step 0"),
    (YieldsInNoGrad, "grad mode", "yields with another grad mode .* leave no_grad"),
    (YieldsInAutocast, "grad mode", "yields with another autocast"),
    (CallsBackward, "no backward", r"holds a \.grad at a yield of callsbackward.*torch\.autograd\.grad"),
    (LeavesGrad, "no backward", r"a step of leavesgrad leaves a \.grad in connector\.weight"),
    (ChangesTeacher, "teacher untouched", r"a step of changesteacher changes the value of head\.bias of teacher"),
    (ThawsTeacher, "teacher untouched", r"changes requires_grad of head\.weight of teacher"),
    (WakesTeacher, "teacher untouched", "changes the mode of layer1 of teacher"),
    (LullsStudent, "student untouched", "leaves the student's network in another mode"),
    (
        NeverTrained,
        "gradients",
        r"forgotten\.weight gets no gradient but 0 in 6 steps.*untrained = \('forgotten\.weight',\)",
    ),
    (ZeroGradient, "gradients", r"connector\.weight gets no gradient but 0"),
    (StudentUntrained, "gradients", r"student\.head\.weight gets no gradient but 0"),
    (Detached, "gradients", r"the terms \['logits'\] of the group 'student' of detached reach none of its parameters"),
    (NotFinite, "gradients", "the term 'log' of notfinite is nan in step 0"),
    (InfiniteGradient, "gradients", r"the gradient of student\.\S+ is not finite in step 0"),
    (ForgetsItsState, "resume", "resumed from a checkpoint ends elsewhere.* in buffers"),
    (RandomButNotSaved, "resume", "resumed from a checkpoint ends elsewhere"),
    (ShapedInPrepare, "resume", r"cannot load its own state after a fresh setup\(\), without prepare\(\)"),
    (ExtraState, "resume", r"_extra_state in state_dict\(\) of extrastate is no tensor"),
    (UpdatesItself, "hosts agree", "a bare loop and Accelerate end with updatesitself"),
    (HalfPrecision, "precision", "halfprecision is (nan|inf|-inf) in step 0 of 6 under autocast in float16"),
]


@pytest.mark.parametrize(("cls", "clause", "message"), BREAKERS, ids=[cls.__name__ for cls, _, _ in BREAKERS])
def test_a_broken_clause_is_named_with_its_remedy(cls, clause, message):
    with pytest.raises(ContractError, match=f"(?s){re.escape(f'[{clause}]')}.*{message}") as caught:
        check_distiller(cls)
    assert caught.value.clause == clause
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_every_clause_has_somebody_who_breaks_it():
    assert {clause for _, clause, _ in BREAKERS} == set(CLAUSES)


def test_an_unknown_group_is_named():
    with pytest.raises(DistillError, match="group 'critic', but its groups are .*Did you mean critics"):
        check_distiller(UnknownGroup)
