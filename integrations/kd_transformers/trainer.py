"""DistillationTrainer: HuggingFace Trainer with a teacher."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from kd_accelerate import TurnPlayer
from kd_accelerate.randomness import undisturbed
from kd_accelerate.sharding import is_sharded, make_whole
from kd_accelerate.streams import Peeked, StagedDataset, Streams, check_anew
from kd_plugins import Batch, Distiller, DistillError, Nets, create_distiller
from kd_plugins.binding import connect, needs_in, needs_of_stages, needs_pass, prepare, schedule, set_up
from kd_plugins.catalog.registry import to_json
from kd_plugins.reading.network import adapt
from kd_transformers import checks
from kd_transformers.card import Gain, add_to_card, check_gain, named_data, section
from kd_transformers.checkpoints import Resumable
from kd_transformers.checks import base, called, class_order, inputs_of, reads_scores, task_of
from kd_transformers.columns import INDEX, TEACHER, check_ids, told_columns, with_index, with_padding
from kd_transformers.compat import ALWAYS_DIVIDES, on_device, used_columns
from kd_transformers.network import decoder_inputs, labels_of
from kd_transformers.playing import Trained, Updates, divides, export, listed, save_weights
from kd_transformers.recording import RecordCallback
from kd_transformers.schedule import staged_scheduler
from kd_transformers.told import Absent, AbsentNetwork, absent_teachers, check_told, loaded_where_read, pop_told

logger = logging.get_logger(__name__)

_EMPTY = "Expected at least one training example, got an empty train_dataset: give rows to train on."


class DistillationTrainer(Resumable):
    """A drop-in for `Trainer` that distils.

    It takes everything that `Trainer` takes, in the same places, and six keyword arguments more. Without them it is
    `Trainer`, to the last bit, but for resumed trainings (see `kd_transformers.checkpoints.Resumable`).

    With a distiller, the update is the same however it is split into micro-batches. A task loss that divides by
    `num_items_in_batch` (language models, a `compute_loss_func`, a class that changes the loss) gets the number of the
    whole accumulated batch, as from `Trainer`; any other is a mean of every micro-batch, divided by the number of
    accumulation steps, where `Trainer` itself inflates the loss of models that take the number and ignore it. Which of
    both a loss is, it is asked once, before the training. Evaluation computes the task loss alone, without the teacher,
    so that it compares across the phases of a schedule. Loss terms are logged as `distill/<term>`, averaged since the
    last log. What is saved is the bare student (of a PEFT model the adapters alone); the distiller's own parts are
    saved beside it (`distiller.safetensors`, `distiller.json`), and so is each peer, in a folder of its own (`peer1`,
    ...). With `model_init` every run starts with a fresh copy of the distiller.

    Columns of the data named `teacher_<input>` go to the teacher alone, in place of the student's; so do inputs that
    only the teacher's forward takes (a BERT teacher's `token_type_ids` beside a DistilBERT student). Where the collator
    is one of transformers' own, they are padded by the `pad_token_id` of the teacher's configuration. A column
    `teacher_logits`, which `cache_teacher` makes, and those of layers stand for the teacher's forward where a method
    reads no more.

    Args:
        *args: As for `Trainer`.
        teacher_model: The frozen network, or several; none where the data hold what `cache_teacher` has asked it.
        peer_models: Networks that are trained together with the student (online methods).
        distiller: A distiller, or the name of one (`"kd"`, `"kd+nst"`, `"module:Class"`).
        distiller_args: Its options, where it is given by name: `{"schedule": "stacked"}`.
        task: What the model's scores are, where its class does not tell: `"classification"`, `"multilabel"`,
            `"regression"`, `"token"` (labels per token), `"causal-lm"` (labels one token ahead), `"segmentation"`,
            `"depth"`, `"detection"`.
        record: Whether a run with a distiller leaves a record in its output folder, from which `kd-plugins report`
            makes a page (see `kd_transformers.recording.RecordCallback`).
        **kwargs: As for `Trainer`.

    Raises:
        DistillError: A combination that cannot work, in one sentence, before any training: a task that the method does
            not fit, other classes or tokens in teacher and student, no teacher, DataParallel, FSDP1.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module | Sequence[nn.Module] | None = None,
        peer_models: Sequence[nn.Module] = (),
        distiller: Distiller | str | None = None,
        distiller_args: Mapping[str, Any] | None = None,
        task: str | None = None,
        record: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teachers = listed("teacher", teacher_model)
        self.peer_models = listed("peer", peer_models)
        self.task = task
        self.distiller = self._distiller(distiller, distiller_args)
        self.player: TurnPlayer | None = None
        self._nets: Nets | None = None
        self._bound_to: nn.Module | None = None
        self._playing = self._played = self._drawn = self._unchecked = False
        self._items: Any = None
        self._counts: bool | None = True if self.distiller is None else None
        self._outputs: Any = None
        self._epoch_steps: int | None = None
        self._staged: StagedDataset | None = None
        self._peeked: Peeked | None = None
        self._built: DataLoader | None = None
        self._streams: Streams | None = None
        self.guarded = self.distiller is not None
        if self.distiller is None:
            return
        if not (self.teachers or self.peer_models) and self.distiller.teachers:
            self.teachers = list(absent_teachers(self.train_dataset))
        checks.check_host(self.args)
        is_sharded(self.accelerator)
        if not self.distiller.data:
            raise DistillError(
                f"{self.distiller.name} makes its own data and Trainer needs a data set: use kd-timm-train or a bare"
                " loop."
            )
        if self.distiller.ready:
            raise DistillError(
                f"This {self.distiller.name} object was set up for another training: create a new one, or give"
                " its name."
            )
        # Everything is handed to Trainer as a mean of the micro-batch, which it then divides.
        self.loss_is_scaled_for_ga = False
        self._unused = copy.deepcopy(self.distiller)
        self._named = (distiller, dict(distiller_args or {})) if isinstance(distiller, str) else None
        self.teachers = loaded_where_read(self.teachers, self.distiller)
        self._adapters: list[Any] = [AbsentNetwork(t) if isinstance(t, Absent) else adapt(t) for t in self.teachers]
        self._nets = self._connect(self.distiller)
        self._tokens = checks.special_tokens(self.model)
        # model_init makes a new student in every run; its peers begin anew with it.
        self._peers_at_first = [copy.deepcopy(p.state_dict()) for p in self.peer_models] if self.model_init else []
        self.add_callback(Updates(self))
        if record:
            self.add_callback(RecordCallback(self))

    def _distiller(self, distiller: Distiller | str | None, options: Mapping[str, Any] | None) -> Distiller | None:
        if not isinstance(options, Mapping | None):
            raise DistillError(f"Expected distiller_args by name, {{'temperature': 2.0}}, got {options!r}.")
        if isinstance(distiller, str):
            return create_distiller(distiller, **(options or {}))
        if options:
            raise DistillError("distiller_args are the options of a distiller given by name: set them on the object.")
        if distiller is None and (self.teachers or self.peer_models):
            raise DistillError("A teacher or peers were given without a distiller: say which, distiller='kd'.")
        if distiller is None and self.task is not None:
            raise DistillError("task says what a distiller's scores are, and there is no distiller: leave it out.")
        if distiller is not None and not isinstance(distiller, Distiller):
            raise DistillError(f"Expected a distiller or the name of one, got {distiller!r}.")
        return distiller

    # Networks

    def _connect(self, distiller: Distiller) -> Nets:
        """Connects the distiller to the networks, and refuses what cannot work before any training time is spent."""
        if self.task not in (None, *checks.TASKS):
            raise DistillError(f"Expected a task among {', '.join(checks.TASKS)}, got {self.task!r}.")
        for network in (self.model, *self.teachers):
            make_whole(network)
        peers = [*map(adapt, self.peer_models)]
        nets = connect(distiller, adapt(self.model), self._adapters, peers, orders=self._orders(distiller))
        checks.check_fit(distiller, self.task or task_of(self.model), self.model)
        for peer in self.peer_models:
            checks.check_labels(peer, self._label, own_loss=self.compute_loss_func is not None)
            checks.same_class_order(self.model, peer)
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None:
            check_ids(self.model, self.teachers, self.peer_models, columns)
        student, *others = (Trained(self, net, student=net is nets.student) for net in nets.peers)
        return Nets(student, nets.teachers, others)

    def _orders(self, distiller: Distiller) -> list[Sequence[int] | None]:
        """The class order of each teacher whose scores are read."""
        return [class_order(self.model, t) if reads_scores(distiller, i) else None for i, t in enumerate(self.teachers)]

    def _set_up(self, distiller: Distiller, loader: Any) -> None:
        """Binds the distiller to the model that is about to be trained; model_init makes a new one in every run."""
        if self._bound_to is self.model:
            return
        nets = self._nets = self._connect(distiller)
        # Trainer has aligned the student with the tokenizer; those that were like it stay so.
        checks.follow_tokens([*self.teachers, *self.peer_models], self.model, self._tokens)
        for module in [*self.teachers, *self.peer_models]:
            if getattr(module, "hf_device_map", None) is None:
                module.to(self.args.device)
        batch = next(self._pass(loader), None)
        if batch is None:
            raise DistillError(_EMPTY)
        if self._staged is None and any(n.index or n.streams for n in needs_of_stages(distiller)):
            raise DistillError(
                f"{distiller.name} reads row numbers or further streams of batches, which neither a stream nor a loader"
                " of your own gives: give a train_dataset whose rows have numbers (len(), [i]), and leave"
                " get_train_dataloader as it is."
            )
        checks.check_fit(distiller, batch.task, self.model)
        check_ids(self.model, self.teachers, self.peer_models, [TEACHER + name for name in batch.teacher_kwargs])
        checks.check_aligned(distiller, nets, batch)
        for teacher in (t for i, t in enumerate(self.teachers) if reads_scores(distiller, i)):
            checks.check_problem(teacher, batch.task)
        check_told(nets, batch)
        set_up(distiller, nets, batch)
        # Some methods know what they read of a teacher only now.
        for net, order in zip(nets.teachers, self._orders(distiller), strict=True):
            net.order = order
        if any(needs.student.taps for needs in needs_of_stages(distiller)):
            checks.check_checkpointing(self.model)
        if needs_pass(distiller) and self._resumed is None and self.args.process_index == 0:
            prepare(distiller, nets, self._pass(loader, whole=True))
        trained = [net for net in nets.peers if isinstance(net, Trained)]
        for net in trained:
            net.counts = self._counts_items(net, batch, loader)
        self._counts = trained[0].counts
        self._unchecked = reads_scores(distiller)
        self._bound_to = self.model

    def _counts_items(self, net: Trained, batch: Batch, loader: Any) -> bool:
        """Whether a network's task loss divides by the number of items it is given; BERT's classifiers ignore it."""
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return False
        batches = itertools.chain([batch], () if self._peeked is not None else self._pass(loader))
        for asked in itertools.islice(batches, 16):  # not the whole of a set without labels
            one, two = (net.task_loss(asked, n) for n in torch.tensor([1.0, 2.0], device=self.args.device))
            if one is None or two is None:
                return False
            if (counts := divides(one, two)) is not None:  # Else no label counts in this batch.
                return counts
        return self.model_accepts_loss_kwargs

    # Data

    def _pass(self, loader: Any, *, whole: bool = False) -> Iterator[Batch]:
        """Batches of the training set in its order, outside of the training's random state.

        Of a data set without a length, which may be endless, no more than the training reads. A loader of the user's
        own is read as it is.

        Args:
            loader: What the training reads.
            whole: Whether it is a pass over everything, and not the first batches alone, which are not worth workers.
        """
        peeked = self._peeked
        if loader is self._built:
            rows = self._staged or self.train_dataset
            rows = rows if peeked is None or whole else peeked.peek(self.train_batch)
            check_anew(rows)
            dataset, collate = used_columns(self, rows, with_padding(self.data_collator, self.teachers), "Training")
            workers = self.args.dataloader_num_workers if whole else 0
            loader = DataLoader(dataset, self.train_batch, collate_fn=collate, num_workers=workers)
        else:
            dataset = loader = getattr(loader, "base_dataloader", loader)
            check_anew(getattr(loader, "dataset", loader))
        reads = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.world_size
        iterator = None
        for _ in itertools.count() if has_length(dataset) else range(max(reads, 1)):
            with undisturbed():
                iterator = iter(loader) if iterator is None else iterator
                inputs = next(iterator, None)
            if inputs is None:
                return
            yield self._batch(on_device(self, inputs))

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        own, theirs = self._split(inputs)
        student = base(self.model)
        labels, mask = labels_of(student, own, self._label)
        task = self.task or task_of(student, labels, own_loss=self.compute_loss_func is not None)
        told = pop_told(theirs, self.train_dataset, len(self.teachers), tokens=task in ("token", "causal-lm"))
        return Batch.of(
            own | decoder_inputs(student, own, labels),
            labels,
            name=getattr(student, "main_input_name", None),
            task=task,
            ignore_index=checks.ignored_label(student),
            mask=mask,
            teacher_kwargs=theirs,
            index=inputs.get(INDEX),
            rows=len(self.train_dataset) if has_length(self.train_dataset) else 0,
            **told,
            **self._normalisation(),
        )

    @property
    def _label(self) -> str:
        """The name of the model's labels."""
        return self.label_names[0] if len(self.label_names) == 1 else "labels"

    def _normalisation(self) -> dict[str, Any]:
        """The mean and std of images in [0, 1], where an image processor tells."""
        processor: Any = getattr(self.processing_class, "image_processor", self.processing_class)
        if not all(hasattr(processor, name) for name in ("do_normalize", "image_mean", "image_std")):
            return {}  # as those of sound
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        if mean is None or std is None:
            return {}  # each image by its own
        # Images that are not rescaled are taken to be in [0, 1] already, as transformers says of them.
        scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 1
        return {name: (np.ravel(values) / scale).tolist() for name, values in (("mean", mean), ("std", std))}

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the student reads of a batch, and what the teachers read that the student does not."""
        only = self._teacher_only()
        own = {k: v for k, v in inputs.items() if k not in only and k != INDEX and not k.startswith(TEACHER)}
        theirs = {k.removeprefix(TEACHER): v for k, v in inputs.items() if k.startswith(TEACHER)}
        return own, {k: v for k, v in inputs.items() if k in only} | theirs

    def _teacher_only(self) -> set[str]:
        """Inputs that a teacher takes and the student does not; labels are the student's, whatever reads them."""
        ours, theirs = inputs_of(self.model), set().union(*map(inputs_of, self.teachers))
        return theirs - ours - {"labels", *self.label_names} if ours else set()

    def _with_streams(self, distiller: Distiller, batch: Batch) -> Batch:
        """The batch with one of each other stream that the method reads in this step, whose stage may be new."""
        table = distiller.progress.table
        shares = needs_in(distiller, table.index(distiller.progress.step) if table is not None else 0).streams
        if not shares:
            return batch
        if self._streams is None:
            rows = self._staged.dataset if self._staged else self.train_dataset
            # Rows of every kind have their unused columns removed by the collator.
            _, collate = used_columns(self, None, with_padding(self.data_collator, self.teachers), "Training")
            self._streams = Streams(rows, shares, self.train_batch, collate, self.args.seed, with_index)
            if self._resumed is not None and (self._resumed / "streams.json").is_file():
                self._streams.load(self._resumed)
        drawn = {name: self._batch(on_device(self, self._streams.draw(name))) for name in shares}
        return dataclasses.replace(batch, streams=drawn)

    def loader(self, dataset: Any, build: Any, *, training: bool) -> DataLoader:
        if self.distiller is None:
            return super().loader(dataset, build, training=training)
        if training and has_length(dataset) and not len(dataset):
            raise DistillError(_EMPTY)
        collator = self.data_collator
        needs = needs_of_stages(self.distiller) if training and not isinstance(dataset, IterableDataset) else []
        if any(n.index or n.streams for n in needs):
            dataset, _ = used_columns(self, dataset, collator, "training")
            steps, seed = self._epoch_steps or 1, self.args.seed
            dataset = self._staged = StagedDataset(dataset, self.distiller, steps, seed, with_index)
        if training and isinstance(dataset, IterableDataset) and not hasattr(dataset, "column_names"):
            dataset = self._peeked = Peeked(dataset, self.args.dataloader_num_workers)
        self.data_collator = with_padding(collator, self.teachers)
        try:
            loader = super().loader(dataset, build, training=training)
        finally:
            self.data_collator = collator
        if training:
            self._built = loader
        return loader

    def further_columns(self, columns: list[str]) -> list[str]:
        if self.distiller is None:
            return []
        only = sorted(self._teacher_only() - set(columns))
        return [*only, *(TEACHER + name for name in (*columns, *only)), *told_columns(self.train_dataset), INDEX]

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._peeked = self._built = self._staged = None
        if self._bound_to is not None and (self.model_init is not None or self._bound_to is not self.model):
            self.distiller, self._bound_to = copy.deepcopy(self._unused), None
            for peer, state in zip(self.peer_models, self._peers_at_first, strict=False):
                peer.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def rehearse(self) -> None:
        """Sets copies of everything up on one batch, for a training that is to begin only after something long.

        Raises:
            DistillError: The method does not fit the networks or the data.
        """
        if self.distiller is None:
            return
        distiller, student, *others = copy.deepcopy([self._unused, self.model, *self.teachers, *self.peer_models])
        networks = [adapt(network.to(self.args.device)) for network in (student, *others)]
        count = len(self.teachers) + 1
        nets = connect(distiller, networks[0], networks[1:count], networks[count:])
        for batch in itertools.islice(self._pass(self.get_train_dataloader()), 1):
            set_up(distiller, nets, batch)

    def search_options(self, found: Mapping[str, Any]) -> None:
        if self.distiller is None or self._named is None:
            raise DistillError(
                f"A search over options of the distiller ({', '.join(found)}) makes a new one in every trial: give"
                " distiller by its name, and distiller_args."
            )
        name, options = self._named
        self.distiller, self._bound_to = create_distiller(name, **{**options, **found}), None

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        # The first thing in a training that knows its loader and its length, and that nobody overrides.
        values = super().set_initial_training_values(args, dataloader)
        self._epoch_steps, self.player, self._streams = values[1], None, None
        if self._staged is not None:
            self._staged.epoch_steps = values[1]
        if self.distiller is not None and values[-1] > 0:
            self._set_up(self.distiller, dataloader)
            schedule(self.distiller, values[-1], epoch=values[1])
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        table = self.distiller.progress.table if self.distiller is not None else None
        if table is None or len(table.stages) < 2 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.own_scheduler(staged_scheduler(self.args, optimizer or self.optimizer, table))
        return self.lr_scheduler

    def start_player(self) -> None:
        """Makes the player, once Trainer has prepared student and optimizer."""
        if self.player is None and self.distiller is not None and self._nets is not None and self.state.max_steps > 0:
            norm = self.args.max_grad_norm if self.args.max_grad_norm and self.args.max_grad_norm > 0 else None
            self.player = TurnPlayer(self.accelerator, self.distiller, self._nets, self.optimizer, max_grad_norm=norm)
            self.player.watch.stops = not self.allow_nonfinite

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.player is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.model_wrapped = self.player.model = model
        self._playing, self._played, self._items = True, False, num_items_in_batch
        try:
            # Before 5.19 Trainer would take a loss that gets the number for one that divides by it.
            loss = super().training_step(model, inputs, num_items_in_batch if ALWAYS_DIVIDES else None)
        finally:
            self._playing = False
        if not self._played:
            raise DistillError(
                f"{type(self).__name__}.compute_loss hides the distillation: call super().compute_loss in it, or put"
                " the class that changes the task loss after DistillationTrainer in the bases."
            )
        self.player.after_backward()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation's loss in training, and `Trainer`'s own in evaluation.

        The outputs in training are the student's; None in a phase whose forward ends before its scores.
        """
        if not self._playing or self.player is None or self._nets is None:
            # Trainer multiplies a loss that was given the items by the processes, also one that ignores them.
            if self._counts is None and num_items_in_batch is not None and self.args.world_size > 1:
                one, two = (self.host_loss(model, dict(inputs), n * num_items_in_batch)[0] for n in (1, 2))
                self._counts = divides(one, two, self.accelerator.gather)
            items = None if self._counts is False else num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)
        self._played = True
        self.player.accumulation = self.current_gradient_accumulation_steps
        for peer in self._nets.peers[1:]:
            peer.module.train()
        batch = self._with_streams(self.player.distiller, self._batch(inputs))
        self._drawn = bool(batch.streams)
        loss = self.player.forward(batch)
        outputs, self._outputs = self._outputs, None
        if self._unchecked and outputs is not None:
            checks.check_ignored(self._nets.student.network.logits(outputs), batch, self.model)
            self._unchecked = False
        if self.compute_loss_func is not None and not ALWAYS_DIVIDES:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def host_loss(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> tuple[Tensor, Any]:
        """The task loss of what follows in the bases, Trainer or a class that changes it, and the model's output."""
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        except NotImplementedError as error:
            if self.compute_loss_func is not None:
                raise
            # torch says so of a kernel, too.
            raise DistillError(
                f"{called(self.model)} gives no task loss (its forward says: {error}): where it has none,"
                " give one, compute_loss_func=."
            ) from error
        return loss, outputs

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._split(inputs)[0] if self.distiller else inputs, *args, **kwargs)

    def clipped_beside(self) -> list[nn.Parameter]:
        return self.player.clip_parameters if self.player is not None else []

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.player is not None and "loss" in logs:
            logs = {**logs, **self.player.logs()}
        super().log(logs, start_time)

    def optimizer_saved(self, folder: str) -> None:
        if self.player is not None:
            self.player.save(folder)
            if self._streams is not None and self.args.should_save:
                self._streams.save(folder)

    def optimizer_loaded(self, folder: str) -> None:
        self.start_player()
        if self.player is None:
            return
        progress = self.player.distiller.progress
        total, changed = progress.total or 0, self.player.load(folder)
        if changed and progress.table is not None:
            logger.warning(
                "The length of the training differs from the run that is resumed; its stages are kept as the checkpoint"
                " has them, the last one until the new end."
            )
            progress.table.total = max(total, progress.table.starts[-1] + 1)
            progress.at(progress.step)

    def best_loaded(self, folder: Path) -> None:
        if self.player is None:
            return
        if (folder / "distiller.json").is_file():
            self.player.load_weights(folder)
        elif folder.is_dir() and (self.peer_models or self.player.distiller.state_dict()):
            logger.warning(
                f"{folder} holds the student alone (save_only_model): the student is that of its best evaluation, peers"
                " and parts of the method are those of the last step."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._save_beside(output_dir)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self._save_beside(None)
        return super().push_to_hub(*args, **kwargs)

    def _save_beside(self, folder: str | None) -> None:
        """Writes what is saved beside the student, and the student in one piece where Trainer does not."""
        if self.distiller is None or not self.distiller.ready:
            return
        path = Path(folder or str(self.args.output_dir))
        self.save_shards_whole(str(path))
        if self.args.should_save:
            path.mkdir(parents=True, exist_ok=True)
            to_json(self.distiller, path / "distiller.json")
            save_weights(self.distiller, path / "distiller.safetensors")
            self.distiller.export(path)
            for i, peer in enumerate(self.peer_models, 1):
                export(peer, path / f"peer{i}")

    def create_model_card(self, *args: Any, gain: Gain | None = None, **kwargs: Any) -> None:
        """Trainer's card, with method, paper, options, teachers and data of the distillation.

        Args:
            *args: As for `Trainer`.
            gain: What was measured of the gain over the student trained alone: of each metric, where more is better,
                the mean and the ends of its 95 % interval, `{"accuracy": (0.8, 0.3, 1.3)}`. The card says "improves"
                only of an interval above 0. `push_to_hub` passes it on.
            **kwargs: As for `Trainer`.
        """
        check_gain(gain or {})
        if self.distiller is None:
            if gain:
                raise DistillError("gain is that of a distillation, and there is no distiller: leave it out.")
            super().create_model_card(*args, **kwargs)
            return
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        tags = given.get("tags") or []
        given["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "knowledge-distillation"]))
        super().create_model_card(**given)
        if self.is_world_process_zero():
            data = given.get("dataset") or named_data(self.train_dataset)
            data = data if isinstance(data, str) else ", ".join(data)
            text = section(self.distiller, self.teachers, data, gain)
            add_to_card(Path(self.args.output_dir) / "README.md", text)


def _shown_signature() -> inspect.Signature:
    """Trainer's parameters with ours behind them."""
    own = inspect.signature(DistillationTrainer.__init__).parameters.values()
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(Resumable.__init__).parameters.values(), *keywords])


setattr(DistillationTrainer.__init__, "__signature__", _shown_signature())  # noqa: B010
