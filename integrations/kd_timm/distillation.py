"""A distiller in kd-timm-train: networks, set-up, streams, stages, and the step that the training loop plays."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader
from torch import Tensor, nn

from kd_accelerate import TurnPlayer
from kd_plugins import Batch, Distiller, DistillError, Net, Reads, Stage, create_distiller
from kd_plugins.binding import connect, needs_pass, prepare, schedule, set_up
from kd_plugins.catalog.registry import options_from_strings
from kd_plugins.stages import StageTable
from kd_timm.build import create_student
from kd_timm.checkpoint import forked_random_state
from kd_timm.data import Targets
from kd_timm.engine import Run
from kd_timm.network import TimmNetwork
from kd_timm.teachers import create_teacher

__all__ = ["Distillation", "create_distillation"]

_logger = logging.getLogger("kd_timm.train")


def create_distillation(
    args: argparse.Namespace,
    student: nn.Module,
    config: Mapping[str, Any],
    classes: tuple[str, ...] | None,
    device: torch.device,
) -> Distillation | None:
    """What `--distill` and its fellows ask for; None without `--distill`.

    Args:
        args: Parsed arguments.
        student: The bare student, on its device.
        config: Its data configuration.
        classes: Its class names, where they are known.
        device: Where teachers and peers go.
    """
    if not args.distill:
        given = [flag for flag in ("teacher", "peer", "distill_args") if getattr(args, flag)]
        if given:
            raise DistillError(f"--{given[0].replace('_', '-')} does nothing without --distill NAME: name a distiller.")
        return None
    with forked_random_state():
        return Distillation(args, student, config, classes, device)


class Distillation:
    """The distiller of a run and its networks.

    Args:
        args: Parsed arguments.
        student: The bare student.
        config: Its data configuration.
        classes: Its class names, where they are known.
        device: Where teachers and peers go.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        student: nn.Module,
        config: Mapping[str, Any],
        classes: tuple[str, ...] | None,
        device: torch.device,
    ) -> None:
        self.args, self.config = args, config
        self.distiller: Distiller = create_distiller(
            args.distill, **options_from_strings(args.distill, args.distill_args)
        )
        self._check_fit()
        self.criterion: Callable[..., Tensor] = nn.functional.cross_entropy
        self.teachers = [
            create_teacher(
                name,
                args.teacher_checkpoint[i] if i < len(args.teacher_checkpoint) else "",
                args.teacher_kwargs[i] if i < len(args.teacher_kwargs) else {},
                config=config,
                num_classes=args.num_classes,
                classes=classes,
            )
            for i, name in enumerate(args.teacher)
        ]
        self.peers = [self._peer(i, name) for i, name in enumerate(args.peer)]
        for module in (*(t.module for t in self.teachers), *self.peers):
            module.to(device)
            if args.channels_last:
                module.to(memory_format=torch.channels_last)
        self.network = TimmNetwork(student)
        self.nets = connect(
            self.distiller,
            self.network,
            [TimmNetwork(teacher.module) for teacher in self.teachers],
            [TimmNetwork(peer) for peer in self.peers],
            transforms=[teacher.transform for teacher in self.teachers],
            orders=[teacher.order for teacher in self.teachers],
        )
        self.device = device
        self.player: TurnPlayer

    def _check_fit(self) -> None:
        if "classification" not in self.distiller.tasks:
            raise DistillError(
                f"{self.distiller.name} fits {', '.join(self.distiller.tasks)}, and kd-timm-train trains classifiers:"
                " choose a method that fits (kd-plugins list)."
            )
        if self.args.grad_accum_steps > 1 and not self.distiller.accumulation:
            raise DistillError(f"{self.distiller.name} does not fit gradient accumulation: drop --grad-accum-steps.")

    def _peer(self, number: int, name: str) -> nn.Module:
        """Another network to train, made as the student is; files of weights are the student's alone."""
        args = copy.copy(self.args)
        args.initial_checkpoint = args.pretrained_path = None
        if number < len(args.peer_kwargs):
            args.model_kwargs = args.peer_kwargs[number]
        elif name != args.model:
            args.model_kwargs = {}
        args.model, args.in_chans = name, self.config["input_size"][0]
        return create_student(args, "--peer")[0]

    # Data

    def batch(self, inputs: Tensor, targets: Any, streams: Mapping[str, Batch] | None = None) -> Batch:
        """A batch of timm's loader, as methods see it."""
        labels, index = (targets.labels, targets.index) if isinstance(targets, Targets) else (targets, None)
        data = self.distiller.data
        return Batch(
            inputs=inputs if data else None,
            labels=labels if data else None,
            size=len(inputs),
            index=index,
            mean=self.config["mean"],
            std=self.config["std"],
            criterion=lambda view, labels: self.criterion(view.logits, labels),
            streams=streams or {},
        )

    def set_up(self, dataset: Any, *, fresh: bool) -> None:
        """Lets the method build its parts on one batch, and pass over the training set where it wants to.

        Args:
            dataset: The training set; its transform is left alone.
            fresh: False where what a pass would find comes from a checkpoint, or from the first process.
        """
        with forked_random_state():
            set_up(self.distiller, self.nets, next(self._pass(dataset)))
            if fresh and needs_pass(self.distiller):
                prepare(self.distiller, self.nets, self._pass(dataset, self.args.workers))
        self.distiller.to(self.device)

    def _pass(self, dataset: Any, workers: int = 0) -> Iterator[Batch]:
        """The training set in its order, without augmentation."""
        if not self.distiller.data:
            yield Batch(size=self.args.batch_size, mean=self.config["mean"], std=self.config["std"])
            return
        view = copy.copy(dataset)
        loader = create_loader(
            view,
            self.config["input_size"],
            self.args.batch_size,
            interpolation=self.config["interpolation"],
            mean=self.config["mean"],
            std=self.config["std"],
            crop_pct=self.config["crop_pct"],
            crop_mode=self.config["crop_mode"],
            num_workers=workers,
            device=self.device,
            persistent_workers=False,
        )
        row = 0
        for inputs, labels in loader:
            if self.args.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            index = torch.arange(row, row + len(inputs), device=self.device)
            row += len(inputs)
            yield self.batch(inputs, Targets(labels, index))

    # Training

    def schedule(self, epochs: int, updates_per_epoch: int) -> None:
        """Resolves the stages over the training; each begins with an epoch."""
        table = schedule(self.distiller, epochs * updates_per_epoch, epoch=updates_per_epoch)
        if any(start % updates_per_epoch for start in table.starts):
            raise DistillError(
                f"{self.distiller.name} trains in {len(table.starts)} stages, each with whole epochs: raise --epochs"
                f" from {epochs} to at least {len(table.starts)}."
            )

    def begin(self, run: Run) -> None:
        """Connects the method with the wrapped student; the player makes the optimizers of the method's groups."""
        self.nets.student.forward = run.model
        self.criterion = run.criterion
        self.player = TurnPlayer(run.accelerator, self.distiller, self.nets, run.optimizer, model=run.model)
        self.player.clip_peers(run.clip_network)
        run.step = DistillStep(run, self)

    @property
    def table(self) -> StageTable:
        """The stages of the training."""
        assert self.distiller.progress.table is not None
        return self.distiller.progress.table

    def stage_epochs(self, updates_per_epoch: int) -> tuple[int, int]:
        """First epoch of the current stage, and first epoch after it."""
        start, end = self.table.bounds(self.distiller.progress.stage)
        return start // updates_per_epoch, end // updates_per_epoch

    def enter_stage(self) -> Stage | None:
        """Enters the stage of the coming update; None where the training is in it already."""
        return self.player.enter_stage()

    def asked(self) -> list[Callable[[Tensor], Tensor]]:
        """The teachers as functions from the student's images to scores, in the student's class order."""

        def scores(net: Net, images: Tensor) -> Tensor:
            return net(Batch.of(images), reads=Reads()).logits

        return [partial(scores, net) for net in self.nets.teachers]

    def save(self, folder: Path) -> None:
        """Writes what a resumed run needs of the method; called on every process."""
        self.player.save(folder / "distiller")

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote."""
        self.player.load(folder / "distiller")


class DistillStep:
    """A micro-step of training with a distiller."""

    def __init__(self, run: Run, distillation: Distillation) -> None:
        self.run, self.distillation = run, distillation
        self.player = distillation.player
        self._streams: dict[str, Iterator[Any]] = {}

    def begin_epoch(self) -> None:
        for peer in self.distillation.peers:
            peer.train()
        self._streams = self.run.data.stream_iterators()

    def __call__(self, inputs: Tensor, targets: Any, accumulate: int, update: bool) -> Tensor:
        run, player, distillation = self.run, self.player, self.distillation
        streams = {
            name: distillation.batch(*self._channels_last(*next(self._streams[name])))
            for name in distillation.distiller.needs().streams
        }
        run.accelerator.gradient_state._set_sync_gradients(update)
        player.accumulation = accumulate
        with nullcontext() if update else run.accelerator.no_sync(run.model):
            loss = player.forward(distillation.batch(inputs, targets, streams))
            run.accelerator.backward(loss / accumulate if accumulate > 1 else loss)
        player.after_backward()
        if update:
            run.clip(player.clip_parameters)
            run.optimizer.step()
            run.optimizer.zero_grad()
            player.after_update()
        return loss.detach()

    def _channels_last(self, inputs: Tensor, targets: Any) -> tuple[Tensor, Any]:
        last = self.run.args.channels_last
        return inputs.contiguous(memory_format=torch.channels_last) if last else inputs, targets

    def logs(self) -> dict[str, float]:
        return self.player.logs()

    def end_epoch(self, epoch: int) -> None:
        table, progress = self.distillation.table, self.distillation.distiller.progress
        before, unit, current = list(table.starts), self.run.updates_per_epoch, progress.stage
        if not self.player.end_epoch(epoch):
            return
        # A stage that ended early leaves its steps to the later ones; here they go on beginning with an epoch.
        later = range(current + 1, len(table.starts))
        if (table.total - progress.step) // unit < len(later):
            table.starts = before
        else:
            for k in later:
                low = max(table.starts[k - 1] // unit + 1, progress.step // unit)
                high = table.total // unit - (len(table.starts) - k)
                table.starts[k] = unit * min(max(round(table.starts[k] / unit), low), high)
        self.distillation.distiller.at(progress.step)
