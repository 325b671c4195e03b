"""Plays a distiller's turns under an Accelerator: the one place where hosts and methods meet."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_accelerate.averaging import average_buffers, average_gradients, broadcast, distributed
from kd_plugins import Batch, Distiller, DistillError, Groups, Nets
from kd_plugins.catalog.options import config_of
from kd_plugins.distiller import Turn, overrides_turns
from kd_plugins.groups import total

__all__ = ["TurnPlayer"]

_logger = logging.getLogger(__name__)

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TurnPlayer:
    """Plays a distiller's turns under an Accelerator.

    Trainer owns the student's backward and step, a bare Accelerate loop does not; so there are three parts, and `step`,
    which is all of them with backward, clipping and the optimizer between:

    1. `forward(batch)` plays the auxiliary turns, holds the extra gradients of the last one, and returns the student's
       loss, whose backward is the host's;
    2. `after_backward()` leaves every `.grad` with the student's loss alone, averages it over the processes at the
       accumulation boundary, and steps the extra groups;
    3. `after_update()`, after the host has clipped (`clip_parameters`) and stepped, steps the group `"own"` and counts.

    Only the host's own optimizer is prepared by Accelerate: a second prepared optimizer would step the same gradient
    scaler, and divide shared parameters' gradients by the scale twice. Each extra group has a scaler of its own.

    With several processes every turn runs without DDP's reducer, and gradients are averaged by hand at the accumulation
    boundary, which is exact for taps, early stops, unused parameters and several forwards. A method of one turn that
    reads logits alone and has no parts of its own leaves DDP as it is.

    Args:
        accelerator: The host's accelerator.
        distiller: The method, set up.
        nets: The networks; the student's forward goes through the prepared model.
        optimizer: The student's optimizer, prepared.
        model: The prepared student, for DDP; by default what the student's forward goes through.
        max_grad_norm: Largest norm of the student's and the own group's joint gradient in `step`, and of each peer's
            gradient; None does not clip.

    Raises:
        DistillError: The student is sharded (FSDP, DeepSpeed), or the method cannot accumulate and shall.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        distiller: Distiller,
        nets: Nets,
        optimizer: Any,
        *,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        groups: Groups | None = None,
    ) -> None:
        if accelerator.distributed_type in _SHARDED:
            raise DistillError(
                f"Distillation under {accelerator.distributed_type.value} is not supported yet: taps and turns need"
                " whole parameters. Use DDP (torchrun, accelerate launch), or train without a distiller."
            )
        self.accelerator = accelerator
        self.distiller = distiller
        self.nets = nets
        self.optimizer = optimizer
        forward = nets.student.forward
        self.model = model if model is not None else forward if isinstance(forward, nn.Module) else nets.student.module
        self.max_grad_norm = max_grad_norm
        self.groups = groups or Groups(distiller, getattr(optimizer, "optimizer", optimizer), nets)
        self.accumulation = 1
        self._held: dict[tuple[int, str], list[Tensor | None]] = {}
        self._last: tuple[int, list[str]] = (0, [])
        self._turns: Iterator[Turn] | None = None
        self._scalers: dict[str, torch.amp.GradScaler] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        fp16 = accelerator.mixed_precision == "fp16" and accelerator.native_amp
        for group in self.groups:
            if fp16 and group.name != "own":
                self._scalers[group.name] = torch.amp.GradScaler(accelerator.device.type)
        broadcast([*distiller.parameters(), *distiller.buffers()])
        for peer in nets.peers[1:]:
            broadcast(peer.module.state_dict().values())
        if distributed():
            distiller.seed_streams(broadcast_object_list([torch.initial_seed()])[0])
        self._by_hand = distributed() and not self._leaves_ddp_alone()
        if max_grad_norm is not None:
            self.clip_peers(partial(nn.utils.clip_grad_norm_, max_norm=max_grad_norm))

    def _leaves_ddp_alone(self) -> bool:
        needs = self.distiller.needs()
        plain = not overrides_turns(self.distiller) and len(self.distiller.stages()) == 1
        return plain and not needs.student.taps and needs.student.logits and not list(self.groups)

    @property
    def sync(self) -> bool:
        """Whether the current micro-batch closes an accumulation window."""
        return bool(self.accelerator.sync_gradients)

    @property
    def clip_parameters(self) -> list[nn.Parameter]:
        """The group `"own"`, which a host clips jointly with the student."""
        return self.groups.own.parameters if self.groups.own else []

    def clip_peers(self, clip: Callable[[list[nn.Parameter]], Any]) -> None:
        """Has the gradient of each peer clipped, as the host clips the student's."""
        for i in range(1, len(self.nets.peers)):
            self.groups[f"peer{i}"].clip = clip

    # The three parts

    def forward(self, batch: Batch) -> Tensor:
        """Plays the turns of one micro-batch up to the student's, and returns the student's loss (not divided).

        Args:
            batch: The micro-batch; `self.accumulation` tells how many share an update.
        """
        if self.accumulation > 1 and not self.distiller.accumulation:
            raise DistillError(
                f"{self.distiller.name} does not fit gradient accumulation: use a larger batch and 1 accumulation step."
            )
        if not self._held:
            self.groups.enter_stage()
        self._turns = iter(self.distiller.turns(self.nets, batch))
        with self.accelerator.no_sync(self.model) if self._by_hand else nullcontext():
            for i in range(2**31):
                turn = self._advance()
                if turn is None:
                    raise DistillError(f"{self.distiller.name} yields no turn with the group 'student'.")
                extras = [name for name in turn if name != "student"]
                last = "student" in turn
                for k, name in enumerate(extras):
                    self._hold(i, name, turn[name], keep=last or k + 1 < len(extras))
                self._count(turn)
                if last:
                    self._last = (i, extras)
                    return total(turn["student"], "student")
                if self.sync:
                    for name in extras:
                        self._step(i, name)
        raise AssertionError("unreachable")

    def after_backward(self) -> None:
        """Sorts out the gradients after the host's backward of the student's loss."""
        student = {id(p) for p in self.groups.student}
        for group in self.groups:
            if group.name != "own":
                for parameter in group.parameters:
                    if id(parameter) not in student:
                        parameter.grad = None
        if not self.sync:
            self._finish()
            return
        turn, extras = self._last
        for name in extras:
            self._step(turn, name)
        self._average(self.groups.student if self._by_hand else [])
        self._average(self.clip_parameters)
        self._unscale_own()

    def after_update(self) -> None:
        """Steps the group `"own"` after the host's update of the student, and counts the step."""
        own = self.groups.own
        if own is not None:
            if not self.accelerator.optimizer_step_was_skipped:
                own.update(self.groups.optimizer)
            own.optimizer.zero_grad(set_to_none=True)
        self._finish()
        self._held.clear()
        self.distiller.after_update()
        self.distiller.at(self.distiller.progress.step + 1)

    def step(self, batch: Batch) -> Tensor:
        """One micro-step of a loop without a Trainer, inside `with accelerator.accumulate(model)`; returns the loss."""
        self.accumulation = self.accelerator.gradient_accumulation_steps
        loss = self.forward(batch)
        self.accelerator.backward(loss)
        self.after_backward()
        if self.sync and self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_([*self.groups.student, *self.clip_parameters], self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.sync:
            self.after_update()
        return loss.detach()

    def end_epoch(self, epoch: float | None = None, unit: int = 1) -> bool:
        """Asks the method whether its stage is done, and lets the next one begin with the next step if so.

        Args:
            epoch: Passes over the training set so far.
            unit: Steps that the later stages begin with, such as those of an epoch.

        Returns:
            Whether the stages have changed; learning-rate curves that follow them then need to be looked up anew.
        """
        progress = self.distiller.progress
        if epoch is not None:
            progress.epoch = epoch
        table = self.distiller.table
        if not self.distiller.stage_done() or table is None or self.distiller.next_stage() is not None:
            return False
        table.end_stage(progress.step, unit)
        self.distiller.at(progress.step)
        return True

    def average_buffers(self) -> None:
        """Averages the batch statistics of student, peers and own parts, before they are evaluated or saved."""
        for module in (*(peer.module for peer in self.nets.peers), self.distiller):
            average_buffers(module)

    # Gradients of groups

    def _advance(self) -> Turn | None:
        with self.accelerator.autocast():
            return next(self._turns, None) if self._turns is not None else None

    def _finish(self) -> None:
        """Runs what follows the student's turn."""
        if self._turns is not None and self._advance() is not None:
            raise DistillError(
                f"{self.distiller.name} yields a turn after the student's: 'student' must be in the last."
            )
        self._turns = None

    def _hold(self, turn: int, name: str, terms: Mapping[str, Tensor], keep: bool) -> None:
        """Adds the gradient of one group's terms to what is held for its update in this turn."""
        group, loss = self.groups[name], total(terms, name) / self.accumulation
        if name in self._scalers:
            loss = self._scalers[name].scale(loss)
        gradients = torch.autograd.grad(loss, group.parameters, retain_graph=keep, allow_unused=True)
        if all(g is None for g in gradients):
            raise DistillError(
                f"The terms {list(terms)} of the group {name!r} reach none of its {len(group.parameters)} parameters:"
                " compute them from the group's own modules, outside no_grad."
            )
        held = self._held.get((turn, name))
        self._held[turn, name] = (
            list(gradients) if held is None else [_add(a, b) for a, b in zip(held, gradients, strict=True)]
        )

    def _step(self, turn: int, name: str) -> None:
        """Updates one group by the gradient held for it."""
        group = self.groups[name]
        gradients = average_gradients(self._held.pop((turn, name)), group.parameters)
        scaler = self._scalers.get(name)
        if scaler is None:
            group.step(gradients, self.groups.optimizer)
            return
        before = [p.grad for p in group.parameters]
        for parameter, gradient in zip(group.parameters, gradients, strict=True):
            parameter.grad = gradient
        group.follow(self.groups.optimizer)
        scaler.unscale_(group.optimizer)
        if group.clip is not None:
            group.clip(group.parameters)
        scaler.step(group.optimizer)
        scaler.update()
        for parameter, gradient in zip(group.parameters, before, strict=True):
            parameter.grad = gradient

    def _average(self, parameters: list[nn.Parameter]) -> None:
        for parameter, gradient in zip(
            parameters, average_gradients([p.grad for p in parameters], parameters), strict=True
        ):
            parameter.grad = gradient

    def _unscale_own(self) -> None:
        """Divides the own group's gradients by the host's loss scale; an overflow leaves them out of this update."""
        scaler, parameters = self.accelerator.scaler, self.clip_parameters
        if scaler is None or not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient /= scaler.get_scale()
        if not all(bool(g.isfinite().all()) for g in gradients):
            for parameter in parameters:
                parameter.grad = None

    # Logs

    def _count(self, turn: Turn) -> None:
        for name, terms in turn.items():
            for term, value in terms.items():
                key = f"distill/{term}" if name == "student" else f"distill/{name}/{term}"
                old, n = self._sums.get(key, (None, 0))
                new = value.detach().float()
                self._sums[key] = (new if old is None else old + new, n + 1)

    def logs(self) -> dict[str, float]:
        """Means of the loss terms since the last call, over steps and processes; nothing else waits for them."""
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        means = torch.stack([self._sums[key][0] / self._sums[key][1] for key in keys])
        self._sums = {}
        return dict(zip(keys, self.accelerator.reduce(means, "mean").tolist(), strict=True))

    # Checkpoints

    def save(self, folder: str | Path) -> None:
        """Writes what a resumed run needs beside the host's checkpoint: weights as safetensors, the rest as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.accelerator.process_index
        save_file(_plain(self.distiller.random_state()), folder / f"distiller_random_{rank}.safetensors")
        if not self.accelerator.is_main_process:
            return
        progress, table = self.distiller.progress, self.distiller.table
        state = {
            **config_of(self.distiller),
            "progress": {"step": progress.step, "epoch": progress.epoch, "stage": progress.stage},
            "stages": table.to_json() if table else None,
        }
        (folder / "distiller.json").write_text(json.dumps(state, indent=2) + "\n")
        save_file(_plain(self.distiller.state_dict()), folder / "distiller.safetensors")
        optimizers = {group.name: group.optimizer.state_dict() for group in self.groups}
        scalers = {name: scaler.state_dict() for name, scaler in self._scalers.items()}
        torch.save({"optimizers": optimizers, "scalers": scalers}, folder / "distiller_optimizers.pt")
        for i, peer in enumerate(self.nets.peers[1:], 1):
            save_file(_plain(peer.module.state_dict()), folder / f"peer{i}.safetensors")
        if self.groups.initial is not None:
            save_file(_plain(self.groups.initial), folder / "initial_student.safetensors")

    def load(self, folder: str | Path) -> bool:
        """Takes up what `save` wrote; returns whether the stages of the run have changed (the saved ones are kept).

        Raises:
            DistillError: The folder holds no distiller, or another one.
        """
        folder = Path(folder)
        if not (folder / "distiller.json").is_file():
            raise DistillError(
                f"Expected distiller.json in the checkpoint {folder}, which was written by a run without a distiller or"
                " with save_only_model: resume from another one, or start anew."
            )
        state = json.loads((folder / "distiller.json").read_text())
        config = json.loads(json.dumps(config_of(self.distiller)))
        name = config["distiller"]
        if state["distiller"] != name:
            raise DistillError(
                f"The checkpoint {folder} was written with the distiller {state['distiller']!r}, this run has"
                f" {name!r}: resume with the distiller that the run was started with."
            )
        before, now = state["options"], config["options"]
        options = {k: (before.get(k), now.get(k)) for k in sorted({*before, *now}) if before.get(k) != now.get(k)}
        words = ", ".join(f"{option}={now} in place of {before}" for option, (before, now) in options.items())
        try:
            self.distiller.load_state_dict(load_file(folder / "distiller.safetensors"))
        except RuntimeError as error:
            raise DistillError(
                f"The checkpoint {folder} does not fit the distiller of this run, which has"
                f" {words or 'the same options'}: resume with what the run was started with. ({error})"
            ) from error
        if options:
            _logger.warning(
                "Resumed %s with other options, %s: what it had made before (a codebook, searched weights) stays.",
                *(name, words),
            )
        saved = torch.load(folder / "distiller_optimizers.pt", map_location="cpu", weights_only=True)
        for group in self.groups:
            group.optimizer.load_state_dict(saved["optimizers"][group.name])
        for name, scaler in self._scalers.items():
            scaler.load_state_dict(saved["scalers"][name])
        for i, peer in enumerate(self.nets.peers[1:], 1):
            peer.module.load_state_dict(load_file(folder / f"peer{i}.safetensors"))
        if self.groups.initial is not None:
            self.groups.initial = load_file(folder / "initial_student.safetensors")
        random = folder / f"distiller_random_{self.accelerator.process_index}.safetensors"
        if random.is_file():
            self.distiller.load_random_state(load_file(random))
        changed = bool(self.distiller.table and self.distiller.table.restore(state["stages"]))
        self.distiller.progress.stage = state["progress"]["stage"]
        self.distiller.at(state["progress"]["step"], state["progress"]["epoch"])
        return changed


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, sharing no memory."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
