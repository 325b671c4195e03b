"""Values by their annotations: what a command line, a JSON file or a caller gave, as the type that was asked for."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be, in its annotation: `Annotated[float, Range(above=0)]`.

    Args:
        above: The number is larger than this.
        low: The number is not smaller than this.
        high: The number is not larger than this.
        below: The number is smaller than this.
    """

    above: float | None = None
    low: float | None = None
    high: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = (("above", self.above), ("from", self.low), ("to", self.high), ("below", self.below))
        return " ".join(f"{word} {number:g}" for word, number in words if number is not None)


Positive = Annotated[float, Range(above=0)]
# Losses are multiplied by its square, and logits divided by it.
Temperature = Annotated[float, Range(low=1e-4, high=1e4)]
NonNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
Fraction = Annotated[float, Range(above=0, below=1)]
AtLeastOne = Annotated[int, Range(low=1)]


def convert(value: Any, hint: Any, text: bool = False) -> Any:
    """The value as an annotation wants it; a ValueError, with a text where there is more to say, if it cannot be had.

    Args:
        value: Anything; a string is read where the annotation is no string.
        hint: A resolved annotation.
        text: Whether the value comes from a command line, where everything is a string: then `str` is the last type of
            a union to be tried, while a value from Python or JSON stays what it is.

    >>> convert("3,layer4", tuple[str | int, ...], text=True)
    (3, 'layer4')
    >>> convert(("3",), tuple[str | int, ...])
    ('3',)
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        converted, allowed = convert(value, get_args(hint)[0], text), get_args(hint)[1]
        if isinstance(allowed, Range) and converted not in allowed:
            raise ValueError
        return converted
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), text)
    if origin is Literal:
        for choice in get_args(hint):
            if value == choice and type(value) is type(choice) or isinstance(value, str) and value == str(choice):
                return choice
        raise ValueError
    if hint in (None, types.NoneType):
        if value is None or isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        raise ValueError
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    kind = origin or hint
    if kind in (tuple, list, Sequence, Collection, Iterable):
        return _convert_list(value, kind, get_args(hint), text)
    if kind in (dict, Mapping):
        return _convert_mapping(value, get_args(hint))
    if kind is Callable:
        if callable(value):
            return value
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError


def _convert_union(value: Any, members: Sequence[Any], text: bool) -> Any:
    if not text and type(value) in members:
        return convert(value, type(value))
    # Every text is a str, so str comes last; a literal "none" goes before None, and both before the rest.
    ranks: dict[Any, int] = {types.NoneType: 1, str: 3}
    for member in sorted(members, key=lambda member: 0 if get_origin(member) is Literal else ranks.get(member, 2)):
        try:
            return convert(value, member, text)
        except ValueError:
            continue
    raise ValueError


def _convert_list(value: Any, kind: Any, items: tuple[Any, ...], text: bool) -> Any:
    if isinstance(value, str):
        if value.startswith("["):
            value, text = _json(value), False
        else:
            inner = value[1:-1] if value.startswith("(") and value.endswith(")") else value
            value = [item.strip() for item in inner.split(",") if item.strip()]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError
    if kind is tuple and items and items[-1] is not Ellipsis:
        items = () if items == ((),) else items
        if len(items) != len(value):
            raise ValueError(f"{len(items)} values expected")
    else:
        items = (items[0] if items else Any,) * len(value)
    converted = [convert(item, hint, text) for item, hint in zip(value, items, strict=True)]
    return converted if kind is list else tuple(converted)


def _convert_mapping(value: Any, items: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(value, str):
        value = _json(value)
    if not isinstance(value, Mapping):
        raise ValueError
    key_hint, value_hint = items or (Any, Any)
    # JSON has string keys only, so keys are read as on a command line.
    return {convert(key, key_hint, True): convert(item, value_hint, False) for key, item in value.items()}


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


_SPELLED = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def _bool(value: Any) -> bool:
    return _SPELLED[value.lower()] if isinstance(value, str) and value.lower() in _SPELLED else _exactly(bool, value)


def _int(value: Any) -> int:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value) else _exactly(int, value)


def _float(value: Any) -> float:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if not math.isfinite(_exactly(float, value)):
        raise ValueError("a finite number")
    return value  # type: ignore[no-any-return]


def _exactly(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise ValueError
    return kind(value)


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: lambda value: _exactly(str, value),
}


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, also within a union."""
    if get_origin(hint) is Annotated:
        return choices_of(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for member in get_args(hint) for choice in choices_of(member))
    return ()


def is_ranged(hint: Any) -> bool:
    """Whether an annotation, or a member of a union, is a number of some range."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(map(is_ranged, get_args(hint)))
    return get_origin(hint) is Annotated and any(isinstance(a, Range) for a in get_args(hint)[1:])


def label(hint: Any) -> str:
    """The annotation as a reader of `--help` wants it.

    >>> label(Positive | Literal["auto"] | None)
    'float above 0 | auto | none'
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join(filter(None, (label(args[0]), *(str(a) for a in args[1:] if isinstance(a, Range)))))
    if hint in (None, types.NoneType):
        return "none"
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(label(arg) for arg in args)
    if hint is Ellipsis:
        return "..."
    if isinstance(hint, list):
        return f"[{', '.join(map(label, hint))}]"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(label, args))}]" if args else name


def as_text(value: Any) -> str:
    """The value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list, dict)) for item in value)
        return json.dumps(value) if nested else ",".join(map(as_text, value)) or "()"
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return str(value) if value != "" else "''"
