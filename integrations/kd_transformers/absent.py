"""Teachers that are not loaded, since what they say is in the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, DistillError, Reads
from kd_plugins.reading.network import Network, adapt
from kd_transformers.checks import base


class Absent(nn.Module):
    """A teacher that is not loaded, since what it says is in the data.

    Args:
        stands_for: The class of the teacher, or its name.
        config: Its configuration.
        identity: Changes with its weights.
        load: Loads it; None where it is not to be had.
        kind: What it is for, where neither its class nor its configuration is known (`checks.kind_of`).
    """

    def __init__(
        self,
        stands_for: type | str,
        config: Any,
        identity: str = "",
        load: Callable[[], nn.Module] | None = None,
        kind: str = "",
    ) -> None:
        super().__init__()
        self.absent_class = stands_for if isinstance(stands_for, type) else None
        self.stands_for = stands_for.__name__ if isinstance(stands_for, type) else stands_for
        self.config, self.identity, self._load, self.absent_kind = config, identity, load, kind

    def load(self) -> nn.Module:
        """The teacher itself, another one at each call; no random stream has moved."""
        if self._load is None:
            raise DistillError(
                f"The method reads more of the teacher than the columns of cache_teacher hold, and the"
                f" {self.stands_for} that wrote them is not loaded: give teacher_model."
            )
        with undisturbed():
            return self._load().requires_grad_(False).eval()


class AbsentNetwork:
    """The adapter of a teacher that is not loaded before it is read, or asked how it is built."""

    def __init__(self, module: Absent) -> None:
        self._absent = module

    @property
    def module(self) -> nn.Module:
        """The teacher, or what stands for it."""
        return self._loaded.module if "_loaded" in vars(self) else self._absent

    @cached_property
    def _loaded(self) -> Network:
        # A part of what stands for it from then on, so that it follows its modes and devices.
        self._absent.loaded = self._absent.load()
        return adapt(self._absent.loaded)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loaded, name)

    def read(self, batch: Batch, reads: Reads, **options: Any) -> Any:
        """As `Network.read`."""
        if isinstance(batch.inputs, Tensor):
            self._loaded.module.to(batch.inputs.device)
        return self._loaded.read(batch, reads, **options)

    def install(self, reads: Reads) -> None:
        """As `Network.install`; what the cache may hold needs no hooks."""
        if reads.hidden or reads.attentions:
            self._loaded.install(reads)

    check_map: Any = Network.check_map


def called(teacher: nn.Module) -> str:
    """The name of a teacher's class, whether it is loaded or not."""
    module = base(teacher)
    return str(getattr(module, "stands_for", type(module).__name__))
