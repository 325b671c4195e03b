"""Whoever breaks a clause of the contract is told which one, and how to mend it."""

from __future__ import annotations

import re

import pytest
import torch
from contract_kit import Adversarial, Honest
from torch import nn

from kd_plugins import DistillError, Needs, OptimSpec, Paper, Reads, Stage
from kd_plugins.testing import CLAUSES, ContractError, check_distiller


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


class StudentUntrained(Broken):
    __doc__ = Broken.__doc__
    task_weight = 0.0

    def loss(self, student, teacher, batch):
        return {"features": super().loss(student, teacher, batch)["features"]}


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
