"""The hosts that are loops: plain torch, and Accelerate with TurnPlayer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate_kit import fresh_accelerate
from shapes.base import Host, Job, with_row
from shapes.nets import BATCH, EPOCH, ROWS, SEED
from torch import Tensor
from torch.utils.data import DataLoader

from kd_accelerate import TurnPlayer
from kd_accelerate.streams import StagedDataset, split
from kd_plugins import Batch, make_optimizers, play
from kd_plugins.binding import needs_in, schedule


class Bare(Host):
    """A loop of plain torch: one process, no accumulation."""

    def __init__(self, job: Job, folder: Path, shift: float = 0.0) -> None:
        super().__init__(job, folder, shift)
        self.nets = self.bound()
        schedule(self.distiller, job.steps, epoch=EPOCH)
        self.moved(self.distiller)
        self.optimizers = make_optimizers(self.distiller, self.optimizer(), self.nets)
        self.curve = self.scheduler(self.optimizers.optimizer)
        self.streams = self.further()

    def batch(self, step: int) -> Batch:
        """The batch of an update."""
        if not self.distiller.data:
            return Batch()
        shares = self.distiller.needs().streams
        rows = split(ROWS, shares, SEED)[""] if shares else list(range(ROWS))
        first = step % EPOCH * BATCH
        items = self.rows([rows[(first + i) % len(rows)] for i in range(BATCH)])
        return self.wrap(items, {name: self.wrap(self.streams.draw(name)) for name in shares})

    def train(self, until: int) -> None:
        precision = {"no": None, "bf16": torch.bfloat16}[self.job.precision]
        while self.distiller.progress.step < until:
            turns = iter(self.distiller.turns(self.nets, self.batch(self.distiller.progress.step)))
            while True:
                # Autocast keeps casts of the weights, so no update may happen inside of it.
                with torch.autocast("cpu", precision) if precision else nullcontext():
                    turn = next(turns, None)
                if turn is None:
                    break
                play(turn, self.optimizers)
            if self.job.decay:
                self.curve.step()

    def save(self) -> None:
        self.optimizers.save(self.folder, self.streams)

    def load(self) -> None:
        self.optimizers.load(self.folder, self.streams)


class Accelerated(Host):
    """A loop under Accelerate, with TurnPlayer."""

    def __init__(self, job: Job, folder: Path, shift: float = 0.0) -> None:
        super().__init__(job, folder, shift)
        fresh_accelerate()
        self.accelerator = accelerator = Accelerator(
            cpu=True, mixed_precision=job.precision, gradient_accumulation_steps=job.accumulation
        )
        if job.precision == "fp16":
            # Accelerate leaves fp16 on a CPU silently off.
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
        distiller = self.distiller
        self.nets = self.bound()
        schedule(distiller, job.steps, epoch=EPOCH)
        self.moved(distiller)
        self.staged = StagedDataset(self.data, distiller, EPOCH, SEED, with_row)
        loader = DataLoader(self.staged, batch_size=job.micro)
        self.model, self.prepared, self.loader = accelerator.prepare(self.student, self.optimizer(), loader)
        self.nets.student.forward = self.model
        self.player = TurnPlayer(accelerator, distiller, self.nets, self.prepared, max_grad_norm=job.clip)
        self.curve = self.scheduler(self.prepared.optimizer)
        self.streams = self.further()

    def train(self, until: int) -> None:
        progress = self.distiller.progress
        while progress.step < until:
            epoch, done = divmod(progress.step, EPOCH)
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, done * self.job.accumulation)
            for items in loader:
                with self.accelerator.accumulate(self.model):
                    self.player.step(self._batch(items))
                if self.job.decay and self.accelerator.sync_gradients:
                    self.curve.step()
                if progress.step == until:
                    break
            else:
                self.player.end_epoch(epoch + 1)

    def _batch(self, items: dict[str, Tensor]) -> Batch:
        if not self.distiller.data:
            return Batch()
        wanted = needs_in(self.distiller, self.distiller.progress.table.index(self.distiller.progress.step)).streams
        return self.wrap(items, {name: self.wrap(self.streams.draw(name)) for name in wanted})

    def save(self) -> None:
        self.player.save(self.folder)
        if self.accelerator.is_main_process:
            state = {
                "student": self.student.state_dict(),
                "optimizer": self.prepared.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "drawn": self.streams.drawn,
            }
            torch.save(state, self.folder / "run.pt")
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        self.player.load(self.folder)
        state = torch.load(self.folder / "run.pt", weights_only=True)
        self.student.load_state_dict(state["student"])
        self.prepared.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.streams = self.further(state["drawn"])
