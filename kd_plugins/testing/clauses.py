"""The contract, first half: what a distiller is. The second half, what it does, is in `runs`."""

from __future__ import annotations

import functools
import json
import re
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from kd_plugins import Distiller, DistillError, Nets
from kd_plugins.authors import overrides
from kd_plugins.binding import needs_of_stages
from kd_plugins.catalog.options import check as check_options
from kd_plugins.catalog.options import options_of, parse
from kd_plugins.catalog.values import as_text


class ContractError(DistillError):
    """A distiller breaks a clause of the contract.

    Attributes:
        clause: The clause, as `check_distiller` names it.
    """

    def __init__(self, clause: str, message: str) -> None:
        super().__init__(f"[{clause}] {message}")
        self.clause = clause


def broken(clause: str, what: str, remedy: str) -> NoReturn:
    """Raises the error of a broken clause."""
    raise ContractError(clause, f"{what} — {remedy}.")


# --- the class: its docstring, its options ----------------------------------------------------------------------------


def check_class(part: Distiller) -> None:
    """Clauses `docstring`, `options` and `config` of one method."""
    cls = type(part)
    _check_docstring(cls)
    try:
        options = options_of(cls)
    except DistillError as error:
        raise ContractError("options", str(error)) from error
    for option in options.values():
        if not option.help:
            broken(
                "options",
                f"the option {option.name!r} of {cls.__name__} has no help",
                f"add `{option.name}: ...` under Args: in the class's docstring",
            )
    _check_config(cls, {name: part.config.get(name, option.default) for name, option in options.items()})


def _check_docstring(cls: type[Distiller]) -> None:
    doc = cls.__doc__ or ""
    if not doc.strip() or doc == Distiller.__doc__:
        broken("docstring", f"{cls.__name__} has no docstring", "say in its first line what the method does")
    paper, whose = cls.paper, f"the docstring of {cls.__name__}"
    if paper is None and not re.search(r"\b(19|20)\d\d\b", doc):
        broken("docstring", f"{whose} cites nothing", "name authors, venue and year, and give the class a `paper`")
    if paper is not None:
        author = str(paper).split(",")[0].split(" & ")[0].removesuffix(" et al.")
        for what, word in (("first author", author), ("year", str(paper.year))):
            if word not in doc:
                broken("docstring", f"{whose} does not name the {what} of its paper, {word}", f"cite it: {paper}")
    if "[B" not in doc:
        broken("docstring", f"{whose} gives no shapes", "say them, such as `[B, C, H, W]`")


def _check_config(cls: type[Distiller], config: Mapping[str, Any]) -> None:
    """The options survive JSON and the command line."""
    remedy = "annotate it with the type that it has (tuples for lists, `X | None` where None is meant)"
    for name, value in config.items():
        what = f"the option {name!r} of {cls.__name__} = {value!r}"
        try:
            ways = {
                "JSON": check_options(cls, {name: json.loads(json.dumps(value))})[name],
                "the command line": parse(cls, [f"{name}={as_text(value)}"])[name],
            }
        except (TypeError, ValueError) as error:
            raise ContractError("config", f"{what} cannot be written down: {error}") from error
        for way, back in ways.items():
            if back != value:
                broken("config", f"{what} comes back from {way} as {back!r}", remedy)
    made = cls(**check_options(cls, json.loads(json.dumps(dict(config)))))
    again = {name: made.config.get(name, value) for name, value in config.items()}
    if again != dict(config):
        broken("config", f"{cls.__name__} made of its config has {again}, not {config}", "do not edit self.config")


# --- the parts: nothing hidden, nothing shared, no network inside -----------------------------------------------------


def reachable(root: Any) -> Iterator[tuple[str, Any]]:
    """Everything that an object holds, however deep, with the way to it; registered parts first, shortest way first."""
    seen: dict[int, Any] = {}
    todo = deque([("self", root)])
    while todo:
        path, value = todo.popleft()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, types.ModuleType)) or value is None:
            continue
        seen[id(value)] = value
        yield path, value
        if not isinstance(value, Tensor):
            todo.extend(_children(path, value))


def _children(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        inner = [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
        rest = [(k, v) for k, v in vars(value).items() if k not in ("_parameters", "_buffers", "_modules")]
        return [(f"{path}.{name}", item) for name, item in (*inner, *rest)]
    if isinstance(value, Mapping):
        return [(f"{path}[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        return [(f"{path}()", item) for item in (*cells, *(value.__defaults__ or ()))]
    if isinstance(value, types.MethodType):
        return [(f"{path}.__self__", value.__self__)]
    if isinstance(value, functools.partial):
        return [(f"{path}()", item) for item in (value.func, *value.args, *value.keywords.values())]
    slots = [slot for cls in type(value).__mro__ for slot in _names(cls.__dict__.get("__slots__", ()))]
    attributes = {**getattr(value, "__dict__", {}), **{s: getattr(value, s) for s in slots if hasattr(value, s)}}
    return [(f"{path}.{name}", item) for name, item in attributes.items()]


def _filled(cell: Any) -> bool:
    try:
        return bool(cell.cell_contents or True)
    except ValueError:
        return False


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def check_parts(distiller: Distiller, nets: Nets) -> None:
    """Clauses `no network inside`, `registered` and `one group`, of a distiller that is set up."""
    theirs: dict[int, str] = {}
    for net, (who, module) in zip(nets, (nets.trained | nets.frozen).items(), strict=True):
        for name, item in (*module.named_modules(), *module.named_parameters()):
            theirs[id(item)] = f"{who}{'.' if name else ''}{name}"
        theirs[id(net)] = who
    registered = {id(p) for p in distiller.parameters()}
    for path, item in reachable(distiller):
        if id(item) in theirs:
            broken(
                "no network inside",
                f"{path} of {distiller.name} is {theirs[id(item)]}",
                "keep nothing of a network; take it from `nets` when it is needed, so that the saved state stays small",
            )
        if isinstance(item, nn.Parameter) and id(item) not in registered:
            broken(
                "registered",
                f"{path} of {distiller.name} is a parameter that no optimizer and no checkpoint would see",
                "register it (an attribute of the module, nn.ParameterList, nn.ModuleDict, ...)",
            )
    _check_groups(distiller, registered)


def _check_groups(distiller: Distiller, registered: Collection[int]) -> None:
    names = {id(p): name for name, p in distiller.named_parameters()}
    extras = distiller.extras()
    owner: dict[int, str] = dict.fromkeys(map(id, distiller.own_parameters()), "own")
    for group, module in extras.items():
        if group in ("student", "own") or re.fullmatch(r"peer\d+", group):
            broken("one group", f"extras() of {distiller.name} has a group {group!r}", "choose a free name")
        for name, parameter in module.named_parameters():
            if id(parameter) not in registered:
                broken(
                    "registered",
                    f"{name} of extras()[{group!r}] of {distiller.name} is not registered",
                    "make the module an attribute of the distiller",
                )
            if id(parameter) in owner:
                broken(
                    "one group",
                    f"the parameter {names[id(parameter)]} of {distiller.name} is in the groups"
                    f" {owner[id(parameter)]!r} and {group!r}",
                    "leave it in one of them",
                )
            owner[id(parameter)] = group
    for name, parameter in distiller.named_parameters():
        if id(parameter) not in owner or not parameter.requires_grad:
            broken(
                "one group",
                f"the parameter {name} of {distiller.name} does not require a gradient, so no group trains it",
                "make it a buffer (register_buffer), or let it be trained",
            )
    unknown = set(distiller.optimizers()) - set(extras)
    if unknown and not overrides(distiller, "shared"):
        broken(
            "one group",
            f"optimizers() of {distiller.name} names {sorted(unknown)}, its extra groups are {sorted(extras)}",
            "use the names in extras()",
        )


def check_needs(distiller: Distiller, nets: Nets) -> None:
    """Clause `needs`: what is read exists, in every stage."""
    for stage, needs in zip(distiller.stages(), needs_of_stages(distiller), strict=True):
        reads = [needs.student, *(needs.peer(i) for i in range(len(nets.peers) - 1))]
        reads += [needs.of_teacher(i) for i in range(len(nets.teachers))]
        for who, net, read in zip(nets.trained | nets.frozen, nets, reads, strict=True):
            try:
                net.network.install(read)
            except DistillError as error:
                raise ContractError(
                    "needs",
                    f"needs() of {distiller.name} in the stage {stage.name!r} names what the {who} has not: {error}",
                ) from error
        if any(not 0 < share < 1 for share in needs.streams.values()) or sum(needs.streams.values()) >= 1:
            broken(
                "needs",
                f"the streams of {distiller.name} in the stage {stage.name!r} take the shares {dict(needs.streams)}",
                "give each a share between 0 and 1 that leaves rows to train on",
            )
