"""DFA: Differentiable Feature Aggregation Search for Knowledge Distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Nets, OptimSpec, Paper, Reads, Stage, View
from kd_plugins import functional as KF
from kd_plugins.aggregation import Aggregating, first_alpha, inverse_rms, read_search
from kd_plugins.catalog.options import options_of
from kd_plugins.catalog.values import Fraction, NonNegative, Positive
from kd_plugins.distiller import Terms, Turn
from kd_plugins.reading.trunk import check_maps, find_groups

_OF_A_SEARCH = ("st_weight", "ts_weight", "regularizer", "search_share", "search_epochs", "held_out")


class DFA(Aggregating, Distiller):
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
        ("Yushuo Guan", "Pengyu Zhao", "Bingxuan Wang", "Yuanxing Zhang", "Cong Yao", "Kaigui Bian", "Jian Tang"),
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
        weight: NonNegative = 1.0,
        st_weight: NonNegative = 1.0,
        ts_weight: NonNegative = 1.0,
        regularizer: NonNegative = 0.0,
        normalize: bool = False,
        search_share: Fraction = 0.25,
        search_epochs: Positive | None = None,
        held_out: Fraction = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        searches = aggregation == "search" and weights is None
        defaults = options_of(type(self))
        self._of_search = idle = [name for name in _OF_A_SEARCH if self.config[name] != defaults[name].default]
        if weights is not None and (aggregation != "search" or search_only):
            raise DistillError("weights come from a search that is done: leave aggregation and search_only out.")
        if search_only and not searches:
            raise DistillError(f"search_only needs a search, and aggregation={aggregation} has none: leave one out.")
        if weights is not None and (teacher_layers is not None or normalize):
            raise DistillError("weights come with the teacher's layers and scales: leave those options out.")
        if search_only and search_epochs is not None:
            raise DistillError("With search_only the searches share the whole training: leave search_epochs out.")
        if st_weight + ts_weight == 0:
            raise DistillError("Expected st_weight or ts_weight above 0: they are the two paths of a search.")
        if idle and not searches:
            raise DistillError(f"{', '.join(idle)}: only a search has that, and this run has none; leave it out.")
        if seed and aggregation != "random":
            raise DistillError(f"seed is of random weights, and aggregation is {aggregation}: leave it out.")
        self.to_teacher, self.to_student, self.connectors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    # The layer groups

    def setup(self, nets: Nets, batch: Batch) -> None:
        saved, layers, teacher_layers = None, self.layers, self.teacher_layers
        if self.weights is not None:
            saved = read_search(self.weights)
            layers, teacher_layers = layers or [g.student for g in saved], ["+".join(g.teacher) for g in saved]
        self.groups = find_groups(nets.student, nets.teacher, batch, layers, teacher_layers)
        student, teacher = self.reads_of(range(len(self.groups)))
        ours, theirs = nets.student(batch, reads=student).features, nets.teacher(batch, reads=teacher).features
        for i, group in enumerate(self.groups):
            own, maps = ours[group.student], [theirs[path] for path in group.teacher]
            check_maps("dfa", group, nets, own, maps)
            searched = saved is None and self.aggregation == "search" and len(maps) > 1
            if saved is None:
                scale = inverse_rms(maps) if self.normalize else [1.0] * len(maps)
                self.add(i, first_alpha(self.aggregation, len(maps), 1000 * self.seed + i), scale, searched=searched)
            else:
                self.add(i, torch.tensor(saved[i].alpha, dtype=torch.float32), saved[i].scale)
            key, channels = str(i), (own.shape[1], maps[0].shape[1])
            if searched and self.st_weight:
                self.to_teacher[key] = nn.Conv2d(*channels, 1)
            if searched and self.ts_weight:
                self.to_student[key] = nn.Conv2d(*channels[::-1], 1)
            if not self.search_only:
                self.connectors[key] = nn.Conv2d(*channels, 1)
            self.say(i, own.shape, maps[0].shape)
        asked = [*self._of_search, *["search_only"] * self.search_only]
        if asked and not len(self.betas):
            raise DistillError(
                "The teacher has one layer in each group, nothing to search: take a deeper one, name teacher_layers, or"
                f" leave out {', '.join(asked)}."
            )

    # Stages, needs and groups of parameters

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
        student, teacher = self.reads_of(range(len(self.groups)) if i is None else [i])
        return Needs(student | Reads(), teacher, streams={} if i is None else {"search": self.held_out})

    def extras(self) -> dict[str, nn.Module]:
        return {"beta": self.betas} if len(self.betas) else {}

    def optimizers(self) -> dict[str, OptimSpec]:
        """Adam at 1e-2 for beta; our default."""
        searches = bool(self.betas) if self.groups else self.aggregation == "search" and self.weights is None
        return {"beta": OptimSpec("Adam", 1e-2, options={"betas": (0.5, 0.999)})} if searches else {}

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
        path, (ours, theirs) = self.groups[i].student, self.reads_of([i])
        view = nets.teacher(batch, reads=theirs)
        made: list[Tensor] = []

        def target(own: Tensor) -> Tensor:
            if not made:
                made.append(self.aggregate(i, view, alpha, own))
            return made[0]

        terms: Terms = {}
        if self.ts_weight:
            entered = {path: lambda own: self.connected("to_student", i, target(own)).to(own.dtype)}
            terms["ts"] = self.ts_weight * batch.task_loss(nets.student(batch, reads=Reads(), replace=entered))
        if self.st_weight:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                own = nets.student(batch, reads=ours).features[path]
                mapped = self.connected("to_teacher", i, own)
            terms["st"] = self.st_weight * KF.feature_l2(mapped, target(own))
        return terms

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        if self.searched is not None:
            return {}
        own = [student.features[group.student] for group in self.groups]
        targets = [self.aggregate(i, teacher, self.alpha(i).detach(), x) for i, x in enumerate(own)]
        mapped = [self.connected("connectors", i, x) for i, x in enumerate(own)]
        distances = [KF.feature_l2(*pair) for pair in zip(mapped, targets, strict=True)]
        return {"features": self.weight * torch.stack(distances).sum()}
