"""From a name to a distiller, through the entry-point group `kd_plugins.distillers`.

Built-in methods and those of other distributions come through the same door; a method is imported when it is asked
for, so a broken one harms nobody else.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch

from kd_plugins.authors import check_made
from kd_plugins.catalog.installed import GROUP, distribution_of, entries_by_name, kd_version, load, only_entry
from kd_plugins.catalog.options import Resolved, resolve, split
from kd_plugins.compose import Composite
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError, did_you_mean
from kd_plugins.states import read_json


def get_distiller(name: str) -> type[Distiller]:
    """The class behind a name.

    Args:
        name: Of an installed distiller, such as "nst"; or "package.module:Class" for one that is not installed.

    Raises:
        DistillError: No such distiller, or one that cannot be imported.
    """
    if not isinstance(name, str) or "+" in name:
        raise DistillError(f"expected the name of one distiller, got {name!r} — create_distiller() makes compositions")
    if ":" in name:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name) or ".py:" in name:
            raise DistillError(
                f"expected module:Class, such as my_method:LogitMatch of a file my_method.py, got {name!r}"
            )
        return _import(EntryPoint(name=name, value=name, group=GROUP))
    entries = entries_by_name()
    if name not in entries:
        known = f"Installed: {', '.join(sorted(entries))} — or give module:Class"
        nothing = "No distiller is installed — run `pip install -e .` in a source checkout, or install kd-plugins"
        raise DistillError(
            f"expected an installed distiller, got {name!r}.{did_you_mean(name, entries)}"
            f" {known if entries else nothing}"
        )
    return _import(only_entry(entries[name]))


def create_distiller(name: str, /, **options: Any) -> Distiller:
    """Makes a distiller by name.

    Args:
        name: "nst"; "kd+nst" for the sum of both; "package.module:Class" for one that is not installed.
        options: Of the constructor. In a composition `kd.temperature` (through `**{"kd.temperature": 4.0}`) is the
            option of one part; without a prefix it goes to the only part that has it. `critic.lr` (`afd.critic.lr`)
            overrides a setting of the optimizer of the distiller's group `critic`.

    Raises:
        DistillError: No such distiller, no such option, or a value that it cannot have.
    """
    resolved = resolve(distiller_classes(name), options)
    made: dict[str, Distiller] = {part: it.cls(**it.options) for part, it in resolved.items()}
    for part, it in resolved.items():
        check_made(made[part])
        made[part].optim_overrides = it.optim
    if len(made) == 1:
        return next(iter(made.values()))
    distiller = Composite(made)
    distiller.optim_overrides = {group: settings for it in resolved.values() for group, settings in it.optim.items()}
    return distiller


def distiller_classes(name: str) -> dict[str, type[Distiller]]:
    """The classes of a name's parts, by the prefix of their options: the name, or of module:Class the class."""
    if not isinstance(name, str):
        raise DistillError(f"expected the name of a distiller, such as 'kd', got {name!r}")
    classes: dict[str, type[Distiller]] = {}
    for part in name.split("+"):
        part = part.strip()
        prefix = part.rpartition(":")[2].rpartition(".")[2] if ":" in part else part
        if prefix in classes:
            raise DistillError(f"expected every distiller once, got {prefix!r} twice in {name!r} — drop one of them")
        classes[prefix] = get_distiller(part)
    return classes


def name_of(cls: type) -> str:
    """The name that makes this class: of its entry point if it has one, or module:Class."""
    for name, entries in sorted(entries_by_name().items()):
        for entry in entries:
            try:
                # A class that exists has been imported; nothing else needs to be for its name.
                if entry.module in sys.modules and entry.load() is cls:
                    return name
            except (ImportError, AttributeError):
                continue
    return f"{cls.__module__}:{cls.__qualname__}"


def options_from_strings(name: str, strings: Iterable[str]) -> dict[str, Any]:
    """What follows `--distill-args`, as the keyword arguments of `create_distiller(name, ...)`.

    Args:
        name: Of the distiller; several are joined with "+".
        strings: `option=value` each; also `part.option=value`, `group.lr=value` and `part.group.lr=value`.
    """
    return _flat(resolve(distiller_classes(name), split(strings), text=True))


def _flat(parts: Mapping[str, Resolved]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in parts.items():
        prefix = "" if len(parts) == 1 else f"{name}."
        flat |= {f"{prefix}{key}": value for key, value in part.options.items()}
        for group, settings in part.optim.items():
            flat |= {f"{prefix}{group}.{key}": value for key, value in settings.items()}
    return flat


def config_of(distiller: Distiller) -> dict[str, Any]:
    """The distiller as a JSON-able dict: its name, every option, and the versions of what made it.

    `from_json` makes the same distiller again, with fresh weights; its `state_dict()` belongs beside it.
    """
    parts = {name_of(type(part)): part for part in distiller.methods.values()}
    prefixes = parts if len(parts) == 1 else distiller.methods
    resolved = {key: Resolved(type(part), part.config, part.optim_overrides) for key, part in prefixes.items()}
    sources = {source.name: source.version for name in parts if (source := distribution_of(name))}
    config = {
        "distiller": "+".join(parts),
        "options": _flat(resolved),
        "versions": {"kd-plugins": kd_version(), "torch": str(torch.__version__), **sources},
    }
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise DistillError(
            f"expected options of {config['distiller']} that JSON can hold, got {config['options']}"
        ) from error


def to_json(distiller: Distiller, path: str | Path | None = None) -> str:
    """`config_of` as JSON text, also written to `path` if there is one."""
    text = json.dumps(config_of(distiller), indent=2) + "\n"
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def from_json(source: str | Path | Mapping[str, Any]) -> Distiller:
    """The distiller that `to_json` or `config_of` described.

    Args:
        source: A path to a JSON file, or the dict.
    """
    config = read_json(source) if isinstance(source, (str, Path)) else source
    if not isinstance(config, Mapping) or "distiller" not in config:
        got = f"the keys {list(config)}" if isinstance(config, Mapping) else type(config).__name__
        raise DistillError(f"expected a config with the key 'distiller', got {got} — see config_of()")
    if not isinstance(config.get("options", {}), Mapping):
        raise DistillError(f"expected a config with a mapping of options, got {config['options']!r} — see config_of()")
    try:
        return create_distiller(config["distiller"], **config.get("options", {}))
    except DistillError as error:
        if not config.get("versions"):
            raise
        made = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
        raise DistillError(f"{error}\n(The config was written by {made}.)") from error


def _import(entry: EntryPoint) -> type[Distiller]:
    if entry.dist is None and os.getcwd() not in sys.path:
        # A loose file beside the command: a console script, unlike `python -m`, does not look there.
        sys.path.append(os.getcwd())
    return load(entry, Distiller)  # type: ignore[no-any-return]
