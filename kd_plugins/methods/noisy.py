"""Noise as a Resource for Learning in Knowledge Distillation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kd_plugins import Batch, DistillError, Needs, Nets, Paper, View
from kd_plugins.catalog.values import NonNegative, Share
from kd_plugins.distiller import Terms, Turn
from kd_plugins.errors import check_built
from kd_plugins.methods.kd import KD
from kd_plugins.reading.scores import class_scores

_logger = logging.getLogger(__name__)


class Noisy(KD):
    """Soft labels under noise: in the teacher's units, in the student's inputs, in the labels, in the teacher's logits.

    Arani, Sarfraz, Zonooz, "Noise as a Resource for Learning in Knowledge Distillation", WACV 2021, arXiv 1910.05057:
    `(1 - alpha) CE(y, S(x + d)) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T))` with `z_s = S(x + d)`,
    `z_t = T(x)`, and

    - *fickle teacher*: one forward of the teacher with its dropout on, its batch statistics fixed;
    - *soft randomization*: `d ~ N(0, sigma^2)` on the student's inputs alone; the teacher sees the clean ones;
    - *messy collaboration*: each label is, with a probability, another class, drawn anew in every step.

    Each can be on alone; with none of them this is `kd`, to the last bit. `alpha=0` takes no teacher: so one is trained
    with noise. Logits are those of `kd` (`[B, K]`, per token or per pixel); other methods of a combination read the
    student's noisy forward, and the labels as drawn.

    **Departures** No training code was released. Images are not clipped to [0, 1] after the noise (the paper does not
    say). Noise on token embeddings is ours, and so are `alpha` and `temperature`, those of `kd`.

    Args:
        fickle: Leave the teacher's dropout on. The paper's best teacher was trained and asked with 0.4.
        sigma: Standard deviation of the noise: of images in pixel units (images in [0, 1]), of token embeddings in
            those of their own standard deviation, padding left out.
        messy: Probability of a wrong label, of each example, token or pixel that counts.
        logit_sigma: The first version's noise on the teacher's logits, `z_t (1 + logit_sigma n)`, `n ~ N(0, 1)`.
    """

    paper = Paper(
        "Noise as a Resource for Learning in Knowledge Distillation",
        ("Elahe Arani", "Fahad Sarfraz", "Bahram Zonooz"),
        "WACV",
        2021,
        arxiv="1910.05057",
    )
    example = {"sigma": 0.1, "messy": 0.1, "logit_sigma": 0.1}

    def __init__(
        self,
        *,
        fickle: bool = False,
        sigma: NonNegative = 0.0,
        messy: Share = 0.0,
        logit_sigma: NonNegative = 0.0,
        **soft_labels: Any,
    ) -> None:
        super().__init__(**soft_labels)
        self.classes = 0
        if not self.alpha:
            self.teachers = 0
            if fickle or logit_sigma:
                raise DistillError("alpha=0 takes no teacher: leave fickle and logit_sigma out, or give alpha a value.")

    def needs(self) -> Needs:
        return Needs() if self.logit_sigma else super().needs()

    def setup(self, nets: Nets, batch: Batch) -> None:
        if not (self.fickle or self.sigma or self.messy or self.logit_sigma):
            _logger.warning("noisy without noise is kd: give fickle=true, sigma, messy or logit_sigma.")
        if self.messy and not self.task_weight:
            _logger.warning(
                "messy draws labels, and alpha=1 reads none: give alpha below 1, or combine another method."
            )
        student = nets.student(batch)
        if self.messy:
            rows = class_scores(student, student, batch).exclusive("messy")
            rows.hard_labels("messy")
            self.classes = rows.student.shape[-1]
        if self.sigma and isinstance(batch.inputs, Tensor):
            if batch.inputs.is_floating_point():
                batch.pixels(torch.zeros_like(batch.inputs))
            else:
                nets.student.network.embeddings()
        if self.fickle:
            for teacher in nets.teachers:
                if batch.teacher_logits is not None:
                    raise DistillError("A fickle teacher is asked anew in every step: leave its cached logits out.")
                if torch.equal(*(teacher(batch, dropout=True).logits for _ in range(2))):
                    raise DistillError(
                        f"fickle=true needs a teacher with dropout, and two forwards of {type(teacher.module).__name__}"
                        " are equal: train one with dropout (--drop 0.4), and make it with the same"
                        " (--teacher-kwargs drop_rate=0.4)."
                    )

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        check_built(self, messy=self.classes, alpha=nets.teachers)
        noisy, replace = batch, None
        if self.messy:
            noisy = noisy.with_labels(self.messy_labels(batch))
        inputs: Any = batch.inputs
        reached: list[int] = []

        def disturbed(x: Tensor) -> Tensor:
            reached.append(len(x))
            return x + self.sigma * _spread(x, batch) * self._noise(x)

        if self.sigma and inputs.is_floating_point():
            noisy = noisy.with_inputs(inputs + batch.pixels(self.sigma * self._noise(inputs)))
        elif self.sigma:
            replace = dict.fromkeys(nets.student.network.embeddings(), disturbed)
        student = nets.student(noisy, replace=replace)
        if replace and not reached:
            raise DistillError(
                f"sigma disturbs token embeddings, and this forward of {type(nets.student.module).__name__} called none"
                f" of {', '.join(replace)}: let get_input_embeddings() give the module that it calls."
            )
        if self.messy and (found := class_scores(student, student, noisy).student.shape[-1]) != self.classes:
            raise DistillError(
                f"messy draws among the {self.classes} classes that the first batch had, and this one has {found}: give"
                " all batches the same (answers in texts of one length)."
            )
        teachers = [teacher(batch, dropout=self.fickle) for teacher in nets.teachers]
        yield {"student": {**self.task(student, noisy), **self.taught(student, teachers, noisy)}}

    def messy_labels(self, batch: Batch) -> Tensor:
        """The labels, of which a share is redrawn among the wrong classes; those that the task ignores stay."""
        y = None if batch.labels is None else torch.as_tensor(batch.labels)
        if y is None or y.is_floating_point():
            raise DistillError(
                "messy draws class numbers, and these labels are soft or missing: train without mixup and cutmix, on"
                " rows that have labels."
            )
        generator = self.host.generator(y.device)
        drawn = torch.rand(y.shape, generator=generator, device=y.device) < self.messy
        other = torch.randint(1, self.classes, y.shape, generator=generator, device=y.device)
        return torch.where(drawn & (y != batch.ignore_index), (y + other) % self.classes, y)

    def loss(self, student: View, teacher: View, batch: Batch) -> Terms:
        if self.logit_sigma:
            noise = self._noise(teacher.logits)
            teacher = dataclasses.replace(teacher, _logits=teacher.logits * (1 + self.logit_sigma * noise))
        return super().loss(student, teacher, batch)

    def _noise(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            # Texts have other lengths on other processes, which in a common stream would draw the same numbers.
            return torch.randn(x.shape, generator=self.host.generator(x.device), device=x.device).to(x.dtype)
        return self.host.randn(len(x), *x.shape[1:], device=x.device).to(x.dtype)


def _spread(x: Tensor, batch: Batch) -> Tensor:
    """The standard deviation of token embeddings `[B, L, H]`, without those of padding."""
    masks = (batch.kwargs.get("attention_mask"), batch.mask)
    mask = next((m for m in masks if isinstance(m, Tensor) and m.shape == x.shape[:-1]), None)
    values = x.detach().float()
    if mask is not None:
        values = values.masked_fill(~mask.bool().unsqueeze(-1), torch.nan)
    return (values - values.nanmean()).square().nanmean().sqrt().to(x.dtype)
