"""Text data of the training script: where it is from, which columns it has, what its labels are, its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from kd_plugins.errors import DistillError, did_you_mean, told
from kd_transformers.arguments import DataArguments
from kd_transformers.docstrings import load_docstrings

_GLUE = "nyu-mll/glue"
_EXTENSIONS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXTS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("sentence",), ("text",), ("content",), ("review",)),
)
_LABELS = ("label", "labels", "target", "class", "score")


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set are.

    Args:
        problem: transformers' name: `single_label_classification`, `multi_label_classification` or `regression`.
        names: Names of the classes in the order of the logits; None where the data set has numbers alone.
        count: Number of logits.
        encode: From a value of the label column to what the model is given: a class number, floats `[count]`, a float.
    """

    problem: str
    names: tuple[str, ...] | None
    count: int
    encode: Callable[[Any], Any]

    @property
    def config(self) -> dict[str, Any]:
        """What a model's configuration says of its labels."""
        config: dict[str, Any] = {"num_labels": self.count, "problem_type": self.problem}
        if self.names is not None:
            config |= {"id2label": dict(enumerate(self.names)), "label2id": {n: i for i, n in enumerate(self.names)}}
        return config


@dataclass
class TextData:
    """A training and an evaluation split of one data set, as they were read.

    Args:
        train: Rows to train on.
        evaluation: Rows to evaluate on; None where none are asked for.
        columns: The text column, and that of a second text.
        label_column: The label column.
        labels: What the labels are.
        source: Where the data is from, in words.
    """

    train: Dataset
    evaluation: Dataset | None
    columns: tuple[str, ...]
    label_column: str
    labels: Labels
    source: str

    def texts(self) -> list[str]:
        """All texts of the training split."""
        return [text for column in self.columns for text in self.train[column]]

    def tokenize(self, tokenizer: Any, length: int, pad: bool = False) -> tuple[Dataset, Dataset | None]:
        """Both splits as a model takes them: token ids and `labels`.

        Args:
            tokenizer: Of the student and of the teachers.
            length: Longest input in tokens.
            pad: Pad all inputs to that length.
        """
        # Only what is needed: datasets hashes the function, with all it refers to, for its cache.
        encode, label, columns = self.labels.encode, self.label_column, self.columns
        padding = "max_length" if pad else False

        def apply(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            texts = [list(rows[name]) for name in columns]
            encoded = tokenizer(*texts, truncation=True, max_length=length, padding=padding)
            return {**encoded, "labels": [encode(value) for value in rows[label]]}

        def tokens(split: Dataset) -> Dataset:
            return split.map(apply, batched=True, remove_columns=split.column_names, desc="Tokenizing")

        return tokens(self.train), None if self.evaluation is None else tokens(self.evaluation)


def load_text(args: DataArguments, evaluate: bool = True, **hub: Any) -> TextData:
    """Reads the data that the arguments name.

    Args:
        args: Which data set, columns and how many rows.
        evaluate: Whether an evaluation split is needed.
        hub: Options of `datasets.load_dataset`: `cache_dir`, `trust_remote_code`.
    """
    raw, source = _read(args, hub)
    held_out = args.validation_split or ("validation_matched" if args.task_name == "mnli" else "validation")
    remedy = "Give --validation_file." if args.train_file else "Name one of them with {}."
    train = _rows(raw, args.train_split, remedy.format("--train_split"))
    evaluation = _rows(raw, held_out, remedy.format("--validation_split")) if evaluate else None
    columns = _text_columns(args, train)
    label = _label_column(args, train)
    missing = [c for c in (*columns, label) if evaluation is not None and c not in evaluation.column_names]
    if missing:
        raise DistillError(f"{source}: the split {held_out} has no column {missing[0]}, as {args.train_split} has.")
    labels = read_labels(train, label)
    train, evaluation = _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples)
    data = TextData(train, evaluation, columns, label, labels, source)
    for name, split in ((args.train_split, train), (held_out, evaluation)):
        if split is not None:
            _check_rows(data, name, split)
    return data


def load_other(args: DataArguments, tokenizer: Any, length: int, **hub: Any) -> Dataset | None:
    """The texts of `--ood_dataset` as token ids, without labels; None where there are none.

    Args:
        args: Which data set, and which rows.
        tokenizer: Of the student and of the teachers.
        length: Longest input in tokens.
        hub: Options of `datasets.load_dataset`.
    """
    name = args.ood_dataset
    if name is None:
        return None
    if Path(name).is_file():
        raw = _read_files("--ood_dataset", {args.ood_split: name}, hub)
    else:
        # The loader raises errors of many libraries; each means that the data is not to be had.
        with told(f"--ood_dataset {name} cannot be loaded", Exception, remedy="check the name and the network."):
            raw = datasets.load_dataset(name, **hub)
    rows = _rows(raw, args.ood_split, "Name one of them with --ood_split.")
    named = args.text_column in rows.column_names
    columns = _text_columns(args if named else DataArguments(label_column=args.label_column), rows)

    def apply(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(*(list(batch[column]) for column in columns), truncation=True, max_length=length))

    return rows.map(apply, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def fingerprint(data: TextData) -> str:
    """A hash of the texts and labels that are trained on."""
    digest = hashlib.sha256()
    for batch in data.train.select_columns([*data.columns, data.label_column]).iter(1000):
        digest.update(repr([list(column) for column in batch.values()]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


# Reading


def _read(args: DataArguments, hub: Mapping[str, Any]) -> tuple[Any, str]:
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file}
        return _read_files("--{}_file", {split: path for split, path in files.items() if path}, hub), args.train_file
    if not (args.task_name or args.dataset_name):
        return load_docstrings(), "docstrings of Python's standard library"
    name, config = (_GLUE, args.task_name) if args.task_name else (args.dataset_name, args.dataset_config_name)
    source = f"{name} {config}" if config else str(name)
    remedy = "check the name and the network, or give local files with --train_file and --validation_file."
    # The loader raises errors of many libraries; each means that the data is not to be had.
    with told(f"The data set {source} cannot be loaded", Exception, remedy=remedy):
        return datasets.load_dataset(name, config, **hub), source


def _read_files(flag: str, files: Mapping[str, str], hub: Mapping[str, Any]) -> DatasetDict:
    """The files of splits; `flag` names a file to the user, by its split."""
    splits = {}
    for split, path in files.items():
        kind, flag_of = _EXTENSIONS.get(Path(path).suffix.lower()), flag.format(split)
        if kind is None:
            raise DistillError(f"{flag_of}: expected a file ending in {', '.join(_EXTENSIONS)}, got {path}.")
        if not Path(path).is_file():
            raise DistillError(f"{flag_of}: there is no file {path}.")
        options = {"sep": "\t"} if path.lower().endswith(".tsv") else {}
        try:
            loaded = datasets.load_dataset(kind, data_files={split: path}, cache_dir=hub.get("cache_dir"), **options)
        except Exception as error:
            raise DistillError(f"{flag_of} {path} cannot be read: {error.__cause__ or error}") from error
        splits[split] = loaded[split]
    return DatasetDict(splits)


def _rows(raw: Mapping[str, Any], split: str, remedy: str) -> Dataset:
    """The rows of a split, or of a slice or sum of splits as `datasets` writes them: `train[:10%]+train[90%:]`."""
    if split in raw:
        return raw[split]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in raw.items()})
    except ValueError as error:
        message = f"Expected a split {split}, got a data set with {', '.join(raw)}. {remedy}"
        raise DistillError(message) from error
    chosen = [raw[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _first(split: Dataset | None, rows: int | None) -> Any:
    return split if split is None or rows is None else split.select(range(min(rows, len(split))))


# Columns


def _text_columns(args: DataArguments, train: Dataset) -> tuple[str, ...]:
    names = train.column_names
    for flag, name in (("--text_column", args.text_column), ("--text_pair_column", args.text_pair_column)):
        if name is not None and name not in names:
            raise DistillError(f"{flag}: expected a column, {', '.join(names)}, got {name}.{did_you_mean(name, names)}")
    if args.text_column or args.text_pair_column:
        if not args.text_column:
            raise DistillError("--text_pair_column is a second text: give --text_column, the first, too.")
        return tuple(name for name in (args.text_column, args.text_pair_column) if name)
    for known in _TEXTS:
        if set(known) <= set(names):
            return known
    label = args.label_column or next((name for name in _LABELS if name in names), None)
    texts = [n for n in names if n != label and getattr(train.features[n], "dtype", "") in ("string", "large_string")]
    if len(texts) == 1:
        return (texts[0],)
    raise DistillError(f"Expected one text column, got {', '.join(names)}: say which with --text_column.")


def _label_column(args: DataArguments, train: Dataset) -> str:
    names = train.column_names
    name = args.label_column or next((name for name in _LABELS if name in names), None)
    if name is None or name not in names:
        got = f"{name}.{did_you_mean(name, names)}" if name else "none that is called so: name it with --label_column."
        raise DistillError(f"Expected a label column among {', '.join(names)}, got {got}")
    return name


# Labels


def read_labels(train: Dataset, column: str) -> Labels:
    """What the labels of a column are, by its type and values.

    Text and `ClassLabel` are classes, as are whole numbers; other numbers are a regression; lists are the classes that
    hold, or a 0 or 1 for each class.
    """
    feature = train.features[column]
    values = train[column][:]  # row by row a column is slow to read
    if any(value is None for value in values):
        raise DistillError(f"Every row needs a label, and {column} is empty in some: drop those rows.")
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _multi_label(inner, values)
    if isinstance(feature, datasets.ClassLabel):
        return _classes("single_label_classification", tuple(feature.names), range(len(feature.names)))
    kind = getattr(feature, "dtype", "")
    if kind.startswith(("float", "double")):
        return Labels("regression", None, 1, float)
    classes = sorted(set(values))
    if len(classes) < 2:
        raise DistillError(f"Expected two classes or more in {column}, got {classes}.")
    numbered = kind.startswith(("int", "uint", "bool")) and [int(c) for c in classes] == list(range(len(classes)))
    return _classes("single_label_classification", None if numbered else tuple(map(str, classes)), classes)


def _multi_label(inner: Any, values: Sequence[Sequence[Any]]) -> Labels:
    widths = {len(value) for value in values}
    members = sorted({item for value in values for item in value})
    if isinstance(inner, datasets.ClassLabel):
        names, classes = tuple(inner.names), list(range(len(inner.names)))
    elif len(widths) == 1 and widths != {1} and set(members) <= {0, 1}:
        (width,) = widths
        return Labels("multi_label_classification", None, width, lambda value: [float(item) for item in value])
    else:
        names, classes = tuple(map(str, members)), members
    if len(classes) < 2:
        raise DistillError(f"Expected lists of two classes or more, got {classes}.")
    return _classes("multi_label_classification", names, classes)


def _classes(problem: str, names: tuple[str, ...] | None, classes: Sequence[Any]) -> Labels:
    """Labels that are of these classes, one of them or several."""
    numbers = {value: i for i, value in enumerate(classes)}
    few = ", ".join(map(repr, classes[:8])) + (", ..." if len(classes) > 8 else "")

    def number(value: Any) -> int:
        if value not in numbers:
            raise DistillError(f"Expected a label of the training split, {few}, got {value!r}: drop the row.")
        return numbers[value]

    def several(values: Sequence[Any]) -> list[float]:
        held = set(map(number, values))
        return [float(i in held) for i in range(len(numbers))]

    return Labels(problem, names, len(numbers), several if problem == "multi_label_classification" else number)


def _check_rows(data: TextData, name: str, split: Dataset) -> None:
    """Finds what would fail in the middle of tokenization, and says where."""
    if not len(split):
        raise DistillError(f"{data.source}: the split {name} has no rows.")
    for column in data.columns:
        row = next((i for i, text in enumerate(split[column]) if not isinstance(text, str)), None)
        if row is not None:
            raise DistillError(f"{data.source}: expected text in {column}, got {split[row][column]!r} in row {row}.")
    for row, value in enumerate(split[data.label_column][:]):
        try:
            if value is None:
                raise DistillError("Expected a label, got none: drop the row.")
            data.labels.encode(value)
        except DistillError as error:
            raise DistillError(f"{data.source}, split {name}, row {row}: {error}") from None
