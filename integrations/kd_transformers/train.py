"""`kd-transformers-train`: trains a text classifier or regressor with HuggingFace Trainer, alone or with a teacher.

The folder that it leaves (`--output_dir`) is an ordinary checkpoint for
`AutoModelForSequenceClassification.from_pretrained` and `AutoTokenizer.from_pretrained`. In it lies `all_results.json`,
as HuggingFace's example scripts write it: metrics (`eval_accuracy`), those of the teacher (`eval_teacher_accuracy`),
how often both decide alike (`eval_teacher_agreement`), parameters, bytes and seconds per step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from kd_accelerate.command import Stopped, run_command, signals
from kd_plugins import Batch, Distiller, View
from kd_plugins.catalog.registry import distiller_classes, from_json, options_from_strings
from kd_plugins.errors import DistillError, told
from kd_plugins.evaluation import Answers, Doubts, dirichlet_offset, uncertainty_metrics
from kd_plugins.finite import check_loss
from kd_plugins.states import MANIFEST, damage, read_json, seal, write_json
from kd_report import page_hint
from kd_report.measures import decisions
from kd_transformers import DistillationTrainer, students
from kd_transformers.arguments import Arguments, parse_args
from kd_transformers.cache import cache_teacher
from kd_transformers.checkpoints import RECIPE, Resumable, asked_for, checkpoints, identity
from kd_transformers.checks import PROBLEMS, called, class_order
from kd_transformers.data import Labels, fingerprint, load_other, load_text
from kd_transformers.metrics import agreement, build_metrics, check_best, default_metrics, ensemble, logits_of
from kd_transformers.recording import RecordCallback, UpdateTimer, changed
from kd_transformers.schedule import check_recipe
from kd_transformers.told import Absent, cached_logits

logger = logging.get_logger(__name__)

_RECORD, _RESULTS = "teacher.json", "all_results.json"
# Of a `Trainer` for teachers, which has no evaluation set and refuses a schedule of evaluations.
_ALONE = dict(eval_strategy="no", save_strategy="no", load_best_model_at_end=False, push_to_hub=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parses, trains, and turns what a user can mend into one line on stderr.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        Exit status.
    """
    arguments = parse_args(argv)
    return run_command("kd-transformers-train", lambda: train(arguments))


def train(arguments: Arguments) -> dict[str, Any]:
    """Trains and evaluates as the arguments say.

    Args:
        arguments: What `parse_args` returned.

    Returns:
        What `all_results.json` holds.
    """
    return Session(arguments).run()


class Session:
    """One run from its arguments to its results.

    Everything is loaded, built and checked before anything is trained, the teacher included.

    Args:
        arguments: Parsed arguments.
    """

    def __init__(self, arguments: Arguments) -> None:
        data, model, distillation, training = self.arguments = arguments
        self.output = Path(str(training.output_dir))
        self.hub = {"cache_dir": model.cache_dir, "trust_remote_code": model.trust_remote_code}
        method = distillation.distill
        self.options = options_from_strings(method, distillation.distill_args) if method else {}
        if training.disable_tqdm:
            disable_progress_bars()
            logging.disable_progress_bar()
        if training.device.type == "cpu":
            training.dataloader_pin_memory = False
        with training.main_process_first(desc="reading the data"):
            self.data = load_text(data, training.do_eval, cache_dir=model.cache_dir)
        self.labels: Labels = self.data.labels
        self._check_task()
        self.teacher_folder = self.output / "teacher"
        self.trains_teacher = distillation.train_teacher and not self._finished_teacher()
        self.tokenizer = self._tokenizer()
        self.teachers = self._teachers()
        self.student = self._student()
        self.peers = [self._checkpoint(name) for name in distillation.peer]
        networks = [self.student, *self.teachers, *self.peers]
        for network in networks:
            size = getattr(network.config, "vocab_size", None)
            if size is not None and len(self.tokenizer) > size:
                raise DistillError(
                    f"The tokenizer has {len(self.tokenizer)} tokens and {called(network)} reads {size}: use the"
                    " tokenizer that belongs to it."
                )
        length = min(students.check_length(network, data.max_seq_length, self.tokenizer) for network in networks)
        if length < data.max_seq_length:
            logger.warning(f"--max_seq_length {data.max_seq_length}: the networks read {length} tokens at most.")
        with training.main_process_first(desc="tokenizing"):
            self.train_set, self.evaluation_set = self.data.tokenize(self.tokenizer, length, data.pad_to_max_length)
            self.other_set = load_other(data, self.tokenizer, length, cache_dir=model.cache_dir)
        half = training.fp16 or training.bf16
        self.collate = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=8 if half else None)
        names = data.metric or default_metrics(self.labels.problem, data.task_name)
        self.compute_metrics = build_metrics(names, self.labels.problem, self.labels.count)
        check_recipe(training)
        if training.load_best_model_at_end and self.evaluation_set is not None:
            rows = self.evaluation_set["labels"][:8]
            check_best(training.metric_for_best_model, self.compute_metrics, rows, self.labels.count)
        self.checkpoint = asked_for(training, self._fingerprint)
        with told("The training cannot be set up with these arguments", ImportError, OSError, RuntimeError, ValueError):
            self.trainer = self._trainer()
        self.trainer.facts = {"arguments": self._fingerprint} if training.do_train else {}
        shown = {"student": _name(self.student), "teachers": [*map(_name, self.teachers)], "peers": distillation.peer}
        self.recorder = RecordCallback(
            self.trainer,
            host="kd-transformers-train",
            names=shown,
            data=self.data.source,
            settings=changed(data) | changed(model),
            teachers=[] if method else self.teachers,
            predicts=not training.do_eval,
            cached=distillation.cache_teacher,
        )
        self.timer = self.recorder if data.record else UpdateTimer()
        self.trainer.add_callback(self.timer)
        record = self.output / "run.json"
        if training.do_train and self.checkpoint is None and record.is_file():
            logger.warning(f"{self.output} holds an earlier run, whose files this one replaces.")
        self._say(
            f"Data: {self.data.source}, {len(self.train_set):,} rows to train on"
            + (f", {len(self.evaluation_set):,} to evaluate on" if self.evaluation_set is not None else "")
        )

    def run(self) -> dict[str, Any]:
        """Trains the teacher where asked, then the student; evaluates and saves.

        Raises:
            Stopped: A signal ended it; in the student's training after the step, with a checkpoint.
        """
        try:
            return self._run()
        except Stopped as stop:
            self.recorder.interrupted()
            stop.says = "there is no checkpoint to continue from."
            if any((folder / MANIFEST).is_file() for folder in checkpoints(self.output)):
                stop.says = f"continue with --output_dir {self.output} --resume_from_checkpoint true"
            raise

    def _run(self) -> dict[str, Any]:
        training = self.arguments.training
        self._forget_torn_results()
        if self.trains_teacher:
            if isinstance(self.trainer, DistillationTrainer):
                self.trainer.rehearse()
            self._train_teacher(self.teachers[0])
        if self.arguments.distillation.cache_teacher and training.do_train:
            self.trainer.train_dataset = self._cached(self.train_set, distiller=self.trainer.distiller)
        if training.do_train:
            self._train()
        if training.do_eval:
            self._evaluate()
        if self.recorder.record is not None:
            self._say(page_hint(self.output))
        if training.push_to_hub:
            self.trainer.push_to_hub()
        # The first process writes the results that all of them read.
        self.trainer.accelerator.wait_for_everyone()
        path = self.output / _RESULTS
        return read_json(path) if path.is_file() else {}

    def _forget_torn_results(self) -> None:
        """Trainer adds to the results of a run before, of which a kill may have left half a file."""
        for path in (self.output / _RESULTS, self.teacher_folder / _RESULTS):
            try:
                if path.is_file():
                    read_json(path)
            except DistillError as error:
                logger.warning(f"{error} It is written anew.")
                path.unlink(missing_ok=True)

    def _cached(self, rows: Any, **options: Any) -> Any:
        """Rows with what the teachers say; a teacher is loaded where some have to be asked for."""
        training, teachers = self.arguments.training, self.teachers
        if self.trains_teacher:
            teachers = [students.absent_teacher(str(self.teacher_folder), None, self.labels)]
        return cache_teacher(
            rows,
            teachers if len(teachers) > 1 else teachers[0],
            self.collate,
            batch_size=training.per_device_eval_batch_size,
            device=training.device,
            **options,
        )

    def _say(self, text: str) -> None:
        if self.arguments.training.process_index == 0:
            print(text, flush=True)

    # Before the training

    def _check_task(self) -> None:
        name, task = self.arguments.distillation.distill, PROBLEMS[self.labels.problem]
        if self.arguments.data.ood_dataset and task != "classification":
            raise DistillError(
                f"--ood_dataset reads the uncertainty of a classifier, and the labels of {self.data.source} make a"
                f" {task} problem: leave it out."
            )
        if self.arguments.training.label_smoothing_factor and task == "regression":
            raise DistillError(
                f"--label_smoothing_factor smooths classes, and the labels of {self.data.source} are numbers: leave it"
                " out."
            )
        for part, cls in distiller_classes(name).items() if name else ():
            if task not in cls.tasks:
                raise DistillError(
                    f"{part} fits {', '.join(cls.tasks)}, and the labels of {self.data.source} make a {task} problem:"
                    " choose a method that fits (kd-plugins list)."
                )

    def _tokenizer(self) -> Any:
        """The one tokenizer of all networks, and the check that it is one."""
        _, model, distillation, _ = self.arguments
        named = {name: name for name in (model.model_name_or_path, *distillation.teacher, *distillation.peer) if name}
        if distillation.train_teacher and not self.trains_teacher:
            named = {name: path for name, path in named.items() if name not in distillation.teacher}
            named["the teacher"] = str(self.teacher_folder)
        first = model.tokenizer_name or next(iter(named.values()), None) or model.config_name
        if first is None or (first == model.config_name and Path(first).suffix == ".json"):
            size, length = model.vocab_size, self.arguments.data.max_seq_length
            tokenizer = students.train_tokenizer(self.data.texts(), size, max(length, 512))
        else:
            if model.vocab_size != type(model).vocab_size:
                logger.warning(f"--vocab_size is of a tokenizer trained on the data; {first} has one: it is left out.")
            revision = {"revision": model.model_revision} if first == model.model_name_or_path else {}
            tokenizer = students.load_tokenizer(first, **self.hub, **revision)
        others = {name: students.load_tokenizer(path, **self.hub) for name, path in named.items() if path != first}
        students.check_tokenizers(tokenizer, others)
        return tokenizer

    def _teachers(self) -> list[Any]:
        given = self.arguments.distillation
        if self.trains_teacher and given.teacher:
            return [self._checkpoint(given.teacher[0])]
        if self.trains_teacher:
            set_seed(self.arguments.training.seed)
            return [self._bert(*self._teacher_size)]
        load: Any = students.absent_teacher if given.cache_teacher else students.load_teacher
        names = [str(self.teacher_folder)] if given.train_teacher else given.teacher
        pairs = zip_longest(names, given.teacher_checkpoint)
        teachers = [load(name, weights, self.labels, **self.hub) for name, weights in pairs]
        self.labels = students.match_names(self.labels, teachers)
        return teachers

    def _student(self) -> Any:
        _, model, _, training = self.arguments
        # The same student whether its teacher is trained in this run or was in an earlier one.
        set_seed(training.seed)
        if model.model_name_or_path:
            options = {"fresh_head": training.do_train, "revision": model.model_revision}
            student = self._checkpoint(model.model_name_or_path, **options)
            if not training.do_train:
                self.labels = self.data.labels = students.in_order_of(self.labels, student)
            return student
        if not training.do_train:
            raise DistillError("There is no student to evaluate: give --model_name_or_path, or add --do_train.")
        if model.config_name:
            return students.from_configuration(model.config_name, self.labels, self.hub, dtype=torch.float32)
        if self.teachers:
            size, heads = model.student_hidden_size, model.student_heads
            return students.shrink(self.teachers[0], self.labels, model.student_layers, size, heads)
        return self._bert(model.student_layers or 4, model.student_hidden_size or 128, model.student_heads or 4)

    def _checkpoint(self, name: str, *, fresh_head: bool = True, **options: Any) -> Any:
        """What is trained: in full precision, whatever the checkpoint was stored in."""
        options |= {**self.hub, "dtype": torch.float32}
        return students.from_checkpoint(name, self.labels, fresh_head=fresh_head, **options)

    def _bert(self, *size: int) -> Any:
        return students.from_scratch(self.labels, self.tokenizer, self.arguments.data.max_seq_length, *size)

    @property
    def _teacher_size(self) -> list[int]:
        """Layers, hidden size and heads of a teacher from scratch."""
        given = self.arguments.distillation
        return [given.teacher_layers, given.teacher_hidden_size, given.teacher_heads]

    def _trainer(self) -> Resumable:
        method = self.arguments.distillation.distill
        options: dict[str, Any] = {"eval_dataset": self.evaluation_set, "compute_metrics": self.compute_metrics}
        if method:
            options |= {"distiller": method, "distiller_args": self.options, "record": False}
            options |= {"teacher_model": self.teachers or None, "peer_models": self.peers}
        cls = DistillationTrainer if method else Resumable
        return self._made(cls, self.student, self.arguments.training, callbacks=[_Stop(self)], **options)

    def _made(self, cls: type[Resumable], model: Any, args: Any, **options: Any) -> Resumable:
        """A trainer on the training set, whose loss is the mean over a batch.

        As it comes, `Trainer` multiplies the loss by accumulation steps and processes where a model takes
        `num_items_in_batch` but ignores it, as BERT does; then teachers and plain students would train otherwise than
        distilled ones.
        """
        common = {"train_dataset": self.train_set, "data_collator": self.collate, "processing_class": self.tokenizer}
        trainer = cls(model=model, args=args, **common, **options)
        trainer.allow_nonfinite = self.arguments.model.allow_nonfinite
        if cls is Resumable:
            trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = False
        return trainer

    # The teacher

    def _teacher_record(self) -> dict[str, Any]:
        """What a teacher of this run is trained with."""
        data, _, distillation, training = self.arguments
        rows = training.per_device_train_batch_size
        return {
            "start": distillation.teacher or self._teacher_size,
            "data": self._fingerprint["data"],
            "classes": list(self.labels.names or ()),
            "epochs": distillation.teacher_epochs or training.num_train_epochs,
            "max_steps": -1 if distillation.teacher_epochs else training.max_steps,
            "learning_rate": distillation.teacher_learning_rate or training.learning_rate,
            "batch_size": rows * training.gradient_accumulation_steps * training.world_size,
            "max_seq_length": data.max_seq_length,
            "seed": training.seed,
            **{name: self._fingerprint[name] for name in RECIPE},
        }

    def _finished_teacher(self) -> bool:
        """Whether an earlier run left the teacher that this one would train."""
        path = self.teacher_folder / _RECORD
        if not path.is_file():
            return False
        why = damage(self.teacher_folder) if (self.teacher_folder / MANIFEST).is_file() else ""
        try:
            saved, ours = read_json(path), self._teacher_record()
        except DistillError as error:
            why = why or str(error)
        if why:
            logger.warning(f"The teacher in {self.teacher_folder} is trained anew: {why}")
            return False
        other = [name for name in ours if saved.get(name, ours[name]) != ours[name]]
        if other:
            raise DistillError(
                f"{self.teacher_folder} holds a teacher that was trained with another {', '.join(other)}: take another"
                " --output_dir, remove that folder, or give it with --teacher in place of --train_teacher."
            )
        return True

    def _train_teacher(self, teacher: Any) -> None:
        training = self.arguments.training
        record = self._teacher_record()
        self._say(f"Training the teacher: {_size(teacher)}")
        args = dataclasses.replace(
            training,
            output_dir=str(self.teacher_folder),
            num_train_epochs=record["epochs"],
            max_steps=record["max_steps"],
            learning_rate=record["learning_rate"],
            resume_from_checkpoint=None,
            **_ALONE,
        )
        set_seed(training.seed)
        # As a teacher it was frozen when the student's trainer was built, which is before, for its checks.
        teacher.requires_grad_(True)
        trainer = self._made(Resumable, teacher, args)
        result = trainer.train()
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.accelerator.wait_for_everyone()
        if training.process_index == 0:
            # Last of all: a folder that has them is finished.
            write_json(self.teacher_folder / _RECORD, record)
            seal(self.teacher_folder)
        teacher.zero_grad(set_to_none=True)
        teacher.requires_grad_(False).eval()

    # The student

    def _train(self) -> None:
        _, model, _, training = self.arguments
        trainer, named = self.trainer, model.model_name_or_path or model.config_name
        shaped = model.student_hidden_size or model.student_heads or model.student_init == "scratch"
        if self.teachers and not (named or shaped):
            teacher = self.teachers[0]
            kept = students.copy_layers(self.student, teacher.load() if isinstance(teacher, Absent) else teacher)
            self._say(f"The student starts from the teacher's layers {', '.join(map(str, kept.values()))}.")
        self._say(f"Training the student: {_size(self.student)}")
        set_seed(training.seed)
        with signals.hold():
            result = trainer.train(resume_from_checkpoint=self.checkpoint)
        signals.check()
        trainer.save_model()
        trainer.save_metrics("train", {**result.metrics, "train_samples": len(self.train_set)})
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        facts: dict[str, float] = {
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "bytes": sum(path.stat().st_size for path in self.output.glob("model*.safetensors")),
        }
        if self.timer.seconds_per_step is not None:
            facts["seconds_per_step"] = self.timer.seconds_per_step
        trainer.save_metrics("student", facts)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What changes the numbers of a run, by argument, as JSON has it; its length may be changed on the way."""
        return identity(self.arguments, fingerprint(self.data))

    def _evaluate(self) -> None:
        trainer, problem = self.trainer, self.labels.problem
        predicted = _predict(trainer, self.evaluation_set)
        if not self.trainer.allow_nonfinite:
            check_loss(predicted.metrics["eval_loss"])
        metrics: dict[str, Any] = {**predicted.metrics, "eval_samples": len(predicted.label_ids)}
        told: list[np.ndarray] = []
        if self.teachers:
            told = self._told(self.evaluation_set)
            taught = ensemble(told, problem)
            scores = self.compute_metrics(EvalPrediction(predictions=taught, label_ids=predicted.label_ids))
            metrics |= {f"eval_teacher_{name}": value for name, value in scores.items()}
            metrics["eval_teacher_agreement"] = agreement(logits_of(predicted.predictions), taught, problem)
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if isinstance(value, float)}
        answers = self._answers(logits_of(predicted.predictions), told, predicted.label_ids)
        if problem == "single_label_classification":
            metrics |= self._uncertainty(answers.found())
        trainer.log(metrics)
        trainer.save_metrics("eval", metrics)
        self.recorder.finish(metrics, answers.found(), answers.classes)
        hidden = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        self._say("  ".join(f"{name} {value:.4f}" for name, value in shown.items() if name not in hidden))

    def _answers(self, logits: np.ndarray, told: list[np.ndarray], labels: np.ndarray | None) -> Answers:
        """What student and teachers decide, by their logits of some rows; with labels or without."""
        answers = Answers(dirichlet_offset(self._distiller, self.labels.count))
        for rows in np.array_split(np.arange(len(logits)), -(-len(logits) // 512)):
            truth = None if labels is None else torch.as_tensor(labels[rows])
            if truth is not None and self.labels.problem == "single_label_classification":
                truth = truth.flatten()
            batch = Batch(labels=truth, size=len(rows), task=PROBLEMS[self.labels.problem])
            ours, *theirs = (decisions(View(torch.as_tensor(x[rows])), batch) for x in (logits, *told))
            if ours is None:
                break
            answers.add("student", *ours)
            answers.ensemble([x.logits for x in theirs if x is not None], ours.labels, ours.logits)
        return answers

    def _uncertainty(self, found: Mapping[str, Doubts]) -> dict[str, float]:
        """How uncertain student and teachers are of the evaluation set, and of texts of another kind."""
        other: Mapping[str, Doubts] = {}
        if self.other_set is not None:
            told = self._told(self.other_set) if self.teachers else []
            other = self._answers(logits_of(_predict(self.trainer, self.other_set).predictions), told, None).found()
        prefixes = {"student": "eval_", "teacher": "eval_teacher_"}
        return {
            f"{prefixes[who]}{name}": value
            for who, doubts in found.items()
            for name, value in uncertainty_metrics(doubts, other.get(who)).items()
        }

    @property
    def _distiller(self) -> Distiller | None:
        """What the student is distilled with; of one that is only evaluated, what its folder tells."""
        path = Path(self.arguments.model.model_name_or_path or "") / "distiller.json"
        saved = not self.arguments.training.do_train and path.is_file()
        return getattr(self.trainer, "distiller", None) or (from_json(path) if saved else None)

    def _told(self, rows: Any) -> list[np.ndarray]:
        """Each teacher's logits of some rows, classes in the student's order."""
        if self.arguments.distillation.cache_teacher:
            logits = cached_logits(self._cached(rows))
        else:
            args = dataclasses.replace(self.arguments.training, report_to="none", **_ALONE)
            trainers = (Trainer(model=t, args=args, data_collator=self.collate) for t in self.teachers)
            logits = [logits_of(_predict(trainer, rows).predictions) for trainer in trainers]
        orders = [class_order(self.student, teacher) for teacher in self.teachers]
        return [x if order is None else x[:, list(order)] for x, order in zip(logits, orders, strict=True)]


def _predict(trainer: Trainer, rows: Any) -> PredictionOutput:
    """What a network says of all of some rows, in their order; grouped by length, an evaluation would have another."""
    whole = {"train_sampling_strategy": "random", "dataloader_drop_last": False}
    before = {name: getattr(trainer.args, name) for name in whole}
    try:
        vars(trainer.args).update(whole)
        return trainer.predict(rows, metric_key_prefix="eval")
    finally:
        vars(trainer.args).update(before)


class _Stop(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if signals.agreed(self.session.trainer.accelerator, state.global_step):
            control.should_save = control.should_training_stop = True
            self.session.recorder.interrupted()


def _name(model: Any) -> str:
    return f"{called(model)}, {model.config.num_hidden_layers} layers"


def _size(model: Any) -> str:
    return f"{_name(model)}, {sum(p.numel() for p in model.parameters()):,} parameters"


if __name__ == "__main__":
    raise SystemExit(main())
