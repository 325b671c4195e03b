"""What DistillationTrainer plays with: networks whose views hold its task loss, and the callback that updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from kd_accelerate.streams import ReplayedDataset, StagedDataset
from kd_plugins import Batch, DistillError, Net, View, binding
from kd_plugins.reading.tap import untraced
from kd_transformers.network import with_labels
from kd_transformers.schedule import refresh


def divides(one: Tensor, two: Tensor, gather: Callable[[Tensor], Tensor] = lambda seen: seen) -> bool | None:
    """Whether a loss divides by the number of items it is given; None where no label counts.

    Args:
        one: The loss with 1 for the number.
        two: With 2.
        gather: Makes of `[1, 2]` of this process that of all, `[processes, 2]`, which then say the same.
    """
    told = one.isfinite() & two.isfinite() & (one != 0)
    seen = gather(torch.stack([told, told & ~torch.isclose(one, two, rtol=1e-3)])[None].int()).any(0)
    return bool(seen[1]) if seen[0] else None


class Trained(Net):
    """The student, or a peer, under Trainer: its view holds the task loss that Trainer computes in its forward.

    Attributes:
        counts: Whether that loss divides by the number of items it is given.
    """

    def __init__(self, trainer: Any, net: Net, *, student: bool) -> None:
        super().__init__(net.network, lambda: net.reads, forward=self._call)
        self.trainer = trainer
        self.student = student
        self.counts = False
        self._batch = Batch()
        self._asks_loss = False
        self._loss: Tensor | None = None

    def __call__(self, batch: Batch, **options: Any) -> View:
        self._batch, self._loss = batch, None
        self._asks_loss = (options.get("reads") or self.reads).logits
        view = super().__call__(batch, **options)
        view.loss = self._loss
        return view

    def task_loss(self, batch: Batch, items: Tensor) -> Tensor | None:
        """The task loss of a batch that has so many items, in evaluation mode; None without labels."""
        _, inputs = self.network.arguments(batch)
        if batch.labels is None and not any(name in inputs for name in self.trainer.label_names):
            return None
        with untraced(self.module):
            labelled = with_labels(self.module, inputs, batch.labels, self.trainer._label)
            return self.trainer.host_loss(self.module, labelled, items)[0]

    def _call(self, **inputs: Any) -> Any:
        trainer, labels = self.trainer, self._batch.labels if self._asks_loss else None
        if not trainer._playing:
            return (trainer.model if self.student else self.module)(**inputs)
        outputs = self._outputs(trainer.model_wrapped if self.student else self.module, inputs, labels)
        if self.student:
            trainer._outputs = outputs
        return outputs

    def _outputs(self, model: nn.Module, inputs: dict[str, Any], labels: Any) -> Any:
        """What the network returns in a step; the task loss, where there are labels, is kept."""
        trainer = self.trainer
        if labels is None and not any(name in inputs for name in trainer.label_names):
            return model(**inputs)
        inputs = with_labels(self.module, inputs, labels, trainer._label)
        # Another stream's batch is no part of the accumulated one, whose items were counted.
        whole = not trainer._drawn or bool(self._batch.streams)
        items = (trainer._items if whole else trainer.count_items(inputs)) if self.counts else None
        self._loss, outputs = trainer.host_loss(model, inputs, items)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if isinstance(logits, Tensor) and self._loss.requires_grad and not logits.requires_grad:
            raise DistillError(
                f"Expected compute_loss of what follows DistillationTrainer in the bases of {type(trainer).__name__} to"
                " return the output of its own forward, got scores without a gradient (a head that is fused with the"
                " loss, as in TRL's SFTTrainer): derive a class from it whose compute_loss is Trainer.compute_loss, and"
                " take that as the base."
            )
        if items is not None and whole:
            # Everything is divided by the accumulation steps afterwards, which this loss is already.
            self._loss = self._loss * trainer.current_gradient_accumulation_steps
        return outputs


class Updates(TrainerCallback):
    """Steps the distiller's own parts with the student's optimizer, and tells it of the end of an epoch.

    Where there are steps, there is a player.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_player()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A loader of several processes, and one that goes on within an epoch, tell their samplers alone.
        rows = self.trainer._staged or self.trainer.train_dataset
        if isinstance(rows, (StagedDataset, ReplayedDataset)):
            rows.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer._played:
            raise DistillError(
                f"{type(self.trainer).__name__}.training_step hides the distillation: call super().training_step in it,"
                " or override compute_loss."
            )
        self.trainer._played = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.player.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here, and not in on_epoch_end, which follows the checkpoint of an epoch's last step. Where the method says
        # that its stage is done, the next one begins with its own learning rate.
        if state.global_step % self.trainer._epoch_steps == 0 and self.trainer.player.end_epoch(state.epoch):
            refresh(self.trainer.lr_scheduler)
        if control.should_evaluate or control.should_save:
            self.trainer.player.average_buffers()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.player is not None:
            self.trainer.player.average_buffers()


# The teachers, or the peers; refuses what is none.
listed = partial(
    binding.listed,
    remedy="load it first, with the from_pretrained of the class that fits the task, such as"
    " AutoModelForSequenceClassification",
)


def export(peer: nn.Module, folder: Path) -> None:
    """Writes a peer as `from_pretrained` loads it."""
    if hasattr(peer, "save_pretrained"):
        peer.save_pretrained(folder)
        return
    folder.mkdir(exist_ok=True)
    save_weights(peer, folder / "model.safetensors")


def save_weights(module: nn.Module, path: Path) -> None:
    save_file({k: v.detach().clone().contiguous() for k, v in module.state_dict().items()}, path)
