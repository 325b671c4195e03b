"""A distiller in kd-timm-train: networks, set-up, streams, stages, and the step that the training loop plays."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from kd_accelerate import TurnPlayer
from kd_accelerate.cached import reads_of
from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, Distiller, DistillError, Net, Reads, create_distiller
from kd_plugins.binding import needs_pass, prepare, schedule, set_up
from kd_plugins.catalog.registry import options_from_strings
from kd_plugins.stages import StageTable
from kd_timm.batches import Batches, batches
from kd_timm.build import check_size, create_student, place
from kd_timm.cache import AbsentNetwork, TeacherCache
from kd_timm.data import Datasets, plain_loader
from kd_timm.engine import PlainStep, TrainingRun
from kd_timm.network import TimmNetwork, image_batch
from kd_timm.rows import Targets
from kd_timm.teachers import Teacher, check_classes, check_classifies, connected, create_teacher, named_teachers


class Distillation:
    """The distiller of a run and its networks.

    Args:
        args: Parsed arguments.
        student: The bare student.
        config: Its data configuration.
        data: What it is trained with, and its class names, where they are known.
        device: Where teachers and peers go.
    """

    def __init__(
        self, args: argparse.Namespace, student: nn.Module, config: dict[str, Any], data: Datasets, device: torch.device
    ) -> None:
        self.args, self.config, self.distiller = args, config, make_distiller(args)
        self.criterion: Callable[..., Tensor] = nn.functional.cross_entropy

        def make() -> list[Teacher]:
            common: dict[str, Any] = dict(config=config, num_classes=args.num_classes, classes=data.classes)
            return [create_teacher(*each, **common) for each in named_teachers(args)]

        self.cache = TeacherCache(args, config, data, self.distiller) if args.cache_teacher else None
        self.teachers = make() if self.cache is None else self.cache.teachers(make)
        self.network = TimmNetwork(student)
        self.peers = [self._peer(i, name) for i, name in enumerate(args.peer)]
        for module in (*(t.module for t in self.teachers), *self.peers):
            place(module, args, device)
        self.nets = connected(self.distiller, self.network, self.teachers, [TimmNetwork(peer) for peer in self.peers])
        self.device = device
        self.rows = 0
        self.player: TurnPlayer

    def _peer(self, number: int, name: str) -> nn.Module:
        """Another network to train, made as the student is and for its images; files of weights are its alone."""
        args = copy.copy(self.args)
        args.initial_checkpoint = args.pretrained_path = None
        if number < len(args.peer_kwargs):
            args.model_kwargs = args.peer_kwargs[number]
        elif name != args.model:
            args.model_kwargs = {}
        args.model, args.img_size, args.in_chans, args.input_size = name, None, None, self.config["input_size"]
        peer = create_student(args, "--peer")[0]
        ours, theirs = (dict(module.named_parameters()).keys() for module in (self.network.module, peer))
        if args.layer_decay is not None and theirs != ours:
            raise DistillError(
                f"--layer-decay scales the rates by the layers of --model, and the peer {name} has others: drop it, or"
                " take peers of the same layers."
            )
        check_size(peer, args, self.config, torch.device("cpu"))
        return peer

    # Data

    def batch(self, inputs: Tensor, targets: Any, streams: Mapping[str, Batch] | None = None) -> Batch:
        """A batch of timm's loader, as methods see it."""
        labels, index, told = targets if isinstance(targets, Targets) else (targets, None, ())
        data = self.distiller.data
        return image_batch(
            self.config,
            inputs if data else None,
            labels if data else None,
            size=len(inputs),
            index=index,
            rows=self.rows,
            classes=self.args.num_classes,
            criterion=lambda view, labels: self.criterion(view.logits, labels),
            streams=streams or {},
            **(self.cache.told_by(told) if self.cache is not None and told else {}),
        )

    def fill(self, run: TrainingRun, epochs: int, dataset: Any) -> None:
        """Asks the teachers what the cache lacks; from then on it stands for them."""
        assert self.cache is not None
        check_classes(self.distiller, self.teachers)
        self.rows = len(dataset)
        with undisturbed(gpu=True):
            if not any(isinstance(t.network, AbsentNetwork) for t in self.teachers):
                self._rehearse(self.cache, next(self._pass(dataset)))
            self.cache.fill(run, self.teachers, epochs)
            for net, teacher, network in zip(self.nets.teachers, self.teachers, self.cache.absent(), strict=True):
                net.network = teacher.network = network
        # With the random numbers of a run that finds everything.
        with undisturbed(gpu=True):
            set_up(self.distiller, self.nets, self.batch(*self.cache.first_batch()))
        self.distiller.to(self.device)

    def _rehearse(self, cache: TeacherCache, batch: Batch) -> None:
        """Sets a copy up on what the cache will say: what does not fit is found before the teachers are asked."""
        tried = copy.deepcopy(self.distiller)
        nets = connected(tried, self.network, self.teachers, [net.network for net in self.nets.peers[1:]])
        set_up(tried, nets, cache.as_told(batch, self.nets.teachers))
        for number, network in enumerate(cache.absent()):
            network.install(reads_of(tried, number))

    def set_up(self, dataset: Any, *, fresh: bool) -> None:
        """Lets the method build its parts on one batch, and pass over the training set where it wants to.

        Args:
            dataset: The training set; its transform is left alone.
            fresh: False where what a pass would find comes from a checkpoint, or from the first process.
        """
        with undisturbed(gpu=True):
            self.rows = 0 if dataset is None or isinstance(dataset, IterableDataset) else len(dataset)
            set_up(self.distiller, self.nets, next(self._pass(dataset)))
            check_classes(self.distiller, self.teachers)
            if fresh and needs_pass(self.distiller):
                prepare(self.distiller, self.nets, self._pass(dataset, self.args.workers))
        self.distiller.to(self.device)

    def _pass(self, dataset: Any, workers: int = 0) -> Iterator[Batch]:
        """The training set in its order, without augmentation."""
        if not self.distiller.data:
            yield self.batch(torch.empty(self.args.batch_size, 0), None)
            return
        view = copy.copy(dataset)
        loader = plain_loader(view, self.config, self.args.batch_size, device=self.device, num_workers=workers)
        row = 0
        for inputs, labels in batches(loader):
            if self.args.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            index = torch.arange(row, row + len(inputs), device=self.device)
            row += len(inputs)
            yield self.batch(inputs, Targets(labels, index))

    # Training

    def schedule(self, epochs: int, updates_per_epoch: int) -> None:
        """Resolves the stages over the training; each begins with an epoch."""
        stages = [stage.name for stage in self.distiller.stages()]
        if epochs < len(stages):
            raise DistillError(
                f"{self.distiller.name} trains in {len(stages)} stages ({', '.join(stages)}), each of whole epochs:"
                f" raise --epochs from {epochs} to at least {len(stages)}."
            )
        schedule(self.distiller, epochs * updates_per_epoch, epoch=updates_per_epoch)

    def stretch(self, updates: int) -> None:
        """Gives a method that goes on with a saved table another number of updates."""
        progress = self.distiller.progress
        if len(self.table.stages) > 1:
            raise DistillError(
                f"--resume: {self.distiller.name} has cut the epochs of the run into stages; leave --epochs as it was."
            )
        self.table.total = updates
        progress.at(progress.step, progress.epoch)

    def begin(self, run: TrainingRun) -> None:
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

    def asked(self) -> list[Callable[[Tensor], Tensor]]:
        """The teachers of the student's classes, as functions from its images to scores in its class order."""

        def scores(net: Net, images: Tensor) -> Tensor:
            return net(Batch.of(images), reads=Reads()).logits

        if self.cache is not None:
            return self.cache.asked()
        known = zip(self.teachers, self.nets.teachers, strict=True)
        return [partial(scores, net) for teacher, net in known if not teacher.misfit]


def make_distiller(args: argparse.Namespace) -> Distiller:
    """The method that `--distill` and `--distill-args` name, where this script can train with it."""
    distiller = create_distiller(args.distill, **options_from_strings(args.distill, args.distill_args))
    check_classifies(distiller, "kd-timm-train")
    if args.grad_accum_steps > 1 and not distiller.accumulation:
        raise DistillError(f"{distiller.name} does not fit gradient accumulation: drop --grad-accum-steps.")
    return distiller


class DistillStep(PlainStep):
    """A micro-step of training with a distiller."""

    def __init__(self, run: TrainingRun, distillation: Distillation) -> None:
        super().__init__(run, distillation.player)
        self.distillation = distillation

    def begin_epoch(self) -> None:
        for peer in self.distillation.peers:
            peer.train()
        # New ones for every epoch, so that a resumed run sees the same rows.
        self.streams = {name: Batches(loader, endless=True) for name, loader in self.run.data.streams.items()}

    def loss(self, inputs: Tensor, targets: Any, accumulate: int) -> Tensor:
        distillation = self.distillation
        distillation.player.accumulation = accumulate
        drawn = {name: next(self.streams[name]) for name in distillation.distiller.needs().streams}
        streams = {name: distillation.batch(*self.run.batch(x, y)) for name, (x, y) in drawn.items()}
        return distillation.player.forward(distillation.batch(inputs, targets, streams))
