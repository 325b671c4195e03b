"""Checkpoints of Trainer that are whole or skipped, and a resumed training that ends as one that was not stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from kd_plugins import DistillError, states
from kd_plugins.errors import told
from kd_plugins.finite import Watch, check_weights
from kd_transformers.compat import Hooks

__all__ = ["Resumable", "checkpoints", "find_checkpoint"]

logger = logging.get_logger(__name__)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, the newest first; whole or not."""
    found = {
        p: p.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    return sorted((p for p in found if found[p].isdecimal()), key=lambda p: int(found[p]), reverse=True)


def find_checkpoint(asked: bool | str, output: str | Path, needs: Sequence[str] = ()) -> Path | None:
    """The checkpoint to go on from: the newest whole one of an output folder, or the one that was named.

    A checkpoint that Trainer wrote has no manifest; it is taken where it is named and has what it needs.

    Args:
        asked: A path, or True for the newest.
        output: The output folder.
        needs: Files that a checkpoint must have.

    Returns:
        The checkpoint; None where `output` has none.

    Raises:
        DistillError: The one that was named is damaged; of those in `output` none is whole.
    """
    if asked is True:
        candidates = checkpoints(output)
        found = states.newest(candidates, logger.warning, needs)
        if found is None and _sealed(candidates):
            raise DistillError(
                f"No checkpoint in {output} is whole: start anew, in another folder or without resuming."
            )
        return found
    folder = Path(str(asked))
    if not folder.is_dir():
        raise DistillError(f"There is no checkpoint {folder} to resume from: mend the path.")
    siblings = checkpoints(folder.parent)
    if _sealed([folder, *siblings]):
        states.check(folder, siblings, needs)
    for name in needs:
        if not (folder / name).is_file():
            raise DistillError(f"{folder} is no whole checkpoint: {name} is missing; name another one, or start anew.")
    return folder


def _sealed(folders: Iterable[Path]) -> bool:
    return any((folder / states.MANIFEST).is_file() for folder in folders)


class Resumable(Hooks):
    """Trainer with a manifest in every checkpoint, written last, and an exact end of a resumed training.

    Trainer itself trains one step more where its last checkpoint is resumed in the middle of an epoch, and reports a
    `train_loss` of the steps since then.

    Attributes:
        allow_nonfinite: Whether a training goes on where its loss stays NaN or infinite.
        facts: What the manifests tell of the run.
    """

    allow_nonfinite = False
    facts: dict[str, Any] = {}
    player: Any = None
    _resumed: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and (resume_from_checkpoint is not True or _sealed(checkpoints(self._output))):
            resume_from_checkpoint = str(find_checkpoint(resume_from_checkpoint, self._output))
        last = checkpoints(self._output) if resume_from_checkpoint is True else []
        self._resumed = Path(str(resume_from_checkpoint)) if isinstance(resume_from_checkpoint, str) else None
        self._resumed = last[0] if last else self._resumed
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _output(self) -> str:
        return str(self.args.output_dir)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.player is None and not self.allow_nonfinite:
            self.watch.see({"loss": loss})
            if self.accelerator.sync_gradients:
                step = self.state.global_step + 1
                self.watch.update(step, step / max(self.state.max_steps, 1) * self.state.num_train_epochs)
        return loss

    def saving(self, folder: Path) -> Any:
        if not self.allow_nonfinite and not self.is_fsdp_enabled:
            remedy = (
                "nothing was saved, and the checkpoints before are good; lower the learning rate, or clip gradients."
            )
            check_weights({"The student": self.model}, remedy)
        # A checkpoint of that name may be left from a run that went further.
        if self.args.should_save:
            (folder / states.MANIFEST).unlink(missing_ok=True)
        # Every library has errors of its own for a full disk.
        return told(f"{folder} cannot be written", Exception, remedy="make room, or mend the rights of its folder.")

    def saved(self, folder: Path) -> None:
        states.write_json(folder / self._losses, self.loss_sums)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            states.seal(folder, **self.facts)

    def training_begins(self) -> None:
        self.watch = Watch()
        if self._resumed is not None and (self._resumed / self._losses).is_file():
            self.loss_sums = states.read_json(self._resumed / self._losses)

    @property
    def _losses(self) -> str:
        """Each process sums its own losses."""
        return f"train_loss_{self.args.process_index}.json"
