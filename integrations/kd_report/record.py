"""What a run leaves for its report: what was run, one row a log, and the networks before and after the training.

A run folder holds `run.json` (what was run, results, cost, what `kd_report.analysis` found `before` and `after`, and
`pictures`, which are `Distiller.pictures()`), `analysis.safetensors` (the tensors of the analysis) and `history.jsonl`
(one JSON object a line). `kd-plugins report` reads these three files and nothing else.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from kd_accelerate.player import TurnPlayer
from kd_plugins import Batch, Distiller, Net, Nets
from kd_plugins.binding import needs_of_stages
from kd_plugins.catalog.registry import config_of
from kd_plugins.evaluation import Doubts
from kd_plugins.picture import Picture
from kd_plugins.states import read_json, replacing, write_text
from kd_report.analysis import Decode, analyse, as_nets, predict
from kd_report.measures import predictions
from kd_report.runs import FORMAT, read_rows

_logger = logging.getLogger(__name__)

__all__ = ["MOST_AT_ONCE", "RunRecord", "StepTimer", "rows_to_analyse", "rows_to_ask", "sizes", "some_rows"]

# How many rows are analysed in one batch: the activations of all layers are held at once.
MOST_AT_ONCE = 64
# The first steps of a training are no measure.
_SKIP, _STEPS = 3, 25
_TERMS, _REST = "distillation terms", "data and the rest"
_LAST = (_TERMS, "backward", "optimizer", _REST)
_PACKAGES = ("kd-plugins", "torch", "accelerate", "timm", "transformers", "datasets")


def _optional(write: Callable[..., None]) -> Callable[..., None]:
    """A method that the first process runs, whose failure (a full disk, an edited file) is a warning and no more."""

    @wraps(write)
    def attempt(self: RunRecord, *args: Any, **kwargs: Any) -> None:
        try:
            if self.enabled:
                write(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001
            _logger.warning("The record in %s is incomplete: %s: %s", self.folder, type(error).__name__, error)

    return attempt


class RunRecord:
    """Writes the record of one run.

    Every method does nothing where `enabled` is False (all processes but the first), and what cannot be analysed or
    written becomes a note and a warning: no report is worth a training.

    Args:
        folder: The run's output folder.
        host: The script, such as `"kd-timm-train"`.
        nets: The networks, or the bare student of a training without a distiller.
        command: The command line; by default that of this process.
        names: What to call the networks: `{"student": "resnet18", "teachers": ["resnet50"], "peers": []}`.
        data: What it was trained on, in words.
        metric: The key of the history that tells how good the student is, such as `"eval_top1"`.
        classes: Class names in the order of the logits.
        decode: Turns a sentence's token ids into the tokens' texts (`tokenizer.convert_ids_to_tokens`).
        settings: Everything else worth telling: arguments, seed, device, precision, processes.
        enabled: Whether this process writes.
        resume: Number of the step that a resumed run continues from: later rows are dropped, the rest is kept. None
            starts a new record.
        rows: The rows up to that step, where the host keeps them; by default those of the file.

    >>> import tempfile
    >>> record = RunRecord(tempfile.mkdtemp(), host="bare loop", nets=nn.Linear(4, 2), command=["python", "train.py"])
    >>> record.log({"step": 1, "loss": 0.5})
    >>> record.finish({"top1": 90.0})
    >>> sorted(path.name for path in record.folder.iterdir())
    ['history.jsonl', 'run.json']
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        host: str,
        nets: Nets | nn.Module,
        distiller: Distiller | None = None,
        command: Sequence[str] | None = None,
        names: Mapping[str, Any] | None = None,
        data: str = "",
        task: str = "classification",
        metric: str = "",
        classes: Sequence[str] | None = None,
        decode: Decode | None = None,
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
        resume: int | None = None,
        rows: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.enabled = Path(folder), enabled
        self.distiller, self.decode = distiller, decode
        self.timer: StepTimer | None = None
        self._began = time.monotonic()
        if not enabled:
            return
        nets = as_nets(nets)
        self.device = nets.device
        threads = f"{self.device.type.upper()}, threads: {torch.get_num_threads()}"
        self.run: dict[str, Any] = {
            "format": FORMAT,
            "status": "unfinished",
            "host": host,
            "command": list(command) if command is not None else _command(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "versions": _versions(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else threads,
            "data": data,
            "task": task,
            "metric": metric,
            "classes": None if classes is None else list(classes),
            "settings": dict(settings or {}),
            "method": None if distiller is None else _method(distiller),
            "stages": None,
            **_networks(nets, names or {}),
            "results": {},
            "cost": {},
            "notes": [],
        }
        self._begin(resume, rows)

    @_optional
    def _begin(self, resume: int | None, rows: Iterable[Mapping[str, Any]] | None) -> None:
        """Starts a new record, or goes on with whatever can be read of the one before, up to the step of its state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        history, before, kept = self.folder / "history.jsonl", self.folder / "run.json", list[Mapping[str, Any]]()
        if resume is not None:
            given = read_rows(history) if rows is None else rows
            kept = [row for row in given if (row.get("step") or 0) <= resume]
            try:
                known = read_json(before) if before.is_file() else {}
                self._began -= float(known.get("seconds", 0.0))
                self.run |= {k: known[k] for k in ("started", "seconds", "notes", "cost", "before") if k in known}
                self.run["resumed"] = known.get("resumed", 0) + 1
            except (TypeError, ValueError, AttributeError) as error:
                self.run["notes"].append(f"What was recorded before the run was resumed cannot be read: {error}")
        if "before" not in self.run:
            (self.folder / "analysis.safetensors").unlink(missing_ok=True)
        write_text(history, "".join(_json(row) + "\n" for row in kept))
        self._write()

    @_optional
    def analyse(self, phase: str, nets: Nets | nn.Module, batches: Iterable[Batch]) -> None:
        """Analyses the unwrapped networks `"before"` or `"after"` the training, on the same evaluation batches.

        Batches that are made lazily are made outside of the training's random state.
        """
        with self._trying(f"The networks could not be analysed {phase} the training", f"No analysis {phase}"):
            found = analyse(nets, batches, decode=self.decode, attentions=_attentions(self.distiller))
            self._keep(phase, found.summary, found.arrays)

    @_optional
    def predict(self, nets: Nets | nn.Module, batches: Iterable[Batch]) -> None:
        """Asks the networks for their predictions, as `kd_report.analysis.predict` does, where no evaluation has."""
        with self._trying("The networks could not be asked for their predictions", "No predictions"):
            answers = predict(nets, batches, distiller=self.distiller)
            self.predictions(answers.found(), answers.classes)

    @_optional
    def predictions(self, found: Mapping[str, Doubts], classes: int) -> None:
        """Tells what the trained networks predict, as `kd_plugins.evaluation.Answers` has collected it."""
        if found:
            summary, arrays = predictions(found, classes)
            self._keep("after", {"predictions": summary}, arrays)

    @_optional
    def _keep(self, phase: str, summary: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
        file = self.folder / "analysis.safetensors"
        tensors = load_file(file) if file.is_file() else {}
        # What an earlier process has found of this phase goes with the first that this one finds.
        tensors = {k: x for k, x in tensors.items() if phase in self.run or not k.startswith(f"{phase}/")}
        tensors |= {f"{phase}/{key}": value.clone() for key, value in arrays.items()}
        with replacing(file) as partial:
            save_file(tensors, partial)
        self.run[phase] = self.run.get(phase, {}) | summary
        self._write()

    @_optional
    def log(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the history: `step` (or `epoch`), losses and metrics by name."""
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json(row) + "\n")

    def time_steps(self, player: Any) -> None:
        """Measures what a few early steps of a `TurnPlayer` spend their time on; removes itself afterwards."""
        if self.enabled and "parts" not in self.run["cost"]:
            self.timer = StepTimer(player)

    @_optional
    def note(self, text: str) -> None:
        """Adds a remark that the report shows."""
        if text not in self.run["notes"]:
            self.run["notes"].append(text)
            self._write()

    @_optional
    def finish(
        self,
        results: Mapping[str, Any],
        *,
        seconds_per_step: float | None = None,
        status: str = "finished",
        pictures: Iterable[Picture] = (),
    ) -> None:
        """Writes the final numbers as the script has them, the cost, the method's pictures and any others.

        The seconds of a step are their mean over the training, evaluation left out; the status is `"finished"` or
        `"interrupted"`.
        """
        cost = {"seconds_per_step": seconds_per_step, "parts": self.timer.stop() if self.timer is not None else {}}
        self.run["cost"] |= {k: x for k, x in cost.items() if x not in (None, {})} | _peak_memory(self.device)
        self.run |= {"results": dict(results), "status": status}
        with self._trying("The method's pictures could not be made", "No pictures of the method"):
            own = self.distiller.pictures() if self.distiller is not None else []
            self.run["pictures"] = [p.to_json() for p in (*pictures, *own)]
        self._write()

    def _write(self) -> None:
        """Writes `run.json` in one step, so that a report made meanwhile reads the old one or the new one."""
        self.run["seconds"] = time.monotonic() - self._began
        if self.distiller is not None and self.distiller.progress.table is not None:
            self.run["stages"] = self.distiller.progress.table.to_json()
        write_text(self.folder / "run.json", _json(self.run, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def _trying(self, note: str, warning: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.note(f"{note}: {error}")
            warnings.warn(f"{warning}: {type(error).__name__}: {error}", stacklevel=5)


class StepTimer:
    """Measures the parts of a few steps of a `TurnPlayer`, without the first ones, then takes itself out of the way.

    The parts of one update, accumulation included: the forwards of student, teachers and peers; `distillation terms`
    (what the turns do beside those forwards, updates of critics included); `backward` of the student's loss;
    `optimizer` (gradients of groups, clipping, updates); `data and the rest` (between two steps). On a GPU every part
    ends with a synchronisation, so that a measured step takes a little longer than the others; numbers do not change.
    """

    def __init__(self, player: TurnPlayer) -> None:
        self.rows: list[dict[str, float]] = [{}]
        self._wrapped = ExitStack()
        self._mark = time.perf_counter()
        self._cuda = player.accelerator.device.type == "cuda"
        for net in player.nets:
            name = "teacher" if net.frozen else "student" if net is player.nets.student else "peers"
            self._wrap(net.network, "read", _TERMS, f"{name} forward")
        self._wrap(player, "forward", _REST, _TERMS)
        self._wrap(player, "after_backward", "backward", "optimizer")
        self._wrap(player, "after_update", "optimizer", "optimizer")

    def stop(self) -> dict[str, float]:
        """Gives the methods back; the median seconds of each part of a step, empty where none was measured."""
        self._wrapped.close()
        rows = self.rows[_SKIP:-1]
        found = dict.fromkeys(chain.from_iterable(rows))
        names = sorted(found, key=lambda name: _LAST.index(name) if name in _LAST else -1)
        return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}

    def _ends(self, part: str) -> None:
        """Adds the time since the last call to a part."""
        if self._cuda:
            torch.cuda.synchronize()
        before, self._mark = self._mark, time.perf_counter()
        self.rows[-1][part] = self.rows[-1].get(part, 0.0) + self._mark - before

    def _wrap(self, owner: Any, method: str, before: str, part: str) -> None:
        """Times a method as `part`, and what lies between the method before it and its start as `before`."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._ends(before)
            result = original(*args, **kwargs)
            self._ends(part)
            if method == "after_update":
                self.rows.append({})
                if len(self.rows) > _SKIP + _STEPS:
                    self.stop()
            return result

        setattr(owner, method, timed)
        self._wrapped.callback(delattr, owner, method)


def rows_to_analyse(trained: int) -> int:
    """How many rows to read before and after a training that reads so many: each time below a hundredth of its cost.

    A short training is analysed at its end alone, where this is 0: on 8 rows.
    """
    rows = min(trained // 125 - 8, 256)
    return rows if rows >= 8 else 0


def rows_to_ask(trained: int) -> int:
    """How many rows to ask for predictions that no evaluation has made, after a training that reads so many.

    A forward costs less than a training's step: less than a hundredth, and the same rows on any machine.
    """
    return max(trained // 100, 8)


def sizes(training: Any, evaluation: Any, rows: str = "rows") -> str:
    """How many rows two data sets have, in words; a stream has no length, and what is missing is no data set."""
    found = []
    for name, data in (("training", training), ("evaluation", evaluation)):
        with suppress(TypeError):
            found.append(f"{len(data):,} {name} {rows}")
    return " and ".join(found)


def some_rows(dataset: Any, count: int | None = None) -> Any:
    """Rows of the evaluation set, by default all, as a fixed seed draws them: sorted folders begin with one class."""
    if isinstance(dataset, IterableDataset):
        return dataset
    generator = torch.Generator().manual_seed(0)
    return Subset(dataset, torch.randperm(len(dataset), generator=generator)[:count].tolist())


def _attentions(distiller: Distiller | None) -> dict[str, list[int]]:
    """The layers of student and teacher whose attention the method reads, over all its stages."""
    if distiller is None or not distiller.ready:
        return {}
    needs = needs_of_stages(distiller)
    read = {"student": [n.student for n in needs], "teacher": [n.of_teacher(0) for n in needs]}
    return {name: sorted({i for reads in found for i in reads.attentions}) for name, found in read.items()}


def _json(value: Any, **form: Any) -> str:
    """JSON, which has no infinities and no NaN: null stands for them, and words for what else it does not have."""

    def plain(x: Any) -> Any:
        x = x.tolist() if isinstance(x, Tensor) else x
        if isinstance(x, Mapping):
            return {str(key): plain(item) for key, item in x.items()}
        if isinstance(x, (list, tuple, set)):
            return [*map(plain, x)]
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        return x if x is None or isinstance(x, (str, int)) else str(x)

    return json.dumps(plain(value), **form)


def _command() -> list[str]:
    """The command line of this process, as somebody would type it."""
    program = Path(sys.argv[0])
    if program.suffix != ".py":
        return [program.name, *sys.argv[1:]]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else ["python", program.name]
    return [*start, *sys.argv[1:]]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"torch": str(torch.__version__)}


def _method(distiller: Distiller) -> dict[str, Any]:
    """Name, options and papers of a method and of its parts."""
    described: list[dict[str, Any]] = []
    for name, part in distiller.methods.items():
        paper, summary = part.paper, (type(part).__doc__ or "").strip().partition("\n")[0]
        cited = paper and {"title": paper.title, "short": str(paper), "arxiv": paper.arxiv}
        described.append({"name": name, "summary": summary, "paper": cited})
    config = config_of(distiller)
    return {"name": config["distiller"], "options": config["options"], "parts": described}


def _networks(nets: Nets, names: Mapping[str, Any]) -> dict[str, Any]:
    """Name, class and size of each network; without a name its class stands for it."""

    def told(net: Net, name: Any) -> dict[str, Any]:
        kind, parameters = type(net.module).__name__, sum(p.numel() for p in net.module.parameters())
        return {"name": name or kind, "class": kind, "parameters": parameters}

    several = {"teachers": nets.teachers, "peers": nets.peers[1:]}
    found = {kind: list(map(told, own, chain(names.get(kind) or (), repeat("")))) for kind, own in several.items()}
    return {"student": told(nets.student, names.get("student")), **found}


def _peak_memory(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"memory": torch.cuda.max_memory_allocated(device), "memory_kind": "GPU memory, peak"}
    try:
        import resource
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory": peak * (1 if sys.platform == "darwin" else 1024), "memory_kind": "resident memory, peak"}
