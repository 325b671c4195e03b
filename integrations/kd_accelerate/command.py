"""What the training commands share."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState

from kd_plugins.errors import DistillError, did_you_mean, told


def run_command(name: str, command: Callable[[], Any]) -> int:
    """Runs a command, and turns what a user can mend into one line on stderr, said by the first process.

    Args:
        name: The command's name.
        command: What it does.

    Returns:
        Exit status: 2 for an error that a user can mend, 130 and 143 where SIGINT and SIGTERM ended it.
    """
    status, said = 0, ""
    with signals.handled():
        try:
            command()
            # A thread of the communication library that outlives the interpreter can abort the process.
            PartialState().destroy_process_group()
        except DistillError as error:
            status, said = 2, f"error: {error}"
        except Stopped as stop:
            status, said = 128 + stop.number, f"stopped by {signal.Signals(stop.number).name}: {stop.says}"
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG):
                raise
            status, said = 2, f"error: {error}: make room, or mend the rights; what was written before is as it was."
    if said and int(os.environ.get("RANK", 0)) == 0:
        print(f"{name}: {said}", file=sys.stderr)
    return status


class Stopped(KeyboardInterrupt):
    """A signal ends the command.

    Attributes:
        number: The signal's.
        says: What is left to go on from.
    """

    says = "the training had not begun."

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Signals:
    """SIGTERM and SIGINT, which end a command at once, or after the step where a training asks for them.

    Attributes:
        asked: Number of the signal that came, or 0.
        held: Whether a training asks; a second signal then ends the command at once.
    """

    def __init__(self) -> None:
        self.asked, self.held = 0, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes both signals while a command runs; in a thread beside the first one nothing does."""
        self.asked, self.held = 0, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._take) for number in numbers]
        try:
            yield
        finally:
            self.asked = 0
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the first signal back, for a training that looks at `asked` after every step."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def check(self) -> None:
        """Ends the command where a signal came."""
        if self.asked:
            raise Stopped(self.asked)

    def agreed(self, accelerator: Accelerator, step: int = 0) -> bool:
        """Whether a signal came to any process. Several ask each other in every tenth step, and end after the same."""
        if accelerator.num_processes > 1:
            if step % 10:
                return False
            came = torch.tensor(float(self.asked), device=accelerator.device)
            if float(accelerator.reduce(came)) and not self.asked:
                self.asked = int(signal.SIGTERM)
        return bool(self.asked)

    def _take(self, number: int, frame: Any) -> None:
        again, self.asked = self.asked, number
        if again or not self.held:
            raise Stopped(number)


signals = _Signals()


def with_file(parser: ArgumentParser, words: Sequence[str], refused: Mapping[str, tuple[Any, str]]) -> list[str]:
    """The words of a command line behind those of the file of arguments that its `--config` names, if any.

    An entry of the file becomes what would be written on the command line, so that both are read and checked alike; a
    flag takes the place of the entry. Exits with a message where the file cannot be read, or names an unknown argument.

    Args:
        parser: The parser, which has `--config`.
        words: The command line.
        refused: Arguments that a file may name at a default alone: that, and the reason.
    """
    files = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    files.add_argument(*flags(parser)["--config"].option_strings, dest="paths", action="append", default=[])
    paths = files.parse_known_args(words)[0].paths
    try:
        if len(paths) > 1:
            raise DistillError("--config: expected one file of arguments, got two.")
        from_file = [word for path in paths for word in _from_file(parser, path, words, refused)]
    except DistillError as error:
        parser.error(str(error))
    # Before all flags, as the last of equal ones counts, and behind what stands first without one.
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[:first], *from_file, *words[first:]]


def given(parser: ArgumentParser, words: Sequence[str]) -> set[str]:
    """The destinations of the flags that occur in a command line."""
    actions, names = flags(parser), (word.partition("=")[0] for word in words)
    return {actions[name].dest for name in names if name in actions}


def explain(parser: ArgumentParser, word: str) -> str:
    """What is wrong with a word of the command line that the parser does not know."""
    known = [flag for flag in flags(parser) if flag.startswith("--")]
    return f"unrecognized argument {word}.{did_you_mean(word.partition('=')[0], known)}"


def flags(parser: ArgumentParser) -> dict[str, Action]:
    """What each flag of a parser does."""
    return parser._option_string_actions


def _from_file(
    parser: ArgumentParser, path: str, words: Sequence[str], refused: Mapping[str, tuple[Any, str]]
) -> list[str]:
    """The entries of a file that no flag overrides, as words of the command line."""
    with told(f"{path} cannot be read as arguments", OSError, ValueError, yaml.YAMLError):
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text) or {}
    if not isinstance(values, dict):
        raise DistillError(f"{path}: expected a mapping of argument names to values, got {type(values).__name__}.")
    known, overridden = flags(parser), given(parser, words)
    positional = [action.dest for action in parser._actions if not action.option_strings]
    from_file = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        flag = next((f for f in (f"--{name}", f"--{name.replace('_', '-')}") if f in known), None)
        if name in positional:
            parser.set_defaults(**{name: value})
        elif name in refused:
            # A file that timm's own script wrote names every flag; one at its default asks for nothing.
            default, reason = refused[name]
            if value is not None and value != default:
                raise DistillError(f"{path}: {key}: {reason}.")
        elif flag is None or name == "help":
            raise DistillError(f"{path}: unknown argument {key!r}.{did_you_mean(name, [f[2:] for f in known])}")
        elif value is not None and name != "config" and known[flag].dest not in overridden:
            from_file += _as_words(flag, value, known[flag])
    return from_file


def _as_words(flag: str, value: Any, action: Action) -> list[str]:
    """An entry of a file as it would be written on the command line."""
    if action.nargs in (0, "*", "+") and value == action.default:
        return []
    if action.nargs == 0 and isinstance(value, bool) and (value or action.default):
        return [flag if value else f"--no-{flag[2:]}"]
    several = action.nargs in ("*", "+") or isinstance(action.nargs, int) and action.nargs > 0
    if isinstance(value, list) and (any(isinstance(v, Mapping) for v in value) if several else action.default == []):
        # A flag that is written once for each item.
        return [word for item in value for word in _as_words(flag, item, action)]
    if isinstance(value, Mapping) and several:
        write = _option if action.dest == "distill_args" else repr
        value = [f"{key}={write(item)}" for key, item in value.items()]
    if several:
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    return [f"{flag}={json.dumps(value) if isinstance(value, (Mapping, list, bool)) else value}"]


def _option(value: Any) -> str:
    """A value of a file in the notation of --distill-args."""
    if isinstance(value, list) and not any(isinstance(item, (list, Mapping)) for item in value):
        return ",".join(str(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
