"""The record of a training with Trainer, which `kd-plugins report` makes a page of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from kd_accelerate.cached import layers_of
from kd_plugins import Batch, Net, Nets, Reads
from kd_plugins.picture import Picture
from kd_plugins.reading.network import adapt
from kd_report.predictions import predicted_maps
from kd_report.record import MOST_AT_ONCE, SHARE, RunRecord, rows_to_analyse, some_rows
from kd_report.uncertainty import Doubts
from kd_transformers.absent import Absent
from kd_transformers.checks import class_order, task_of
from kd_transformers.columns import with_padding
from kd_transformers.compat import on_device, used_columns

__all__ = ["RecordCallback", "UpdateTimer"]


class UpdateTimer(TrainerCallback):
    """Measures the mean duration of an update, without evaluation and saving."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._start = 0.0, 0, 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """None before the first update."""
        return self._seconds / self._steps if self._steps else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._start
        self._steps += 1


class RecordCallback(UpdateTimer):
    """Records a training in its output folder: what was run, every log, the networks before and after, cost by part.

    A `DistillationTrainer` has it by itself (`record=False` is without); to a `Trainer` it is added once that is made,
    `trainer.add_callback(RecordCallback(trainer))`. `kd-plugins report OUTPUT_DIR` then makes the page. The training
    itself is not changed by a bit. What the networks predict is asked at the end, of rows of the evaluation set drawn
    at random, all of them where that takes no more than a hundredth of the training's time. Sharded networks (FSDP,
    DeepSpeed) are not analysed.

    Args:
        trainer: A `DistillationTrainer`, or a `Trainer`.
        host: What the report calls the script.
        names: What to call the networks: `{"student": ..., "teachers": [...], "peers": [...]}`.
        data: The data set in words.
        teachers: Teachers to compare the student of a plain `Trainer` with.
        settings: What else the report shows; by default the training arguments that differ from their defaults.
        predicts: Whether to ask the networks for their predictions; a script that has asked them gives `finish` what
            they said.
        cached: Whether a cache stands for the teachers whose logits alone are read.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        host: str = "transformers Trainer",
        names: Mapping[str, Any] | None = None,
        data: str = "",
        teachers: Sequence[nn.Module] = (),
        settings: Mapping[str, Any] | None = None,
        predicts: bool = True,
        cached: bool = False,
    ) -> None:
        super().__init__()
        # One of the user's own takes the place of that which a DistillationTrainer has by itself.
        trainer.remove_callback(RecordCallback)
        self.trainer, self.teachers, self.predicts = trainer, tuple(teachers), predicts
        self.cached = cached
        self.host, self.names, self.data, self.settings = host, names, data, settings
        self.record: RunRecord | None = None
        self.stopped = False
        self.results: dict[str, Any] = {}
        self._began, self._rows = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer, distiller, tokenizer = self.trainer, self._distiller, self.trainer.processing_class
        config = getattr(trainer.model, "config", None)
        names = getattr(config, "id2label", None) or {}
        self.record = RunRecord(
            args.output_dir,
            host=self.host,
            nets=self._nets(),
            distiller=distiller,
            names=self.names,
            data=self.data,
            task=self._task,
            metric=f"eval_{args.metric_for_best_model.removeprefix('eval_')}" if args.metric_for_best_model else "",
            classes=[str(names[i]) for i in sorted(names)] or None,
            decode=getattr(tokenizer, "convert_ids_to_tokens", None),
            settings=_changed(args) if self.settings is None else self.settings,
            resume=state.global_step or None,
            rows=[{"step": row["step"], **row} for row in state.log_history],
        )
        self._began = time.perf_counter()
        self._rows = rows_to_analyse(
            state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        if self._rows and not state.global_step:
            self._analyse("before")
        player = getattr(trainer, "player", None)
        if player is not None:
            self.record.time_steps(player)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        # What Trainer says of the whole training at its end is no point of a curve.
        if self.record is None or not logs or "train_runtime" in logs:
            return
        self.record.log({"step": state.global_step, **logs})
        self.results |= {key: value for key, value in logs.items() if key.startswith("eval_")}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None and not self.stopped:
            self._analyse("after")
            self.finish(self.results)

    def interrupted(self) -> None:
        """Says that the training has not come to its end."""
        self.stopped = True
        if self.record is not None:
            self.record.finish({}, status="interrupted")

    def finish(self, results: Mapping[str, Any], found: Mapping[str, Doubts] | None = None, classes: int = 0) -> None:
        """Writes other results than those of the last evaluation in the training.

        Args:
            results: Numbers by name.
            found: What the networks say of the evaluation set, as `kd_report.uncertainty.Answers` has collected it.
            classes: Number of classes.
        """
        if self.record is not None:
            self.record.predictions(found or {}, classes)
            self.record.finish(results, seconds_per_step=self.seconds_per_step, pictures=self._pictures())

    def _pictures(self) -> Iterator[Picture]:
        """What is shown of the networks' predictions."""
        if self.trainer.eval_dataset is not None and self._task == "segmentation":
            shown = predicted_maps(self._nets(), next(self._batches(self._rows or 8)))
            yield from [] if shown is None else [shown]

    @property
    def _distiller(self) -> Any:
        return getattr(self.trainer, "distiller", None)

    def _nets(self) -> Nets:
        nets = getattr(self.trainer, "_nets", None)
        if nets is not None:
            shown = [net for i, net in enumerate(nets.teachers) if not self._hidden(net, i)]
            return Nets(nets.student, shown, nets.peers[1:])
        student = self.trainer.model
        taught = [
            Net(adapt(teacher), Reads, frozen=True, order=class_order(student, teacher)) for teacher in self.teachers
        ]
        return Nets(Net(adapt(student), Reads), taught)

    def _hidden(self, net: Net, number: int) -> bool:
        """Whether a teacher is left out: one that the cache stands for, also in the run that fills it."""
        return isinstance(net.module, Absent) or (self.cached and layers_of(self._distiller, number) is not None)

    def _analyse(self, phase: str) -> None:
        assert self.record is not None  # noqa: S101
        trainer = self.trainer
        if trainer.eval_dataset is None:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            self.record.note("Sharded networks are not analysed.")
            return
        nets = self._nets()
        for net in nets.teachers:
            net.module.to(trainer.args.device)
        with trainer.accelerator.autocast():
            self.record.analyse(phase, nets, self._batches(self._rows or 8))
            if phase == "after" and self.predicts:
                spent = time.perf_counter() - self._began
                self.record.predict(nets, self._batches(), seconds=SHARE * spent)

    def _batches(self, count: int | None = None) -> Iterator[Batch]:
        trainer, dataset, collate = self.trainer, self.trainer.eval_dataset, self.trainer.data_collator
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        loader: Any
        if type(trainer).get_eval_dataloader is not Trainer.get_eval_dataloader:
            loader = trainer.get_eval_dataloader()
            # This process reads alone.
            loader = getattr(loader, "base_dataloader", loader)
        else:
            collate = with_padding(collate, getattr(trainer, "teachers", self.teachers))
            dataset, collate = used_columns(trainer, dataset, collate, "evaluation")
            size = min(trainer.args.per_device_eval_batch_size, MOST_AT_ONCE)
            loader = DataLoader(some_rows(dataset, count), batch_size=size, collate_fn=collate)
        for inputs in loader:
            prepared = on_device(trainer, inputs)
            if self._distiller is not None:
                yield trainer._batch(prepared)  # type: ignore[attr-defined]
            else:
                name = getattr(trainer.model, "main_input_name", None)
                yield Batch.of(dict(prepared), name=name, task=self._task)

    @property
    def _task(self) -> str:
        return getattr(self.trainer, "task", None) or task_of(self.trainer.model)


def _changed(args: Any) -> dict[str, Any]:
    """Training arguments that differ from their defaults, and the seed."""
    defaults = {name: field.default for name, field in type(args).__dataclass_fields__.items()}
    given = {k: v for k, v in args.to_dict().items() if k in defaults and v != defaults[k] and v not in (None, "", [])}
    return {**{k: v for k, v in given.items() if isinstance(v, (str, int, float, bool))}, "seed": args.seed}
