"""DistillationTrainer: HuggingFace Trainer with a teacher."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from kd_accelerate import TurnPlayer
from kd_accelerate.streams import StagedDataset, Streams
from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads, View, create_distiller
from kd_plugins.binding import connect, needs_in, needs_pass, prepare, schedule, set_up
from kd_plugins.catalog.registry import to_json
from kd_plugins.reading.network import adapt
from kd_transformers.cache import TEACHER_LOGITS, check_cache
from kd_transformers.checks import (
    check_checkpointing,
    check_fit,
    check_host,
    check_vocabulary,
    class_order,
    inputs_of,
    same_class_order,
    task_of,
)
from kd_transformers.schedule import refresh, staged_scheduler

__all__ = ["DistillationTrainer"]

logger = logging.get_logger(__name__)

_INDEX = "kd_index"
_TEACHER = "teacher_"
_WEIGHTS = "model.safetensors"


class DistillationTrainer(Trainer):
    """A drop-in for `Trainer` that distils.

    It takes everything that `Trainer` takes, in the same places, and four keyword arguments more. Without them it is
    `Trainer`, to the last bit.

    With a distiller, the loss of every micro-batch is its mean, divided by the number of accumulation steps:
    `Trainer` itself inflates the loss of several models under accumulation. A `compute_loss_func` gets the number of
    items of its own micro-batch. Evaluation computes the task loss alone, without the teacher, so that it compares
    across the phases of a schedule. Loss terms are logged as `distill/<term>`, averaged since the last log. What is
    saved is the bare student; the distiller's own parts are saved beside it (`distiller.safetensors`,
    `distiller.json`), and so is each peer, in a folder of its own (`peer1`, ...). With `model_init` every run starts
    with a fresh copy of the distiller.

    Columns of the data named `teacher_<input>` go to the teacher alone, in place of the student's; so do inputs that
    only the teacher's forward takes (a BERT teacher's `token_type_ids` beside a DistilBERT student). A column
    `teacher_logits`, which `cache_teacher` makes, stands for the teacher's forward where only its logits are read.

    Args:
        *args: As for `Trainer`.
        teacher_model: The frozen network, or several.
        peer_models: Networks that are trained together with the student (online methods).
        distiller: A distiller, or the name of one (`"kd"`, `"kd+nst"`, `"module:Class"`).
        distiller_args: Its options, where it is given by name: `{"schedule": "stacked"}`.
        **kwargs: As for `Trainer`.

    Raises:
        DistillError: A combination that cannot work, in one sentence, before any training: a task that the method does
            not fit, other classes or tokens in teacher and student, no teacher, DataParallel, FSDP or DeepSpeed.
    """

    data_collator: Any
    lr_scheduler: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module | Sequence[nn.Module] | None = None,
        peer_models: Sequence[nn.Module] = (),
        distiller: Distiller | str | None = None,
        distiller_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        teachers = [] if teacher_model is None else teacher_model
        self.teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        self.peer_models = list(peer_models or ())
        self.distiller = self._distiller(distiller, distiller_args)
        self.player: TurnPlayer | None = None
        self._nets: Nets | None = None
        self._bound_to: nn.Module | None = None
        self._playing = self._played = self._resuming = False
        self._epoch_steps: int | None = None
        self._resumed_from: str | None = None
        self._staged: StagedDataset | None = None
        self._streams: Streams | None = None
        if self.distiller is None:
            return
        check_host(self.args, fsdp=self.is_fsdp_enabled, deepspeed=self.is_deepspeed_enabled)
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
        # Means, divided by Trainer: what ignores num_items_in_batch would else count once for each micro-batch.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._unused = copy.deepcopy(self.distiller)
        self._teacher_networks = [adapt(t) for t in self.teachers]
        self._nets = self._connect()
        # model_init makes a new student in every run; its peers begin anew with it.
        self._peers_at_first = [copy.deepcopy(p.state_dict()) for p in self.peer_models] if self.model_init else []
        self.add_callback(_Updates(self))

    def _distiller(self, distiller: Distiller | str | None, options: Mapping[str, Any] | None) -> Distiller | None:
        if isinstance(distiller, str):
            return create_distiller(distiller, **(options or {}))
        if options:
            raise DistillError("distiller_args are the options of a distiller given by name: set them on the object.")
        if distiller is None and (self.teachers or self.peer_models):
            raise DistillError("A teacher or peers were given without a distiller: say which, distiller='kd'.")
        if distiller is not None and not isinstance(distiller, Distiller):
            raise DistillError(f"Expected a distiller or the name of one, got {type(distiller).__name__}.")
        return distiller

    # Networks

    def _connect(self) -> Nets:
        """Connects the distiller to the networks, and refuses what cannot work before any training time is spent."""
        assert self.distiller is not None  # noqa: S101
        nets = connect(
            self.distiller,
            adapt(self.model),
            self._teacher_networks,
            [adapt(p) for p in self.peer_models],
            orders=[class_order(self.model, t) for t in self.teachers],
        )
        check_fit(self.distiller, task_of(self.model), self.model)
        for peer in self.peer_models:
            same_class_order(self.model, peer)
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None:
            self._check_vocabularies(columns)
        student, *peers = (_Trained(self, net, student=net is nets.student) for net in nets.peers)
        return Nets(student, nets.teachers, peers)

    def _check_vocabularies(self, columns: Iterable[Any]) -> None:
        """Networks that read the same token ids must share a vocabulary."""
        own = any(str(column).startswith(_TEACHER) and column != TEACHER_LOGITS for column in columns)
        for network in [*([] if own else self.teachers), *self.peer_models]:
            check_vocabulary(self.model, network)

    def _set_up(self) -> None:
        """Binds the distiller to the model that is about to be trained; model_init makes a new one in every run."""
        distiller = self.distiller
        if distiller is None or self._bound_to is self.model:
            return
        nets = self._nets = self._connect()
        for module in [*self.teachers, *self.peer_models]:
            if getattr(module, "hf_device_map", None) is None:
                module.to(self.args.device)
        batch = next(self._pass(), None)
        if batch is None:
            raise DistillError("Expected at least one training example, got an empty train_dataset.")
        check_fit(distiller, batch.task, self.model)
        self._check_vocabularies(_TEACHER + name for name in batch.teacher_kwargs)
        self._check_cache(batch)
        set_up(distiller, nets, batch)
        if any(needs_in(distiller, stage).student.taps for stage in range(len(distiller.stages()))):
            check_checkpointing(self.model)
        if needs_pass(distiller) and not self._resuming and self.args.process_index == 0:
            prepare(distiller, nets, self._pass(self.args.dataloader_num_workers))
        self._bound_to = self.model

    def _check_cache(self, batch: Batch) -> None:
        """Asks the teacher once, to see that the column of its logits is its own."""
        if batch.teacher_logits is None or self._nets is None:
            return
        if len(self.teachers) != 1:
            raise DistillError(
                f"The column {TEACHER_LOGITS} belongs to one teacher, got {len(self.teachers)}: remove it."
            )
        teacher, uncached = self._nets.teacher, dataclasses.replace(batch, teacher_logits=None)
        check_cache(*(teacher(asked, reads=Reads()).logits for asked in (batch, uncached)))

    def _pass(self, workers: int = 0) -> Iterator[Batch]:
        """Batches of the training set in its order, outside of the training's random state.

        Of a data set without a length, which may be endless, no more than the training reads.
        """
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        loader = DataLoader(dataset, self._train_batch_size, collate_fn=collate, num_workers=workers)
        reads = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.world_size
        iterator = None
        for _ in itertools.count() if has_length(dataset) else range(max(reads, 1)):
            with torch.random.fork_rng(devices=[]):
                iterator = iter(loader) if iterator is None else iterator
                inputs = next(iterator, None)
            if inputs is None:
                return
            yield self._batch(self._prepare_inputs(inputs))

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        own = self._own_inputs(inputs)
        only = self._teacher_only()
        theirs = {name: value for name, value in inputs.items() if name in only}
        theirs |= {k.removeprefix(_TEACHER): v for k, v in inputs.items() if k.startswith(_TEACHER)}
        cached = theirs.pop(TEACHER_LOGITS.removeprefix(_TEACHER), None)
        name = getattr(self.model, "main_input_name", None)
        fields = {"index": inputs.get(_INDEX), **self._normalisation()}
        task = task_of(self.model, own.get("labels"))
        return Batch.of(own, name=name, task=task, teacher_kwargs=theirs, teacher_logits=cached, **fields)

    def _normalisation(self) -> dict[str, Any]:
        """The mean and std of the images, where an image processor tells."""
        processor: Any = getattr(self.processing_class, "image_processor", self.processing_class)
        if not getattr(processor, "do_normalize", False):
            return {}
        return {"mean": processor.image_mean, "std": processor.image_std}

    def _own_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student reads of a batch."""
        only = self._teacher_only()
        return {k: v for k, v in inputs.items() if k not in only and k != _INDEX and not k.startswith(_TEACHER)}

    def _teacher_only(self) -> set[str]:
        """Inputs that a teacher takes and the student does not."""
        ours, theirs = inputs_of(self.model), set().union(*map(inputs_of, self.teachers))
        return theirs - ours if ours else set()

    def _with_streams(self, batch: Batch) -> Batch:
        """The batch with one of each other stream that the method reads in this step, whose stage may be new."""
        assert self.distiller is not None  # noqa: S101
        assert self.distiller.progress.table is not None  # noqa: S101
        shares = needs_in(self.distiller, self.distiller.progress.table.index(self.distiller.progress.step)).streams
        if not shares:
            return batch
        if self._streams is None:
            rows = _Rows(self._staged.dataset if self._staged else self.train_dataset)
            collate = self._get_collator_with_removed_columns(_IndexCollator(self.data_collator))
            self._streams = Streams(rows, shares, self._train_batch_size, collate, self.args.seed)
            if self._resumed_from is not None and (Path(self._resumed_from) / "streams.json").is_file():
                self._streams.load(self._resumed_from)
        drawn = {name: self._batch(self._prepare_inputs(self._streams.draw(name))) for name in shares}
        return dataclasses.replace(batch, streams=drawn)

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        if not is_training or self.distiller is None or isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        needs = [needs_in(self.distiller, stage) for stage in range(len(self.distiller.stages()))]
        if not any(n.index or n.streams for n in needs):
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        steps, seed = self._epoch_steps or 1, self.args.seed
        dataset = self._staged = StagedDataset(dataset, self.distiller, steps, seed, _with_index)
        collator, self.data_collator = self.data_collator, _IndexCollator(self.data_collator)
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        known = self._signature_columns is not None
        super()._set_signature_columns_if_needed()
        if self.distiller is not None and not known:
            columns = dict.fromkeys([*self._signature_columns, *sorted(self._teacher_only())])
            self._signature_columns = [*columns, *(_TEACHER + name for name in columns), TEACHER_LOGITS, _INDEX]

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._resuming = bool(resume_from_checkpoint)
        self._streams, self._resumed_from = None, None
        if self._bound_to is not None and (self.model_init is not None or self._bound_to is not self.model):
            self.distiller, self._bound_to = copy.deepcopy(self._unused), None
            for peer, state in zip(self.peer_models, self._peers_at_first, strict=False):
                peer.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        self._epoch_steps = values[1]
        if self._staged is not None:
            self._staged.epoch_steps = values[1]
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self._set_up()
        return super().create_optimizer(model) if model is not None else super().create_optimizer()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        distiller = self.distiller
        if distiller is None or self._nets is None:
            return super().create_scheduler(num_training_steps, optimizer)
        table = schedule(distiller, num_training_steps, epoch=self._epoch_steps)
        if len(table.stages) > 1 and self.lr_scheduler is None:
            self.lr_scheduler = staged_scheduler(self.args, optimizer or self.optimizer, table)
            self._created_lr_scheduler = True
        else:
            super().create_scheduler(num_training_steps, optimizer)
        norm = self.args.max_grad_norm if self.args.max_grad_norm and self.args.max_grad_norm > 0 else None
        self.player = TurnPlayer(
            self.accelerator, distiller, self._nets, optimizer or self.optimizer, max_grad_norm=norm
        )
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.distiller is None:
            return super().training_step(model, inputs, num_items_in_batch)
        assert self.player is not None  # noqa: S101
        self.model_wrapped = self.player.model = model
        self._playing, self._played = True, False
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
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
        """The distillation's loss in training, and `Trainer`'s own in evaluation."""
        if not self._playing or self.player is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._played = True
        self.player.accumulation = self.current_gradient_accumulation_steps
        peers = self._nets.peers[1:] if self._nets is not None else ()
        for peer in peers:
            peer.module.train()
        loss = self.player.forward(self._with_streams(self._batch(inputs)))
        if self.compute_loss_func is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Before 5.19 Trainer takes every compute_loss_func for one that counts the accumulated items itself.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._own_inputs(inputs) if self.distiller else inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        own = self.player.clip_parameters if self.player is not None else []
        if not own:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *own], self.args.max_grad_norm)

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.player is not None and "loss" in logs:
            logs = {**logs, **self.player.logs()}
        super().log(logs, start_time)

    def _end_epoch(self, epoch: float) -> None:
        """Asks the method whether its stage is done; the next one then begins with its own learning rate."""
        if self.player is not None and self.player.end_epoch(epoch):
            refresh(self.lr_scheduler)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.player is not None:
            self.player.save(output_dir)
            if self._streams is not None and self.args.should_save:
                self._streams.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.player is None or checkpoint is None:
            return
        distiller = self.player.distiller
        total = distiller.progress.total or 0
        if self.player.load(checkpoint):
            logger.warning(
                "The length of the training differs from the run that is resumed; its stages are kept as the checkpoint"
                " has them, the last one until the new end."
            )
            assert distiller.progress.table is not None  # noqa: S101
            distiller.progress.table.total = max(total, distiller.progress.table.starts[-1] + 1)
            distiller.at(distiller.progress.step)
        self._streams, self._resumed_from = None, checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.distiller is not None and self.distiller.ready and self.args.should_save and not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            to_json(self.distiller, folder / "distiller.json")
            state = {k: v.detach().clone().contiguous() for k, v in self.distiller.state_dict().items()}
            save_file(state, folder / "distiller.safetensors")
            self.distiller.export(folder)
            self._export_peers(folder)

    def _export_peers(self, folder: Path) -> None:
        """Writes each peer as `from_pretrained` loads it, into a folder of its own: `peer1`, `peer2`, ..."""
        for i, peer in enumerate(self.peer_models, 1):
            own = folder / f"peer{i}"
            if isinstance(peer, PreTrainedModel):
                peer.save_pretrained(own)
                continue
            own.mkdir(exist_ok=True)
            save_file({k: v.detach().clone().contiguous() for k, v in peer.state_dict().items()}, own / _WEIGHTS)


class _Trained(Net):
    """The student, or a peer, under Trainer: its view holds the task loss that Trainer computes in its forward."""

    def __init__(self, trainer: DistillationTrainer, net: Net, *, student: bool) -> None:
        super().__init__(net.network, lambda: net.reads, forward=self._call)
        self.trainer = trainer
        self.student = student
        self._labels: Any = None
        self._loss: Tensor | None = None

    def __call__(self, batch: Batch, **options: Any) -> View:
        reads = options.get("reads") or self.reads
        self._labels, self._loss = batch.labels if reads.logits else None, None
        view = super().__call__(batch, **options)
        view.loss = self._loss
        return view

    def _call(self, **inputs: Any) -> Any:
        trainer = self.trainer
        if not trainer._playing:
            return (trainer.model if self.student else self.module)(**inputs)
        model = trainer.model_wrapped if self.student else self.module
        if self._labels is not None:
            inputs["labels"] = self._labels
        elif not any(name in inputs for name in trainer.label_names):
            return model(**inputs)
        items = None
        if trainer.compute_loss_func is not None:
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        # What follows in the bases: the task loss of Trainer, or of a class that changes it.
        task: Any = super(DistillationTrainer, trainer).compute_loss  # type: ignore[misc]
        self._loss, outputs = task(model, inputs, return_outputs=True, num_items_in_batch=items)
        return outputs


class _Updates(TrainerCallback):
    """Steps the distiller's own parts with the student's optimizer, and tells it of the end of an epoch."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.player is not None:
            self.trainer.player.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here, and not in on_epoch_end, which follows the checkpoint of an epoch's last step.
        if state.global_step % self.trainer._epoch_steps == 0:
            self.trainer._end_epoch(state.epoch)
        if control.should_evaluate or control.should_save:
            self.average_buffers()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average_buffers()

    def average_buffers(self) -> None:
        if self.trainer.player is not None:
            self.trainer.player.average_buffers()


class _IndexCollator:
    """A collator that carries row numbers past the user's own."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        index = torch.tensor([item[_INDEX] for item in items])
        batch = self.collate([{k: v for k, v in item.items() if k != _INDEX} for item in items])
        return {**batch, _INDEX: index}


def _with_index(item: Any, row: int) -> Any:
    return {**item, _INDEX: row}


class _Rows:
    """Items with their row numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return _with_index(self.dataset[row], row)
