"""Every private name of transformers, and of what lies under it, that this package relies on.

`tests/transformers/test_compat.py` says of each whether the installed versions still have it, as it is used here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import logging

from kd_accelerate.randomness import undisturbed
from kd_plugins.errors import DistillError

logger = logging.get_logger(__name__)

# Before 5.19 Trainer takes every compute_loss_func for one that counts the accumulated items itself.
ALWAYS_DIVIDES = hasattr(Trainer, "loss_is_scaled_for_ga")


# What the options of a distiller are called in a hyperparameter search.
_OPTION = "distiller."


class Hooks(Trainer):
    """Trainer's private hooks and helpers under names of ours; as it stands it is Trainer."""

    data_collator: Any
    _signature_columns: Any
    summed_since = 0
    """The step from which on `loss_sums` hold the losses."""
    _begun: bool
    _final = False
    """Whether the training is over and about to log its mean loss."""
    _further: Sequence[str] = ()
    _reading = ""
    """The checkpoint whose weights are being read."""

    # Hooks, for a subclass to override

    def loader(self, dataset: Any, build: Callable[[Any], DataLoader], *, training: bool) -> DataLoader:
        """Makes a data loader; `build(dataset)` is how Trainer makes it, of `self.data_collator`."""
        return build(dataset)

    def further_columns(self, columns: list[str]) -> list[str]:
        """Columns that stay beside those that the model's forward takes."""
        return []

    def clipped_beside(self) -> list[nn.Parameter]:
        """Parameters that are clipped jointly with the model's."""
        return []

    def optimizer_saved(self, folder: str) -> None:
        """Called when a checkpoint's optimizer has been written."""

    def optimizer_loaded(self, folder: str) -> None:
        """Called when a checkpoint's optimizer has been read."""

    def best_whole(self, folder: Path) -> bool:
        """Whether the best checkpoint can be loaded at the end of the training; what is asked says why not."""
        return True

    def best_loaded(self, folder: Path) -> None:
        """Called when the training is over and the model has the weights of its best checkpoint."""

    def loading(self, folder: str) -> AbstractContextManager[Any]:
        """What surrounds the reading of a checkpoint: of the model, then of the optimizer."""
        return nullcontext()

    def saving(self, folder: Path) -> AbstractContextManager[Any]:
        """What surrounds the writing of a checkpoint."""
        return nullcontext()

    def saved(self, folder: Path) -> None:
        """Called when a checkpoint has been written, before older ones are removed."""

    def training_begins(self) -> None:
        """Called before the first step, also where none is left; the state of a checkpoint has been read."""

    def search_options(self, found: Mapping[str, Any]) -> None:
        """Takes what a hyperparameter search, or who sets its result, names `distiller.<option>`."""

    # Helpers

    @property
    def train_batch(self) -> int:
        """Rows of a training batch of this process."""
        return int(self._train_batch_size)

    def own_scheduler(self, scheduler: Any) -> None:
        """Takes a learning-rate curve as one that Trainer has made, which it drops before another training."""
        self.lr_scheduler = scheduler
        self._created_lr_scheduler = True

    def prepare_anew(self) -> None:
        """Takes back how an evaluation before the training has prepared the model: Accelerate would leave it so.

        That is without DDP, whose processes would then train each for itself.
        """
        distributed = self.args.parallel_mode == ParallelMode.DISTRIBUTED
        if distributed and not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.model_wrapped is self.model:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor | int | None:
        """What Trainer counts as the items of one batch, over all processes where it averages over them."""
        return self._get_num_items_in_batch([inputs], self.args.device)

    def save_shards_whole(self, folder: str) -> None:
        """Writes a student in one piece where Trainer leaves that out (SHARDED_STATE_DICT); called on all processes."""
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            state = self.accelerator.get_state_dict(self.model)
            # In 5.17 `_save` writes in every process, and the states of the others are empty.
            if self.args.should_save:
                self._save(folder, state_dict=state)

    @property
    def loss_sums(self) -> list[float]:
        """The losses that have been logged, those that have not, and the step of the last log."""
        return [self._total_loss_scalar, self._tr_loss.item(), self._globalstep_last_logged]

    @loss_sums.setter
    def loss_sums(self, sums: list[float]) -> None:
        self._total_loss_scalar, self._globalstep_last_logged = sums[0], int(sums[2])
        self._tr_loss.fill_(sums[1])

    # Trainer's own

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Where what a search has found is set by its names, as transformers' guide does.
        found, _ = _ours(vars(self.args))
        if found:
            self.search_options(found)
        return super().train(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        build, options = super()._get_dataloader, {**kwargs, "is_training": is_training}
        return self.loader(dataset, lambda rows: build(rows, *args, **options), training=is_training)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Trainer keeps them, and ours follow the data set, which may be another one by now.
        columns = [name for name in self._signature_columns if name not in self._further]
        self._further = self.further_columns(columns)
        self._signature_columns = [*columns, *self._further]

    def _hp_search_setup(self, trial: Any) -> None:
        found: dict[str, Any] = {}

        def without_ours(params: Mapping[str, Any]) -> dict[str, Any]:
            ours, rest = _ours(params)
            found.update(ours)
            return rest

        space = getattr(self, "hp_space", None)
        if space is not None:
            self.hp_space = lambda trial: without_ours(space(trial))
        try:
            super()._hp_search_setup(without_ours(trial) if isinstance(trial, dict) else trial)
        finally:
            if space is not None:
                self.hp_space = space
        if found:
            self.search_options(found)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        beside = self.clipped_beside()
        if not beside:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *beside], self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.optimizer_saved(output_dir)
        # Older checkpoints are removed in `_save_checkpoint`; the arguments have been written by here.
        self.args.save_total_limit = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit = self.args.save_total_limit
        with self.saving(folder):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.saved(folder)
            if self.args.should_save:
                rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        self._reading = checkpoint
        with self.loading(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_best_model(self) -> None:
        self._reading = str(self.state.best_model_checkpoint)
        if self.best_whole(Path(self._reading)):
            super()._load_best_model()
            self.best_loaded(Path(self._reading))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Trainer writes a model's weights as `save_pretrained` names them, and looks for its own names only.
        missing = load_result.missing_keys if load_result.unexpected_keys else []
        if not (missing and load_renamed(self.model, self._reading, missing)):
            super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self.loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        self.optimizer_loaded(checkpoint)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._begun = False
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._begin()
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            # Trainer asks only after a step whether it was the last.
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        self._final = True
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self._final = False
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._final and "train_loss" in logs:
            # Trainer divides by the steps since the training was resumed, before 5.18 by all.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.summed_since, 0.001)
        super().log(logs, *args, **kwargs)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.training_begins()


def _ours(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is named `distiller.<option>`, by option, and the rest."""
    ours = {k.removeprefix(_OPTION): v for k, v in params.items() if k.startswith(_OPTION)}
    return ours, {k: v for k, v in params.items() if not k.startswith(_OPTION)}


def load_renamed(model: nn.Module, folder: str, missing: Sequence[str]) -> bool:
    """Loads weights that lie under other names than the model's own (ViT), as `from_pretrained` does.

    Args:
        model: Has its other weights from the folder.
        folder: A checkpoint.
        missing: The model's names of those that were not found.

    Returns:
        Whether all of them were there; else the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    # No weight is rounded on the way.
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in model.parameters() if p.is_floating_point()))
    given = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with undisturbed():
            found, told = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), **given)
    except Exception as error:  # A class of the user's own may be made in any way, and a training is at its end.
        logger.warning(f"{type(model).__name__}.from_pretrained cannot read {folder}: {error}")
        return False
    anew = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    read = {name: value for name, value in found.state_dict().items() if name in missing and name not in anew}
    # What its owner has changed in the model is none of what `from_pretrained` makes.
    own = model.state_dict()
    fits = all(name in read and read[name].shape == own[name].shape for name in missing)
    if fits:
        model.load_state_dict(read, strict=False)
    return fits


# Data


def on_device(trainer: Trainer, inputs: Any) -> Mapping[str, Any]:
    """A batch where Trainer wants it."""
    return trainer._prepare_inputs(inputs)


def used_columns(trainer: Trainer, dataset: Any, collate: Any, description: str) -> tuple[Any, Any]:
    """A data set and its collator without the columns that nothing takes."""
    if isinstance(dataset, Dataset):
        return trainer._remove_unused_columns(dataset, description=description), collate
    return dataset, trainer._get_collator_with_removed_columns(collate, description=description)


# Attention


def tapped(config: PretrainedConfig, name: str, tap: Any) -> PretrainedConfig:
    """A shallow copy of a config that names an attention function of ours, and its tap."""
    copied = copy.copy(config)
    vars(copied).update({"_attn_implementation_internal": name, name: tap})
    return copied


def attention_name(config: Any) -> str | None:
    """The attention that a config names."""
    return config._attn_implementation


def chosen_attention(module: nn.Module, config: Any) -> Callable[..., Any] | None:
    """The attention function that a module would have called: by name, or its own file's eager one."""
    name = attention_name(config)
    for cls in type(module).__mro__:
        space = vars(sys.modules.get(cls.__module__, object))
        functions = space.get("ALL_ATTENTION_FUNCTIONS")
        if functions is not None:
            return functions.get_interface(name, space.get("eager_attention_forward"))
    return ALL_ATTENTION_FUNCTIONS.get(name)


def chosen_mask(config: Any) -> Callable[..., Any]:
    """The function that makes the mask of the attention that a config names."""
    return ALL_MASK_ATTENTION_FUNCTIONS[attention_name(config)]


def is_reentrant(module: nn.Module) -> bool:
    """Whether a module recomputes its activations by reentrant checkpointing."""
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and options.get("use_reentrant"))


# Labels of a decoder


def shifted(model: nn.Module, labels: Tensor) -> Tensor | None:
    """What a model's decoder reads where it is given labels alone; None where the model does not tell."""
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    config: Any = model.config
    for cls in type(model).__mro__:
        shift = vars(sys.modules.get(cls.__module__, object)).get("shift_tokens_right")
        if shift is not None:
            return shift(labels, config.pad_token_id, config.decoder_start_token_id)
    return None


# Speech


def hears(model: nn.Module) -> bool:
    """Whether a model makes frames of the samples, or of the finer frames, that its mask is of."""
    return hasattr(model, "_get_feat_extract_output_lengths")


def frames_of(model: Any, mask: Tensor) -> Tensor:
    """Which frames of the scores of a speech model `[B, frames]` come of the samples that count `[B, samples]`."""
    length = getattr(model, "_get_feat_extract_output_lengths", None)
    if length is None:
        raise DistillError(
            f"{type(model).__name__} does not tell how many samples make a frame of its scores, so that the padding"
            " among them is not known: pad no batch (leave attention_mask out), or distill its layers."
        )
    frames = int(length(torch.tensor(mask.shape[1])))
    return torch.arange(frames, device=mask.device) < length(mask.sum(1)).unsqueeze(1)


# evaluate, datasets, torch


def averages(metric: Any) -> bool:
    """Whether a metric of `evaluate` can average over classes."""
    return "average" in inspect.signature(metric._compute).parameters


def rows_id(dataset: Any) -> str:
    """What `datasets` knows the rows of a data set by."""
    return str(dataset._fingerprint)


def commit_of(config: Any) -> str | None:
    """The commit on the hub that a configuration was read from; None of a folder."""
    return getattr(config, "_commit_hash", None)


def rates_are(scheduler: Any, rates: list[float]) -> None:
    """Tells a scheduler that the learning rates were set by another hand."""
    scheduler._last_lr = rates
