"""Teachers that are not loaded, since what they say is in the data; what its columns say, and of whom."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from kd_accelerate.cached import layers_of
from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, Distiller, DistillError, Nets, Reads
from kd_plugins import functional as KF
from kd_plugins.reading.network import Network, adapt
from kd_plugins.reading.view import TopK, View
from kd_transformers.checks import called, class_names, config_of, counted_as, kind_of, stated
from kd_transformers.columns import TEACHER, TEACHER_CLASSES, TEACHER_LOGITS, TOLD, told_layers

_NOTE = f"{TEACHER_LOGITS}: "


class Absent(nn.Module):
    """A teacher that is not loaded, since what it says is in the data.

    Args:
        stands_for: The class of the teacher, or its name.
        config: Its configuration.
        identity: Changes with its weights.
        load: Loads it; None where it is not to be had.
        kind: What it is for, where neither its class nor its configuration is known (`checks.kind_of`).
    """

    def __init__(
        self,
        stands_for: type | str,
        config: Any,
        identity: str = "",
        load: Callable[[], nn.Module] | None = None,
        kind: str = "",
    ) -> None:
        super().__init__()
        self.absent_class = stands_for if isinstance(stands_for, type) else None
        self.stands_for = stands_for.__name__ if isinstance(stands_for, type) else stands_for
        self.config, self.identity, self._load, self.absent_kind = config, identity, load, kind

    def load(self) -> nn.Module:
        """The teacher itself, another one at each call; no random stream has moved."""
        if self._load is None:
            raise DistillError(
                f"The method reads more of the teacher than the columns of cache_teacher hold, and the"
                f" {self.stands_for} that wrote them is not loaded: give teacher_model."
            )
        with undisturbed():
            return self._load().requires_grad_(False).eval()


class AbsentNetwork:
    """The adapter of a teacher that is not loaded before it is read, or asked how it is built."""

    def __init__(self, module: Absent) -> None:
        self._absent = module

    @property
    def module(self) -> nn.Module:
        """The teacher, or what stands for it."""
        return self._loaded.module if "_loaded" in vars(self) else self._absent

    @cached_property
    def _loaded(self) -> Network:
        # A part of what stands for it from then on, so that it follows its modes and devices.
        self._absent.loaded = self._absent.load()
        return adapt(self._absent.loaded)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loaded, name)

    def read(self, batch: Batch, reads: Reads, **options: Any) -> Any:
        """As `Network.read`."""
        if isinstance(batch.inputs, Tensor):
            self._loaded.module.to(batch.inputs.device)
        return self._loaded.read(batch, reads, **options)

    def install(self, reads: Reads) -> None:
        """As `Network.install`; what the cache may hold needs no hooks."""
        if reads.hidden or reads.attentions:
            self._loaded.install(reads)

    check_map: Any = Network.check_map


# The columns, read with a batch, and compared with the teachers once


def noted(description: str | None, teachers: Sequence[nn.Module], row: Mapping[str, Any], temperature: float) -> str:
    """A data set's description with what its columns are."""
    whole = None if TEACHER_CLASSES in row else torch.as_tensor(row[TEACHER_LOGITS]).shape[-1]
    facts = [
        {
            "stands_for": called(teacher),
            "kind": kind_of(teacher),
            "classes": class_names(config_of(teacher)),
            "scores": whole or stated(teacher, counted_as(teacher)),
            "temperature": temperature,
        }
        for teacher in teachers
    ]
    others = [line for line in (description or "").splitlines() if not line.startswith(_NOTE)]
    return "\n".join([*others, _NOTE + json.dumps(facts)])


def absent_teachers(dataset: Any) -> list[Absent]:
    """Stand-ins for the teachers whose logits a data set has."""
    if TEACHER_LOGITS not in (getattr(dataset, "column_names", None) or ()):
        return []
    found = []
    for facts in _note_of(dataset):
        absent = Absent(facts["stands_for"], None, kind=facts.get("kind", ""))
        names = dict(enumerate(facts["classes"] or ()))
        absent.config = SimpleNamespace(**{counted_as(absent): facts["scores"]}, id2label=names)
        found.append(absent)
    return found


def temperature_of(dataset: Any) -> float:
    """That at which the rest of the highest logits was summed."""
    return float(_note_of(dataset)[0].get("temperature", 1.0))


def _note_of(dataset: Any) -> list[dict[str, Any]]:
    """What a data set says of the teachers that wrote its column."""
    lines = (getattr(getattr(dataset, "info", None), "description", None) or "").splitlines()
    noted = sorted({line for line in lines if line.startswith(_NOTE)})
    if len(noted) > 1:
        raise DistillError(
            f"The parts of the data set have columns {TEACHER_LOGITS} of other teachers or temperatures: make the"
            " column of the whole anew with cache_teacher."
        )
    if not noted:
        raise DistillError(
            f"The data set does not say which teacher wrote its column {TEACHER_LOGITS}, so that its classes are not"
            " known: train on what cache_teacher returns (no stream or torch Subset of it), or give teacher_model where"
            " the column holds all logits."
        )
    return json.loads(noted[0].removeprefix(_NOTE))


def loaded_where_read(teachers: Sequence[nn.Module], distiller: Distiller) -> list[nn.Module]:
    """The teachers; those of which a method reads more than a cache holds are loaded."""
    return [
        teacher.load() if isinstance(teacher, Absent) and layers_of(distiller, i) is None else teacher
        for i, teacher in enumerate(teachers)
    ]


def cached_logits(cached: Dataset) -> list[np.ndarray]:
    """Each teacher's logits `[N, K]` in a data set that `cache_teacher` has made."""
    logits = np.asarray(cached.select_columns(TEACHER_LOGITS).with_format("numpy")[:][TEACHER_LOGITS])
    return [logits] if logits.ndim == 2 else list(logits.swapaxes(0, 1))


def check_cache(cached: View, asked: View, mask: Tensor | None) -> None:
    """Refuses a column that another teacher wrote, or the same teacher for other rows.

    Args:
        cached: What the column says of one batch.
        asked: What the teacher says of it now.
        mask: The tokens that are there, where the scores are of tokens.
    """
    logits, top = asked.logits, cached.top
    told = cached.logits if top is None else top.scores
    if top is not None and told.shape[:-1] == logits.shape[:-1]:
        logits = KF.merge_rest(logits, top.classes, top.temperature)
    if not all(_alike(cached.features[name], x, mask) for name, x in asked.features.items()):
        raise DistillError(
            "The columns of the teacher's layers are not what teacher_model gives of these rows: make them anew with"
            " cache_teacher(dataset, teacher, distiller=...), or remove them."
        )
    if not _alike(told, logits, mask):
        raise DistillError(
            f"The column {TEACHER_LOGITS} is not what teacher_model says of these rows: make it anew with"
            " cache_teacher(dataset, teacher), or remove the column."
        )


def _alike(told: Tensor, asked: Tensor, mask: Tensor | None) -> bool:
    if told.shape != asked.shape:
        return False
    if mask is not None and told.dim() == 3 and told.shape[:2] == mask.shape:
        told, asked = told[mask.bool()], asked[mask.bool()]
    return torch.allclose(told.float(), asked.float(), rtol=2e-2, atol=2e-2)


def pop_told(inputs: dict[str, Any], dataset: Any, teachers: int, *, tokens: bool) -> dict[str, Any]:
    """Takes what teachers have said out of a batch's inputs for them.

    Args:
        inputs: The inputs.
        dataset: Where the batch is from.
        teachers: How many there are.
        tokens: Whether the scores are of tokens.

    Returns:
        Their logits, and the layers of each, as `Batch.of` takes them.
    """
    logits, classes = (inputs.pop(name.removeprefix(TEACHER), None) for name in TOLD)
    layers: list[dict[str | int, Tensor]] = [{} for _ in range(teachers)]
    for column, (number, layer) in told_layers(TEACHER + name for name in list(inputs)).items():
        value = inputs.pop(column.removeprefix(TEACHER))
        if number < teachers:
            layers[number][layer] = value
    said = None if logits is None else _said(dataset, logits, classes, tokens=tokens)
    return {"teacher_logits": said, "teacher_features": tuple(layers)}


def _said(dataset: Any, logits: Tensor, classes: Tensor | None, *, tokens: bool) -> Any:
    """The logits in the columns of a batch, of several teachers each; with their classes where they are the highest."""
    several, classes = logits.dim() == (4 if tokens else 3), None if classes is None else classes.long()
    temperature = 1.0 if classes is None else temperature_of(dataset)

    def told(logits: Tensor, classes: Tensor | None) -> Tensor | TopK:
        return logits if classes is None else TopK(logits, classes, temperature)

    if not several:
        return told(logits, classes)
    each = [None] * logits.shape[-2] if classes is None else classes.unbind(-2)
    return tuple(map(told, logits.unbind(-2), each))


def check_told(nets: Nets, batch: Batch) -> None:
    """Asks the teachers once, to see that the column of their logits is their own."""
    if batch.teacher_logits is None:
        return
    cached = len(batch.teacher_logits) if isinstance(batch.teacher_logits, tuple) else 1
    if cached != len(nets.teachers):
        raise DistillError(
            f"The column {TEACHER_LOGITS} holds the logits of {cached} teachers, got {len(nets.teachers)}: make it"
            " anew, cache_teacher(dataset, teachers), or remove it."
        )
    uncached = dataclasses.replace(batch, teacher_logits=None)
    for teacher in (net for net in nets.teachers if not isinstance(net.module, Absent)):
        features = tuple(batch.teacher_features[teacher.number]) if batch.teacher_features else ()
        told, asked = (teacher(one, reads=Reads(features=features)) for one in (batch, uncached))
        check_cache(told, asked, batch.mask)
