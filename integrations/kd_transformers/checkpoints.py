"""Checkpoints of Trainer that are whole or skipped, and a resumed training that ends as one that was not stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from kd_plugins import DistillError, states
from kd_plugins.finite import Watch, check_weights
from kd_transformers.compat import Hooks

if TYPE_CHECKING:
    from kd_transformers.arguments import Arguments

logger = logging.get_logger(__name__)

# Training arguments that make another run of one seed, learning rate and batch size.
RECIPE = (
    *("data_seed", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor", "fp16", "bf16"),
    *("train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha"),
)
_CHANGES = (
    *RECIPE,
    *("seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
)
# Arguments of ours that make none.
_FREE = {
    *("cache_dir", "allow_nonfinite", "trust_remote_code", "max_eval_samples", "validation_file", "metric"),
    *("validation_split", "ood_dataset", "ood_split", "cache_teacher"),
}


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, the newest first; whole or not."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {path: path.name.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*")}
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
            raise DistillError(f"No checkpoint in {output} is whole: start anew in another folder or without resuming.")
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


def identity(arguments: Arguments, rows: str) -> dict[str, Any]:
    """What changes the numbers of a run, by argument, as JSON has it; its length may be changed on the way.

    Args:
        arguments: Those of the script.
        rows: A hash of the rows that are trained on.
    """
    *ours, training = arguments
    found = {name: value for part in ours for name, value in vars(part).items() if name not in _FREE}
    found |= {name: getattr(training, name) for name in _CHANGES} | {"data": rows}
    return {name: json.loads(json.dumps(value, default=str)) for name, value in found.items()}


def check_same_run(checkpoint: Path, ours: Mapping[str, Any], *, named: bool) -> None:
    """Refuses a checkpoint of another run, or warns where it was named: somebody goes on with it on purpose."""
    before = states.facts(checkpoint).get("arguments") or {}
    changed = [f"{k} {before[k]} (here {now})" for k, now in ours.items() if before.get(k, now) != now]
    if named and before.get("optim", ours["optim"]) != ours["optim"]:
        raise DistillError(
            f"{checkpoint} holds the state of --optim {before['optim']}, which {ours['optim']} cannot take up: give"
            " that, or begin anew with the weights, --model_name_or_path."
        )
    if changed and named:
        logger.warning(f"Resuming {checkpoint} with other arguments: it was written with {'; '.join(changed)}.")
    elif changed:
        raise DistillError(
            f"{checkpoint} is of a run with {'; '.join(changed)}: give the arguments of that run, or name the"
            f" checkpoint to go on with others on purpose, --resume_from_checkpoint {checkpoint}."
        )


def asked_for(training: TrainingArguments, ours: Mapping[str, Any]) -> str | None:
    """The checkpoint of `--resume_from_checkpoint`: a path, or the newest whole one of the output folder.

    `true` expects one; `auto` begins anew where no checkpoint has been finished yet.

    Args:
        training: The training arguments.
        ours: What `identity` tells of this run.
    """
    asked = str(training.resume_from_checkpoint or "false")
    if asked.lower() == "false":
        return None
    newest = asked.lower() in ("true", "last", "auto")
    needs = ["trainer_state.json"]
    if not (training.fsdp or training.deepspeed):
        world, rank = training.world_size, training.process_index
        needs += ["optimizer.pt", "scheduler.pt", f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"]
    output = str(training.output_dir)
    found = find_checkpoint(True if newest else asked, output, needs)
    if found is None:
        if asked.lower() == "auto":
            return None
        raise DistillError(f"--resume_from_checkpoint {asked}: there is no checkpoint in {output} that is whole.")
    check_same_run(found, ours, named=not newest)
    return str(found)


class Resumable(Hooks):
    """Trainer with a manifest in every checkpoint, written last, and an exact end of a resumed training.

    Trainer itself trains one step more where its last checkpoint is resumed in the middle of an epoch, and reports a
    `train_loss` of the steps since then.

    Attributes:
        guarded: Whether what Trainer would go on with, or end in an error of its own, is refused in a sentence: a loss
            that stays NaN, a checkpoint that was named and is damaged, files that cannot be read or written.
        allow_nonfinite: Whether a guarded training goes on where its loss stays NaN or infinite.
        facts: What the manifests tell of the run.
    """

    guarded = True
    allow_nonfinite = False
    facts: dict[str, Any] = {}
    player: Any = None
    _resumed: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        asked: Any = resume_from_checkpoint
        folder = self.args.output_dir
        if asked and (_sealed(checkpoints(folder)) if asked is True else self.guarded):
            asked = str(find_checkpoint(asked, folder))
        taken = next(iter(checkpoints(folder)), None) if asked is True else asked
        self._resumed = Path(taken) if taken else None
        self.prepare_anew()
        output = super().train(asked, *args, **kwargs)
        # The last steps are too few for the watch.
        self._check_weights()
        return output

    def _check_weights(self) -> None:
        if self.guarded and not self.allow_nonfinite and not self.is_fsdp_enabled:
            remedy = "nothing was saved, the checkpoints before are good; lower the learning rate, or clip gradients."
            check_weights({"The student": self.model}, remedy)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.player is None and self.guarded and not self.allow_nonfinite:
            self.watch.see({"loss": loss})
            if self.accelerator.sync_gradients:
                step = self.state.global_step + 1
                self.watch.update(step, step / max(self.state.max_steps, 1) * self.state.num_train_epochs)
        return loss

    def loading(self, folder: str) -> Any:
        return states.taking_up(folder) if self.guarded else nullcontext()

    def best_whole(self, folder: Path) -> bool:
        # Sizes alone: the state of an optimizer, which is not needed here, may be many gigabytes.
        why = states.damage(folder, contents=False) if self.guarded and (folder / states.MANIFEST).is_file() else ""
        if why:
            logger.warning(f"The best checkpoint {folder} is damaged, all networks stay those of the last step: {why}.")
        return not why

    def saving(self, folder: Path) -> Any:
        self._check_weights()
        # A checkpoint of that name may be left from a run that went further.
        if self.args.should_save:
            (folder / states.MANIFEST).unlink(missing_ok=True)
        return states.writing(folder) if self.guarded else nullcontext()

    def saved(self, folder: Path) -> None:
        states.write_json(folder / self._losses, self.loss_sums)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            states.seal(folder, **self.facts)

    def training_begins(self) -> None:
        self.watch, self.summed_since = Watch(), self.state.global_step
        # Trainer's own checkpoints have none.
        if self._resumed is not None and (self._resumed / self._losses).is_file():
            self.loss_sums, self.summed_since = states.read_json(self._resumed / self._losses), 0

    @property
    def _losses(self) -> str:
        """Each process sums its own losses."""
        return f"train_loss_{self.args.process_index}.json"
