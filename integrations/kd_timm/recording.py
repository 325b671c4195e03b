"""The record of a run of kd-timm-train, which `kd-plugins report` makes a page of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kd_plugins import Batch, Net, Nets, Reads
from kd_plugins.evaluation import Doubts
from kd_report import page_hint
from kd_report.record import MOST_AT_ONCE, RunRecord, rows_to_analyse, sizes, some_rows
from kd_timm.arguments import parse_args
from kd_timm.data import plain_loader
from kd_timm.network import TimmNetwork, image_batch
from kd_timm.parts import Parts, softmax


class Recorder:
    """Writes the record of a session: the networks before and after the training, and a row an epoch.

    Args:
        session: The run, ready to train.
        start: The epoch that it begins with.
        begun: Whether it goes on within that epoch.
    """

    def __init__(self, session: Parts, start: int, *, begun: bool) -> None:
        self.session = session
        args, distillation, defaults = session.args, session.distillation, vars(parse_args([]))
        settings = {key: value for key, value in session.given.items() if value != defaults.get(key)}
        settings |= {key: getattr(args, key) for key in ("lr", "batch_size", "epochs", "opt", "seed")}
        settings |= {"processes": session.processes, "precision": session.accelerator.mixed_precision}
        self.record = RunRecord(
            session.folder,
            host="kd-timm-train",
            nets=self._nets(),
            distiller=None if distillation is None else distillation.distiller,
            names={"student": args.model, "teachers": args.teacher, "peers": args.peer},
            data=_data(session),
            metric=f"eval_{session.metric}",
            classes=session.data.classes,
            settings=settings,
            enabled=session.primary and not args.no_record,
            resume=start * session.updates_per_epoch if session.state is not None else None,
        )
        rows = session.updates_per_epoch * session.epochs * args.grad_accum_steps * args.batch_size
        self.rows = rows_to_analyse(rows * session.processes)
        if start == 0 and not begun and self.rows:
            self._analyse("before")
        if distillation is not None:
            self.record.time_steps(distillation.player)

    def epoch(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Adds the row of an epoch, evaluated or not."""
        self.record.log({"epoch": epoch + 1, "step": (epoch + 1) * self.session.updates_per_epoch, **row})

    def finish(self, results: Mapping[str, Any], found: Mapping[str, Doubts]) -> None:
        """Analyses the best student and writes the results, and what the networks have said of each image."""
        if not self.record.enabled:
            return
        self._analyse("after")
        if not softmax(self.session.args):
            # With --loss bce each class has a sigmoid of its own, and the classes no distribution.
            kept = {"predicted", "label", "agreement"}
            found = {name: {k: x for k, x in values.items() if k in kept} for name, values in found.items()}
        self.record.predictions(found, max(self.session.args.num_classes, 2))
        self.record.finish(results, seconds_per_step=results["seconds_per_step"])
        self.session.reporter.line(page_hint(self.session.folder))

    def _nets(self) -> Nets:
        """The networks with the student that is evaluated and exported."""
        student, distillation = Net(TimmNetwork(self.session.evaluated), Reads), self.session.distillation
        if distillation is None:
            return Nets(student)
        teachers = [] if distillation.cache is not None else distillation.nets.teachers
        return Nets(student, teachers, distillation.nets.peers[1:])

    def _analyse(self, phase: str) -> None:
        args, evaluation = self.session.args, self.session.data.evaluation
        # What is analysed are scores of exclusive classes, of images.
        if self.record.enabled and evaluation is not None and args.task != "multilabel" and not args.naflex_loader:
            with self.session.autocast():
                self.record.analyse(phase, self._nets(), self._batches())

    def _batches(self) -> Iterator[Batch]:
        args, data, count = self.session.args, self.session.data, self.rows or 8
        size, config = min(args.validation_batch_size or args.batch_size, MOST_AT_ONCE), data.config
        device, dtype = self.session.accelerator.device, next(self.session.evaluated.parameters()).dtype
        # A worker alone reads a batch, and more of them only start where there is one.
        workers, rows = args.workers if count > size else 0, some_rows(data.evaluation.dataset, count)
        for inputs, labels in plain_loader(rows, config, size, device=device, num_workers=workers, img_dtype=dtype):
            yield image_batch(config, inputs, labels)


def _data(session: Parts) -> str:
    """The data set in words."""
    training, evaluation = (getattr(x, "dataset", None) for x in (session.data.train, session.data.evaluation))
    found = sizes(training, evaluation, "images")
    named = session.args.dataset or session.args.data_dir or "none"
    return f"{named}: {found}" if found else named
