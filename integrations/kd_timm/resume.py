"""The resume state of a run: written after every evaluated epoch, taken up to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from kd_plugins import DistillError
from kd_timm.checkpoint import load_random_state, load_weights, random_state, read_json, save_weights, write_json
from kd_timm.parts import Parts

# Arguments that may change on resume without changing the numbers.
_FREE = {"resume", "config", "output", "experiment", "log_interval", "device", "checkpoint_hist", "pin_mem"}
_FREE |= {"no_record"}
_FREE |= {"report_to", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id"}


def save_state(session: Parts, epoch: int) -> None:
    """Writes what `--resume` needs to go on with `epoch`."""
    states = gather_object([random_state()])
    folder = session.checkpoints.open_state() if session.primary else session.checkpoints.new_state
    session.accelerator.wait_for_everyone()
    if session.distillation is not None:
        session.distillation.player.save(folder / "distiller")
    if session.primary:
        save_weights(session.student, folder / "model.safetensors")
        if session.ema is not None:
            save_weights(session.ema.module, folder / "ema.safetensors")
        torch.save(
            {
                "optimizer": session.optimizer.state_dict(),
                "scaler": session.accelerator.scaler.state_dict() if session.accelerator.scaler else None,
                "scheduler": _plateau_state(session.scheduler),
            },
            folder / "optimizer.pt",
        )
        for rank, state in enumerate(states):
            torch.save(state, folder / f"random-{rank}.pt")
        content = {
            "epoch": epoch,
            "processes": session.processes,
            "kept": session.checkpoints.kept,
            "peers": session.peers.best,
            "seconds": session.seconds,
            "updates": session.updates,
            "arguments": session.given,
        }
        write_json(folder / "state.json", content)
    session.accelerator.wait_for_everyone()
    if session.primary:
        session.checkpoints.close_state()
    session.accelerator.wait_for_everyone()


def load_state(session: Parts) -> int:
    """Takes up the state of `--resume`; returns the epoch to go on with."""
    folder = session.state
    assert folder is not None
    saved = read_json(folder / "state.json")
    if saved["processes"] != session.processes:
        raise DistillError(
            f"--resume: the run had {saved['processes']} processes, this one has {session.processes}: start as many."
        )
    changed = [k for k, v in saved["arguments"].items() if k not in _FREE and session.given.get(k) != v]
    if changed:
        raise DistillError(
            f"--resume continues a run exactly, but these arguments differ from it: {', '.join(changed)}. Give"
            f" those of {folder.parent / 'args.yaml'} (--config reads that file)."
        )
    if session.distillation is not None:
        session.distillation.player.load(folder / "distiller")
        session.new_schedule()
    load_weights(session.student, folder / "model.safetensors")
    if session.ema is not None:
        load_weights(session.ema.module, folder / "ema.safetensors")
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    session.optimizer.load_state_dict(state["optimizer"])
    if session.accelerator.scaler is not None:
        session.accelerator.scaler.load_state_dict(state["scaler"])
    if state["scheduler"] is not None:
        session.scheduler.lr_scheduler.load_state_dict(state["scheduler"]["inner"])
        session.scheduler.restore_lr = state["scheduler"]["restore_lr"]
    session.seconds, session.updates = saved["seconds"], saved["updates"]
    session.checkpoints.kept = [(metric, epoch) for metric, epoch in saved["kept"]]
    session.peers.best = saved["peers"]
    if session.primary:
        _bring_along(folder.parent, session.folder)
    random = torch.load(folder / f"random-{session.accelerator.process_index}.pt", weights_only=True)
    load_random_state(random)
    session.reporter.line(f"Continuing with epoch {saved['epoch']} from {folder}")
    return saved["epoch"]


def _plateau_state(scheduler: Any) -> dict[str, Any] | None:
    """The only schedule whose state is more than the epoch and the rate."""
    inner = getattr(scheduler, "lr_scheduler", None)
    return None if inner is None else {"inner": inner.state_dict(), "restore_lr": scheduler.restore_lr}


def _bring_along(before: Path, folder: Path) -> None:
    """Copies what a run has left so far, best weights and curves, to the folder in which it goes on."""
    if before.resolve() == folder.resolve():
        return
    for path in before.iterdir():
        if path.is_file() and path.name != "results.json" and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
