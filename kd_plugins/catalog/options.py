"""A distiller's options, read off its constructor: the signature is the command line, the config file and the help.

Every option of a distiller is a keyword-only, annotated, defaulted argument of `__init__`; its help is its entry under
`Args:` in the docstring. So a new method needs no argument parser and no config class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal, get_type_hints

from torch import nn

from kd_plugins.catalog.values import NonNegative, Positive, as_text, choices_of, convert, is_ranged, label
from kd_plugins.errors import DistillError, did_you_mean

# What `Distiller.__init__` sets, and what a distiller does: an option of such a name would be overwritten or hidden.
_TAKEN = tuple(
    "config host optim_overrides progress ready training after_update begin_stage export extras kind loss methods needs"
    " optimizers own_parameters pictures prepare setup shared stage_done stages task taught turns".split()
)


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """The optimizer of one extra group; every field can be overridden, `--distill-args critic.lr=2e-5`.

    Attributes:
        optimizer: Name of a class in `torch.optim`.
        lr: Learning rate.
        weight_decay: Weight decay.
        options: Other arguments of the optimizer, such as `{"betas": (0.5, 0.9)}`.
        schedule: `"constant"`, or `"student"` to follow the relative curve of the student's learning rate.
        clip: Largest norm of the group's gradient; None does not clip.
    """

    optimizer: str = "Adam"
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Literal["constant", "student"] = "constant"
    clip: Positive | None = None


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a distiller.

    Args:
        name: Of the constructor's argument.
        annotation: Its resolved type.
        default: Its default value.
        help: From the docstring, in one line.
    """

    name: str
    annotation: Any
    default: Any
    help: str = ""

    @property
    def type(self) -> str:
        """The type, as a reader of `--help` wants it."""
        return label(self.annotation)

    @property
    def default_text(self) -> str:
        """The default, as it is written on the command line."""
        return as_text(self.default)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What one distiller of a (composed) name is made of: its class, its options, its groups' optimizer settings."""

    cls: type
    options: dict[str, Any]
    optim: dict[str, dict[str, Any]]


def options_of(cls: type) -> dict[str, Option]:
    """The options of a distiller class, in the order of its constructor.

    A constructor that takes `**kwargs` passes them to its base class, whose options follow.

    >>> from typing import Literal
    >>> class Example:
    ...     '''Args:
    ...         weight: Of the loss,
    ...             in front of everything.
    ...     '''
    ...     def __init__(self, *, weight: float = 1.0, kernel: Literal["poly", "linear"] = "poly"): ...
    >>> options_of(Example)["weight"].help, options_of(Example)["kernel"].type
    ('Of the loss, in front of everything.', 'poly | linear')
    """
    options: dict[str, Option] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if base in (nn.Module, object):
            break
        if init is None:
            continue
        hints = _hints(init, cls)
        helps = {**_argument_help(base.__doc__), **_argument_help(init.__doc__)}
        parameters = list(inspect.signature(init).parameters.values())[1:]
        own = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        for p in own:
            name = p.name
            if name in options:
                continue
            if p.kind is not p.KEYWORD_ONLY or p.default is p.empty or name not in hints:
                raise DistillError(
                    f"expected every argument of {cls.__name__}.__init__ to be keyword-only, annotated and defaulted, "
                    f"got {name!r} — write `*, {name}: float = ...`"
                )
            if name in _TAKEN:
                raise DistillError(
                    f"expected options of {cls.__name__} under names of their own, got {name!r}, where every"
                    f" distiller keeps something else — choose another name, such as `own_{name}`"
                )
            options[name] = Option(name, hints[name], p.default, helps.get(name, ""))
        if own == parameters:
            break
    return options


def parse(cls: type, strings: Iterable[str]) -> dict[str, Any]:
    """The options written as `name=value` on a command line, as the values that the constructor takes.

    Numbers, `true` and `false`, `none`, comma-separated lists and, for mappings and nested lists, JSON.

    >>> class Example:
    ...     def __init__(self, *, layers: tuple[str, ...] = (), weight: float | None = None): ...
    >>> parse(Example, ["layers=layer3,layer4", "weight=50"])
    {'layers': ('layer3', 'layer4'), 'weight': 50.0}
    """
    return _checked(cls, split(strings), text=True)


def check(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with types checked, converted where nothing is lost (an int for a float, a list for a tuple).

    A string stands for what it spells, as JSON and YAML files and hyper-parameter searches may quote numbers; where the
    option itself may be a string, it stays one.
    """
    return _checked(cls, options, text=False)


def constructed(cls: type, args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a distiller with its value, checked, as its constructor was called.

    What is no option (of a class that breaks the rules of constructors) is there as it was given.
    """
    try:
        options = options_of(cls)
    except DistillError:
        options = {}
    if args or not options or not set(given) <= set(options):
        bound = inspect.signature(cls).bind_partial(*args, **given)
        bound.apply_defaults()
        return dict(bound.arguments)
    return {name: option.default for name, option in options.items()} | check(cls, given)


def check_set(cls: type, name: str, value: Any) -> None:
    """Refuses a number that is set as an option's value and that the constructor would not take.

    What is no number stays as it is set: an author may make a layer of an option, or a list of a text.
    """
    if isinstance(value, (int, float)) and name in _ranged(cls):
        if isinstance(value, float):
            # What anneals an option may leave its range by a rounding, which is no reason to end a training.
            with suppress(DistillError):
                _convert_option(name, round(value, 6), _ranged(cls)[name], text=False)
                return
        _convert_option(name, value, _ranged(cls)[name], text=False)


@cache
def _ranged(cls: type) -> dict[str, Any]:
    """The annotations of the options that are numbers of some range, by name."""
    with suppress(DistillError):
        return {name: option.annotation for name, option in options_of(cls).items() if is_ranged(option.annotation)}
    return {}


def options_table(options: Mapping[str, Option], prefix: str = "") -> str:
    """The options with types, defaults and help, one a line.

    >>> print(options_table({"weight": Option("weight", float, 1.0, "Of the loss.")}))
      weight: float = 1.0    Of the loss.
    """
    heads = [f"  {prefix}{option.name}: {option.type} = {option.default_text}" for option in options.values()]
    width = max((len(head) for head in heads if len(head) <= 60), default=0)
    lines = [f"{head:<{width}}    {option.help}".rstrip() for head, option in zip(heads, options.values(), strict=True)]
    return "\n".join(lines) or "  (no options)"


# --- names with dots: compositions and optimizer groups ---------------------------------------------------------------


def resolve(classes: Mapping[str, type], options: Mapping[str, Any], *, text: bool = False) -> dict[str, Resolved]:
    """Sorts the options of a composition to its parts and checks them.

    Args:
        classes: The parts' classes by name; a single distiller is a composition of one.
        options: `weight` goes to the only part that has it, `nst.weight` to the part nst. `critic.lr` is the learning
            rate of the group `critic` of a single distiller, `afd.critic.lr` the one of the part afd.
        text: Whether the values are strings from a command line.
    """
    given: dict[str, dict[str, Any]] = {name: {} for name in classes}
    optim: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in classes}
    for key, value in options.items():
        owner, rest = _owner(classes, key)
        if "." in rest:
            group, field = rest.split(".", 1)
            target, name = optim[owner].setdefault(group, {}), field
            value = _optim_setting(classes, key, field, value, text)
        else:
            target, name = given[owner], rest
        if name in target:
            raise DistillError(f"expected every option once, got {rest!r} of {owner} twice — drop one of them")
        target[name] = value
    single = len(classes) == 1
    return {
        name: Resolved(cls, _checked(cls, given[name], text, "" if single else f"{name}."), optim[name])
        for name, cls in classes.items()
    }


def _owner(classes: Mapping[str, type], key: str) -> tuple[str, str]:
    """The part that an option belongs to, and the option's name within it."""
    prefix, dot, rest = key.partition(".")
    if dot and prefix in classes:
        return prefix, rest
    if len(classes) == 1:
        return next(iter(classes)), key
    names = "+".join(classes)
    if dot:
        raise DistillError(
            f"expected a part of {names} before the first dot, got {key!r}.{did_you_mean(prefix, classes)} "
            f"An optimizer setting of a group is written {next(iter(classes))}.{key}"
        )
    owners = [name for name, cls in classes.items() if key in options_of(cls)]
    if len(owners) > 1:
        ways = " or ".join(f"{owner}.{key}" for owner in owners)
        raise DistillError(f"expected an option of one part of {names}, got {key!r}, which several have — write {ways}")
    if not owners:
        known = dict.fromkeys(option for cls in classes.values() for option in options_of(cls))
        tables = "\n".join(options_table(options_of(cls), f"{name}.") for name, cls in classes.items())
        raise DistillError(f"{names} has no option {key!r}.{did_you_mean(key, known)} Its options:\n{tables}")
    return owners[0], key


def _optim_setting(classes: Mapping[str, type], key: str, field: str, value: Any, text: bool) -> Any:
    hints = get_type_hints(OptimSpec, include_extras=True)
    if field not in hints:
        what = f"part of {'+'.join(classes)} or " if len(classes) > 1 else ""
        raise DistillError(
            f"expected {key!r} to name a {what}setting of an optimizer group ({', '.join(hints)}), "
            f"got {field!r}.{did_you_mean(field, hints)}"
        )
    return _convert_option(key, value, hints[field], text)


# --- reading what was given -------------------------------------------------------------------------------------------


def split(strings: Iterable[str]) -> dict[str, str]:
    """What `name=value` strings say, by name."""
    given: dict[str, str] = {}
    for string in strings:
        name, equals, value = string.partition("=")
        name = name.strip()
        if not equals or not name:
            raise DistillError(f"expected option=value, got {string!r}")
        if name in given:
            raise DistillError(f"expected every option once, got {name!r} twice — drop one of them")
        given[name] = value.strip()
    return given


def _checked(cls: type, given: Mapping[str, Any], text: bool, prefix: str = "") -> dict[str, Any]:
    options = options_of(cls)
    checked = {}
    for name, value in given.items():
        if name not in options:
            raise DistillError(
                f"{cls.__name__} has no option {name!r}.{did_you_mean(name, options)} "
                f"Its options:\n{options_table(options, prefix)}"
            )
        checked[name] = _convert_option(f"{prefix}{name}", value, options[name].annotation, text)
    return checked


def _convert_option(name: str, value: Any, hint: Any, text: bool) -> Any:
    try:
        return convert(value, hint, text)
    except ValueError as error:
        detail = f" ({error})" if str(error) else ""
        close = did_you_mean(value, map(str, choices_of(hint))) if isinstance(value, str) else ""
        raise DistillError(f"expected {name} to be {label(hint)}, got {value!r}{detail}.{close}") from None


# --- signatures and docstrings ----------------------------------------------------------------------------------------


def _hints(init: Callable[..., Any], cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(init, include_extras=True)
    except (NameError, AttributeError, TypeError) as error:
        raise DistillError(
            f"expected annotations of {cls.__name__}.__init__ that can be resolved at run time, got: {error} — "
            "import the type outside TYPE_CHECKING"
        ) from error


def _argument_help(doc: str | None) -> dict[str, str]:
    """The entries under `Args:` of a Google docstring, each joined into one line."""
    lines = inspect.cleandoc(doc or "").splitlines()
    start = next((i for i, line in enumerate(lines) if re.fullmatch(r"\s*(Args|Arguments|Parameters):\s*", line)), None)
    if start is None:
        return {}
    # cleandoc() takes the indentation of a section that opens the docstring.
    outer = _indent(lines[start]) if start else -1
    entries: dict[str, list[str]] = {}
    names: list[str] = []
    level: int | None = None
    for line in lines[start + 1 :]:
        if not line.strip():
            continue
        if _indent(line) <= outer:
            break
        level = _indent(line) if level is None else level
        entry = re.match(r"\s*\*{0,2}(\w+(?:, \w+)*)(?: \(.*?\))?:(?:\s+(.*)|$)", line)
        if _indent(line) <= level and entry:
            names = entry[1].split(", ")
            entries |= {name: [entry[2] or ""] for name in names}
        else:
            for name in names:
                entries[name].append(line.strip())
    return {name: " ".join(filter(None, text)) for name, text in entries.items()}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
