"""Progress of a run: the log lines of timm's script, and a bar on a terminal instead of all but an epoch's last."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_logger = logging.getLogger("kd_timm.train")


class _Bar(Progress):
    """A bar with the numbers below, where they cannot take its place on a narrow terminal."""

    values = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.values)


class Reporter:
    """Shows how far an epoch is.

    Args:
        primary: False on all processes but the first, which show no bar; their logs are silent.
    """

    def __init__(self, primary: bool) -> None:
        console = Console(stderr=True)
        shown = ("{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self.terminal = primary and console.is_terminal
        self.bar = _Bar(*shown, TimeRemainingColumn(), console=console, transient=True, disable=not self.terminal)
        self.task = self.bar.add_task("")
        self.epoch, self.total, self.said = 0, 0, ""

    def begin(self, epoch: int, total: int) -> None:
        """Starts an epoch of `total` updates."""
        self.epoch, self.total, self.said, self.bar.values = epoch, total, "", ""
        self.bar.reset(self.task, description=f"epoch {epoch}", total=total)
        self.bar.start()

    def advance(self, updates: int) -> None:
        """Moves the bar to a number of updates."""
        self.bar.update(self.task, completed=updates)

    def update(self, updates: int, values: Mapping[str, float], line: str) -> None:
        """Reports running means.

        Args:
            updates: Updates of this epoch so far.
            values: Numbers by name: the loss, its terms, the rate.
            line: What timm's script tells of them, and of time.
        """
        terms = [f"  {name}: {value:.4g}" for name, value in values.items() if name not in ("loss", "lr")]
        self.bar.values = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        place = f"[{updates - 1:>4d}/{self.total} ({100.0 * updates / self.total:>3.0f}%)]"
        self.said = f"Train: {self.epoch} {place}  {line}{''.join(terms)}"
        if not self.terminal:
            _logger.info(self.said)

    def end(self) -> None:
        """Ends an epoch."""
        # Off a terminal it would print an empty line.
        if self.terminal:
            self.bar.stop()
            if self.said:
                self.line(self.said)

    def line(self, text: str) -> None:
        """Writes a line of text."""
        _logger.info(text)
