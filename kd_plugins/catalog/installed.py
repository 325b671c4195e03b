"""Which distillers are installed: entry points, read without importing any method, nor torch."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import NamedTuple

from kd_plugins.errors import DistillError

GROUP = "kd_plugins.distillers"
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


def entries_by_name() -> dict[str, list[EntryPoint]]:
    """Entry points by name; one each distribution, however often sys.path leads to it."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        distribution = re.sub(r"[-_.]+", "-", entry.dist.name).lower() if entry.dist else ""
        found.setdefault(entry.name, {}).setdefault(distribution, entry)
    return {name: list(entries.values()) for name, entries in found.items()}


def only_entry(entries: list[EntryPoint]) -> EntryPoint:
    """The one entry point of a name; `DistillError` where several distributions have it."""
    if len(entries) > 1:
        sources = " and ".join(f"{source_of(entry)} ({entry.value})" for entry in entries)
        raise DistillError(
            f"expected one distiller named {entries[0].name!r}, got several, from {sources} — uninstall one of them, "
            "or give module:Class"
        )
    return entries[0]


def source_of(entry: EntryPoint) -> Source | None:
    """The distribution of an entry point; None where it is of none."""
    return Source(entry.dist.name, entry.dist.version) if entry.dist else None
