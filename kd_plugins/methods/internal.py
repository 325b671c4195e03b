"""Knowledge Distillation from Internal Representations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Nets, Paper, Reads, Stage, View
from kd_plugins import functional as KF
from kd_plugins.catalog.values import Fraction, NonNegative, Positive, Temperature
from kd_plugins.distiller import Terms
from kd_plugins.methods.kd import soft_labels
from kd_plugins.nn.connectors import as_weights
from kd_plugins.reading.depth import pairs_of, uniform


class Internal(Distiller):
    """Distils the teacher's attention distributions and [CLS] activations layer by layer, then its soft labels.

    Aguilar, Ling, Zhang, Yao, Fan, Guo, "Knowledge Distillation from Internal Representations", AAAI 2020, arXiv
    1910.03723. Each student layer stands for a block of teacher layers and learns from the block's last:
    `KL(A_t || A_s)` of the attention distributions `[B, heads, L, L]`, averaged over heads and real query tokens,
    and `1 - cos(h_t, h_s)` of the [CLS] vectors `[B, H]`. The schedules are the paper's:

    - `all`: every layer and the soft labels in every step;
    - `progressive` (PID): one layer after the other, bottom-up, each alone; then the soft labels alone;
    - `stacked` (SID): as progressive, but the losses of the lower layers stay; then the soft labels alone.

    Every phase has a learning-rate curve and optimizer state of its own. In a phase that reads layer l neither network
    runs the layers above l. Attention is read before dropout; padding is left out, as keys and as queries.

    Departures: the paper's numbers of epochs, thresholds and weights are not known to us; all defaults are ours.

    Args:
        schedule: `all`, `progressive` or `stacked`.
        layers: Which teacher layer each student layer learns from: `uniform` (the last layer of its block), or pairs
            such as `1:2,2:4`, student before the colon.
        attention_weight: Weight of the attention term of a layer.
        hidden_weight: Weight of the cosine term of a layer.
        classification_share: Share of the training for the last phase, the soft labels; the layers share the rest.
        phase_epochs: Epochs of each layer's phase, in place of a share.
        threshold: A layer's phase ends early once its mean cosine term over an epoch falls below this.
        fresh_optimizer: Start every phase with empty optimizer state.
        freeze_lower: Let no gradient reach the layers below the one that a phase trains; `progressive` alone, since in
            `stacked` the lower layers go on learning from their own terms.
        temperature: Temperature of the soft labels.
        gold: Weight of the task loss with the true labels, in the last phase.
        project: Learn a linear map of the student's [CLS] vector where the hidden sizes differ; the paper's are equal.
    """

    paper = Paper(
        "Knowledge Distillation from Internal Representations",
        ("Gustavo Aguilar", "Yuan Ling", "Yu Zhang", "Benjamin Yao", "Xing Fan", "Chenlei Guo"),
        "AAAI",
        2020,
        arxiv="1910.03723",
    )
    tasks = ("classification", "multilabel", "regression")
    networks = "transformer"

    def __init__(
        self,
        *,
        schedule: Literal["all", "progressive", "stacked"] = "stacked",
        layers: str = "uniform",
        attention_weight: NonNegative = 1.0,
        hidden_weight: NonNegative = 1.0,
        classification_share: Fraction = 0.5,
        phase_epochs: Positive | None = None,
        threshold: float | None = None,
        fresh_optimizer: bool = True,
        freeze_lower: bool = False,
        temperature: Temperature = 1.0,
        gold: NonNegative = 0.0,
        project: bool = False,
    ) -> None:
        super().__init__()
        if attention_weight + hidden_weight == 0:
            raise DistillError("Expected attention_weight or hidden_weight above 0: they are all that layers learn by.")
        if schedule == "all" and (threshold is not None or phase_epochs is not None):
            raise DistillError("phase_epochs and threshold are of phases, and schedule=all has none: leave them out.")
        if freeze_lower and schedule != "progressive":
            raise DistillError(
                f"freeze_lower freezes the layers below the one that a phase trains, which the schedule {schedule!r}"
                " goes on training: use schedule=progressive, or leave it out."
            )
        if threshold is not None and hidden_weight == 0:
            raise DistillError("threshold reads the cosine term, whose hidden_weight is 0: give it a weight.")
        self._explicit = None if layers == "uniform" else pairs_of(layers)
        self.pairs: dict[int, int] = self._explicit or {}
        self.projections = nn.ModuleDict()
        # Sums over the epoch of the newest layer's cosine term; buffers, so that a resumed epoch ends the same.
        self.cosine: Tensor
        self.register_buffer("cosine", torch.zeros(2))

    def setup(self, nets: Nets, batch: Batch) -> None:
        self._check_tokens(batch)
        if self.hidden_weight and batch.mask is not None and not batch.mask[:, 0].all():
            raise DistillError(
                "internal compares the vector of the first token, [CLS], and texts of this batch begin with padding:"
                " pad on the right (tokenizer.padding_side), or take hidden_weight=0."
            )
        n_s, n_t = nets.student.layers(batch), nets.teacher.layers(batch)
        self.pairs = self._explicit or uniform(n_s, n_t)
        for ours, theirs in self.pairs.items():
            if not (1 <= ours <= n_s and 1 <= theirs <= n_t):
                raise DistillError(
                    f"The layer pair {ours}:{theirs} does not exist: the student has layers 1 to {n_s}, the teacher 1"
                    f" to {n_t}."
                )
        everything = self._reads(tuple(self.pairs))
        student, teacher = nets.student(batch, reads=everything[0]), nets.teacher(batch, reads=everything[1])
        for ours, theirs in self.pairs.items():
            if self.attention_weight:
                a_s, a_t = student.attentions[ours].scores, teacher.attentions[theirs].scores
                if a_s.shape != a_t.shape:
                    raise DistillError(
                        f"internal compares attention [B, heads, L, L], got {list(a_s.shape)} at the student's layer"
                        f" {ours} and {list(a_t.shape)} at the teacher's layer {theirs}: use a student with as many"
                        " heads and the same tokens, or attention_weight=0."
                    )
            if self.hidden_weight:
                h_s, h_t = student.hidden[ours].shape, teacher.hidden[theirs].shape
                rows, same = len(h_s) == len(h_t) == 3, h_s[-1] == h_t[-1]
                if not rows or not (same or self.project):
                    remedy = "a student of that hidden size, project=true, or hidden_weight=0"
                    raise DistillError(
                        f"internal compares hidden states [B, L, H] of one size H, got {list(h_s)} at the student's"
                        f" layer {ours} and {list(h_t)} at the teacher's layer {theirs}: use"
                        f" {remedy if rows else 'hidden_weight=0'}."
                    )
                if not same:
                    self.projections[str(ours)] = nn.Linear(h_s[-1], h_t[-1])

    def _check_tokens(self, batch: Batch) -> None:
        if self.attention_weight and not batch.aligned:
            raise DistillError(
                f"internal compares attention token by token, and teacher_{batch.name} holds other tokens than the"
                " student's: use a teacher with the student's tokenizer, or attention_weight=0."
            )

    # The schedule: what a phase compares, and so reads

    def stages(self) -> list[Stage]:
        if self.schedule == "all":
            return [Stage("all layers")]
        share, fresh = (1 - self.classification_share) / max(len(self.pairs), 1), self.fresh_optimizer
        phases = [Stage(f"layer {layer}", share, self.phase_epochs, fresh) for layer in sorted(self.pairs)]
        return [*phases, Stage("classification", self.classification_share, None, fresh)]

    def _phase(self) -> tuple[tuple[int, ...], bool]:
        """The student layers that the current phase compares, and whether it teaches the labels."""
        layers = tuple(sorted(self.pairs))
        if self.schedule == "all":
            return layers, True
        stage = self.progress.stage
        if stage >= len(layers):
            return (), True
        return (layers[stage : stage + 1] if self.schedule == "progressive" else layers[: stage + 1]), False

    def _reads(self, layers: tuple[int, ...]) -> tuple[Reads, Reads]:
        def reads(x: tuple[int, ...]) -> Reads:
            return Reads(False, hidden=x if self.hidden_weight else (), attentions=x if self.attention_weight else ())

        return reads(layers), reads(tuple(self.pairs[layer] for layer in layers))

    def needs(self) -> Needs:
        if not self.ready:
            return Needs()
        layers, labels = self._phase()
        student, teacher = self._reads(layers)
        if labels:
            return Needs(student | Reads(), teacher | Reads(softened=self.temperature))
        cut = (layers[-1] - 1,) if self.freeze_lower and layers[-1] > 1 else ()
        return Needs(student | Reads(False, cut=cut), teacher)

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        layers, labels = self._phase()
        terms: Terms = {}
        if layers and self.attention_weight:
            self._check_tokens(batch)
            terms["kl_attention"] = self.attention_weight * sum(self._kl(i, student, teacher, batch) for i in layers)
        if layers and self.hidden_weight:
            cosines = [self._cosine(i, student, teacher) for i in layers]
            self.cosine += torch.stack([cosines[-1].detach().float(), torch.ones_like(self.cosine[1])])
            terms["cos_hidden"] = self.hidden_weight * sum(cosines)
        if labels:
            terms["soft_labels"] = soft_labels(student, teacher, batch, self.temperature)
        return terms

    def _kl(self, layer: int, student: View, teacher: View, batch: Batch) -> Tensor:
        ours, theirs = student.attentions[layer], teacher.attentions[self.pairs[layer]]
        probs = {"student_probs": ours.probs, "teacher_probs": theirs.probs}
        return KF.attention_kl(ours.scores, theirs.scores, batch.mask, **probs)

    def _cosine(self, layer: int, student: View, teacher: View) -> Tensor:
        ours = student.hidden[layer][:, :1]
        if str(layer) in self.projections:
            projection = self.projections[str(layer)]
            ours = projection(as_weights(projection, ours))
        return KF.cls_cosine(ours, teacher.hidden[self.pairs[layer]][:, :1])

    @property
    def task_weight(self) -> float:  # type: ignore[override]
        """`gold` in the phase of the labels; the layers are taught without."""
        return self.gold if self._phase()[1] else 0.0

    def begin_stage(self, stage: Stage) -> None:
        self.cosine.zero_()

    def stage_done(self) -> bool:
        mean = self.host.mean(self.cosine[0] / self.cosine[1].clamp_min(1))
        layers, labels = self._phase()
        seen = bool(self.cosine[1] > 0)
        self.cosine.zero_()
        return bool(self.threshold is not None and layers and not labels and seen and mean < self.threshold)
