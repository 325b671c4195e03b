"""DFA: Differentiable Feature Aggregation Search for Knowledge Distillation."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugins import functional as KF
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller, Terms, Turn
from kd_plugins.errors import DistillError
from kd_plugins.picture import Bars, Heatmap, Picture
from kd_plugins.reading.nets import Nets
from kd_plugins.reading.trunk import LayerGroup, find_groups
from kd_plugins.reading.view import Batch, Needs, Reads, View
from kd_plugins.stages import Stage

__all__ = ["DFA"]

_logger = logging.getLogger("kd_plugins.dfa")

_POINTS = 20
"""Points of a search at which the weights are kept for the report."""


class DFA(Distiller):
    """Searches, for every group of teacher layers, the weighted sum of their maps that teaches best; then distils it.

    Guan, Zhao, Wang, Zhang, Yao, Bian, Tang, "Differentiable Feature Aggregation Search for Knowledge Distillation",
    ECCV 2020, arXiv 2008.00506. A layer group i holds the layers of one spatial size: teacher maps `T_i^j`
    `[B, C_t, H, W]` and the student's last map `S_i` `[B, C_s, H, W]`. With `alpha_i = softmax(beta_i)`, the aggregate
    is `A_i = sum_j alpha_i^j T_i^j`.

    1. Search, one group after the other: the bridge loss `st_weight * |A_i - F_s(S_i)|^2 + ts_weight * CE(y, rest of
       the student on F_t(A_i))` trains the student and the connectors F_s, F_t (1x1 convolutions) on one part of the
       training set, and in turn, plus `regularizer * |beta_i|^2`, beta_i on the other part (first-order bi-level
       optimization). In the second path the connected aggregate takes the place of the student's map S_i.
    2. Distillation of a fresh student on the whole training set, with alpha as the search left it:
       `task + weight * sum_i |A_i - F_s(S_i)|^2`, with fresh connectors.

    The squared distances are means over the entries. Groups where the teacher has one layer need no search.

    Departures: all defaults of weights, shares and learning rates are ours, since the paper's are not known to us, and
    so is the form of the regularizer. In an iteration beta moves first, then the student; the student of one group's
    search goes on from that of the group before, with fresh optimizer state. Teacher maps of a group that have other
    channels than its last are left out; where layers are named, a map of another size than the student's is averaged
    to it. The student's batch statistics see both paths up to the group, and above it aggregates alone.

    Args:
        aggregation: `search`; or, without a search, `uniform` weights, `random` weights (uniform on the simplex), or
            the `last` layer of each group alone, which is plain feature distillation.
        weights: The search.json of another run, in place of a search.
        search_only: Leave the second part out; the run is for its search.json.
        layers: Student layers, one for each group: stage numbers or module paths; found by default.
        teacher_layers: Teacher layers of each group, in the order of the student's: a glob, or several joined by `+`,
            such as `layer1.*,layer2.0+layer2.2`, or a stage number for the blocks of a stage; found by default.
        weight: Weight of the distance in the second part.
        st_weight: Weight of the bridge loss's path from student to teacher, the distance.
        ts_weight: Weight of its path from teacher to student, the task loss.
        regularizer: Weight of the squared norm of beta.
        normalize: Divide the maps of each teacher layer by their root mean square over one batch, so that alpha does
            not depend on how large a layer's numbers are.
        search_share: Share of the training for all searches together.
        search_epochs: Epochs of each group's search, in place of a share.
        held_out: Share of the training set that beta learns from during the searches.
        seed: Of `random` weights.
    """

    paper = Paper(
        "Differentiable Feature Aggregation Search for Knowledge Distillation",
        (
            "Yushuo Guan",
            "Pengyu Zhao",
            "Bingxuan Wang",
            "Yuanxing Zhang",
            "Cong Yao",
            "Kaigui Bian",
            "Jian Tang",
        ),
        "ECCV",
        2020,
        arxiv="2008.00506",
    )

    def __init__(
        self,
        *,
        aggregation: Literal["search", "uniform", "random", "last"] = "search",
        weights: str | None = None,
        search_only: bool = False,
        layers: tuple[int | str, ...] | None = None,
        teacher_layers: tuple[int | str, ...] | None = None,
        weight: float = 1.0,
        st_weight: float = 1.0,
        ts_weight: float = 1.0,
        regularizer: float = 0.0,
        normalize: bool = False,
        search_share: float = 0.25,
        search_epochs: float | None = None,
        held_out: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if weights is not None and (aggregation != "search" or search_only):
            raise DistillError("weights come from a search that is done: leave aggregation and search_only out.")
        if search_only and aggregation != "search":
            raise DistillError(f"search_only needs a search, and aggregation={aggregation} has none: leave one out.")
        if weights is not None and (teacher_layers is not None or normalize):
            raise DistillError("weights come with the teacher's layers and scales: leave those options out.")
        if search_epochs is not None and search_epochs <= 0:
            raise DistillError(f"Expected search_epochs above 0, got {search_epochs}.")
        if search_only and search_epochs is not None:
            raise DistillError("With search_only the searches share the whole training: leave search_epochs out.")
        if min(weight, st_weight, ts_weight, regularizer) < 0 or st_weight + ts_weight == 0:
            raise DistillError("Expected no weight below 0, and st_weight or ts_weight above.")
        if not (0 < search_share < 1 and 0 < held_out < 1):
            raise DistillError(f"Expected search_share and held_out between 0 and 1, got {search_share}, {held_out}.")
        of_a_search = {
            "st_weight": st_weight != 1,
            "ts_weight": ts_weight != 1,
            "regularizer": regularizer != 0,
            "search_share": search_share != 0.25,
            "search_epochs": search_epochs is not None,
            "held_out": held_out != 0.5,
        }
        idle = [name for name, given in of_a_search.items() if given]
        if idle and (aggregation != "search" or weights is not None):
            raise DistillError(f"{', '.join(idle)}: only a search has that, and this run has none; leave it out.")
        if seed and aggregation != "random":
            raise DistillError(f"seed is of random weights, and aggregation is {aggregation}: leave it out.")
        self.aggregation, self.weights, self.search_only = aggregation, weights, search_only
        self.layers, self.teacher_layers = layers, teacher_layers
        self.weight, self.st_weight, self.ts_weight = weight, st_weight, ts_weight
        self.regularizer, self.normalize, self.held_out, self.seed = regularizer, normalize, held_out, seed
        self.search_share, self.search_epochs = search_share, search_epochs
        self.groups: list[LayerGroup] = []
        self.sizes: list[tuple[int, int]] = []
        # By number of the group: beta where it is searched, alpha where it is given.
        self.betas = nn.ParameterDict()
        self.to_teacher, self.to_student, self.connectors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    # The layer groups

    def setup(self, nets: Nets, batch: Batch) -> None:
        saved = None if self.weights is None else _load(self.weights)
        self.groups = self._find(nets, batch, saved)
        reads = self._reads(range(len(self.groups)))
        student = nets.student(batch, reads=reads[0]).features
        teacher = nets.teacher(batch, reads=reads[1]).features
        for i, group in enumerate(self.groups):
            ours, theirs = student[group.student], [teacher[path] for path in group.teacher]
            _check_maps(group, nets, ours, theirs)
            self.sizes.append((ours.shape[2], ours.shape[3]))
            if saved is not None:
                scale = saved[i]["scale"]
            else:
                norms = [float(x.float().square().mean().sqrt()) for x in theirs]
                scale = [1 / max(norm, 1e-12) if self.normalize else 1.0 for norm in norms]
            self.register_buffer(f"scale{i}", torch.tensor(scale, dtype=torch.float32))
            self._add(i, ours.shape[1], theirs[0].shape[1], None if saved is None else saved[i]["alpha"])
            self._say(i, ours.shape, theirs[0].shape)
        if self.search_only and not len(self.betas):
            raise DistillError(
                "There is nothing to search: the teacher has one layer in each group. Take a deeper teacher, or name"
                " teacher_layers."
            )

    def _find(self, nets: Nets, batch: Batch, saved: Sequence[dict[str, Any]] | None) -> list[LayerGroup]:
        if saved is None:
            return find_groups(nets.student, nets.teacher, batch, self.layers, self.teacher_layers)
        layers = [g["student"] for g in saved] if self.layers is None else self.layers
        return find_groups(nets.student, nets.teacher, batch, layers, ["+".join(g["teacher"]) for g in saved])

    def _add(self, i: int, student: int, teacher: int, saved: Sequence[float] | None) -> None:
        """Makes the parts of one group, of so many channels."""
        key, n = str(i), len(self.groups[i].teacher)
        alpha = torch.full((n,), 1 / n)
        if saved is not None:
            alpha = torch.tensor(saved, dtype=torch.float32)
        elif self.aggregation == "random":
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            alpha = F.normalize(-torch.rand(n, generator=generator).clamp_min(1e-6).log(), p=1, dim=0)
        elif self.aggregation == "last":
            alpha = F.one_hot(torch.tensor(n - 1), n).float()
        if saved is None and self.aggregation == "search" and n > 1:
            self.betas[key] = nn.Parameter(torch.zeros(n))
            if self.st_weight:
                self.to_teacher[key] = nn.Conv2d(student, teacher, 1)
            if self.ts_weight:
                self.to_student[key] = nn.Conv2d(teacher, student, 1)
            self.register_buffer(f"trace{i}", torch.full((_POINTS + 1, n), torch.nan))
            getattr(self, f"trace{i}")[0] = alpha
        else:
            self.register_buffer(f"alpha{i}", alpha)
        if not self.search_only:
            self.connectors[key] = nn.Conv2d(student, teacher, 1)

    def _say(self, i: int, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Lists a group, on the first process."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        group = self.groups[i]
        how = "searched" if str(i) in self.betas else f"weights {[round(a, 4) for a in self.alpha(i).tolist()]}"
        left_out = f"; left out for their channels: {', '.join(group.left_out)}" if group.left_out else ""
        _logger.info(
            f"dfa, layer group {i + 1}: student {group.student} {list(ours[1:])}, teacher {', '.join(group.teacher)}"
            f" {list(theirs[1:])}, {how}{left_out}"
        )

    # Stages, needs and groups of parameters

    @property
    def searched(self) -> int | None:
        """The number of the layer group that the current stage searches; None in the distillation."""
        numbers = [int(key) for key in self.betas]
        return numbers[self.progress.stage] if self.progress.stage < len(numbers) else None

    def stages(self) -> list[Stage]:
        if self.groups:
            names = [f"search {self.groups[int(key)].student}" for key in self.betas]
        else:
            names = ["search"] if self.aggregation == "search" and self.weights is None else []
        share = self.search_share / max(len(names), 1)
        searches = [Stage(name, share, self.search_epochs) for name in names]
        if self.search_only:
            return searches
        return [*searches, Stage("distill", 1 - self.search_share, fresh_student=bool(searches))]

    def needs(self) -> Needs:
        if not self.groups:
            searches = self.progress.stage == 0 and self.stages()[0].name == "search"
            return Needs(streams={"search": self.held_out} if searches else {})
        i = self.searched
        if i is None:
            student, teacher = self._reads(range(len(self.groups)))
            return Needs(student | Reads(), teacher)
        student, teacher = self._reads([i])
        return Needs(student | Reads(), teacher, streams={"search": self.held_out})

    def _reads(self, numbers: Sequence[int]) -> tuple[Reads, Reads]:
        """The maps of some groups, of the student and of the teacher."""
        groups = [self.groups[i] for i in numbers]
        theirs = dict.fromkeys(path for group in groups for path in group.teacher)
        return Reads(False, tuple(group.student for group in groups)), Reads(False, tuple(theirs))

    def extras(self) -> dict[str, nn.Module]:
        return {"beta": self.betas} if len(self.betas) else {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam at 1e-2 for beta; our default."""
        return dict.fromkeys(self.extras(), OptimSpec("Adam", 1e-2, options={"betas": (0.5, 0.999)}))

    # A step

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        i = self.searched
        if i is None:
            yield from super().turns(nets, batch)
            return
        alpha = self.alpha(i)
        learned = self._bridge(nets, batch.stream("search"), i, alpha, frozen=True)
        if self.regularizer:
            learned["regularizer"] = self.regularizer * self.betas[str(i)].float().square().sum()
        yield {"beta": learned}
        yield {"student": self._bridge(nets, batch, i, self.alpha(i).detach(), frozen=False)}

    def _bridge(self, nets: Nets, batch: Batch, i: int, alpha: Tensor, *, frozen: bool) -> Terms:
        """The bridge loss of group i; `frozen` where nothing of the student below the group will need a gradient."""
        path, (ours, theirs) = self.groups[i].student, self._reads([i])
        target = self._aggregate(i, nets.teacher(batch, reads=theirs), alpha)
        terms: Terms = {}
        if self.ts_weight:
            view = nets.student(batch, reads=Reads(), replace={path: self.to_student[str(i)](target)})
            terms["ts"] = self.ts_weight * batch.task_loss(view)
        if self.st_weight:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                mapped = self.to_teacher[str(i)](nets.student(batch, reads=ours).features[path])
            terms["st"] = self.st_weight * KF.feature_l2(mapped, target)
        return terms

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        if self.searched is not None:
            return {}
        distances = [
            KF.feature_l2(
                self.connectors[str(i)](student.features[group.student]),
                self._aggregate(i, teacher, self.alpha(i).detach()),
            )
            for i, group in enumerate(self.groups)
        ]
        return {"features": self.weight * torch.stack(distances).sum()}

    def alpha(self, i: int) -> Tensor:
        """The weights of the teacher's layers in group i, `[N]`, float32."""
        if str(i) in self.betas:
            return self.betas[str(i)].float().softmax(0)
        return getattr(self, f"alpha{i}")  # type: ignore[no-any-return]

    def _aggregate(self, i: int, teacher: View, alpha: Tensor) -> Tensor:
        """The teacher's maps of group i as one, of the size of the student's."""
        maps = [teacher.features[path] for path in self.groups[i].teacher]
        size = self.sizes[i]
        maps = [m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in maps]
        return KF.aggregate(maps, alpha * getattr(self, f"scale{i}"))

    # What the search has found

    def after_update(self) -> None:
        i, progress = self.searched, self.progress
        if i is None or progress.stage_end is None:
            return
        done = (progress.step + 1 - progress.stage_start) / (progress.stage_end - progress.stage_start)
        with torch.no_grad():
            getattr(self, f"trace{i}")[min(int(_POINTS * done), _POINTS)] = self.alpha(i)

    def export(self, folder: str | Path) -> None:
        """Writes the weights as search.json, for `weights=` of another run."""
        groups = [
            {
                "student": group.student,
                "teacher": list(group.teacher),
                "alpha": self.alpha(i).tolist(),
                "scale": getattr(self, f"scale{i}").tolist(),
            }
            for i, group in enumerate(self.groups)
        ]
        text = json.dumps({"method": "dfa", "aggregation": self.aggregation, "groups": groups}, indent=2)
        (Path(folder) / "search.json").write_text(text + "\n", encoding="utf-8")

    def pictures(self) -> list[Picture]:
        """The weights of each group, and how they have moved in its search."""
        bars, maps = [], []
        for i, group in enumerate(self.groups):
            values = list(zip(group.teacher, self.alpha(i).tolist(), strict=True))
            words = "Weight of each teacher layer in what the student's layer learns from; the line: all the same."
            bars.append(Bars(f"Weights for {group.student}", values, mark=1 / len(values), caption=words))
            if str(i) in self.betas:
                trace: Tensor = getattr(self, f"trace{i}")
                kept = [p for p in range(len(trace)) if not trace[p].isnan().any()]
                maps.append(
                    Heatmap(
                        f"Search for {group.student}",
                        trace[kept].T.tolist(),
                        group.teacher,
                        [f"{100 * p // _POINTS} %" for p in kept],
                        row_label="teacher layer",
                        column_label="part of the search",
                        caption="The same weights from the beginning of each group's search to its end.",
                    )
                )
        return [*bars, *maps]


def _check_maps(group: LayerGroup, nets: Nets, ours: Tensor, theirs: Sequence[Tensor]) -> None:
    """Refuses what cannot be summed."""
    nets.student.network.check_map("dfa", group.student, ours)
    for path, x in zip(group.teacher, theirs, strict=True):
        nets.teacher.network.check_map("dfa", path, x)
    channels = [x.shape[1] for x in theirs]
    if len(set(channels)) > 1:
        raise DistillError(
            f"The teacher's layers {list(group.teacher)} have {channels} channels and cannot be summed: name layers of"
            " equal channels as one group."
        )


def _load(path: str) -> list[dict[str, Any]]:
    """The groups in a search.json."""
    try:
        groups: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))["groups"]
        sizes = [(len(g["teacher"]), len(g["alpha"]), len(g["scale"]), bool(g["student"])) for g in groups]
        sums = [math.fsum(map(float, g["alpha"])) for g in groups]
        finite = all(math.isfinite(float(x)) for g in groups for x in g["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillError(f"Expected the search.json of a run with dfa, got {path} ({error!r}).") from error
    if not groups or any(not a == b == c > 0 for a, b, c, _ in sizes):
        raise DistillError(f"Expected an alpha and a scale for each teacher layer in {path}: search anew.")
    if not finite or not all(abs(x - 1) < 1e-3 for x in sums):
        raise DistillError(f"Expected weights that sum to 1 in each group of {path}, got sums of {sums}: search anew.")
    return groups
