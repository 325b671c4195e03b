"""The command line: TrainingArguments, and the arguments of data, models and distillation.

Every flag may be written with underscores or dashes. A YAML or JSON file of arguments may stand first, or after
`--config`; flags override it.
"""

# HfArgumentParser reads the annotations of these classes: no `from __future__ import annotations` here.

import math
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from transformers import HfArgumentParser, TrainingArguments

from kd_accelerate.command import explain, flags, given, with_file
from kd_plugins.catalog.values import AtLeastOne, NonNegative, Positive, Range, Share, convert
from kd_transformers.docstrings import DOCSTRINGS_DEFAULTS

_COUNT = AtLeastOne, "a whole number, at least 1"
_BETA = Annotated[float, Range(low=0, below=1)], "a number from 0, below 1"
# What TrainingArguments take, and the training fails at or makes nonsense of.
_RANGES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    "gradient_accumulation_steps": _COUNT,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "weight_decay"), (NonNegative, "a number, at least 0")),
    "neftune_noise_alpha": (NonNegative | None, "a number, at least 0"),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), (Positive | None, "a number above 0")),
    "label_smoothing_factor": (Share, "a number from 0 to 1"),
    "seed": (Annotated[int, Range(low=0, high=2**32 - 1)], f"a whole number from 0 to {2**32 - 1}"),
    "dataloader_num_workers": (Annotated[int, Range(low=0)], "a whole number, at least 0"),
}
_TEACHER_SHAPE = ("teacher_layers", "teacher_hidden_size", "teacher_heads")
# Flags that say something of another one.
_BELONGS = {
    "dataset_config_name": "dataset_name",
    "validation_file": "train_file",
    "ood_split": "ood_dataset",
    "model_revision": "model_name_or_path",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    **dict.fromkeys(("distill_args", "peer"), "distill"),
    **dict.fromkeys(("teacher_epochs", "teacher_learning_rate", *_TEACHER_SHAPE), "train_teacher"),
}
_DATA_FLAGS = ("task_name", "dataset_name", "train_file", "validation_file")


def _field(default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata=metadata)


def _list(help: str, metavar: str) -> Any:
    # Both "--flag a --flag b" and "--flag a b".
    return field(default_factory=list, metadata={"help": help, "action": "extend", "metavar": metavar})


@dataclass
class DataArguments:
    """What is trained and evaluated on. Nothing named: docstrings of Python's standard library, embedded."""

    _argument_group_name = "Data"

    task_name: str | None = _field(help="GLUE task: cola, mrpc, sst2, stsb, ...")
    dataset_name: str | None = _field(help="data set of the hub, or a folder of data files")
    dataset_config_name: str | None = _field(help="configuration of --dataset_name")
    train_file: str | None = _field(help="csv, json, jsonl or parquet file to train on")
    validation_file: str | None = _field(help="csv, json, jsonl or parquet file to evaluate on")
    train_split: str = _field("train", help="split to train on, or a slice of one: train[:10000]")
    validation_split: str | None = _field(
        help="split to evaluate on, or a slice (default: validation; of mnli the matched one)"
    )
    text_column: str | None = _field(help="column of the text (default: by its name, or the only text column)")
    text_pair_column: str | None = _field(help="column of the second text")
    label_column: str | None = _field(help="column of the label: class, number, or list of classes")
    max_seq_length: int = _field(128, help="longest input in tokens; longer ones are cut")
    pad_to_max_length: bool = _field(False, help="pad every input to --max_seq_length, not to the longest of its batch")
    max_train_samples: int | None = _field(help="train on this many rows, the first ones")
    max_eval_samples: int | None = _field(help="evaluate on this many rows, the first ones")
    ood_dataset: str | None = _field(
        help="texts of another kind: data set of the hub, folder or file; how well the uncertainty of student and"
        " teachers tells them from the evaluation split goes to all_results.json"
    )
    ood_split: str = _field("validation", help="split of --ood_dataset, or a slice of one")
    record: bool = _field(True, help="leave a record for kd-plugins report")
    metric: list[str] = _list(
        "metric shipped with this package (accuracy, f1, matthews_correlation, pearsonr, spearmanr), name on the hub,"
        " or path; repeatable (default: those of the task)",
        "NAME",
    )


@dataclass
class ModelArguments:
    """The student. Nothing named: made from the teacher's layers, or from scratch where there is no teacher."""

    _argument_group_name = "Student"

    model_name_or_path: str | None = _field(help="checkpoint that the student starts from")
    config_name: str | None = _field(help="configuration of a student that starts from scratch")
    tokenizer_name: str | None = _field(
        help="tokenizer, or WordPiece vocab.txt (default: the student's, the teacher's, or one trained on the data)"
    )
    student_init: Literal["teacher", "scratch"] | None = _field(
        help="take embeddings, head and --student_layers layers of the teacher, or start from random weights"
    )
    student_layers: int | None = _field(help="layers of the student (default: half of the teacher's)")
    student_hidden_size: int | None = _field(help="hidden size of a student from scratch")
    student_heads: int | None = _field(help="attention heads of a student from scratch")
    vocab_size: int = _field(4096, help="size of a vocabulary that is trained on the data")
    allow_nonfinite: bool = _field(False, help="go on where the loss is NaN or infinite, in place of stopping")
    cache_dir: str | None = _field(help="where downloads are kept")
    model_revision: str = _field("main", help="revision of --model_name_or_path")
    trust_remote_code: bool = _field(False, help="allow models of the hub to run code of their own")


@dataclass
class DistillationArguments:
    """The method and its teachers."""

    _argument_group_name = "Distillation"

    distill: str | None = _field(help="distiller, or several joined with +; see `kd-plugins list`", metavar="NAME")
    distill_args: list[str] = _list("options of the distiller; see `kd-plugins info NAME`", "K=V")
    teacher: list[str] = _list("teacher: name on the hub, or path (repeatable)", "MODEL")
    teacher_checkpoint: list[str] = _list(
        'weights of the i-th teacher: a folder or a file ("": the published ones)', "PATH"
    )
    cache_teacher: bool = _field(
        False,
        help="ask the teachers once for each row, before the training, where a method reads their logits and layers"
        " that it names, and load none that an earlier run has asked",
    )
    peer: list[str] = _list(
        "checkpoint that is trained together with the student, of an online method (repeatable)", "MODEL"
    )
    train_teacher: bool = _field(
        False,
        help="train the teacher on the same data first, and save it in output_dir/teacher; one that is there already is"
        " taken as it is. With --teacher that checkpoint is fine-tuned, else a small BERT is trained from scratch",
    )
    teacher_epochs: float | None = _field(help="epochs of --train_teacher (default: --num_train_epochs)")
    teacher_learning_rate: float | None = _field(help="learning rate of --train_teacher (default: --learning_rate)")
    teacher_layers: int = _field(4, help="layers of a teacher from scratch")
    teacher_hidden_size: int = _field(128, help="hidden size of a teacher from scratch")
    teacher_heads: int = _field(4, help="attention heads of a teacher from scratch")


class _Help(ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, [], SUPPRESS) else super()._get_help_string(action)


class Arguments(NamedTuple):
    """Everything that the command line says."""

    data: DataArguments
    model: ModelArguments
    distillation: DistillationArguments
    training: TrainingArguments


def build_parser() -> HfArgumentParser:
    """The parser: our flags, and every field of TrainingArguments."""
    defaults = ", ".join(f"--{name} {value}" for name, value in DOCSTRINGS_DEFAULTS.items())
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, DistillationArguments, TrainingArguments],
        prog="kd-transformers-train",
        # Else an error stands below a page of flags.
        usage="%(prog)s [--FLAG ...]",
        description="Train a text classifier or regressor of transformers, alone or with knowledge distillation.",
        epilog=f"Without a data set: docstrings of Python's standard library, with other defaults: {defaults}. Without"
        " --do_train and --do_eval: both.",
        formatter_class=_Help,
        # A prefix of one flag must not end up as another (--distill).
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", default=SUPPRESS, help="YAML or JSON file of arguments")
    for action in flags(parser).values():
        if action.dest in ("distill_args", "teacher_checkpoint"):
            # "--distill-args" with nothing after it is what a script with an empty variable writes.
            action.nargs = "*"
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Parses the command line over the arguments of a file; exits with a message where it cannot.

    Args:
        argv: Arguments; None takes those of the process.
    """
    parser, words = build_parser(), list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and Path(words[0]).suffix in (".json", ".yaml", ".yml"):
        words.insert(0, "--config")
    words = with_file(parser, words, {})
    named = given(parser, words)
    if not any(name in named for name in (*_DATA_FLAGS, "help")):
        parser.set_defaults(**DOCSTRINGS_DEFAULTS)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, True, look_for_args_file=False)
    except Exception as error:
        # TrainingArguments refuse combinations of their own.
        parser.error(str(error))
    if unknown:
        parser.error(explain(parser, unknown[0]))
    arguments = Arguments(*parsed[:4])
    if not (named & {"do_train", "do_eval", "do_predict"}):
        arguments.training.do_train = arguments.training.do_eval = True
    if problem := _problem(arguments, named):
        parser.error(problem)
    return arguments


def _problem(arguments: Arguments, named: set[str]) -> str | None:
    """The first thing that is wrong with the arguments, seen without any data."""
    data, model, distillation, training = arguments
    if sum(bool(x) for x in (data.task_name, data.dataset_name, data.train_file or data.validation_file)) > 1:
        return "expected one source of data, got several: give --task_name, --dataset_name or --train_file"
    values = {**vars(data), **vars(model), **vars(distillation)}
    everything = vars(training) | values
    for name, value in everything.items():
        # TrainingArguments read what begins with a brace.
        if name.endswith("_kwargs") and isinstance(value, str):
            return f'--{name}: expected JSON, {{"name": value, ...}}, got {value}'
    for name, other in _BELONGS.items():
        if name in named and everything[name] and not everything[other]:
            return f"--{name} belongs to --{other}, which is not given: add --{other}"
    if len(distillation.teacher_checkpoint) > len(distillation.teacher):
        return "--teacher-checkpoint: the i-th belongs to the i-th --teacher, and there are more of them"
    if distillation.train_teacher and len(distillation.teacher) > 1:
        return "--train_teacher trains one teacher, got several --teacher"
    if distillation.train_teacher and distillation.teacher_checkpoint:
        return "--teacher-checkpoint gives trained weights, and --train_teacher trains them: leave one out"
    taught = distillation.teacher or distillation.train_teacher
    if taught and not distillation.distill and model.model_name_or_path and training.do_train:
        return (
            "expected --distill with a teacher, got none: say which method (--distill kd), or leave the teacher out"
            " and compare the trained student with it by --do_eval alone"
        )
    if taught and not distillation.distill and not (model.student_init or model.model_name_or_path):
        return (
            "expected --distill with a teacher, got none: say which method (--distill kd), or that the teacher is only"
            " where the student starts (--student_init teacher), or what it is compared with (--student_init scratch)"
        )
    if data.ood_dataset and not training.do_eval:
        return "--ood_dataset is compared with the evaluation split: add --do_eval"
    if distillation.cache_teacher and not (distillation.distill and taught):
        return "--cache_teacher expects --distill and a teacher"
    if distillation.cache_teacher and not training.do_train:
        return "--cache_teacher asks the teachers about the training rows: add --do_train"
    if "labels" not in (training.label_names or ["labels"]):
        return "--label_names: the rows have their labels in the column labels: leave it out"
    if training.do_predict:
        return "--do_predict is not supported: evaluate with --do_eval"
    for name in ("batch_eval_metrics", "prediction_loss_only", "eval_do_concat_batches"):
        if getattr(training, name) != getattr(TrainingArguments, name):
            return f"--{name}: the metrics are of all predictions at once: leave it out"
    if distillation.teacher and named.intersection(_TEACHER_SHAPE):
        return "--teacher_layers, --teacher_hidden_size and --teacher_heads shape one from scratch: leave out --teacher"
    if model.model_name_or_path and (model.config_name or model.student_init or model.student_layers):
        return "--model_name_or_path is a whole student: leave out --config_name, --student_layers, --student_init"
    if model.config_name and (model.student_init == "teacher" or model.student_layers):
        return "--config_name describes a student from scratch: leave out --student_layers and --student_init teacher"
    shaped = model.student_hidden_size or model.student_heads
    if shaped and (model.model_name_or_path or model.config_name or model.student_init == "teacher"):
        return "--student_hidden_size and --student_heads shape a new student: add --student_init scratch alone"
    if model.student_init == "teacher" and not (distillation.teacher or distillation.train_teacher):
        return "--student_init teacher: expected a teacher, got none: add --teacher or --train_teacher"
    for name, value in vars(training).items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"--{name}: expected a finite number, got {value}"
    for name, (hint, words) in _RANGES.items():
        try:
            convert(getattr(training, name), hint)
        except ValueError:
            return f"--{name}: expected {words}, got {getattr(training, name)}"
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
            return f"--{name}: expected a positive number, got {value}"
    return None
