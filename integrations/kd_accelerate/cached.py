"""What caches of teachers' answers have in common: known by all that the answers depend on, and whole or made anew."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from kd_plugins import Distiller, DistillError, Reads
from kd_plugins.binding import needs_of_stages
from kd_plugins.states import digest, read_json, write_json, write_text

logger = logging.getLogger(__name__)


def reads_of(distiller: Distiller, number: int) -> Reads:
    """All that a method reads of a teacher in its stages."""
    return functools.reduce(Reads.__or__, [needs.of_teacher(number) for needs in needs_of_stages(distiller)])


def layers_of(distiller: Distiller, number: int) -> tuple[str | int, ...] | None:
    """The layers of a teacher that a method reads in its stages; None where they are more than a cache holds."""
    reads = reads_of(distiller, number)
    more = reads.hidden or reads.attentions or any("*" in str(name) for name in reads.features)
    return None if more else reads.features


def temperature_read(distiller: Distiller, teachers: int, flag: str) -> float:
    """That at which a method reads the highest of the teachers' scores; refuses one that reads all of them."""
    reads = [needs.of_teacher(i) for needs in needs_of_stages(distiller) for i in range(teachers)]
    found = {one.softened for one in reads if one.logits}
    if len(found) > 1 or None in found:
        raise DistillError(
            f"{flag} keeps the highest of a teacher's scores, which a softmax at one temperature reads (kd's, without"
            f" standardize), and {distiller.name} reads them all: leave {flag} out."
        )
    return found.pop() or 1.0 if found else 1.0


def files_id(*paths: str | Path) -> str:
    """Changes with the files of checkpoints: configurations, weights and code, each a folder or a file."""
    kinds = ("config.json", "*.index.json", "*.safetensors", "*.bin", "*.pth*", "*.py")
    found = hashlib.sha256()
    for path in map(Path, paths):
        files: Iterable[Path] = {f for kind in kinds for f in path.glob(kind)} if path.is_dir() else [path]
        for file in sorted(files):
            found.update(f"{file.name} {digest(file)}\n".encode())
    return found.hexdigest()


def note_facts(file: Path, facts: Mapping[str, Any], others: Iterable[Path], same: Sequence[str] = ()) -> None:
    """Writes down what a cache is made of; one that is new is told apart from those that lie beside it.

    Args:
        file: Where the facts of this cache are written, unless they are there.
        facts: What the answers depend on, each by a word for it that a user knows.
        others: Files of the facts of other caches.
        same: Facts in which a cache must agree to be compared at all.
    """
    if file.is_file():
        return
    changed: list[list[str]] = []
    for other in others:
        try:
            before = read_json(other)
        except DistillError:
            continue  # Half a file says nothing of its cache.
        if all(before.get(name) == facts[name] for name in same):
            changed.append([name for name in {**facts, **before} if before.get(name) != facts.get(name)])
    if changed:
        nearest: list[str] = min(changed, key=len)
        logger.warning("The teacher is asked anew: since it was last asked these have changed: %s.", ", ".join(nearest))
    write_json(file, facts, shared=True)


def whole(file: Path) -> bool:
    """Whether a file of a cache is what was written."""
    seal = _seal(file)
    return file.is_file() and seal.is_file() and seal.read_bytes() == digest(file).encode()


@contextmanager
def making(file: Path) -> Iterator[bool]:
    """Lets one process at a time make a file of a cache, and seals it: several runs may share a cache.

    Yields:
        Whether it is to be made. One that is whole is only read, which needs no right to write.
    """
    if whole(file):
        yield False
        return
    with FileLock(file.with_suffix(".lock"), mode=0o664):
        missing = not whole(file)
        if missing and file.is_file():
            logger.warning("%s is damaged or unfinished: its rows are asked for anew.", file)
            file.unlink()
        yield missing
        if missing:
            write_text(_seal(file), digest(file), shared=True)


def check_twice(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Refuses a teacher whose answers to one question differ."""
    if not all(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3) for a, b in zip(first, second, strict=True)):
        raise DistillError(
            "Expected a teacher that says the same of the same rows, got one whose two forwards differ in evaluation"
            " mode: it draws random numbers, so train without a cache."
        )


def _seal(file: Path) -> Path:
    return file.with_suffix(".sha256")
