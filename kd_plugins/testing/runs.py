"""The contract, second half: what a distiller does, found by training with it on copies of the networks."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_plugins import Batch, Distiller, DistillError, Network, Run, play
from kd_plugins.binding import connect, needs_pass, prepare, schedule, set_up
from kd_plugins.distiller import Turn
from kd_plugins.run import total
from kd_plugins.testing.clauses import ContractError, broken

_ISLAND = "compute the loss in float32, with autocast disabled (.float()), and away from 0 / 0 and log(0)"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every training of one check has in common.

    Attributes:
        make: Makes the distiller.
        student: The student, of which each training takes a copy.
        teachers: The teachers.
        peers: The other peers.
        batches: One epoch.
        steps: Least number of updates.
        optimizer: Makes the student's optimizer.
        adapt: Makes the adapter of a network.
    """

    make: Callable[[], Distiller]
    student: nn.Module
    teachers: Sequence[nn.Module]
    peers: Sequence[nn.Module]
    batches: Sequence[Batch]
    steps: int
    optimizer: Callable[[Any], Optimizer]
    adapt: Callable[[nn.Module], Network]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.student.parameters()), torch.device("cpu"))


class Training:
    """One training: a fresh distiller, set up on copies of the networks.

    Args:
        setting: What to train.
        seed: Of everything random before the first step.
        wrap: Prepares the copied student and its optimizer, as a host does.
        refit: Let the method pass over the data before the training; a resumed one takes that from its checkpoint.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        seed: int = 0,
        wrap: Callable[[nn.Module, Optimizer], tuple[nn.Module, Any]] | None = None,
        refit: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        self.setting = setting
        self.distiller = setting.make()
        student, *others = (copy.deepcopy(m) for m in (setting.student, *setting.peers))
        teachers = [copy.deepcopy(m) for m in setting.teachers]
        optimizer: Any = setting.optimizer([p for p in student.parameters() if p.requires_grad])
        self.model = student
        if wrap is not None:
            self.model, optimizer = wrap(student, optimizer)
        adapters = [[setting.adapt(m) for m in group] for group in ((student,), teachers, others)]
        self.nets = connect(self.distiller, adapters[0][0], adapters[1], adapters[2], forwards=[self.model])
        before = [_snapshot(net.module) for net in self.nets]
        set_up(self.distiller, self.nets, setting.batches[0])
        if refit and needs_pass(self.distiller):
            prepare(self.distiller, self.nets, setting.batches)
        for net, state in zip(self.nets, before, strict=True):
            who = f"setup() or prepare() of {self.distiller.name}"
            _compare(net.module, state, "networks untouched", who, type(net.module).__name__)
        stages, epoch = self.distiller.stages(), len(setting.batches)
        fixed = math.ceil(sum(stage.epochs or 0 for stage in stages))
        self.total = epoch * max(math.ceil(setting.steps / epoch), fixed + len(stages))
        schedule(self.distiller, self.total, epoch=epoch)
        self.run = Run(self.distiller, optimizer, self.nets)
        self.teacher_states = [_snapshot(net.module) for net in self.nets.teachers]
        self.student_modes = {name: m.training for name, m in student.named_modules()}
        torch.manual_seed(seed + 1)

    def batches(self, stop: int | None = None) -> Iterator[tuple[int, Batch]]:
        """The batches of the remaining steps, with their numbers; the progress is kept as hosts do."""
        for step in range(self.distiller.progress.step, self.total if stop is None else stop):
            self.distiller.progress.at(step, step / len(self.setting.batches))
            yield step, self.setting.batches[step % len(self.setting.batches)]

    def train(self, stop: int | None = None) -> Training:
        """Trains in a bare loop, unchecked."""
        for _, batch in self.batches(stop):
            for turn in self.distiller.turns(self.nets, batch):
                play(turn, self.run)
        return self

    def state(self) -> dict[str, Tensor]:
        """All weights that the training moves, by name."""
        modules = {"distiller": self.distiller, **self.nets.trained}
        return {f"{who}.{k}": v.detach().clone() for who, m in modules.items() for k, v in m.state_dict().items()}

    def resume(self, folder: str) -> Training:
        """Takes up what another training has saved."""
        try:
            self.run.load(folder)
        except DistillError as error:
            raise ContractError(
                "resume",
                f"{self.distiller.name} cannot load its own state after a fresh setup(), without prepare(): {error}"
                " — give every part its final shape in setup().",
            ) from error
        return self


def walk(training: Training, *, dtype: torch.dtype | None = None) -> dict[str, bool]:
    """Trains in a bare loop and checks every turn; under autocast in `dtype` where one is given.

    Returns:
        Whether a gradient that is not 0 has reached each parameter of the distiller and of the trained networks.
    """
    # Of all parameters that should be trained: `critic.weight`, `student.head.weight`, `peer1.head.weight`.
    names = {id(p): name for name, p in training.distiller.named_parameters()}
    for who, module in training.nets.trained.items():
        names |= {id(p): f"{who}.{name}" for name, p in module.named_parameters() if p.requires_grad}
    reached = dict.fromkeys(names.values(), False)
    clause = "gradients" if dtype is None else "precision"
    under = "" if dtype is None else f" under autocast in {str(dtype).removeprefix('torch.')}"
    for step, batch in training.batches():
        where = f"in step {step} of {training.total}{under}"
        for turn in _turns(training, batch, dtype, where):
            for label, gradient in _gradients(training, turn, names, clause, where):
                if not gradient.isfinite().all():
                    broken(clause, f"the gradient of {label} is not finite {where}", _ISLAND)
                reached[label] |= bool(gradient.any())
            play(turn, training.run)
        _check_after(training, where)
    return reached


def _turns(training: Training, batch: Batch, dtype: torch.dtype | None, where: str) -> Iterator[Turn]:
    """The turns of one step; what surrounds a yield must be as it was before."""
    distiller, kind = training.distiller, training.setting.device.type
    turns = iter(distiller.turns(training.nets, batch))
    last, seen = training.run._ends_with, False
    try:
        while True:
            before = _mode(kind)
            with nullcontext() if dtype is None else torch.autocast(kind, dtype):
                inside = _mode(kind)
                turn = next(turns, None)
                changed = [what for what, now in _mode(kind).items() if now != inside[what]]
            changed += [what for what, now in _mode(kind).items() if now != before[what]]
            if changed:
                broken(
                    "grad mode",
                    f"turns() of {distiller.name} yields with another {changed[0]} than it was resumed with {where}",
                    "leave no_grad and autocast blocks before each yield",
                )
            if turn is None:
                break
            if seen:
                broken(
                    "student last",
                    f"turns() of {distiller.name} yields a turn of {list(turn)} after the {last}'s {where}",
                    f"put {last!r} in the last turn, and only there",
                )
            _check_turn(training, turn, where)
            seen = last in turn
            yield turn
    finally:
        getattr(turns, "close", lambda: None)()
    if not seen:
        broken(
            "student last",
            f"turns() of {distiller.name} yields no turn with the group {last!r} {where}",
            f"put {last!r} in the last turn",
        )


def _mode(kind: str) -> dict[str, Any]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
    }


def _check_turn(training: Training, turn: Any, where: str) -> None:
    name = training.distiller.name
    if not isinstance(turn, Mapping) or not turn or not all(isinstance(terms, Mapping) for terms in turn.values()):
        broken("turns", f"{name} yields {type(turn).__name__} {where}", "yield {group: {term: loss}}")
    for group, terms in turn.items():
        for term, value in terms.items():
            if not (isinstance(term, str) and isinstance(value, Tensor) and value.dim() == 0):
                broken(
                    "turns",
                    f"the term {term!r} of the group {group!r} of {name} is {getattr(value, 'shape', value)!r} {where}",
                    "yield named scalar tensors",
                )
            if not value.isfinite():
                clause = "precision" if "autocast" in where else "gradients"
                broken(clause, f"the term {term!r} of {name} is {value.item()} {where}", _ISLAND)
    for label, parameter in _outside(training, student=True):
        if parameter.grad is not None:
            broken(
                "no backward",
                f"{label} holds a .grad at a yield of {name} {where}",
                "yield the loss, or use torch.autograd.grad; backward() is the host's",
            )


def _gradients(
    training: Training, turn: Turn, names: Mapping[int, str], clause: str, where: str
) -> Iterator[tuple[str, Tensor]]:
    for group, terms in turn.items():
        if group == "student":
            parameters = [*training.run.student, *training.run.clip_parameters]
        else:
            parameters = training.run[group].parameters
        loss = total(terms, group)
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            broken(
                clause,
                f"the terms {list(terms)} of the group {group!r} of {training.distiller.name} reach none of its"
                f" parameters {where}",
                "compute them from the group's own modules, outside no_grad and without detach",
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and id(parameter) in names:
                yield names[id(parameter)], gradient


def _outside(training: Training, *, student: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters in which a step may leave no `.grad`."""
    yield from training.distiller.named_parameters()
    for who, module in (training.nets.frozen | training.nets.trained).items():
        if student or who != "student":
            yield from ((f"{who}.{name}", p) for name, p in module.named_parameters())


def _check_after(training: Training, where: str) -> None:
    name = training.distiller.name
    for (who, module), state in zip(training.nets.frozen.items(), training.teacher_states, strict=True):
        _compare(module, state, "teacher untouched", f"a step of {name}", who, where)
    for label, parameter in _outside(training):
        if parameter.grad is not None:
            broken("no backward", f"a step of {name} leaves a .grad in {label} {where}", "backward() is the host's")
    for path, module in training.nets.student.module.named_modules():
        if module.training != training.student_modes[path]:
            broken(
                "student untouched",
                f"a step of {name} leaves the student's {path or 'network'} in another mode {where}",
                "restore train() and eval()",
            )


_NOT_YOURS = {
    "the value of": "never write into a network; work on a copy of the tensor",
    "requires_grad of": "freezing is the host's; use detach()",
    "the mode of": "train() and eval() are the host's",
}


def _snapshot(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        "the value of": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "requires_grad of": {name: p.requires_grad for name, p in module.named_parameters()},
        "the mode of": {name: m.training for name, m in module.named_modules()},
    }


def _compare(module: nn.Module, before: Mapping[str, Any], clause: str, who: str, whose: str, where: str = "") -> None:
    for what, after in _snapshot(module).items():
        for name, value in after.items():
            old = before[what].get(name)
            if not (torch.equal(value, old) if isinstance(value, Tensor) and old is not None else value is old):
                found = f"{who} changes {what} {name or 'the whole'} of {whose} {where}"
                broken(clause, found.rstrip(), _NOT_YOURS[what])


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest absolute difference of two states and where it is; infinite where they have not the same names."""
    if a.keys() != b.keys():
        return math.inf, sorted(a.keys() ^ b.keys())[0]
    return max(((_largest(a[name], b[name]), name) for name in a), default=(0.0, ""))


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    distance = (a.double() - b.double()).abs()[~same]
    return float(distance.nan_to_num(math.inf).max()) if distance.numel() else 0.0


@contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps one state for the process; a check must neither meet the caller's nor leave its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [(cls._shared_state, dict(cls._shared_state)) for cls in (PartialState, AcceleratorState, GradientState)]
    for state, _ in kept:
        state.clear()
    try:
        yield
    finally:
        for state, before in kept:
            state.clear()
            state.update(before)


def under_accelerate(setting: Setting) -> dict[str, Tensor]:
    """The same training played by `kd_accelerate.TurnPlayer`; the weights that it ends with."""
    from accelerate import Accelerator

    from kd_accelerate import TurnPlayer

    with _own_accelerate_state():
        accelerator = Accelerator(cpu=setting.device.type == "cpu", mixed_precision="no")
        training = Training(setting, wrap=accelerator.prepare)
        run = training.run
        player = TurnPlayer(accelerator, training.distiller, training.nets, run.optimizer, model=training.model)
        for step, batch in training.batches():
            with accelerator.accumulate(training.model):
                player.step(batch)
            done = training.distiller.progress.step - step
            if done != 1:
                raise DistillError(f"Expected one update in step {step}, got {done}.")
        return training.state()
