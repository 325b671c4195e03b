"""One epoch of training and one pass of evaluation."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from kd_accelerate import TurnPlayer
from kd_accelerate.command import signals
from kd_plugins.finite import Watch, check_weights
from kd_timm.compat import ClassificationEvaluator, evaluation_sample_limit, set_sync_gradients
from kd_timm.data import Data
from kd_timm.network import one_head
from kd_timm.progress import Reporter

Seen = Callable[[Tensor, Tensor, list[Tensor]], None]
"""Takes a batch of a model's scores `[B, K]`, targets and what others say."""


class TrainingRun:
    """What training and evaluation share.

    Attributes:
        args: Parsed arguments.
        accelerator: Device, precision, processes.
        student: The bare student.
        model: The student as Accelerate wrapped it.
        optimizer: The prepared optimizer.
        scheduler: timm's learning-rate schedule; None for none.
        criterion: Training loss of scores and targets.
        data: The loaders.
        ema: Moving average of the student.
        step: How a batch is played.
        updates_per_epoch: Optimizer steps in one epoch.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    student: nn.Module
    model: Any
    optimizer: Any
    scheduler: Any
    criterion: nn.Module
    data: Data
    updates_per_epoch: int
    ema: ModelEmaV3 | None
    step: PlainStep

    @property
    def rate(self) -> float:
        """Mean learning rate over the parameter groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def images(self, inputs: Tensor) -> Tensor:
        """Images as `--channels-last` lays them out; anything else as it is."""
        last = self.args.channels_last and inputs.dim() == 4
        return inputs.contiguous(memory_format=torch.channels_last) if last else inputs

    def clip(self, others: Sequence[nn.Parameter] = ()) -> None:
        """Clips the student's gradients as `--clip-grad` and `--clip-mode` say, jointly with those of others."""
        if self.args.clip_grad is None:
            return
        self.accelerator.unscale_gradients(self.optimizer)
        self.clip_network(list(self.model.parameters()), others)

    def clip_network(self, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter] = ()) -> None:
        """Clips the gradients of one network, which are not scaled, as `--clip-grad` and `--clip-mode` say."""
        args = self.args
        if args.clip_grad is None:
            return
        # Adaptive clipping leaves the classifier alone, as in timm's script.
        parameters = parameters[:-2] if args.clip_mode == "agc" else parameters
        dispatch_clip_grad([*parameters, *others], value=args.clip_grad, mode=args.clip_mode)


class PlainStep:
    """A micro-step of training; without a player of turns what timm's ClassificationTask and loop do.

    Args:
        run: The run.
        player: What plays the turns of a distiller.
    """

    def __init__(self, run: TrainingRun, player: TurnPlayer | None = None) -> None:
        self.run, self.player = run, player
        self.watch = Watch() if player is None else player.watch
        self.watch.stops = not run.args.allow_nonfinite

    def __call__(self, inputs: Tensor, targets: Any, accumulate: int, update: bool) -> Tensor:
        """Plays one batch, forward, backward and update, and returns its unscaled loss.

        Args:
            inputs: Normalised images `[B, C, H, W]`.
            targets: Labels `[B]`, or soft targets `[B, K]` of Mixup.
            accumulate: Micro-batches in this update.
            update: Whether this one completes the update.
        """
        run, player = self.run, self.player
        set_sync_gradients(run.accelerator, update)
        with nullcontext() if update else run.accelerator.no_sync(run.model):
            loss = self.loss(inputs, targets, accumulate)
            run.accelerator.backward(loss / accumulate if accumulate > 1 else loss)
        if player is None:
            self.watch.see({"loss": loss})
        else:
            player.after_backward()
        if update:
            run.clip(() if player is None else player.clip_parameters)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if player is not None:
                player.after_update()
        return loss.detach()

    def loss(self, inputs: Tensor, targets: Any, accumulate: int) -> Tensor:
        """The loss of a batch, with its graph."""
        output = one_head(self.run.model(inputs), self.run.student)
        with self.run.accelerator.autocast():
            return self.run.criterion(output, targets)

    def logs(self) -> dict[str, float]:
        """Mean loss terms since the last call, by name; must be called on every process."""
        return {} if self.player is None else self.player.logs()

    def begin_epoch(self) -> None:
        """Called before the first batch of an epoch."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last update of an epoch, with the number of epochs so far."""
        if self.player is not None:
            self.player.end_epoch(epoch, unit=self.run.updates_per_epoch)


def train_one_epoch(run: TrainingRun, epoch: int, reporter: Reporter, *, first_update: int) -> dict[str, float]:
    """Trains for one epoch.

    Args:
        run: The run.
        epoch: Number of the epoch.
        reporter: Where progress goes.
        first_update: Update number, in the current learning-rate schedule, that the epoch begins with.

    Returns:
        Mean loss and loss terms over the epoch and all processes.
    """
    args, loader = run.args, run.data.train
    run.data.set_epoch(epoch, args.mixup_off_epoch)
    run.model.train()
    run.step.begin_epoch()
    run.optimizer.zero_grad()
    total = torch.zeros((), device=run.accelerator.device)
    count, updates, started = 0, 0, time.monotonic()
    terms: dict[str, tuple[float, int]] = {}
    accumulate, batches = args.grad_accum_steps, len(loader)
    remainder = batches % accumulate
    window = 0
    reporter.begin(f"epoch {epoch}", run.updates_per_epoch)
    for number, (inputs, targets) in enumerate(loader):
        last = number == batches - 1
        update = last or (number + 1) % accumulate == 0
        # The last update of an epoch may hold fewer micro-batches; each counts for more then.
        current = remainder if remainder and number >= batches - remainder else accumulate
        loss = run.step(run.images(inputs), targets, current, update)
        # The sum stays on the device: reading it would wait for the step.
        total += loss * len(inputs)
        count += len(inputs)
        if not update:
            continue
        updates += 1
        window += 1
        signals.check()
        reporter.advance(updates)
        if run.ema is not None:
            run.ema.update(run.student, step=first_update + updates)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=first_update + updates)
        if run.step.player is None:
            done = epoch * run.updates_per_epoch + updates
            run.step.watch.update(done, done / run.updates_per_epoch)
        if (updates - 1) % args.log_interval == 0 or last:
            run.step.watch.look()
            means = run.step.logs()
            for name, value in means.items():
                sum_, weight = terms.get(name, (0.0, 0))
                terms[name] = (sum_ + value * window, weight + window)
            window = 0
            shown = {"loss": (_mean(run, total) / count)} | means | {"lr": run.rate}
            speed = count * run.accelerator.num_processes / max(time.monotonic() - started, 1e-9)
            reporter.update(updates, shown, speed)
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    run.step.end_epoch(epoch + 1)
    reporter.end()
    if not args.allow_nonfinite:
        # Before anything of this epoch is written.
        remedy = f"epoch {epoch} broke it, and the states before are good; lower the learning rate, or clip gradients."
        check_weights({"The student": run.student}, remedy)
    return {"loss": _mean(run, total) / max(count, 1)} | {name: s / w for name, (s, w) in terms.items()}


def _mean(run: TrainingRun, value: Tensor) -> float:
    """A number, averaged over processes."""
    return float(run.accelerator.reduce(value.detach().clone(), reduction="mean"))


def _two_classes(scores: Tensor) -> Tensor:
    """Scores `[B, K]`; one logit `[B, 1]` as the two classes between which its sign decides."""
    return F.pad(scores, (1, 0)) if scores.shape[-1] == 1 else scores


def answers(
    run: TrainingRun, model: nn.Module, loader: Any, others: Sequence[Callable[[Tensor], Tensor]] = ()
) -> Iterator[tuple[Tensor, Tensor, list[Tensor], int]]:
    """What a model says of each batch of a loader: scores, targets, the scores of others, and how many rows count.

    The rows that come last may fill up this process's share.
    """
    limit, done = evaluation_sample_limit(loader), 0
    model.eval()
    for inputs, targets in loader:
        inputs = run.images(inputs)
        with run.accelerator.autocast():
            output = _two_classes(one_head(model(inputs), model))
            told = [_two_classes(other(inputs)) for other in others]
        rows = len(output) if limit is None else max(0, min(limit - done, len(output)))
        done += len(output)
        yield output, targets, told, rows


@torch.inference_mode()
def evaluate(
    run: TrainingRun,
    model: nn.Module,
    *,
    others: Sequence[Callable[[Tensor], Tensor]] = (),
    seen: Seen | None = None,
) -> dict[str, float]:
    """Evaluates a model on the evaluation split.

    Args:
        run: The run.
        model: What to evaluate, called with normalised images.
        others: Teachers; the share of images on which the model and the i-th of them choose the same class is reported
            as `agreement` (`agreement1`, ... from the second on).
        seen: What is to see the scores as well.

    Returns:
        Loss, top-1 and top-5 accuracy in percent over all processes, and the agreements.
    """
    accelerator, loader = run.accelerator, run.data.evaluation
    evaluator = ClassificationEvaluator(device=accelerator.device, max_samples=evaluation_sample_limit(loader))
    agree = torch.zeros(len(others) + 1, dtype=torch.float64, device=accelerator.device)
    for output, targets, told, rows in answers(run, model, loader, others):
        for i, scores in enumerate(told):
            agree[i] += (scores.argmax(-1) == output.argmax(-1))[:rows].sum()
        agree[-1] += rows
        evaluator.update(output, targets)
        if seen is not None:
            seen(output[:rows], targets[:rows], [scores[:rows] for scores in told])
    distributed = accelerator.num_processes > 1
    metrics = dict(evaluator.compute(distributed=distributed))
    if others:
        if distributed:
            dist.all_reduce(agree)
        shares = (100 * agree[:-1] / agree[-1].clamp(min=1)).tolist()
        metrics |= {f"agreement{i or ''}": share for i, share in enumerate(shares)}
    return metrics
