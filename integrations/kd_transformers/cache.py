"""Pays the teacher once: what it says as columns of the data set, for inputs that are the same in every epoch."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from kd_accelerate.cached import check_twice, drop_damaged, layers_of, note_facts, seal_file, temperature_read
from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads, create_distiller
from kd_plugins import functional as KF
from kd_plugins.catalog.values import AtLeastOne, Positive, convert
from kd_plugins.errors import told as told_in_words
from kd_plugins.reading.network import adapt
from kd_plugins.reading.view import TopK, View
from kd_transformers.absent import Absent, called
from kd_transformers.checks import base, class_names, counted_as, inputs_of, kind_of, scores_tokens
from kd_transformers.columns import (
    TEACHER,
    TEACHER_CLASSES,
    TEACHER_LOGITS,
    Padded,
    Told,
    as_file,
    is_told,
    layer_column,
    with_padding,
)
from kd_transformers.compat import rows_id
from kd_transformers.playing import listed
from kd_transformers.views import Views

if TYPE_CHECKING:
    from datasets import Dataset


_BLOCK = 4096
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
    from datasets import Dataset, concatenate_datasets
    from transformers import default_data_collator

    if not isinstance(dataset, Dataset):
        raise DistillError(
            f"Expected a datasets.Dataset, whose rows are the same in every epoch, got {type(dataset).__name__}:"
            " make one with Dataset.from_list, or train without a cache."
        )
    transform = dataset.format["format_kwargs"]["transform"] if dataset.format["type"] == "custom" else None
    if transform is not None and views is None:
        raise DistillError(
            "Expected rows that are the same in every epoch, got a data set with a transform (set_transform): say how"
            " many views of each are kept, views=N, apply it once with map, or train without a cache."
        )
    if transform is None and views is not None:
        raise DistillError(
            "views are those of a data set with a transform (set_transform), got one without: leave it out."
        )
    teachers = listed("teacher", teacher)
    if not teachers:
        raise DistillError("Expected at least one teacher to ask, got none.")
    for what, value, hint, expected in (
        ("top_k", top_k, AtLeastOne | None, "a whole number, at least 1"),
        ("temperature", temperature, Positive | None, "a number above 0"),
        ("batch_size", batch_size, AtLeastOne, "a whole number, at least 1"),
        ("views", views, AtLeastOne | None, "a whole number, at least 1"),
    ):
        try:
            convert(value, hint)
        except ValueError:
            raise DistillError(f"{what}: expected {expected}, got {value!r}.") from None
    for kind in map(kind_of, teachers):
        if kind in ("sequence to sequence", "question answering"):
            raise DistillError(
                f"Expected a teacher that scores rows, or the tokens of its inputs, got one for {kind}: train without a"
                " cache."
            )
    method = create_distiller(distiller) if isinstance(distiller, str) else distiller
    layers = [layers_of(method, i) or () if method is not None else () for i in range(len(teachers))]
    if top_k and method is not None:
        asked_at = temperature_read(method, len(teachers), "top_k")
        if temperature not in (None, asked_at):
            raise DistillError(f"{method.name} reads at temperature {asked_at:g}, got {temperature}: leave it out.")
        temperature = asked_at
    temperature = 1.0 if temperature is None else temperature
    modes = [t.training for t in teachers]
    weight = next(teachers[0].parameters(), torch.empty(0))
    device = torch.device(device) if device is not None else weight.device
    collate = with_padding(data_collator or default_data_collator, teachers)
    taken = set().union(*map(inputs_of, teachers))
    replayed = None if views is None else Views(dataset, views)

    def is_input(column: str) -> bool:
        asked_with = not taken or column in taken or column.startswith(TEACHER)
        return asked_with and not is_told(column) and not column.startswith("label")

    columns = [*filter(is_input, dataset.column_names)]

    @cache
    def loaded() -> list[Net]:
        found = [t.load() if isinstance(t, Absent) else t for t in teachers]
        return [Net(adapt(t.to(device)), Reads, frozen=True) for t in found]

    asked = alone = False

    def ask(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[View], Tensor | None]:
        """The batch of some rows, what the teachers say of it, and the mask of what they read."""
        nets = loaded()
        name = getattr(base(nets[0].module), "main_input_name", None)
        inputs = collate(list(map(dict, rows)))
        theirs = {k.removeprefix(TEACHER): v for k, v in inputs.items() if k.startswith(TEACHER)}
        own = {k: v for k, v in inputs.items() if not k.startswith((TEACHER, "label"))}
        batch = Batch.of(own, name=name, teacher_kwargs=theirs).to(device)
        reads = [Reads(features=names) for names in layers]
        return inputs, [net(batch, reads=one) for net, one in zip(nets, reads, strict=True)], batch.teacher_mask

    def logits(rows: Mapping[str, list[Any]], numbers: Sequence[int], *, first: int, view: int) -> dict[str, Any]:
        nonlocal asked, alone
        many = not isinstance(teacher, nn.Module)
        if replayed is None:
            items = [dict(zip(columns, row, strict=True)) for row in zip(*(rows[c] for c in columns), strict=True)]
        else:
            shown = (replayed.item(first + number, view) for number in numbers)
            items = [{c: value for c, value in row.items() if is_input(c)} for row in shown]
        found: dict[str, list[Any]] = {TEACHER_LOGITS: [], **({TEACHER_CLASSES: []} if top_k else {})}
        found |= {layer_column(i, name): [] for i, names in enumerate(layers) for name in names}
        for start in range(0, len(items), batch_size):
            rows_of = items[start : start + batch_size]
            inputs, said, mask = ask(rows_of)
            if not asked:
                again, same, _ = ask(rows_of)
                _check_collator(inputs, again)
                check_twice(_all(said), _all(same))
                asked = True
            told = _rows(said, loaded(), mask, many=many)
            for i, one in enumerate(said):
                for name, x in one.features.items():
                    if len(x) != len(rows_of):
                        raise DistillError(
                            f"The layer {name} gives {list(x.shape)} of {len(rows_of)} rows, and the cache holds what"
                            " it gives of each: leave distiller out."
                        )
                    real = (
                        mask.bool().cpu() if mask is not None and x.shape[:2] == mask.shape and x.dim() == 3 else None
                    )
                    found[layer_column(i, name)] += [
                        as_file(row if real is None else row[real[j]]) for j, row in enumerate(x.float().cpu())
                    ]
            if not alone and len(set(map(len, told))) > 1:
                row = min(range(len(told)), key=lambda i: len(told[i]))
                _, same, mask = ask(rows_of[row : row + 1])
                _check_padding(told[row], _rows(same, loaded(), mask, many=many)[0])
                alone = True
            if top_k:
                kept, classes = zip(*(KF.top_k(x, min(top_k, x.shape[-1]), temperature) for x in told), strict=True)
                found[TEACHER_CLASSES] += [x.int().numpy() for x in classes]
                told = list(kept)
            found[TEACHER_LOGITS] += [x.numpy() for x in told]
        return found

    plain = dataset.with_format(None)
    plain = plain.remove_columns([*filter(is_told, plain.column_names)])
    if not len(plain):
        raise DistillError("Expected at least one row to ask the teacher about, got an empty data set.")
    facts = _facts(plain, teachers, collate)
    if top_k:
        facts["column"] += f", the {top_k} highest at temperature {temperature:g}"
    if any(layers):
        facts["layers"] = str(layers)
    if replayed is not None:
        facts["images"] = replayed.sample()
        with told_in_words("The transform cannot be told from others", Exception, remedy="give a function of a module"):
            # Of a function of a module the name alone would be known.
            facts["transform"] = _hash(
                transform, *([inspect.getsource(transform)] if inspect.isfunction(transform) else [])
            )
    known = _hash(facts)
    folder = Path(plain.cache_files[0]["filename"]).parent if plain.cache_files else None
    processes = PartialState()
    if folder is not None and processes.is_main_process:
        note_facts(folder / f"teacher-{known}.json", facts, folder.glob("teacher-*.json"), same=["split"])

    def block(view: int, start: int) -> Dataset:
        end, name = min(start + _BLOCK, len(plain)), f"{known}-{start}" if views is None else f"{known}-{view}-{start}"
        file = None if folder is None else folder / f"teacher-{name}.arrow"
        if file is not None:
            drop_damaged(file)
        made = plain.select(range(start, end)).map(
            partial(logits, first=start, view=view),
            batched=True,
            with_indices=True,
            batch_size=16 * batch_size,
            cache_file_name=None if file is None else str(file),
            new_fingerprint=name,
            remove_columns=plain.column_names,
            desc=f"Asking the teacher, rows {start} to {end} of {len(plain)}" + (f", view {view}" if views else ""),
        )
        if file is not None:
            seal_file(file)
        return made

    blocks = [(view, start) for view in range(views or 1) for start in range(0, len(plain), _BLOCK)]
    try:
        if folder is not None and processes.num_processes > 1:
            # Each process asks about blocks of its own, and then finds those of the others.
            for view, start in blocks[processes.process_index :: processes.num_processes]:
                block(view, start)
            processes.wait_for_everyone()
        each = [concatenate_datasets([block(v, s) for v, s in blocks if v == view]) for view in range(views or 1)]
        note = _noted(plain.info.description, teachers, each[0][0], temperature)
        if replayed is not None:
            replayed.answers, each[0].info.description = each, note
            return replayed
        # The logits alone are written; the rows stay where they are.
        whole = concatenate_datasets([plain, each[0]], axis=1)
        whole.info.description = note
        return whole.with_format(dataset.format["type"])
    finally:
        for t, training in zip(teachers, modes, strict=True):
            t.train(training)


def absent_teachers(dataset: Any) -> list[Absent]:
    """Stand-ins for the teachers whose logits a data set has."""
    if TEACHER_LOGITS not in (getattr(dataset, "column_names", None) or ()):
        return []
    found = []
    for facts in _note_of(dataset):
        absent = Absent(facts["stands_for"], None, kind=facts.get("kind", ""))
        names = dict(enumerate(facts["classes"] or ()))
        absent.config = SimpleNamespace(**{counted_as(absent): facts["scores"]}, id2label=names)
        found.append(absent)
    return found


def temperature_of(dataset: Any) -> float:
    """That at which the rest of the highest logits was summed."""
    return float(_note_of(dataset)[0].get("temperature", 1.0))


def _note_of(dataset: Any) -> list[dict[str, Any]]:
    """What a data set says of the teachers that wrote its column."""
    lines = (getattr(getattr(dataset, "info", None), "description", None) or "").splitlines()
    noted = sorted({line for line in lines if line.startswith(_NOTE)})
    if len(noted) > 1:
        raise DistillError(
            f"The parts of the data set have columns {TEACHER_LOGITS} of other teachers or temperatures: make the"
            " column of the whole anew with cache_teacher."
        )
    if not noted:
        raise DistillError(
            f"The data set does not say which teacher wrote its column {TEACHER_LOGITS}, so that its classes are not"
            " known: train on what cache_teacher returns (no stream or torch Subset of it), or give teacher_model where"
            " the column holds all logits."
        )
    found: list[dict[str, Any]] = json.loads(noted[0].removeprefix(_NOTE))
    return found


def loaded_where_read(teachers: Sequence[nn.Module], distiller: Distiller) -> list[nn.Module]:
    """The teachers; those of which a method reads more than a cache holds are loaded."""
    return [
        teacher.load() if isinstance(teacher, Absent) and layers_of(distiller, i) is None else teacher
        for i, teacher in enumerate(teachers)
    ]


def cached_logits(cached: Dataset) -> list[np.ndarray]:
    """Each teacher's logits `[N, K]` in a data set that `cache_teacher` has made."""
    logits = np.asarray(cached.select_columns(TEACHER_LOGITS).with_format("numpy")[:][TEACHER_LOGITS])
    return [logits] if logits.ndim == 2 else list(logits.swapaxes(0, 1))


_NOTE = f"{TEACHER_LOGITS}: "


def _all(views: Sequence[View]) -> list[Tensor]:
    return [x for view in views for x in (view.logits, *view.features.values())]


def _rows(views: Sequence[View], nets: Sequence[Net], mask: Tensor | None, *, many: bool) -> list[Tensor]:
    """The logits of each row of a batch: of a text's tokens without the padding, of several teachers side by side."""
    scores = [view.logits.float().cpu() for view in views]
    shapes = [list(x.shape) for x in scores]
    tokens = scores_tokens([net.module for net in nets])
    if scores[0].dim() != (3 if tokens else 2) or any(shape != shapes[0] for shape in shapes):
        raise DistillError(
            f"Expected a teacher with logits [B, K], or [B, L, K] of tokens, got {', '.join(map(str, shapes))}: the"
            " cache holds one vector of each teacher for each row, or token; train without it."
        )
    whole = torch.stack(list(scores), -2) if many else scores[0]
    if not tokens or mask is None:
        return list(whole)
    if mask.shape != whole.shape[:2]:
        raise DistillError(
            f"Expected scores of each of the inputs that the mask {list(mask.shape)} tells of, got {shapes[0]}, so that"
            " padding among them is not known: train without a cache."
        )
    return [row[real.bool()] for row, real in zip(whole, mask.cpu(), strict=True)]


def _check_collator(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuses a collator that draws random numbers: cached logits would belong to other inputs."""
    for name, value in first.items():
        if isinstance(value, Tensor) and not torch.equal(value, second[name]):
            raise DistillError(
                f"Expected a data_collator that makes the same batch of the same rows, got two {name}: it draws random"
                " numbers (masks, crops). Apply them once with map, or train without a cache."
            )


def _check_padding(padded: Tensor, alone: Tensor) -> None:
    """Refuses a teacher that says something else of a text beside a longer one: training has other batches."""
    # On the scale of the scores, and of all of them: half precision rounds single ones.
    if (padded - alone).abs().mean() > 5e-2 * alone.std(-1).mean():
        raise DistillError(
            "Expected a teacher that says the same of a text whatever it is padded to, got one that does not (positions"
            " that are counted from padding on the left): pad on the right, or pad all rows to one length."
        )


def _noted(description: str | None, teachers: Sequence[nn.Module], row: Mapping[str, Any], temperature: float) -> str:
    """A data set's description with what its columns are."""
    whole = None if TEACHER_CLASSES in row else torch.as_tensor(row[TEACHER_LOGITS]).shape[-1]
    facts = [
        {
            "stands_for": called(teacher),
            "kind": kind_of(teacher),
            "classes": class_names(getattr(base(teacher), "config", None)),
            "scores": whole or getattr(getattr(base(teacher), "config", None), counted_as(teacher), None),
            "temperature": temperature,
        }
        for teacher in teachers
    ]
    others = [line for line in (description or "").splitlines() if not line.startswith(_NOTE)]
    return "\n".join([*others, _NOTE + json.dumps(facts)])


def _hash(*values: Any) -> str:
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    for value in values:
        hasher.update(value)
    return str(hasher.hexdigest())


def _facts(dataset: Any, teachers: Sequence[nn.Module], collate: Any) -> dict[str, str]:
    """What the logits depend on, each by a word for it that a user knows."""
    while isinstance(collate, (Told, Padded)):
        collate = collate.collate
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
    weight = next((p for p in teacher.parameters() if p.is_floating_point()), None)
    given = getattr(teacher.config, "dtype", None) if weight is None and hasattr(teacher, "config") else None
    return str(given if weight is None else weight.dtype)


def _tokenizer_id(tokenizer: Any) -> str:
    """Changes with the tokens, their numbers, and how text is padded."""
    tokens = sorted(tokenizer.get_vocab().items())
    return _hash(type(tokenizer).__name__, tokens, tokenizer.special_tokens_map, tokenizer.padding_side)


def _weights_id(teacher: nn.Module) -> str:
    """Changes with a teacher's class, configuration and weights; of one that is not loaded, with its files."""
    if isinstance(teacher, Absent):
        return teacher.identity
    config: Any = getattr(teacher, "config", None)
    facts = config.to_dict() if hasattr(config, "to_dict") else {}
    # A forward with labels writes the type of problem into the configuration; where a model is from says nothing.
    found: list[Any] = [type(teacher).__qualname__, {k: v for k, v in facts.items() if k not in _ASIDE}]
    for name, value in teacher.state_dict().items():
        # Flat first: the bytes of a tensor without an axis cannot be viewed.
        bits = value.detach().cpu().flatten().contiguous().view(torch.uint8)
        found += [name, str(value.dtype), bits.numpy().tobytes()]
    return _hash(*found)


def check_cache(cached: View, asked: View, mask: Tensor | None) -> None:
    """Refuses a column that another teacher wrote, or the same teacher for other rows.

    Args:
        cached: What the column says of one batch.
        asked: What the teacher says of it now.
        mask: The tokens that are there, where the scores are of tokens.
    """
    logits, top = asked.logits, cached.top
    told = cached.logits if top is None else top.scores
    if top is not None and told.shape[:-1] == logits.shape[:-1]:
        logits = KF.merge_rest(logits, top.classes, top.temperature)
    layers = [(x, cached.features[name]) for name, x in asked.features.items()]
    if mask is not None:
        layers = [(x * mask[..., None] if x.dim() == 3 and x.shape[:2] == mask.shape else x, y) for x, y in layers]
    if not all(x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=2e-2, atol=2e-2) for x, y in layers):
        raise DistillError(
            "The columns of the teacher's layers are not what teacher_model gives of these rows: make them anew with"
            " cache_teacher(dataset, teacher, distiller=...), or remove them."
        )
    same = told.shape == logits.shape
    if same and mask is not None and told.shape[:2] == mask.shape and told.dim() == 3:
        told, logits = told[mask.bool()], logits[mask.bool()]
    if not same or not torch.allclose(told.float(), logits.float(), rtol=2e-2, atol=2e-2):
        raise DistillError(
            f"The column {TEACHER_LOGITS} is not what teacher_model says of these rows: make it anew with"
            " cache_teacher(dataset, teacher), or remove the column."
        )


def told_by(dataset: Any, logits: Tensor | None, classes: Tensor | None, *, tokens: bool) -> Any:
    """What the columns of a batch of a data set say, of several teachers each."""
    if logits is None:
        return None
    several, classes = logits.dim() == (4 if tokens else 3), None if classes is None else classes.long()
    temperature = 1.0 if classes is None else temperature_of(dataset)

    def told(logits: Tensor, classes: Tensor | None) -> Tensor | TopK:
        return logits if classes is None else TopK(logits, classes, temperature)

    if not several:
        return told(logits, classes)
    each = [None] * logits.shape[-2] if classes is None else classes.unbind(-2)
    return tuple(map(told, logits.unbind(-2), each))


def check_told(nets: Nets, batch: Batch) -> None:
    """Asks the teachers once, to see that the column of their logits is their own."""
    if batch.teacher_logits is None:
        return
    cached = len(batch.teacher_logits) if isinstance(batch.teacher_logits, tuple) else 1
    if cached != len(nets.teachers):
        raise DistillError(
            f"The column {TEACHER_LOGITS} holds the logits of {cached} teachers, got {len(nets.teachers)}: make it"
            " anew, cache_teacher(dataset, teachers), or remove it."
        )
    uncached = dataclasses.replace(batch, teacher_logits=None)
    for teacher in (net for net in nets.teachers if not isinstance(net.module, Absent)):
        features = tuple(batch.teacher_features[teacher.number]) if batch.teacher_features else ()
        told, asked = (teacher(one, reads=Reads(features=features)) for one in (batch, uncached))
        check_cache(told, asked, batch.mask)
