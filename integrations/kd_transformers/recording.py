"""The record of a training with Trainer, which `kd-plugins report` makes a page of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from kd_accelerate.cached import layers_of
from kd_plugins import Batch, Net, Nets, Reads
from kd_plugins.evaluation import Doubts
from kd_plugins.picture import Picture
from kd_plugins.reading.network import adapt
from kd_report.analysis import predicted_maps
from kd_report.record import MOST_AT_ONCE, RunRecord, rows_to_analyse, rows_to_ask, sizes, some_rows
from kd_transformers.checks import class_order, stated, task_of
from kd_transformers.columns import with_padding
from kd_transformers.compat import on_device, used_columns
from kd_transformers.told import Absent


class UpdateTimer(TrainerCallback):
    """Measures the mean duration of an update, without evaluation and saving."""

    _seconds, _steps, _start = 0.0, 0, 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """None before the first update."""
        return self._seconds / self._steps if self._steps else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._start
        self._steps += 1


@dataclass(eq=False)
class RecordCallback(UpdateTimer):
    """Records a training in its output folder: what was run, every log, the networks before and after, cost by part.

    A `DistillationTrainer` has it by itself (`record=False` is without); to a `Trainer` it is added once that is made,
    `trainer.add_callback(RecordCallback(trainer))`. `kd-plugins report OUTPUT_DIR` then makes the page. The training
    itself is not changed by a bit. What the networks predict is asked at the end, of rows of the evaluation set drawn
    at random, as many as a hundredth of those that the training reads. Sharded networks (FSDP, DeepSpeed) are not
    analysed.

    Args:
        trainer: A `DistillationTrainer`, or a `Trainer`.
        host: What the report calls the script.
        names: What to call the networks: `{"student": ..., "teachers": [...], "peers": [...]}`.
        data: The data set in words; by default its numbers of rows.
        teachers: Teachers to compare the student of a plain `Trainer` with.
        settings: What else the report shows, and runs of one experiment agree in, beside the training arguments that
            differ from their defaults.
        predicts: Whether to ask the networks for their predictions; a script that has asked them gives `finish` what
            they said.
        cached: Whether a cache stands for the teachers whose logits alone are read.
    """

    trainer: Trainer
    _: KW_ONLY
    host: str = "transformers Trainer"
    names: Mapping[str, Any] | None = None
    data: str = ""
    teachers: Sequence[nn.Module] = ()
    settings: Mapping[str, Any] | None = None
    predicts: bool = True
    cached: bool = False

    def __post_init__(self) -> None:
        # One of the user's own takes the place of that which a DistillationTrainer has by itself.
        self.trainer.remove_callback(RecordCallback)
        self.teachers = tuple(self.teachers)
        self.record: RunRecord | None = None
        self.results: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer, best = self.trainer, args.metric_for_best_model
        evaluation = None if isinstance(trainer.eval_dataset, dict) else trainer.eval_dataset
        # A model_init gives a new method for each training.
        self._distiller: Any = getattr(trainer, "distiller", None)
        self._task = getattr(trainer, "task", None) or task_of(trainer.model)
        names = stated(trainer.model, "id2label") or {}
        self.record = RunRecord(
            args.output_dir,
            host=self.host,
            nets=self._nets(),
            distiller=self._distiller,
            names=self.names,
            data=self.data or sizes(trainer.train_dataset, evaluation),
            task=self._task,
            metric=f"eval_{best.removeprefix('eval_')}" if best else "",
            classes=[str(names[i]) for i in sorted(names)] or None,
            decode=getattr(trainer.processing_class, "convert_ids_to_tokens", None),
            settings={**changed(args), "seed": args.seed, **(self.settings or {})},
            resume=state.global_step or None,
            rows=[{"step": row["step"], **row} for row in state.log_history],
        )
        rows = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._rows, self._asked = rows_to_analyse(rows), rows_to_ask(rows)
        if self._rows and not state.global_step:
            self._analyse("before", self.record)
        player = getattr(trainer, "player", None)
        if player is not None:
            self.record.time_steps(player)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # What Trainer says of the whole training at its end is no point of a curve.
        if self.record is not None and logs and "train_runtime" not in logs:
            self.record.log({"step": state.global_step, **logs})
            self.results |= {key: value for key, value in logs.items() if key.startswith("eval_")}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None and self.record.run["status"] != "interrupted":
            if args.load_best_model_at_end:
                # The weights that stay are those of the best evaluation.
                best = [row for row in state.log_history if row["step"] == state.best_global_step]
                self.results |= {key: x for row in best for key, x in row.items() if key.startswith("eval_")}
            self._analyse("after", self.record)
            self.finish(self.results)

    def interrupted(self) -> None:
        """Says that the training has not come to its end."""
        if self.record is not None:
            self.record.finish({}, status="interrupted")

    def finish(self, results: Mapping[str, Any], found: Mapping[str, Doubts] | None = None, classes: int = 0) -> None:
        """Writes other results than those of the last evaluation in the training.

        With them goes what the networks say of the evaluation set, as `kd_plugins.evaluation.Answers` has found it.
        """
        if self.record is not None:
            self.record.predictions(found or {}, classes)
            self.record.finish(results, seconds_per_step=self.seconds_per_step, pictures=self._pictures())

    def _pictures(self) -> Iterator[Picture]:
        """What is shown of the networks' predictions."""
        if self.trainer.eval_dataset is not None and self._task == "segmentation":
            shown = predicted_maps(self._nets(), next(self._batches(self._rows or 8)))
            yield from [] if shown is None else [shown]

    def _nets(self) -> Nets:
        nets, student = getattr(self.trainer, "_nets", None), self.trainer.model
        if nets is not None:
            # A teacher that the cache stands for is left out, also in the run that fills it.
            asked = [net for net in nets.teachers if not self.cached or layers_of(self._distiller, net.number) is None]
            shown = [net for net in asked if not isinstance(net.module, Absent)]
            return Nets(nets.student, shown, nets.peers[1:])
        orders = [(teacher, class_order(student, teacher)) for teacher in self.teachers]
        taught = [Net(adapt(teacher), Reads, frozen=True, order=order) for teacher, order in orders]
        return Nets(Net(adapt(student), Reads), taught)

    def _analyse(self, phase: str, record: RunRecord) -> None:
        trainer = self.trainer
        if trainer.eval_dataset is None:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            record.note("Sharded networks are not analysed.")
            return
        nets = self._nets()
        for net in nets.teachers:
            net.module.to(trainer.args.device)
        with trainer.accelerator.autocast():
            record.analyse(phase, nets, self._batches(self._rows or 8))
            if phase == "after" and self.predicts:
                record.predict(nets, self._batches(self._asked))

    def _batches(self, count: int) -> Iterator[Batch]:
        trainer, dataset, collate = self.trainer, self.trainer.eval_dataset, self.trainer.data_collator
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
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
        name, read = getattr(trainer.model, "main_input_name", None), 0
        for inputs in loader:
            prepared = on_device(trainer, inputs)
            if self._distiller is not None:
                batch = trainer._batch(prepared)  # type: ignore[attr-defined]
            else:
                batch = Batch.of(dict(prepared), name=name, task=self._task)
            yield batch
            read += batch.size
            # A loader of the user's own, and a stream, go on.
            if read >= count:
                return


def changed(args: Any) -> dict[str, Any]:
    """Those of the arguments in a dataclass that differ from their defaults."""
    # TrainingArguments so leave tokens out.
    values = args.to_dict() if hasattr(args, "to_dict") else vars(args)
    given = {f.name: values[f.name] for f in fields(args) if values.get(f.name) not in (f.default, None, "", [])}
    return {name: value for name, value in given.items() if isinstance(value, (str, int, float, bool))}
