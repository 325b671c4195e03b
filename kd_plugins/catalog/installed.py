"""Which distillers and networks' adapters are installed: entry points, read without importing any of them, nor torch.

What is broken is broken for those alone who ask for it, and no distribution takes a name of this one's.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distributions, entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

from kd_plugins.errors import DistillError

GROUP, NETWORKS = "kd_plugins.distillers", "kd_plugins.networks"
# The class of every network comes from there: an adapter of that name would take them all.
_EVERYONES = ("torch", "builtins")
ROWS = Path(__file__).with_name("methods.json")
"""A file that `kd-plugins list` reads; a test holds it to the classes."""


class Source(NamedTuple):
    """The installed distribution that a distiller comes from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def list_distillers() -> list[str]:
    """The names of all installed distillers, sorted. Imports none of them."""
    return sorted(entries_by_name())


def distribution_of(name: str) -> Source | None:
    """The distribution that a distiller comes from; None for module:Class."""
    entries = entries_by_name().get(name)
    return source_of(only_entry(entries)) if entries else None


def known_rows() -> dict[str, list[str]]:
    """What the list says of the methods of this distribution, by entry point: year, kind, tasks, hosts, paper."""
    return json.loads(ROWS.read_text(encoding="utf-8"))


def kd_version() -> str:
    """The version of kd-plugins that is installed."""
    try:
        return version("kd-plugins")
    except PackageNotFoundError:
        return "unknown (not installed)"


def entries_by_name(group: str = GROUP) -> dict[str, list[EntryPoint]]:
    """Entry points by name; one each distribution, however often sys.path leads to it, and of a name of ours ours."""
    everyones = _EVERYONES if group == NETWORKS else ()
    found = {name: entries for name, entries in _found(group).items() if name not in everyones}
    own = {name: [entry for entry in entries if ours(entry)] for name, entries in found.items() if len(entries) > 1}
    return {name: own.get(name) or entries for name, entries in found.items()}


def unused(group: str = GROUP) -> list[EntryPoint]:
    """The entry points that `entries_by_name` leaves out, as their names are taken."""
    used = entries_by_name(group)
    return [entry for name, entries in _found(group).items() for entry in entries if entry not in used.get(name, [])]


def _found(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in _entry_points(group, _places()):
        found.setdefault(entry.name, []).append(entry)
    # Whose an entry is takes parsing a distribution's metadata: asked where a name has several alone.
    return {name: _one_each(entries) if len(entries) > 1 else entries for name, entries in found.items()}


def _one_each(entries: Iterable[EntryPoint]) -> list[EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entries:
        found.setdefault(_distribution(entry), entry)
    return list(found.values())


def _places() -> tuple[tuple[str, int], ...]:
    """Where distributions are looked for, and when one last came or went there."""
    places = [place or "." for place in sys.path]
    return tuple((place, os.stat(place).st_mtime_ns) for place in places if os.path.exists(place))


@lru_cache(maxsize=4)  # Every distribution's files are read for it, and a training asks several times.
def _entry_points(group: str, places: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    try:
        return [entry for entry in entry_points(group=group) if entry.group == group]
    except Exception:  # a distribution whose list nobody can read, for which Python gives nobody's
        found: list[EntryPoint] = []
        for distribution in distributions():
            try:
                found += distribution.entry_points.select(group=group)
            except Exception:  # noqa: BLE001
                continue
        return found


def _distribution(entry: EntryPoint) -> str:
    return re.sub(r"[-_.]+", "-", entry.dist.name).lower() if entry.dist else ""


def ours(entry: EntryPoint) -> bool:
    """Whether an entry point is of this distribution."""
    return _distribution(entry) == "kd-plugins"


def load(entry: EntryPoint, base: type, what: str = "distiller") -> Any:
    """The class of an entry point.

    Args:
        entry: Of an installed distribution, or made for a class that is in none.
        base: What it is a subclass of.
        what: It is, in words.

    Raises:
        DistillError: It cannot be imported, whatever its module raises, or is no such class.
    """
    source = source_of(entry)
    named = f"{what} {entry.name!r} of {source} ({entry.value})" if source else f"{what} {entry.value!r}"
    remedy = "is it mended by an update of its distribution?" if source else "is it in this folder or on PYTHONPATH?"
    try:
        cls = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # another's module may fail in any way
        raise DistillError(f"cannot load {named} ({type(error).__name__}: {error}): {remedy}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise DistillError(f"expected {named} to be a subclass of kd_plugins.{base.__name__}, got {cls!r}")
    return cls


def only_entry(entries: list[EntryPoint]) -> EntryPoint:
    """The one entry point of a name; `DistillError` where several distributions have it."""
    if len(entries) > 1:
        sources = " and ".join(f"{source_of(entry)} ({entry.value})" for entry in entries)
        networks = entries[0].group == NETWORKS
        raise DistillError(
            f"expected one {'adapter' if networks else 'distiller'} named {entries[0].name!r}, got several, "
            f"from {sources} — uninstall one of them{'' if networks else ', or give module:Class'}"
        )
    return entries[0]


def source_of(entry: EntryPoint) -> Source | None:
    """The distribution of an entry point; None where it is of none."""
    return Source(entry.dist.name, entry.dist.version) if entry.dist else None
