"""The one way to write files that outlive a kill, and to find the newest state that is whole.

A file is written beside its place, flushed and renamed. A state is a folder whose last file, `manifest.json`, holds the
size and the SHA-256 of every other one: without it, or with another byte in it, the folder is not whole. A run keeps
the state before the newest one, so that there is one to fall back to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError, told

MANIFEST = "manifest.json"
_PARTIAL = ".partial"


# What torch's writer, which tells of its own broken file and not of the disk, has in its errors.
_TORCHS_WRITER = re.compile("inline_container|Parent directory|cannot be opened")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Says in one sentence that a file or a folder cannot be written, as of a full disk; other faults stay."""
    from safetensors import SafetensorError

    remedy = "make room, or mend the rights of its folder."
    with told(f"{path} cannot be written", OSError, SafetensorError, remedy=remedy):
        try:
            yield
        except RuntimeError as error:
            if _TORCHS_WRITER.search(str(error)):
                raise OSError(str(error)) from error
            raise


@contextmanager
def taking_up(folder: str | Path) -> Iterator[None]:
    """Says in one sentence that a state cannot be taken up, for what is in it; what is wrong in a program stays.

    So does a device without memory, which has nothing to do with the state and after which a host may try again.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    errors = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError, UnpicklingError)
    remedy = "it is damaged, was edited, or is of another run; go on with what it was written with."
    full: OutOfMemoryError | None = None
    with told(f"The state {folder} cannot be read", *errors, remedy=remedy):
        try:
            yield
        except OutOfMemoryError as error:
            full = error
    if full is not None:
        raise full


@contextmanager
def replacing(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` in one step when the block ends without an error.

    Args:
        path: The file.
        shared: Whether other runs may write the same file meanwhile, as one of a cache; the last of them stays.

    Raises:
        DistillError: It cannot be written; what was there before is as it was.
    """
    path = Path(path)
    # One name, where it can be: the next writing takes the place of what a kill has left.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}" if shared else path.name + _PARTIAL)
    try:
        with writing(path):
            if partial.is_symlink():
                # Somebody's link, which would lead the writing elsewhere.
                partial.unlink()
            # Safetensors lets a file's owner alone read it; others may, as the umask says.
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str, *, shared: bool = False) -> None:
    """Writes a text file in one step, with "?" for half a surrogate; `shared` as in `replacing`."""
    with replacing(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | Path, content: Any, *, shared: bool = False) -> None:
    """Writes a JSON file in one step; `shared` as in `replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n", shared=shared)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; a DistillError names one that is damaged."""
    with told(f"{path} cannot be read", OSError, ValueError, RecursionError, remedy="it is damaged, or was edited."):
        return json.loads(Path(path).read_text(encoding="utf-8"))


# A folder that is whole or not


def seal(folder: str | Path, **facts: Any) -> None:
    """Says that a folder is whole: flushes its files and writes the manifest, last of all.

    Args:
        folder: With everything in it, also in folders of its own.
        facts: What else the manifest tells, as JSON takes it.
    """
    folder, files = Path(folder), {}
    for path in sorted(folder.rglob("*")):
        _flush(path)
        if path.is_file() and path != folder / MANIFEST and path.suffix != _PARTIAL:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_json(folder / MANIFEST, {"files": files, **facts})


def facts(folder: str | Path) -> dict[str, Any]:
    """What the manifest of a folder tells beside its files; empty without one."""
    path = Path(folder) / MANIFEST
    content = read_json(path) if path.is_file() else {}
    return {key: value for key, value in content.items() if key != "files"}


def damage(folder: str | Path, needs: Iterable[str] = (), *, contents: bool = True) -> str:
    """Why a folder is no whole state, naming the file; empty where it is one.

    Args:
        folder: A folder that `seal` has closed, or not.
        needs: Files that it must have.
        contents: Whether every byte is read, and not only whether the files are there in their sizes.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        files: Mapping[str, Any] = read_json(folder / MANIFEST)["files"]
        for name in (*files, *needs):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if name not in files:
                return f"{name} is not in its {MANIFEST}"
            size = path.stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes and was written with {files[name]['bytes']}"
        for name in files if contents else ():
            if digest(folder / name) != files[name]["sha256"]:
                return f"{name} holds other bytes than were written (its SHA-256 differs)"
    except (DistillError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return ""


def newest(candidates: Iterable[Path], say: Callable[[str], Any], needs: Iterable[str] = ()) -> Path | None:
    """The first whole state of those that exist; `say` is told which were skipped, and why.

    Args:
        candidates: Folders, the newest first.
        say: Takes one sentence.
        needs: Files that a state must have.
    """
    needs = tuple(needs)
    for folder in candidates:
        if folder.is_dir():
            why = damage(folder, needs)
            if not why:
                return folder
            say(f"Skipped {folder}: {why}.")
    return None


def check(folder: Path, candidates: Iterable[Path], needs: Iterable[str] = ()) -> None:
    """Refuses a state that was named and is damaged, and says which one to take instead.

    Args:
        folder: The state.
        candidates: Those of the same run, the newest first.
        needs: Files that a state must have.
    """
    needs = tuple(needs)
    why = damage(folder, needs)
    if why:
        other = newest((c for c in candidates if c.resolve() != folder.resolve()), lambda _: None, needs)
        remedy = f"take {other} instead" if other else "no other state of the run is whole, so start anew"
        raise DistillError(f"{folder} is no whole state: {why}; {remedy}.")


# The states of a run that keeps two


def slots(folder: str | Path) -> list[Path]:
    """Where the states of a run lie, the newest first."""
    return [Path(folder) / name for name in ("state.new", "state", "state.old")]


def open_state(folder: str | Path) -> Path:
    """An empty folder for a new state of a run, which `close_state` makes the newest one."""
    settle(folder)
    new = slots(folder)[0]
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    return new


def settle(folder: str | Path) -> None:
    """Ends what a kill between the two steps of `close_state` has left: the new state may be the only whole one."""
    new = slots(folder)[0]
    if new.is_dir() and not damage(new):
        _shift(folder)


def close_state(folder: str | Path, **facts: Any) -> None:
    """Seals the new state of a run; the one before it stays, and the one before that goes."""
    seal(slots(folder)[0], **facts)
    _shift(folder)


def _shift(folder: str | Path) -> None:
    new, current, old = slots(folder)
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(current, old)
    os.replace(new, current)
    _flush(Path(folder))


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # There a folder cannot be opened.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
