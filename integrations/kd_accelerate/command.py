"""What the training commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from accelerate import PartialState

from kd_plugins import DistillError

__all__ = ["run_command"]


def run_command(name: str, command: Callable[[], Any]) -> int:
    """Runs a command, and turns what a user can mend into one line on stderr, said by the first process.

    Args:
        name: The command's name.
        command: What it does.

    Returns:
        Exit status.
    """
    try:
        command()
        # A thread of the communication library that outlives the interpreter can abort the process.
        PartialState().destroy_process_group()
    except DistillError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0
