"""Progress of a run: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

_logger = logging.getLogger("kd_timm.train")


class Reporter:
    """Shows how far an epoch is.

    Args:
        primary: False on all processes but the first, which stay silent.
    """

    def __init__(self, primary: bool) -> None:
        self.primary = primary
        console = Console(stderr=True)
        shown = ("{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TimeRemainingColumn(), "{task.fields[values]}")
        self.terminal = primary and console.is_terminal
        self.bar = Progress(*shown, *left, console=console, transient=True, disable=not self.terminal)
        self.task = self.bar.add_task("", values="")
        self.title, self.total = "", 0

    def begin(self, title: str, total: int) -> None:
        """Starts an epoch of `total` updates."""
        self.title, self.total = title, total
        self.bar.reset(self.task, description=title, total=total, values="")
        self.bar.start()

    def advance(self, updates: int) -> None:
        """Moves the bar to a number of updates."""
        self.bar.update(self.task, completed=updates)

    def update(self, updates: int, values: Mapping[str, float], speed: float) -> None:
        """Reports running means.

        Args:
            updates: Updates of this epoch so far.
            values: Numbers by name.
            speed: Images a second.
        """
        if not self.primary:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.update(self.task, completed=updates, values=text)
        if not self.terminal:
            _logger.info(f"{self.title} [{updates}/{self.total}]  {text}  {speed:.0f} images/s")

    def end(self) -> None:
        """Ends an epoch."""
        # Off a terminal it would print an empty line.
        if self.terminal:
            self.bar.stop()

    def line(self, text: str) -> None:
        """Writes a line of text."""
        if self.primary:
            _logger.info(text)
