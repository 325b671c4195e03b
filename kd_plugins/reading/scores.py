"""Class scores, read in one way by every method, whatever the task."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.functional.topk import merge_rest
from kd_plugins.reading.view import Batch, View

_TASKS = ("classification", "multilabel", "regression", "token", "causal-lm", "ctc", "segmentation")


class Rows(NamedTuple):
    """Scores of student and teacher, one row for each thing that is classified.

    Attributes:
        student: `[B, N, K]`: N is 1 for a classifier, the tokens of a text, the pixels of an image.
        teacher: The same shape.
        mask: `[B, N]`, the rows that count; None when all do.
        labels: Class numbers `[B, N]`; None where the labels are none (soft targets, or no labels).
        binary: Whether each score is a class of its own under a sigmoid, rather than all under one softmax.
        numbers: Whether each score is a number, that of a regression, and no class at all.
        ignore_index: The label of what has no true class.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    labels: Tensor | None
    binary: bool
    numbers: bool = False
    ignore_index: int = -100

    def exclusive(self, method: str) -> Rows:
        """These rows; raises where the scores are not of classes that exclude each other."""
        if self.binary or self.numbers:
            got = "of a regression" if self.numbers else "under sigmoids"
            raise DistillError(
                f"{method} compares classes that exclude each other (a softmax over at least two), got scores"
                f" {list(self.student.shape)} {got}: use kd, or a method that reads features."
            )
        return self

    def hard_labels(self, method: str) -> tuple[Tensor, Tensor]:
        """The class numbers, and which rows count and have one, `[B, N]` each; raises where there are none.

        The number is 0 where a row does not count. An example whose label is ignored has no class, though what a
        teacher says of it counts to methods that ask for none.
        """
        if self.labels is None:
            raise DistillError(
                f"{method} needs the number of the true class of each example, and these labels are soft or missing:"
                " train without mixup, cutmix and label smoothing of the targets, or use kd."
            )
        known = self.labels != self.ignore_index
        known = known if self.mask is None else known & self.mask
        return self.labels.masked_fill(~known, 0), known


def class_scores(student: View, teacher: View, batch: Batch, temperature: float | None = None) -> Rows:
    """The class scores of two networks for one batch.

    Classes are the last axis of scores per token (`batch.task` is `"token"`, `"causal-lm"` or `"ctc"`) and the second
    axis of score maps `[B, K, H, W]`, as in `torch.nn.functional.cross_entropy`; of `[B, K, L]` or `[B, L, K]` the
    labels or the mask tell which, or else the task must. A teacher's map of another size is resized to the student's
    (bilinear), labels of another size are read at the centre of each position. Left out are tokens that are padding,
    tokens and pixels whose label is `batch.ignore_index`, and for a causal model the last position, which has no next
    token. One score alone is the logit of a sigmoid, but where `batch.task` is `"regression"`.

    Args:
        student: Scores `[B, K]`, `[B, L, K]`, `[B, K, L]` or `[B, K, H, W]`, or one for each example `[B]` or, where
            the labels are of that shape (or `[B, 1, H, W]`) and no shares, for each pixel `[B, H, W]`.
        teacher: Scores of the same classes.
        batch: Its task, labels, mask and ignored label.
        temperature: Of a loss between two softmaxes that asks nothing but how far they are apart. Where a cache holds
            the highest of the teacher's scores, it gets these with the rest as one class; other losses need them all.
            A method says so in its needs, `Needs(teacher=Reads(softened=temperature))`.

    Raises:
        DistillError: Scores of different classes or positions, with an axis of classes that is in doubt, or of a task
            that has none.
    """
    if batch.task not in _TASKS:
        raise DistillError(
            f"Expected scores of one of the tasks {', '.join(_TASKS)}, got those of {batch.task!r}: say which"
            " (Batch.of(..., task=...)), or take a method that reads features."
        )
    s = student.logits
    top = teacher.top if temperature is not None else None
    t = teacher.logits if top is None else top.scores
    s, t = (x.unsqueeze(1) if x.dim() == 1 else x for x in (s, t))
    # The labels of CTC are not aligned with the frames.
    labels = batch.labels if isinstance(batch.labels, Tensor) and batch.task != "ctc" else None
    if batch.task == "segmentation" and s.dim() == 3:
        if labels is None:
            raise DistillError(
                f"Scores {list(s.shape)} of a segmentation without labels may be [B, H, W] of one class or [B, K, L]:"
                " give labels, or scores [B, 1, H, W] or [B, K, 1, L]."
            )
        s, t = (x.unsqueeze(1) for x in (s, t)) if _one_class(s, labels) else (s, t)
    last = _classes_last(s, labels, batch)
    if top is not None:
        if batch.task in ("regression", "multilabel") or s.shape[-1] == 1 or not (last or s.dim() == 2):
            raise DistillError(
                f"The highest of a teacher's scores are kept of a softmax, got scores {list(s.shape)} of the task"
                f" {batch.task}: make the cache without top k."
            )
        if temperature != top.temperature:
            raise DistillError(
                f"The cache holds the highest of the teacher's scores at temperature {top.temperature:g}, and the loss"
                f" has {temperature:g}: make it anew with that temperature, or give the loss the cache's."
            )
        s = merge_rest(s, top.classes, top.temperature)
    if not last and s.dim() == 4 and t.dim() == 4:
        t = _resized(t, s)
    if s.shape != t.shape:
        raise DistillError(
            "Expected student and teacher scores of the same classes and positions, got"
            f" {list(s.shape)} and {list(t.shape)}: both networks need the same classes, in the same order, and the"
            " same tokens or pixels."
        )
    numbers = batch.task == "regression"
    binary = not numbers and (batch.task == "multilabel" or s.shape[-1 if last else 1] == 1)
    if s.dim() == 2:
        # One number for each example, with an axis of its own or without.
        hard = labels is not None and labels.numel() == len(s) and not labels.is_floating_point()
        rows = labels.reshape(-1, 1) if labels is not None and hard else None
        return Rows(s.unsqueeze(1), t.unsqueeze(1), None, rows, binary, numbers, batch.ignore_index)
    classes = -1 if last else 1
    if labels is not None and labels.dim() == s.dim() and labels.shape[classes] == 1:
        labels = labels.squeeze(classes)  # one label of each position, as a binary loss takes them
    if not last:
        size, s, t = s.shape[2:], s.movedim(1, -1), t.movedim(1, -1)
        labels = None if labels is None or labels.dim() != s.dim() - 1 else _at(labels, size)
    labels = None if labels is None or labels.shape != s.shape[:-1] else labels
    real = batch.mask if batch.mask is not None and batch.mask.shape == s.shape[:-1] else None
    if real is None and batch.mask is not None and last:
        raise DistillError(
            f"Expected a mask of each of the scores {list(s.shape)}, got {list(batch.mask.shape)}, so that padding"
            " among them is not known: give Batch.of(..., mask=[B, L])."
        )
    soft = labels is not None and labels.is_floating_point()
    # Numbers and probabilities may have the value of the ignored label.
    all_count = soft and (numbers or 0 <= batch.ignore_index <= 1)
    mask = None if labels is None or all_count else labels != batch.ignore_index
    labels = None if soft else labels
    if real is not None:
        mask = real.bool() if mask is None else mask & real.bool()
    if batch.task == "causal-lm":
        s, t = s[..., :-1, :], t[..., :-1, :]
        mask, labels = (None if x is None else x[..., 1:] for x in (mask, labels))
        # Padding on the left stands before a token that counts.
        mask = mask & real.bool()[..., :-1] if real is not None else mask
    mask, labels = (None if x is None else x.flatten(1) for x in (mask, labels))
    return Rows(s.flatten(1, -2), t.flatten(1, -2), mask, labels, binary, numbers, batch.ignore_index)


def score_maps(student: View, teacher: View, batch: Batch, method: str) -> tuple[Tensor, Tensor]:
    """The score maps of two networks in one shape `[B, K, H, W]`, all positions of them; the teacher's is resized.

    Args:
        student: Scores `[B, K, H, W]`, or of a depth `[B, H, W]`.
        teacher: The same, of any height and width.
        batch: Its task: the scores of a detector's boxes `[B, N, K]` are no map.
        method: Who asks.

    Raises:
        DistillError: Scores that are no maps, or of different classes.
    """
    flat = batch.task != "detection"
    s, t = (x.unsqueeze(1) if x.dim() == 3 and flat else x for x in (student.logits, teacher.logits))
    if s.dim() != 4 or t.dim() != 4 or s.shape[:2] != t.shape[:2]:
        raise DistillError(
            f"{method} compares maps of scores [B, K, H, W] of the same classes, or of depth [B, H, W], got"
            f" {list(student.logits.shape)} and {list(teacher.logits.shape)}: leave its term of the scores out, or take"
            " networks for segmentation or depth with the same classes in the same order."
        )
    return s, _resized(t, s)


def _resized(scores: Tensor, like: Tensor) -> Tensor:
    """A score map `[B, K, H, W]` at the size of another."""
    if scores.shape[2:] == like.shape[2:]:
        return scores
    return F.interpolate(scores.float(), like.shape[2:], mode="bilinear", align_corners=False).to(scores.dtype)


def _one_class(scores: Tensor, labels: Tensor) -> bool:
    """Whether maps `[B, H, W]` are of one class without an axis for it, and not shares of the classes `[B, K, L]`."""
    if scores.dim() != 3 or labels.shape not in (scores.shape, scores.unsqueeze(1).shape):
        return False
    shares = labels.dim() == 3 and labels.is_floating_point()
    return not shares or bool((labels.sum(1) - 1).abs().max() > 1e-3)


def _classes_last(scores: Tensor, labels: Tensor | None, batch: Batch) -> bool:
    if scores.dim() == 2 or batch.task in ("token", "causal-lm", "ctc"):
        return True
    if scores.dim() > 3 or batch.task == "segmentation":
        return False
    hard = labels is not None and labels.dim() == 2 and not labels.is_floating_point()
    lengths = [x.shape[1] for x in (labels if hard else None, batch.mask) if x is not None and x.dim() == 2]
    length = next((n for n in lengths if n in scores.shape[1:]), None)
    if length is not None:
        last, first = (n == length for n in scores.shape[1:])
    else:
        # Shares of the classes fit either axis; where each score has its own sigmoid there is no share to be had.
        shares = batch.task == "classification" and (labels is None or labels.shape == scores.shape)
        last, first = True, hard or shares
    if first and last and batch.task != "regression":
        told = " and ".join(str(list(x.shape)) for x in (labels, batch.mask) if x is not None) or "None"
        raise DistillError(
            f"Scores {list(scores.shape)} with labels and mask {told} do not tell which axis holds the classes: say"
            ' Batch.of(..., task="token") for [B, L, K], or task="segmentation" for [B, K, L].'
        )
    return last


def _at(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Labels `[B, ...]` at the centres of the positions of a map of another size."""
    for axis, n in enumerate(size, 1):
        if labels.shape[axis] != n:
            centres = (torch.arange(n, device=labels.device) + 0.5) * (labels.shape[axis] / n)
            labels = labels.index_select(axis, centres.long())
    return labels
