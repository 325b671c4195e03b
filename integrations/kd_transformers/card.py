"""What a model card says of a distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from kd_plugins import Distiller, DistillError
from kd_transformers.checks import called, stated

Gain = Mapping[str, Sequence[float]]


# What `datasets` calls data by that were read from files: the format says nothing of them.
_FORMATS = "csv", "json", "pandas", "parquet", "text", "arrow", "xml", "sql", "generator", "webdataset", "hdf5"


def named_data(dataset: Any) -> str:
    """What a data set is called, where it has a name."""
    name = str(getattr(dataset, "builder_name", None) or "")
    return "" if name in _FORMATS or name.endswith("folder") else name


def check_gain(gain: Gain) -> None:
    """Refuses what is no gain: of each metric the mean, and the ends of its interval."""
    if not isinstance(gain, Mapping):
        raise DistillError(f"Expected gain by metric, {{'accuracy': (0.8, 0.3, 1.3)}}, got {gain!r}.")
    for metric, numbers in gain.items():
        given = isinstance(numbers, Sequence) and all(isinstance(number, Real) for number in numbers)
        if not given or len(numbers) != 3 or not numbers[1] <= numbers[0] <= numbers[2]:
            raise DistillError(
                f"Expected of {metric} the mean gain and the ends of its interval, (0.8, 0.3, 1.3), got {numbers!r}."
            )


def section(distiller: Distiller, teachers: Sequence[nn.Module], data: str, gain: Gain | None) -> str:
    """The section of a card: methods with papers and options, teachers, data, and what was measured of the gain."""
    lines = ["## Distillation", "", "Trained with kd-plugins:", ""]
    for name, part in distiller.methods.items():
        paper = part.paper
        where = "" if paper is None else f": [{paper.title}]({paper.url})" if paper.url else f": {paper.title}"
        lines.append(f"- method `{name}`{where}" + ("" if paper is None else f" ({paper})"))
        lines += [f"  - `{option}`: {value}" for option, value in part.config.items()]
    lines += [f"- teacher: {_name(teacher)}" for teacher in teachers]
    lines.append(f"- data: {data or 'not named'}")
    told = [_told(metric, *numbers) for metric, numbers in (gain or {}).items()]
    return "\n".join([*lines, "", *(told or ["No gain over the student trained alone was measured."]), ""])


def _told(metric: str, mean: float, low: float, high: float) -> str:
    interval = f"{mean:+g} (95 % interval {low:+g} to {high:+g})"
    if low > 0:
        return f"The distillation improves {metric} over the student trained alone by {interval}."
    if high < 0:
        return f"The distillation lowers {metric} against the student trained alone, by {interval}."
    return f"The difference in {metric} to the student trained alone, {interval}, tells no gain."


def _name(network: nn.Module) -> str:
    path, kind = str(stated(network, "_name_or_path") or ""), called(network)
    # A folder of this machine means nothing to others.
    hub = path and not Path(path).exists() and not Path(path).is_absolute()
    return f"`{path}`, {kind}" if hub else kind


def add_to_card(path: Path, text: str) -> None:
    """Puts a section before that of the training procedure."""
    head, mark, rest = path.read_text(encoding="utf-8").partition("## Training procedure\n")
    path.write_text(f"{head}{text}\n{mark}{rest}", encoding="utf-8")
