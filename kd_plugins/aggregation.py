"""Weighted sums of a teacher's layers: their parts, their first weights, the file that keeps them, their pictures."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import DistillError, Progress, Reads, View
from kd_plugins import functional as KF
from kd_plugins.host import world
from kd_plugins.nn.connectors import as_weights
from kd_plugins.picture import Bars, Heatmap, Picture
from kd_plugins.reading.trunk import LayerGroup
from kd_plugins.states import write_json

_logger = logging.getLogger("kd_plugins.dfa")

# Points of a search at which the weights are kept for the report.
_POINTS = 20


class Aggregate(NamedTuple):
    """What a search has found for one layer of a student: an entry of search.json.

    Attributes:
        student: Path of the student's layer.
        teacher: Paths of the teacher's layers.
        alpha: Weight of each of them; they sum to 1.
        scale: What each is multiplied by beside that.
    """

    student: str
    teacher: Sequence[str]
    alpha: Sequence[float]
    scale: Sequence[float]


def first_alpha(aggregation: str, n: int, seed: int = 0) -> Tensor:
    """The weights `[n]` that a sum of layers starts with.

    Args:
        aggregation: `random` is uniform on the simplex, `last` the last layer alone; all others begin with equal ones.
        n: Number of layers.
        seed: Of random weights.

    >>> first_alpha("last", 3), first_alpha("search", 4)
    (tensor([0., 0., 1.]), tensor([0.2500, 0.2500, 0.2500, 0.2500]))
    """
    if aggregation == "random":
        generator = torch.Generator().manual_seed(seed)
        return F.normalize(-torch.rand(n, generator=generator).clamp_min(1e-6).log(), p=1, dim=0)
    return F.one_hot(torch.tensor(n - 1), n).float() if aggregation == "last" else torch.full((n,), 1 / n)


def inverse_rms(maps: Sequence[Tensor]) -> list[float]:
    """One over the root mean square of each map.

    >>> inverse_rms([torch.tensor([3.0, -3.0]), torch.tensor([0.5])])
    [0.3333333333333333, 2.0]
    """
    return [1 / max(float(x.float().square().mean().sqrt()), 1e-12) for x in maps]


def read_search(path: str) -> list[Aggregate]:
    """The sums in a search.json.

    Raises:
        DistillError: It is none, or its weights do not sum to 1.
    """
    try:
        groups = [Aggregate(**g) for g in json.loads(Path(path).read_text(encoding="utf-8"))["groups"]]
        sizes = [(len(g.teacher), len(g.alpha), len(g.scale), bool(g.student)) for g in groups]
        sums = [math.fsum(map(float, g.alpha)) for g in groups]
        finite = all(math.isfinite(float(x)) for g in groups for x in g.scale)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillError(f"Expected the search.json of a run with dfa, got {path} ({error!r}).") from error
    if not groups or any(not a == b == c > 0 for a, b, c, _ in sizes):
        raise DistillError(f"Expected an alpha and a scale for each teacher layer in {path}: search anew.")
    if not finite or not all(abs(x - 1) < 1e-3 for x in sums):
        raise DistillError(f"Expected weights that sum to 1 in each group of {path}, got sums of {sums}: search anew.")
    return groups


class Aggregating(nn.Module):
    """What a method has, beside a `Distiller`, whose student learns from weighted sums of a teacher's layers.

    Each layer group has one sum. The base comes before `Distiller`: `class Method(Aggregating, Distiller)`.

    Attributes:
        groups: The layers; empty before the method is set up.
        betas: By number of the group, what the weights are the softmax of, where they are searched.
    """

    name: str
    aggregation: str
    progress: Progress

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[LayerGroup] = []
        self.betas = nn.ParameterDict()

    @property
    def searched(self) -> int | None:
        """The number of the layer group that the current stage searches; None in the distillation."""
        numbers = [int(key) for key in self.betas]
        return numbers[self.progress.stage] if self.progress.stage < len(numbers) else None

    def after_update(self) -> None:
        """Keeps the weights that the current stage searches, for the report."""
        i, progress = self.searched, self.progress
        if i is not None and progress.stage_end is not None:
            self._keep(i, (progress.step + 1 - progress.stage_start) / (progress.stage_end - progress.stage_start))

    def add(self, i: int, alpha: Tensor, scale: Sequence[float], *, searched: bool = False) -> None:
        """Makes the weights of group i.

        Args:
            i: Its number.
            alpha: The weights `[N]`, or the equal ones that a search starts with.
            scale: What each layer is multiplied by beside that.
            searched: Whether beta is trained in place of them.
        """
        self.register_buffer(f"scale{i}", torch.tensor(scale, dtype=torch.float32))
        if searched:
            self.betas[str(i)] = nn.Parameter(torch.zeros(len(alpha)))
            self.register_buffer(f"trace{i}", torch.full((_POINTS + 1, len(alpha)), torch.nan))
            self._keep(i, 0)
        else:
            self.register_buffer(f"alpha{i}", alpha)

    def alpha(self, i: int) -> Tensor:
        """The weights of the teacher's layers in group i, `[N]`, float32."""
        return self.betas[str(i)].float().softmax(0) if str(i) in self.betas else self.get_buffer(f"alpha{i}")

    def reads_of(self, numbers: Sequence[int]) -> tuple[Reads, Reads]:
        """The maps of some groups, of the student and of the teacher."""
        groups = [self.groups[i] for i in numbers]
        theirs = dict.fromkeys(path for group in groups for path in group.teacher)
        return Reads(False, tuple(group.student for group in groups)), Reads(False, tuple(theirs))

    def aggregate(self, i: int, teacher: View, alpha: Tensor, own: Tensor) -> Tensor:
        """The teacher's maps of group i as one, of the size of the student's map `own` in this batch."""
        maps, size = [teacher.features[path] for path in self.groups[i].teacher], own.shape[2:]
        maps = [m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in maps]
        return KF.aggregate(maps, alpha * self.get_buffer(f"scale{i}"))

    def connected(self, kind: str, i: int, x: Tensor) -> Tensor:
        """What the connector of a kind of group i makes of a map.

        Raises:
            DistillError: There is none, since its path had no weight when the method was set up.
        """
        parts = getattr(self, kind)
        if str(i) not in parts:
            raise DistillError(f"The path {kind} had no weight when {self.name} was set up: begin with one above 0.")
        return parts[str(i)](as_weights(parts[str(i)], x))  # type: ignore[no-any-return]

    def say(self, i: int, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Lists a group with the shapes of its maps, on the first process."""
        group, (rank, _) = self.groups[i], world()
        how = "searched" if str(i) in self.betas else f"weights {[round(a, 4) for a in self.alpha(i).tolist()]}"
        left_out = f"; left out for their channels: {', '.join(group.left_out)}" if group.left_out else ""
        _logger.log(
            logging.DEBUG if rank else logging.INFO,
            f"{self.name}, layer group {i + 1}: student {group.student} {list(ours[1:])}, teacher"
            f" {', '.join(group.teacher)} {list(theirs[1:])}, {how}{left_out}",
        )

    @torch.no_grad()
    def _keep(self, i: int, done: float) -> None:
        """Keeps the weights of group i for the report, where that much of its search is done."""
        self.get_buffer(f"trace{i}")[min(int(_POINTS * done), _POINTS)] = self.alpha(i)

    def _found(self) -> list[Aggregate]:
        """The sums as they are."""
        return [
            Aggregate(group.student, list(group.teacher), self.alpha(i).tolist(), self.get_buffer(f"scale{i}").tolist())
            for i, group in enumerate(self.groups)
        ]

    def export(self, folder: str | Path) -> None:
        """Writes the weights as search.json, for another run."""
        groups = [group._asdict() for group in self._found()]
        content = {"method": "dfa", "aggregation": self.aggregation, "groups": groups}
        write_json(Path(folder) / "search.json", content)

    def pictures(self) -> list[Picture]:
        """The weights of each group, and how they have moved in its search."""
        words = "Weight of each teacher layer in what the student's layer learns from; the line: all the same."
        bars: list[Picture] = []
        for group in self._found():
            values = list(zip(group.teacher, group.alpha, strict=True))
            bars.append(Bars(f"Weights for {group.student}", values, mark=1 / len(values), caption=words))
        return [*bars, *(self._moved(int(key)) for key in self.betas)]

    def _moved(self, i: int) -> Heatmap:
        """How the weights of group i have moved in its search."""
        trace = self.get_buffer(f"trace{i}")
        kept = [p for p in range(len(trace)) if not trace[p].isnan().any()]
        return Heatmap(
            f"Search for {self.groups[i].student}",
            trace[kept].T.tolist(),
            list(self.groups[i].teacher),
            [f"{100 * p // _POINTS} %" for p in kept],
            row_label="teacher layer",
            column_label="part of the search",
            caption="The same weights from the beginning of each group's search to its end.",
        )
