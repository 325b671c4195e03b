"""The docstrings of Python's standard library as a text data set: real English that is on every machine."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config

from kd_plugins.errors import DistillError

# What the script's flags default to for this data set; Trainer's own are for fine-tuning large pretrained models.
DOCSTRINGS_DEFAULTS: dict[str, Any] = {
    "max_seq_length": 64,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "num_train_epochs": 10,
    "learning_rate": 5e-4,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    # Paragraphs differ in length: batches of like ones halve the padding, and the time.
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 50,
}

# Tests come with some installations and not with others, and their docstrings are test data.
_LEFT_OUT = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "lib-dynload"}
_FEWEST_WORDS = 6
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Paragraph(NamedTuple):
    """One example: a paragraph of a docstring, the file it is from, the package that the file belongs to."""

    text: str
    package: str
    file: str


def load_docstrings(packages: int = 12, validation: float = 0.2, root: str | Path | None = None) -> DatasetDict:
    """The paragraphs of the docstrings of the largest packages, labelled by package, split by file.

    Which package a paragraph is from is a question about its topic. Files are either in the training split or in the
    validation split, never in both, and no paragraph occurs twice: a random split would be far easier (a linear model
    on TF-IDF reaches 0.83 there and 0.62 here, Python 3.11), because paragraphs of one file share peculiar words.

    The split depends on no seed. It does depend on the Python version, whose library the text is from.

    Args:
        packages: How many packages, the ones with the most paragraphs.
        validation: Share of a package's paragraphs that its validation files hold, as nearly as whole files allow.
        root: Folder of the library's source; None takes that of the running Python.

    Returns:
        Splits `train` and `validation` with the columns `text`, `label` (a `ClassLabel`) and `file`, rows in a fixed
        mixed order.
    """
    if root is not None:
        return _splits(packages, validation, Path(root))
    library = Path(sysconfig.get_path("stdlib"))
    # Reading the library takes seconds: its rows are kept where `datasets` keeps those of the hub.
    facts = repr((sys.version, library, packages, validation, Path(__file__).read_text(encoding="utf-8")))
    kept = Path(config.HF_DATASETS_CACHE, f"docstrings-{_digest(facts)[:16]}")
    if not kept.is_dir():
        splits = _splits(packages, validation, library)
        with suppress(OSError):  # a cache that is read-only, or another process that was first
            kept.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=kept.name, dir=kept.parent) as own:
                splits.save_to_disk(Path(own, "splits"))
                Path(own, "splits").rename(kept)
        if not kept.is_dir():
            return splits
    # `map` writes beside rows that lie in a file, and nothing beside those in memory.
    return DatasetDict.load_from_disk(kept, keep_in_memory=not os.access(kept, os.W_OK))


def _splits(packages: int, validation: float, root: Path) -> DatasetDict:
    paragraphs = read_docstrings(root)
    counts = Counter(p.package for p in paragraphs)
    files = {name: Counter(p.file for p in paragraphs if p.package == name) for name in counts}
    # Ties are broken by name. A package of one or two files could not be split.
    largest = sorted((n for n in counts if len(files[n]) > 2), key=lambda name: (-counts[name], name))[:packages]
    if len(largest) < 2:
        raise DistillError(
            "Expected the source of Python's standard library, got an installation without it: name a data set with"
            " --task_name, --dataset_name or --train_file."
        )
    names = sorted(largest)
    held_out = {file for name in names for file in split_by_file(files[name], validation)}
    features = Features({"text": Value("string"), "label": ClassLabel(names=names), "file": Value("string")})
    splits = {}
    for split in ("train", "validation"):
        rows = [p for p in paragraphs if p.package in names and (p.file in held_out) == (split == "validation")]
        rows.sort(key=lambda p: _digest(p.file + p.text))
        columns = {"text": [p.text for p in rows], "label": [p.package for p in rows], "file": [p.file for p in rows]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def read_docstrings(root: Path) -> list[Paragraph]:
    """All paragraphs of the docstrings under a folder, each once, in the order of the files' names.

    Sources are parsed, never imported. A paragraph that occurs in two packages belongs to neither.
    """
    found: dict[str, Paragraph] = {}
    owners: dict[str, set[str]] = {}
    for path in sorted(root.glob("*/**/*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT.isdisjoint(parts):
            continue
        for text in _paragraphs(path):
            letters = " ".join(_words(text)).lower()
            owners.setdefault(letters, set()).add(parts[0])
            found.setdefault(letters, Paragraph(text, parts[0], "/".join(parts)))
    return [paragraph for letters, paragraph in found.items() if len(owners[letters]) == 1]


def split_by_file(sizes: dict[str, int], share: float) -> set[str]:
    """Files that together hold about a share of the paragraphs, chosen by a hash of their names.

    >>> sorted(split_by_file({"a.py": 50, "b.py": 30, "c.py": 20}, 0.2))
    ['c.py']

    Args:
        sizes: Number of paragraphs of each file.
        share: The share to come near to.
    """
    wanted = share * sum(sizes.values())
    chosen: set[str] = set()
    held = 0
    for file in sorted(sizes, key=_digest):
        if held < wanted and held + sizes[file] <= 1.25 * wanted:
            chosen.add(file)
            held += sizes[file]
    return chosen or {min(sizes, key=lambda file: (sizes[file], file))}


def _paragraphs(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Invalid escapes in old sources are no concern of whoever trains on them.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return
    for node in _documented(tree):
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(paragraph.split())
            if len(_words(text)) >= _FEWEST_WORDS and ">>>" not in text:
                yield text


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """What can have a docstring, found through statements alone: expressions are most of a tree."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for field in ("body", "orelse", "finalbody", "handlers"):
        for statement in getattr(node, field, None) or ():
            yield from _documented(statement)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
