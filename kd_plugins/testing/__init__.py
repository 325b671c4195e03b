"""The contract that every distiller keeps, as one function for anybody's tests.

A plug-in's whole test of it is

    from kd_plugins.testing import check_distiller

    def test_contract():
        check_distiller("mine", options={"weight": 2.0})

It trains with the distiller for a few steps, several times over, on copies of small networks, and raises a
`ContractError` for the first clause that is broken. The clauses, by the name that the error carries:

- `docstring`: a first line, a citation (the paper's first author and year), and the shapes `[B, ...]`.
- `options`: the constructor's arguments are keyword-only, annotated and defaulted, each with help under `Args:`.
- `config`: every option survives JSON and the command line.
- `networks untouched`: `setup` and `prepare` leave weights, batch statistics and modes as they were.
- `no network inside`: nothing of a network can be reached from the distiller.
- `registered`: every parameter that can be reached from the distiller is registered.
- `one group`: each of them is in exactly one group, `"own"` or one of `extras()`.
- `needs`: what `needs()` names exists, in every stage.
- `turns`, `student last`: turns are mappings of named scalars; `"student"` is in the last one, and only there.
- `grad mode`: grad mode and autocast are the same at every yield as before it.
- `no backward`: no `.grad` is left anywhere but in the student; backward belongs to the host.
- `teacher untouched`, `student untouched`: a step leaves the teachers bit-unchanged, and the student in its mode.
- `gradients`: while the progress walks from 0 to 1, every parameter of the distiller and of the trained networks gets a
  finite gradient that is not 0. Where the method leaves some out on purpose, its class says so, by globs over the names
  in the error: `untrained = ("student.head.*",)`; a property may follow the options.
- `resume`: weights, optimizers, `state_dict()` and random streams, taken up by a fresh distiller after `setup`, end in
  the same bits as the training that was not interrupted.
- `hosts agree`: the same steps under Accelerate end in the same weights, within 1e-6 (left out without Accelerate, and
  in a process that belongs to a distributed training). Trainer plays turns through the same player.
- `precision`: losses and gradients are finite under autocast in bfloat16 and in float16.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kd_plugins import Batch, Distiller, DistillError, Reads, create_distiller
from kd_plugins.catalog.registry import distiller_classes
from kd_plugins.testing.clauses import ContractError, broken, check_class, check_needs, check_parts
from kd_plugins.testing.networks import (
    TinyNet,
    adapt,
    tiny_batches,
    tiny_network,
    tiny_tokens,
    tiny_transformer,
    training_set,
)
from kd_plugins.testing.runs import Setting, Training, difference, under_accelerate, walk

__all__ = ["CLAUSES", "ContractError", "TinyNet", "check_distiller", "tiny_batches", "tiny_tokens", "tiny_transformer"]

CLAUSES = (
    *("docstring", "options", "config", "networks untouched", "no network inside", "registered", "one group", "needs"),
    *("turns", "student last", "grad mode", "no backward", "teacher untouched", "student untouched", "gradients"),
    *("resume", "hosts agree", "precision"),
)


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9)


def check_distiller(
    distiller: str | type[Distiller] | Distiller | Callable[[], Distiller],
    *,
    options: Mapping[str, Any] | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    peers: Sequence[nn.Module] | None = None,
    batches: Sequence[Batch] | None = None,
    steps: int = 6,
    optimizer: Callable[[Any], Optimizer] = _sgd,
) -> tuple[str, ...]:
    """Checks the whole contract of a distiller.

    Args:
        distiller: A name (`"nst"`, `"kd+nst"`, `"module:Class"`), a class, a distiller that is not set up yet, or a
            function that makes one; several are needed, with equal options.
        options: Of the distiller, where a name or a class is given; those in the class's `example` are its defaults.
        student: The student, without dropout for equality between hosts; copies of it are trained. By default a
            `TinyNet`; a `tiny_transformer` where the class says `networks = "transformer"`.
        teacher: The teacher or teachers; by default larger networks of the same kind, as many as the method takes.
        peers: The other peers; by default one where the method takes any.
        batches: The batches of one epoch; by default `tiny_batches` or `tiny_tokens`, with the streams that the method
            asks for.
        steps: Least number of updates; rounded up to whole epochs, at least one for each stage.
        optimizer: Makes the student's optimizer of its parameters.

    Returns:
        The clauses that were checked: all but `"hosts agree"` where that cannot be.

    Raises:
        ContractError: The first clause that is broken, with what breaks it and the remedy.
    """
    make = _maker(distiller, options)
    probe = make()
    for part in probe.methods.values():
        check_class(part)
    student = tiny_network(probe, 0) if student is None else student
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    if teacher is None:
        count = probe.teachers if isinstance(probe.teachers, int) else {"many": 2, "or peers": 0}[probe.teachers]
        teacher = [tiny_network(probe, i + 1).to(device) for i in range(count)]
    if peers is None:
        peers = [tiny_network(probe, 1).to(device)] if probe.peers else []
    setting = Setting(
        make=make,
        student=student,
        teachers=[teacher] if isinstance(teacher, nn.Module) else list(teacher),
        peers=list(peers),
        batches=[batch.to(device) for batch in (training_set(probe) if batches is None else batches)],
        steps=steps,
        optimizer=optimizer,
        adapt=adapt,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        run = Training(setting)
        check_parts(run.distiller, run.nets)
        check_needs(run.distiller, run.nets)
        reached = walk(run)
        check_parts(run.distiller, run.nets)
        _check_reached(run, reached)
        _check_resume(setting, run)
        hosts = _check_hosts(setting, run)
        for dtype in (torch.bfloat16, torch.float16):
            walk(Training(setting), dtype=dtype)
    return tuple(clause for clause in CLAUSES if hosts or clause != "hosts agree")


def _maker(distiller: Any, options: Mapping[str, Any] | None) -> Callable[[], Distiller]:
    given = dict(options or {})
    if isinstance(distiller, str):
        classes = distiller_classes(distiller)
        for name, part in classes.items():
            for option, value in part.example.items():
                if not {option, f"{name}.{option}"} & set(given):
                    given[option if len(classes) == 1 else f"{name}.{option}"] = value
        return lambda: create_distiller(distiller, **given)
    if isinstance(distiller, type):
        cls: Any = distiller
        return lambda: cls(**{**cls.example, **given})
    if given:
        raise DistillError("Expected options with a name or a class only — give the distiller the options itself.")
    if isinstance(distiller, Distiller):
        if distiller.ready:
            raise DistillError(f"Expected a distiller that is not set up, got {distiller.name} — give a fresh one.")
        return lambda: copy.deepcopy(distiller)
    return distiller


def _check_reached(run: Training, reached: Mapping[str, bool]) -> None:
    untrained = tuple(glob for part in run.distiller.methods.values() for glob in part.untrained)
    excused = _unused(run)
    for name, found in reached.items():
        if not found and name not in excused and not any(fnmatch.fnmatch(name, glob) for glob in untrained):
            broken(
                "gradients",
                f"the parameter {name} gets no gradient but 0 in {run.total} steps of {run.distiller.name}",
                f"let a loss term reach it, or say that it is left out: untrained = ({name!r},) in the class",
            )


def _unused(run: Training) -> set[str]:
    """Parameters of the trained networks that not even their own logits depend on."""
    unused = set()
    batch = run.setting.batches[0]
    for who, net in zip(run.nets.trained, run.nets.peers if batch.inputs is not None else (), strict=False):
        named = {f"{who}.{name}": p for name, p in net.module.named_parameters() if p.requires_grad}
        logits = net.network.read(batch, Reads()).logits
        gradients = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
        unused |= {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
    return unused


def _check_resume(setting: Setting, whole: Training) -> None:
    name = whole.distiller.name
    for key, value in whole.distiller.state_dict().items():
        if not isinstance(value, Tensor):
            what = f"{key} in state_dict() of {name} is no tensor"
            broken("resume", what, "keep it in a buffer; files hold tensors only")
    table = whole.distiller.progress.table
    start = table.starts[-1] if table is not None else 0
    first = Training(setting).train(stop=start + (whole.total - start) // 2)
    # Another seed: what is random in setup() and not in the state must show.
    second = Training(setting, seed=1, refit=False)
    with tempfile.TemporaryDirectory() as folder:
        first.run.save(folder)
        second.resume(folder).train()
    distance, where = difference(whole.state(), second.state())
    if distance > (0.0 if setting.device.type == "cpu" else 1e-6):
        broken(
            "resume",
            f"a training with {name} that is resumed from a checkpoint ends elsewhere, by {distance:.1e} in {where}",
            "keep what changes between steps, and what is random in setup(), in buffers; draw from self.generator()",
        )


def _check_hosts(setting: Setting, bare: Training) -> bool:
    installed = all(importlib.util.find_spec(package) for package in ("accelerate", "kd_accelerate"))
    if not installed or dist.is_available() and dist.is_initialized():
        return False
    distance, where = difference(bare.state(), under_accelerate(setting))
    if distance > 1e-6:
        broken(
            "hosts agree",
            f"a bare loop and Accelerate end with {bare.distiller.name} {distance:.1e} apart in {where}",
            "leave updates to the yielded turns, and draw random numbers from self.generator() or self.randn()",
        )
    return True
