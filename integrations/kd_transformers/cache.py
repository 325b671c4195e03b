"""Pays the teacher once: what it says as columns of the data set, for inputs that are the same in every epoch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn
from transformers import default_data_collator

from kd_accelerate.cached import layers_of, making, note_facts, temperature_read
from kd_accelerate.sharding import make_whole
from kd_plugins import Distiller, DistillError, create_distiller
from kd_plugins.catalog.values import AtLeastOne, Positive, convert
from kd_plugins.errors import told as told_in_words
from kd_plugins.nn.codebook import state_bytes
from kd_plugins.reading.tap import untraced
from kd_transformers.asking import Asking, Views
from kd_transformers.checks import config_of, kind_of, stated, task_of
from kd_transformers.columns import TEACHER_LOGITS, Told, is_told, with_padding
from kd_transformers.compat import rows_id
from kd_transformers.playing import listed
from kd_transformers.told import Absent, noted

_BLOCK = 4096
# Numbers of something, or None, but for these.
_NUMBERS = {"temperature": Positive | None, "batch_size": AtLeastOne}
_ASIDE = ("problem_type", "_name_or_path", "transformers_version")


def cache_teacher(
    dataset: Dataset,
    teacher: nn.Module | Sequence[nn.Module],
    data_collator: Any = None,
    *,
    distiller: Distiller | str | None = None,
    views: int | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Dataset | Views:
    """Runs a teacher over a data set once and adds its logits, float32, as the column `teacher_logits`.

    They are `[K]` of a classifier, and `[L, K]` of a model with scores per token, padding left out. Of several teachers
    the column holds all logits, `[teachers, K]` or `[L, teachers, K]`, in their order. Large vocabularies need `top_k`:
    the column then holds the k highest logits with that of all other classes taken as one behind them (`[k + 1]`; see
    `kd_plugins.functional.merge_rest`), and a column `teacher_classes` which they are. `kd` reads them.

    With a `distiller` the layers that it names are kept too, each in a column `teacher_layer:N:NAME`, as a file of
    NumPy's for each row: a vector takes 4 bytes a number, a text's hidden states, of its tokens without padding, so
    much for each token, and in a batch zeros at its padding. Attention and numbered hidden states are not kept.

    `DistillationTrainer` takes the columns in place of the teacher's forward wherever a method reads no more of the
    teacher (`kd`, the last phase of `internal`, with their layers `fitnet`, `rkd`, `crd`); a step then costs what
    training without a teacher costs. Give it the same `teacher_model` as well, several in the same order: it compares
    one batch before the training, and runs the teacher where a method reads more or changes the inputs. Without a
    `teacher_model` the teacher need not be loaded: its classes are noted in the data set's description, which
    `save_to_disk` keeps. Nothing is compared then, so the inputs of the rows must be left as they are.

    The column lies in memory-mapped Arrow files of `datasets`, beside the data set's own, one for each 4096 rows, under
    a fingerprint of the rows, of the teacher's class, configuration, weights and dtype, and of the collator with its
    settings and its tokenizer: asked again with the same ones, nothing runs, an interrupted pass goes on where it was,
    and a file that is damaged is made anew. Where they differ from those of a cache that lies there, a warning says in
    what. Rows that lie in memory alone are asked about every time.

    Rows that a transform (`set_transform`) augments while they are loaded are replayed: Python's, NumPy's and torch's
    random numbers of a row follow from its number and its view, and epoch e shows view e modulo `views`. So the student
    sees the very crop that the teacher was asked about, wherever a run begins. A transform that draws from a generator
    of its own is refused.

    Args:
        dataset: Tokenized rows, as for `Trainer`; columns that the teacher does not take are left out. Columns of its
            own (`teacher_input_ids`, ...) are given to it in place of the student's.
        teacher: A model with scores `[B, K]`, or `[B, L, K]` of tokens, or several. One that is not loaded (`Absent`)
            is loaded where it has to be asked.
        data_collator: Makes a batch of rows; by default `transformers`' own, which needs rows of one length.
        distiller: The method that will read the columns, or its name.
        views: How many views of each row are kept, where the data set has a transform; one for each epoch is what a
            training without a cache shows, fewer cost the teacher less.
        top_k: How many of the logits are kept, of a softmax over many classes; by default all.
        temperature: Of the loss that will read the highest ones, at which the rest is summed; whole logits fit any. By
            default the distiller's, or 1.
        batch_size: Rows in a forward. Padding follows the batch, so logits agree with those of another batch size to
            rounding only.
        device: Where the teacher runs; by default where it is.

    Returns:
        The data set with the columns; with `views` one that shows them in turn.

    Raises:
        DistillError: A data set that is not of `datasets`, or transformed on access and no `views`; a collator that
            makes two batches of the same rows (random masks); a transform that cannot be replayed; a teacher that gives
            anything but scores of rows or of their tokens, two answers to one question, or another answer where a text
            is padded further; `top_k` for a distiller that reads all logits.
    """
    if not isinstance(dataset, Dataset):
        raise DistillError(
            f"Expected a datasets.Dataset, whose rows are the same in every epoch, got {type(dataset).__name__}:"
            " make one with Dataset.from_list, or train without a cache."
        )
    transform = dataset.format["format_kwargs"]["transform"] if dataset.format["type"] == "custom" else None
    _check_numbers(top_k=top_k, temperature=temperature, batch_size=batch_size, views=views)
    if transform is not None and views is None:
        raise DistillError(
            "Expected rows that are the same in every epoch, got a data set with a transform (set_transform): say how"
            " many views of each are kept, views=N, apply it once with map, or train without a cache."
        )
    if transform is None and views is not None:
        raise DistillError("views are of a data set with a transform (set_transform), got one without: leave it out.")
    teachers = listed("teacher", teacher)
    _check_teachers(teachers)
    for t in teachers:
        make_whole(t)
    plain = dataset.with_format(None)
    plain = plain.remove_columns([*filter(is_told, plain.column_names)])
    if not len(plain):
        raise DistillError("Expected at least one row to ask the teacher about, got an empty data set.")
    method = create_distiller(distiller) if isinstance(distiller, str) else distiller
    if not isinstance(method, Distiller | None):
        raise DistillError(f"Expected a distiller or the name of one, got {method!r}.")
    if not callable(data_collator or default_data_collator):
        raise DistillError(f"Expected a data_collator, which makes a batch of rows, got {data_collator!r}.")
    with told_in_words(f"device={device!r} is no device of torch", RuntimeError, remedy="give one, such as 'cuda:0'"):
        place = None if device is None else torch.device(device)
    for part in method.methods.values() if method is not None else ():
        part.host.task = task_of(teachers[0])
    layers = [layers_of(method, i) or () if method is not None else () for i in range(len(teachers))]
    if top_k and method is not None:
        asked_at = temperature_read(method, len(teachers), "top_k")
        if temperature not in (None, asked_at):
            raise DistillError(f"{method.name} reads at temperature {asked_at:g}, got {temperature}: leave it out.")
        temperature = asked_at
    collate = with_padding(data_collator or default_data_collator, teachers)
    replayed = None if views is None else Views(dataset, views)
    asking = Asking(
        teachers,
        collate,
        layers,
        many=not isinstance(teacher, nn.Module),
        top_k=top_k,
        temperature=1.0 if temperature is None else temperature,
        batch_size=batch_size,
        device=place or next(teachers[0].parameters(), torch.empty(0)).device,
        views=replayed,
    )
    facts = _facts(plain, teachers, collate)
    if top_k:
        facts["column"] += f", the {top_k} highest at temperature {asking.temperature:g}"
    if any(layers):
        facts["layers"] = f"{layers}, files of NumPy's with an end"
    if replayed is not None:
        facts["images"] = replayed.sample()
        with told_in_words("The transform cannot be told from others", Exception, remedy="give a function of a module"):
            # Of a function of a module the name alone would be known.
            source = [inspect.getsource(transform)] if inspect.isfunction(transform) else []
            facts["transform"] = _hash(transform, *source)
    with untraced(*teachers):
        each = _Blocks(plain, asking, facts).answers()
    note = noted(plain.info.description, teachers, each[0][0], asking.temperature)
    if replayed is not None:
        replayed.answers, each[0].info.description = each, note
        return replayed
    # The logits alone are written; the rows stay where they are.
    whole = concatenate_datasets([plain, each[0]], axis=1)
    whole.info.description = note
    return whole.with_format(dataset.format["type"])


def _check_numbers(**given: float | None) -> None:
    """Refuses what no number of rows, classes or views can be, or no temperature."""
    for what, value in given.items():
        expected = "a number above 0" if what == "temperature" else "a whole number, at least 1"
        try:
            # What convert would read of a text is used as it is.
            convert(value if not isinstance(value, str) else "", _NUMBERS.get(what, AtLeastOne | None))
        except ValueError:
            raise DistillError(f"{what}: expected {expected}, got {value!r}.") from None


def _check_teachers(teachers: Sequence[nn.Module]) -> None:
    """Refuses none, and those whose answers are no scores of rows or tokens."""
    if not teachers:
        raise DistillError("Expected at least one teacher to ask, got none.")
    for kind in map(kind_of, teachers):
        if kind in ("sequence to sequence", "question answering"):
            raise DistillError(
                f"Expected a teacher that scores rows, or the tokens of its inputs, got one for {kind}: train without a"
                " cache."
            )


class _Blocks:
    """Rows in blocks, each asked about once and kept in a file beside the data set's own, where it has one.

    Args:
        rows: The rows, without what teachers have said.
        asking: Asks about them.
        facts: What the answers depend on.
    """

    def __init__(self, rows: Dataset, asking: Asking, facts: Mapping[str, str]) -> None:
        self.rows, self.asking, self.known = rows, asking, _hash(facts)
        self.starts = range(0, len(rows), _BLOCK)
        self.folder = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else None
        if self.folder is not None and PartialState().is_main_process:
            file = self.folder / f"teacher-{self.known}.json"
            note_facts(file, facts, self.folder.glob("teacher-*.json"), same=["split"])

    def answers(self) -> list[Dataset]:
        """What the teachers say of all rows, view by view.

        Each process asks about blocks of its own, where it can find those of the others.
        """
        shown, processes = self.asking.views, PartialState()
        views = range(1 if shown is None else shown.views)
        if self.folder is not None and processes.num_processes > 1:
            for block in [*product(views, self.starts)][processes.process_index :: processes.num_processes]:
                self._one(*block)
            processes.wait_for_everyone()
        return [concatenate_datasets([self._one(view, start) for start in self.starts]) for view in views]

    def _one(self, view: int, start: int) -> Dataset:
        end = min(start + _BLOCK, len(self.rows))
        name = f"{self.known}-{start}" if self.asking.views is None else f"{self.known}-{view}-{start}"
        file = None if self.folder is None else self.folder / f"teacher-{name}.arrow"
        which = "" if self.asking.views is None else f", view {view}"
        with nullcontext() if file is None else making(file):
            return self.rows.select(range(start, end)).map(
                partial(self.asking, first=start, view=view),
                batched=True,
                with_indices=True,
                batch_size=16 * self.asking.batch_size,
                cache_file_name=None if file is None else str(file),
                new_fingerprint=name,
                remove_columns=self.rows.column_names,
                desc=f"Asking the teacher, rows {start} to {end} of {len(self.rows)}{which}",
            )


def _hash(*values: Any) -> str:
    hasher = Hasher()
    for value in values:
        hasher.update(value)
    return str(hasher.hexdigest())


def _facts(dataset: Any, teachers: Sequence[nn.Module], collate: Any) -> dict[str, str]:
    """What the logits depend on, each by a word for it that a user knows."""
    collate = collate.collate if isinstance(collate, Told) else collate
    settings = dict(getattr(collate, "__dict__", {}))
    tokenizer = settings.pop("tokenizer", None)
    return {
        "rows": rows_id(dataset),
        "teacher's weights": _hash(*map(_weights_id, teachers)),
        "teacher's dtype": ", ".join(map(_dtype, teachers)),
        "collator": _hash(type(collate).__qualname__, sorted(settings.items()) or collate),
        "tokenizer": "" if tokenizer is None else _tokenizer_id(tokenizer),
        "column": f"{TEACHER_LOGITS}, float32, of {len(teachers)}",
        "split": str(dataset.split),
    }


def _dtype(teacher: nn.Module) -> str:
    dtypes = (p.dtype for p in teacher.parameters() if p.is_floating_point())
    return str(next(dtypes, stated(teacher, "dtype")))


def _tokenizer_id(tokenizer: Any) -> str:
    """Changes with the tokens, their numbers, and how text is padded."""
    tokens = sorted(tokenizer.get_vocab().items())
    return _hash(type(tokenizer).__name__, tokens, tokenizer.special_tokens_map, tokenizer.padding_side)


def _weights_id(teacher: nn.Module) -> str:
    """Changes with a teacher's class, configuration and weights; of one that is not loaded, with its files."""
    if isinstance(teacher, Absent):
        return teacher.identity
    config = config_of(teacher)
    facts = config.to_dict() if hasattr(config, "to_dict") else {}
    # A forward with labels writes the type of problem into the configuration; where a model is from says nothing.
    found: list[Any] = [type(teacher).__qualname__, {k: v for k, v in facts.items() if k not in _ASIDE}]
    for name, value in teacher.state_dict().items():
        found += [name, str(getattr(value, "dtype", "")), state_bytes(value)]
    return _hash(*found)
