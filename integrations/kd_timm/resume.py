"""The resume state of a run: written after every evaluated epoch and within one, taken up to the bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from kd_accelerate.randomness import load_random_state, random_state
from kd_plugins import DistillError, states
from kd_plugins.errors import told
from kd_timm.arguments import as_flag
from kd_timm.checkpoint import copy_file, load_weights, save_weights
from kd_timm.compat import native_scaler
from kd_timm.data import LOADER_ARGUMENTS, MIXUP_ARGUMENTS
from kd_timm.parts import Parts

_logger = logging.getLogger("kd_timm.train")

# Arguments that may change on resume without changing the numbers.
_FREE = {"resume", "config", "output", "experiment", "log_interval", "device", "checkpoint_hist", "pin_mem"}
_FREE |= {"no_resume_opt", "start_epoch", "stop_epoch", "save_epochs", "recovery_interval", "save_images", "local_rank"}
_FREE |= {"report_to", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id", "validation_batch_size"}
_FREE |= {"checkpoint_format", "no_record"}
# Those that may change, so that the run goes on otherwise than it would have.
_WARNED = {"epochs", "cooldown_epochs", "workers", "persistent_workers", "val_interval", "clip_grad", "clip_mode"}
# And those that may where no method counts its steps and rows.
_WARNED_ALONE = {"batch_size", "grad_accum_steps", "mixup_off_epoch", "train_interpolation", "no_prefetcher"}
# Of these, those that cut an epoch into other batches.
_OF_BATCHES = {"batch_size", "grad_accum_steps", "aug_repeats", "use_multi_epochs_loader"}
_WARNED_ALONE |= {*LOADER_ARGUMENTS.values(), *MIXUP_ARGUMENTS.values(), "use_multi_epochs_loader"}


def save_state(session: Parts, epoch: int, place: Mapping[str, Any]) -> None:
    """Writes what `--resume` needs to go on with `epoch`.

    Args:
        session: The run.
        epoch: The epoch that comes, or that it is in.
        place: How far this process is in it; empty before it, `{"trained": its means}` behind its training.
    """
    here: dict[str, Any] = {"place": dict(place)}
    if session.processes > 1:
        # DDP gives all processes the first one's batch statistics, where the step before has averaged gradients.
        here["statistics"] = {name: value.cpu() for name, value in _statistics(session).items()}
        here["gives"] = session.model.require_forward_param_sync
    everywhere = gather_object([(random_state(gpu=True), here)])
    folder = states.open_state(session.folder) if session.primary else states.slots(session.folder)[0]
    session.accelerator.wait_for_everyone()
    if session.distillation is not None:
        session.distillation.player.save(folder / "distiller")
    if session.primary:
        save_weights(session.student, folder / "model.safetensors")
        if session.ema is not None:
            save_weights(session.ema.module, folder / "ema.safetensors")
        scaler, generators = session.accelerator.scaler, _generators(session)
        state = {
            "optimizer": session.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "scheduler": _plateau_state(session.scheduler),
            "task": session.task.get_task_state() if session.task is not None else {},
        }
        with states.writing(folder):
            torch.save(state | {name: own.get_state() for name, own in generators.items()}, folder / "optimizer.pt")
            for rank, (random, here) in enumerate(everywhere):
                torch.save(random, folder / f"random-{rank}.pt")
                torch.save(here, folder / f"place-{rank}.pt")
            # Beside its numbers, since a run that goes on from here may find the file of a later epoch.
            for best in map(session.peers.path, session.peers.best):
                copy_file(best, folder / best.name)
        content = {
            "epoch": epoch,
            "processes": session.processes,
            "kept": session.checkpoints.kept,
            "peers": session.peers.best,
            "seconds": session.seconds,
            "updates": session.updates,
            "summary": session.summary.rows,
            "arguments": session.given,
        }
        states.write_json(folder / "state.json", content)
    session.accelerator.wait_for_everyone()
    if session.primary:
        states.close_state(session.folder)
        session.describe()
    session.accelerator.wait_for_everyone()


def load_state(session: Parts, folder: Path) -> tuple[int, Mapping[str, Any], bool]:
    """Takes up the state of `--resume`.

    Returns:
        The epoch to go on with, the place in it, and whether the run goes on as it would have.
    """
    saved = states.read_json(folder / "state.json")
    if saved["processes"] != session.processes:
        raise DistillError(
            f"--resume: the run had {saved['processes']} processes, this one has {session.processes}: start as many."
        )
    changed = _changed(session, saved["arguments"], folder)
    if session.distillation is not None:
        session.distillation.player.load(folder / "distiller")
        for group in session.distillation.player if session.args.no_resume_opt else ():
            group.optimizer.state.clear()
        if "epochs" in changed:
            session.distillation.stretch(session.epochs * session.updates_per_epoch)
        session.new_schedule()
    load_weights(session.student, folder / "model.safetensors")
    if session.ema is not None:
        load_weights(session.ema.module, folder / "ema.safetensors")
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    if session.task is not None:
        session.task.load_task_state(state["task"])
    if not session.args.no_resume_opt:
        session.optimizer.load_state_dict(state["optimizer"])
        if state.get("stream") is not None:
            session.optimizer.optimizer.generator = torch.Generator(session.accelerator.device)
        if session.accelerator.scaler is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
    for name, own in _generators(session).items():
        if state.get(name) is not None and not (name == "stream" and session.args.no_resume_opt):
            own.set_state(state[name])
    if state["scheduler"] is not None:
        session.scheduler.lr_scheduler.load_state_dict(state["scheduler"]["inner"])
        session.scheduler.restore_lr = state["scheduler"]["restore_lr"]
    session.seconds, session.updates = saved["seconds"], saved["updates"]
    session.summary.rows = list(saved["summary"])
    session.checkpoints.kept = [(metric, epoch) for metric, epoch in saved["kept"]]
    session.peers.best = saved["peers"]
    rank = session.accelerator.process_index
    random = torch.load(folder / f"random-{rank}.pt", weights_only=True)
    load_random_state(random)
    here = torch.load(folder / f"place-{rank}.pt", map_location="cpu", weights_only=True)
    place = here["place"] and here["place"] | {"random": random}
    if session.processes > 1:
        session.model.require_forward_param_sync = here["gives"]
        for name, statistic in _statistics(session).items():
            statistic.copy_(here["statistics"][name])
    # Workers that live on, and a loader that reads ahead into the next epoch, have streams that no state holds.
    changed += ["persistent_workers"] * bool(session.args.workers and session.args.persistent_workers)
    changed += ["use_multi_epochs_loader"] * session.args.use_multi_epochs_loader
    if "batches" in place and not _OF_BATCHES.isdisjoint(changed):
        place = {}
        _logger.warning(f"Epoch {saved['epoch']} begins anew, as its batches are others than those of {folder}.")
    session.accelerator.wait_for_everyone()
    if session.primary:
        _bring_along(folder.parent, session.folder)
        for best in map(session.peers.path, session.peers.best):
            copy_file(folder / best.name, best)
        states.settle(session.folder)
        if session.saver is not None:
            _take_up_history(session.saver, session.folder, saved["epoch"])
    within = f", update {place['sums'][0]}" if "batches" in place else ""
    session.reporter.line(f"Continuing with epoch {saved['epoch']}{within} from {folder}")
    if changed and session.primary:
        flags = ", ".join(map(as_flag, dict.fromkeys(changed)))
        _logger.warning(f"The run goes on otherwise than it would have, because of {flags}.")
    return saved["epoch"], place, not changed and not session.args.no_resume_opt


def _changed(session: Parts, before: dict[str, Any], folder: Path) -> list[str]:
    """The arguments that differ from those of a state so that the run changes; raises where that cannot be."""
    given, before = _one_spelling(session.given), _one_spelling(before)
    changed = [k for k, v in before.items() if k not in _FREE and given.get(k) != v]
    allowed = _WARNED if session.distillation is not None else _WARNED | _WARNED_ALONE
    fixed = [name for name in changed if name not in allowed]
    if fixed:
        raise DistillError(
            f"--resume continues a run, and these arguments of it cannot change: {', '.join(fixed)}. Give those of"
            f" {folder.parent / 'args.yaml'} (--config reads that file), or begin anew with the run's weights,"
            f" --initial-checkpoint {folder.parent / 'last.safetensors'}."
        )
    return changed


def _one_spelling(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the data in one spelling: the same folder may be named in several ways."""
    data = given.get("data_dir") or given.get("data")
    return given | {"data": None, "data_dir": data and os.path.realpath(data)}


def load_checkpoint(session: Parts, path: str) -> int:
    """Takes up a checkpoint of timm's script; returns the epoch to go on with."""
    scaler, task = native_scaler(session.accelerator.scaler), session.saved_task()
    remedy = "name the model and flags that it was made with"
    with told(f"--resume {path} does not fit this run", Exception, remedy=remedy):
        optimizer = None if session.args.no_resume_opt else session.optimizer.optimizer
        epoch = resume_task_checkpoint(task, path, optimizer, None if optimizer is None else scaler)
        if session.ema is not None:
            load_task_ema_checkpoint(task, path)
    session.reporter.line(f"Continuing with epoch {epoch or 0} from {path}")
    return epoch or 0


def _generators(session: Parts) -> dict[str, torch.Generator]:
    """The random streams that an optimizer, as AdaHessian, and a moving average in bfloat16 keep for themselves."""
    owned = {
        "stream": getattr(session.optimizer.optimizer, "generator", None),
        "rounding": getattr(session.ema, "_sr_generator", None),
    }
    return {name: generator for name, generator in owned.items() if generator is not None}


def _statistics(session: Parts) -> dict[str, torch.Tensor]:
    """The batch statistics, which within an epoch each process has of its own."""
    found = {"student": session.student} | ({} if session.ema is None else {"average": session.ema.module})
    if session.distillation is not None:
        found |= {f"peer{i}": peer for i, peer in enumerate(session.distillation.peers)}
        found["distiller"] = session.distillation.distiller
    named = ((f"{who}.{name}", buffer) for who, module in found.items() for name, buffer in module.named_buffers())
    return {name: buffer for name, buffer in named if name.endswith(("running_mean", "running_var"))}


def _plateau_state(scheduler: Any) -> dict[str, Any] | None:
    """The only schedule whose state is more than the epoch and the rate."""
    inner = getattr(scheduler, "lr_scheduler", None)
    return None if inner is None else {"inner": inner.state_dict(), "restore_lr": scheduler.restore_lr}


def _take_up_history(saver: CheckpointSaver, folder: Path, epoch: int) -> None:
    """Takes up what timm's saver has kept, but for the epochs that come anew."""
    if not (folder / "last.pth.tar").is_file():
        return
    saver.load_state_dict_from_checkpoint(folder / "last.pth.tar")
    epochs = {file: int(Path(file).name.partition(".")[0].rpartition("-")[2]) for file, _ in saver.checkpoint_files}
    later = [file for file, its in epochs.items() if its >= epoch]
    for file in later:
        Path(file).unlink()
    saver.checkpoint_files = [kept for kept in saver.checkpoint_files if kept[0] not in later]
    if later:
        best, saver.best_metric = saver.checkpoint_files[0] if saver.checkpoint_files else ("", None)
        saver.best_epoch = epochs.get(best)
        if best:
            copy_file(Path(best), folder / "model_best.pth.tar")


def _bring_along(before: Path, folder: Path) -> None:
    """Copies what a run has left so far, best weights and curves, to the folder in which it goes on."""
    if before.resolve() == folder.resolve():
        return
    if (folder / "last.safetensors").exists():
        raise DistillError(
            f"--resume: {folder} holds another run, whose weights would be taken for those of {before}: name another"
            f" --experiment, or go on with that run, --resume {folder}."
        )
    for path in before.iterdir():
        if path.is_file() and path.name != "results.json" and not (folder / path.name).exists():
            copy_file(path, folder / path.name)
