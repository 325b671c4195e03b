"""One epoch of training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from kd_accelerate import TurnPlayer
from kd_accelerate.command import signals
from kd_accelerate.randomness import load_random_state
from kd_plugins import DistillError
from kd_plugins.finite import Watch, check_weights
from kd_timm.batches import Batches
from kd_timm.compat import set_sync_gradients
from kd_timm.data import Data, model_dtype
from kd_timm.network import one_head
from kd_timm.progress import Reporter
from kd_timm.rows import Targets


class TrainingRun:
    """What training and evaluation share.

    Attributes:
        args: Parsed arguments.
        accelerator: Device, precision, processes.
        student: The bare student.
        model: The student as Accelerate wrapped it.
        task: timm's own distillation around the wrapped student; None without it.
        optimizer: The prepared optimizer.
        scheduler: timm's learning-rate schedule; None for none.
        criterion: Training loss of scores and targets.
        data: The loaders.
        ema: Moving average of the student.
        step: How a batch is played.
        updates_per_epoch: Optimizer steps in one epoch.
        updates: Optimizer steps that were timed.
        seconds: What they took.
        folder: Output folder.
        reporter: Where progress goes.
        saver: timm's own of checkpoints, on the first process where `--recovery-interval` and its like ask for it.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    student: nn.Module
    model: Any
    task: TrainingTask | None
    optimizer: Any
    scheduler: Any
    criterion: nn.Module
    data: Data
    updates_per_epoch: int
    updates: int
    seconds: float
    folder: Path
    reporter: Reporter
    saver: CheckpointSaver | None
    ema: ModelEmaV3 | None
    step: PlainStep

    @property
    def rate(self) -> float:
        """Mean learning rate over the parameter groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def check_weights(self, epoch: int) -> None:
        """Refuses a student that an epoch has broken."""
        if not self.args.allow_nonfinite:
            remedy = (
                f"epoch {epoch} broke it, and the states before are good; lower the learning rate, or clip gradients."
            )
            check_weights({"The student": self.student}, remedy)

    def autocast(self) -> torch.autocast:
        """The precision that `--amp` and `--amp-dtype` say."""
        dtype = getattr(torch, self.args.amp_dtype)
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=self.args.amp)

    def images(self, inputs: Any, dtype: torch.dtype | None = None) -> Any:
        """Images on the device as `--channels-last` lays them out; patches of `--naflex-loader` as they are.

        Args:
            inputs: A loader's.
            dtype: Of the network that sees them, by default the student's.
        """
        if isinstance(inputs, dict):
            moved = {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            return moved | {"patches": moved["patches"].to(dtype or model_dtype(self.args))}
        inputs = inputs.to(self.accelerator.device, dtype or model_dtype(self.args))
        last = self.args.channels_last and inputs.dim() == 4
        return inputs.contiguous(memory_format=torch.channels_last) if last else inputs

    def batch(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """A batch of a training loader on the device, and mixed, where the loader has not done so."""
        inputs, mixup = self.images(inputs), self.data.mixup
        if not self.args.no_prefetcher:
            return inputs, targets
        targets = targets.to(self.accelerator.device)
        if mixup is None:
            return inputs, targets
        if isinstance(targets, Targets):
            inputs, labels = mixup(inputs, targets.labels)
            return inputs, targets._replace(labels=labels)
        return mixup(inputs, targets)

    def clip(self, others: Sequence[nn.Parameter] = ()) -> None:
        """Clips the student's gradients as `--clip-grad` and `--clip-mode` say, jointly with those of others."""
        if self.args.clip_grad is None:
            return
        self.accelerator.unscale_gradients(self.optimizer)
        if self.task is None:
            self.clip_network(list(self.model.parameters()), others)
        else:
            found = self.task.get_clip_parameters(exclude_head=self.args.clip_mode == "agc")
            dispatch_clip_grad(found, value=self.args.clip_grad, mode=self.args.clip_mode)

    def clip_network(self, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter] = ()) -> None:
        """Clips the gradients of one network, which are not scaled, as `--clip-grad` and `--clip-mode` say."""
        args = self.args
        if args.clip_grad is None:
            return
        # Adaptive clipping leaves the classifier alone, as in timm's script.
        parameters = parameters[:-2] if args.clip_mode == "agc" else parameters
        dispatch_clip_grad([*parameters, *others], value=args.clip_grad, mode=args.clip_mode)


class PlainStep:
    """A micro-step of training; without a player of turns what timm's tasks and loop do.

    Args:
        run: The run.
        player: What plays the turns of a distiller.
    """

    def __init__(self, run: TrainingRun, player: TurnPlayer | None = None) -> None:
        self.run, self.player = run, player
        self.watch = Watch() if player is None else player.watch
        self.watch.stops = not run.args.allow_nonfinite
        self.streams: dict[str, Batches] = {}
        self.second_order: bool = getattr(run.optimizer.optimizer, "is_second_order", False)

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
            run.accelerator.backward(loss / accumulate * self.scale(inputs), create_graph=self.second_order)
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
        run = self.run
        with run.autocast():
            if run.task is not None:
                return run.task(inputs, targets)["loss"]
            return run.criterion(one_head(run.model(inputs), run.student), targets)

    def scale(self, inputs: Any) -> float:
        """How much a batch counts, where `--naflex-loader` or `--train-img-sizes` make some larger than others."""
        run, args = self.run, self.run.args
        mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
        rows, scale = _rows(inputs), 1.0
        if mode != "none":
            share = rows / run.data.mean_batch
            scale = share if mode == "linear" else share**0.5
        if args.naflex_loader and run.accelerator.num_processes > 1:
            everywhere = run.accelerator.reduce(torch.tensor(float(rows), device=run.accelerator.device))
            scale *= run.accelerator.num_processes * rows / float(everywhere)
        return scale

    def logs(self) -> dict[str, float]:
        """Mean loss terms since the last call, by name; must be called on every process."""
        return {} if self.player is None else self.player.logs()

    def begin_epoch(self) -> None:
        """Called before the first batch of an epoch."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last update of an epoch, with the number of epochs so far."""
        if self.player is not None:
            self.player.end_epoch(epoch, unit=self.run.updates_per_epoch)


class Epoch:
    """An epoch that is being trained: its batches, and what has been added up.

    Args:
        run: The run, whose loaders know the epoch.
        place: Where another run has come to in it, from `place`; empty to begin it.
    """

    def __init__(self, run: TrainingRun, place: Mapping[str, Any]) -> None:
        self.run, self.batches = run, Batches(run.data.train)
        self.updates, self.rows, self.window = place.get("sums", (0, 0, 0))
        # The sum stays on the device: reading it would wait for the step.
        self.loss = torch.tensor(place.get("loss", 0.0), device=run.accelerator.device)
        self.terms: dict[str, tuple[float, int]] = dict(place.get("terms", {}))
        if place:
            for name, stream in run.step.streams.items():
                stream.take_up(place["streams"][name])
            self.batches.take_up(place["batches"])
            load_random_state(place["random"])

    def place(self) -> dict[str, Any]:
        """Where this process is, after an update."""
        return {
            "sums": (self.updates, self.rows, self.window),
            "loss": float(self.loss),
            "terms": self.terms,
            "batches": self.batches.place(),
            "streams": {name: stream.place() for name, stream in self.run.step.streams.items()},
        }

    def look(self) -> dict[str, float]:
        """The mean loss so far, and those of its terms since the last look; every process calls it."""
        self.run.step.watch.look()
        means = self.run.step.logs()
        for name, value in means.items():
            sum_, weight = self.terms.get(name, (0.0, 0))
            self.terms[name] = (sum_ + value * self.window, weight + self.window)
        self.window = 0
        return {"loss": self.mean_loss()} | means

    def mean_loss(self) -> float:
        """The mean loss so far, over all processes."""
        return _mean(self.run, self.loss) / max(self.rows, 1)

    def means(self) -> dict[str, float]:
        """The mean loss and loss terms of the whole epoch."""
        return {"loss": self.mean_loss()} | {name: s / w for name, (s, w) in self.terms.items()}


def train_one_epoch(
    run: TrainingRun,
    number: int,
    *,
    first_update: int,
    averaged: int,
    place: Mapping[str, Any],
    save: Callable[[int, Mapping[str, Any]], None],
) -> dict[str, float]:
    """Trains for one epoch.

    Args:
        run: The run.
        number: Number of the epoch.
        first_update: Update number, in the current learning-rate schedule, that the epoch begins with.
        averaged: How many updates of this student the moving average has seen.
        place: Where in the epoch to go on, as `save` was given it; empty for its beginning.
        save: Writes the state of the run within an epoch: its number, and the place in it.

    Returns:
        Mean loss and loss terms over the epoch and all processes.

    Raises:
        Stopped: A signal came; the state is written.
    """
    args, length, reporter = run.args, len(run.data.train), run.reporter
    run.data.set_epoch(number, args.mixup_off_epoch)
    run.model.train()
    run.step.begin_epoch()
    run.optimizer.zero_grad()
    epoch = Epoch(run, place)
    waited, taken = AverageMeter(), AverageMeter()
    asked = begun = time.monotonic()
    images = 0
    accumulate = args.grad_accum_steps
    remainder = length % accumulate
    reporter.begin(number, run.updates_per_epoch)
    for micro, (inputs, targets) in enumerate(epoch.batches, start=epoch.batches.given):
        last = micro == length - 1
        update = last or (micro + 1) % accumulate == 0
        # The last update of an epoch may hold fewer micro-batches; each counts for more then.
        current = remainder if remainder and micro >= length - remainder else accumulate
        inputs, targets = run.batch(inputs, targets)
        waited.update(current * (time.monotonic() - asked))
        with _statistics():
            loss = run.step(inputs, targets, current, update)
        epoch.loss += loss.float() * _rows(inputs)
        epoch.rows += _rows(inputs)
        images += _rows(inputs) * run.accelerator.num_processes
        if not update:
            asked = time.monotonic()
            continue
        epoch.updates += 1
        epoch.window += 1
        run.updates += 1
        updates = epoch.updates
        reporter.advance(updates)
        taken.update(max(time.monotonic() - begun, 1e-9))
        run.seconds += taken.val
        begun = time.monotonic()
        if run.ema is not None:
            run.ema.update(run.student, step=averaged + updates)
        if run.step.player is None:
            done = number * run.updates_per_epoch + updates
            run.step.watch.update(done, done / run.updates_per_epoch)
        if args.synchronize_step and run.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        if (updates - 1) % args.log_interval == 0 or last:
            shown = epoch.look() | {"lr": run.rate}
            line = (
                f"Loss: {_mean(run, loss.float()):#.3g} ({shown['loss']:#.3g})"
                f"  Time: {taken.val:.3f}s, {images / taken.val:>7.2f}/s"
                f"  ({taken.avg:.3f}s, {images / taken.avg:>7.2f}/s)"
                f"  LR: {run.rate:.3e}  Data: {waited.val:.3f} ({waited.avg:.3f})"
            )
            reporter.update(updates, shown, line)
            if args.save_images and run.accelerator.is_main_process and not isinstance(inputs, dict):
                image = run.folder / f"train-batch-{micro}.jpg"
                torchvision.utils.save_image(inputs, image, padding=0, normalize=True)
        recover = args.recovery_interval and updates % args.recovery_interval == 0
        if recover and run.saver is not None and not args.distill:
            run.saver.save_recovery(number, batch_idx=updates - 1)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=first_update + updates)
        stops = not last and signals.agreed(run.accelerator, updates)
        if stops or recover and not last:
            run.step.watch.look()
            save(number, epoch.place())
            begun = time.monotonic()
        if stops:
            signals.check()
        images, asked = 0, time.monotonic()
    if hasattr(run.optimizer.optimizer, "sync_lookahead"):
        run.optimizer.optimizer.sync_lookahead()
    run.step.end_epoch(number + 1)
    reporter.end()
    run.check_weights(number)  # Before anything of this epoch is written.
    return epoch.means()


@contextmanager
def _statistics() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DistillError(
            "Batch normalisation takes the mean of each channel over a batch, and here a batch has one value: raise"
            " --batch-size, or --img-size."
        ) from error


def _rows(inputs: Any) -> int:
    """The images of a batch."""
    return len(inputs["patches"] if isinstance(inputs, dict) else inputs)


def _mean(run: TrainingRun, value: Tensor) -> float:
    """A number, averaged over processes."""
    return float(run.accelerator.reduce(value.detach().clone(), reduction="mean"))
