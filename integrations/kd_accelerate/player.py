"""The engine under an Accelerator: precision, scalers, accumulation, and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_accelerate.sharding import check_reached, check_sharded, gather_for_taps, is_sharded
from kd_plugins import Batch, Distiller, DistillError, Nets, Run
from kd_plugins.authors import overrides
from kd_plugins.averaging import distributed
from kd_plugins.groups import Group


def _reduces(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


class TurnPlayer(Run):
    """Plays a distiller's turns under an Accelerator: `Run` with its precision, accumulation and processes.

    Only the host's own optimizer is prepared by Accelerate: a second prepared optimizer would step the same gradient
    scaler, and divide shared parameters' gradients by the scale twice. Each extra group has a scaler of its own.

    A student that is sharded (FSDP2, DeepSpeed ZeRO) has its gradients averaged by what shards it; its forwards
    run to their end. Where layers are read, FSDP2 keeps its weights until the backward, as it may start in a layer.
    Clipping is joint but under DeepSpeed, which clips and steps the student in the backward, and the own parts apart.

    With several processes every turn of any other runs without DDP's reducer, and gradients are averaged by hand at the
    accumulation boundary, which is exact for taps, early stops, unused parameters and several forwards. A method of one
    turn that reads logits alone and has no parts of its own leaves DDP as it is.

    Args:
        accelerator: The host's accelerator.
        distiller: The method, set up.
        nets: The networks; the student's forward goes through the prepared model.
        optimizer: The student's optimizer, prepared.
        model: The prepared student, for DDP; by default what the student's forward goes through.
        max_grad_norm: Largest norm of the student's and the own group's joint gradient in `step`, and of each peer's
            gradient; None does not clip.

    Raises:
        DistillError: The student is sharded and the method does not fit that, or fp16 meets a stage that does not train
            the student.
    """

    nets: Nets
    keeps_student = False

    def __init__(
        self,
        accelerator: Accelerator,
        distiller: Distiller,
        nets: Nets,
        optimizer: Any,
        *,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.sharded = is_sharded(accelerator)
        if self.sharded:
            plugin = getattr(accelerator.state, "deepspeed_plugin", None)
            scaled = plugin is not None and accelerator.mixed_precision == "fp16"
            check_sharded(distiller, nets, zero=plugin.zero_stage if plugin is not None else 0, scaled=scaled)
            gather_for_taps(distiller, nets)
        super().__init__(distiller, optimizer, nets, max_grad_norm=max_grad_norm)
        self.accelerator = accelerator
        forward = nets.student.forward
        self.model = model if model is not None else forward if isinstance(forward, nn.Module) else nets.student.module
        fp16 = accelerator.mixed_precision == "fp16" and accelerator.native_amp
        if fp16 and any(stage.ends_with != "student" for stage in distiller.stages()):
            raise DistillError(
                f"{distiller.name} has a stage that leaves the student alone, and the gradient scaler of fp16 takes no"
                " step without a gradient of it: use bf16."
            )
        self._scalers: dict[str, torch.amp.GradScaler] = {
            group.name: torch.amp.GradScaler(accelerator.device.type) for group in self if fp16 and group.name != "own"
        }
        needs = distiller.needs()
        plain = not overrides(distiller, "turns") and len(distiller.stages()) == 1
        # A student that is asked past DDP, as bind leaves it, has no reducer.
        past = forward is None or isinstance(forward, nn.Module) and not any(map(_reduces, forward.modules()))
        self._reduced = plain and not past and not needs.student.taps and needs.student.logits and not self.groups

    @property
    def plain_optimizer(self) -> Optimizer:
        inner = super().plain_optimizer
        while hasattr(inner, "optimizer"):  # DeepSpeed wraps once more.
            inner = inner.optimizer
        return inner

    @property
    def sync(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    @property
    def joined(self) -> bool:
        return distributed()

    @property
    def by_hand(self) -> bool:
        return self.joined and not self._reduced and not self.sharded

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def unreduced(self) -> AbstractContextManager[Any]:
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, norm: float) -> None:
        self.accelerator.clip_grad_norm_([*self.student, *self.clip_parameters], norm)

    def step(self, batch: Batch) -> Tensor:
        """One micro-step of a loop without a Trainer, inside `with accelerator.accumulate(model)`; returns the loss."""
        self.accumulation = self.accelerator.gradient_accumulation_steps
        return super().step(batch)

    def after_backward(self) -> None:
        super().after_backward()
        if self.sync:
            deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            if deepspeed and self.max_grad_norm is not None and self.clip_parameters:
                nn.utils.clip_grad_norm_(self.clip_parameters, self.max_grad_norm)
            if self.sharded and not deepspeed:
                check_reached(self.distiller, self.student)
            self._unscale_own()

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

    def update_own(self, own: Group) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            super().update_own(own)

    def scaled(self, group: Group, loss: Tensor) -> Tensor:
        return self._scalers[group.name].scale(loss) if group.name in self._scalers else loss

    def step_group(self, group: Group, gradients: Sequence[Tensor | None]) -> None:
        scaler = self._scalers.get(group.name)
        if scaler is None:
            super().step_group(group, gradients)
            return
        with group.holding(gradients):
            group.follow(self.plain_optimizer)
            scaler.unscale_(group.optimizer)
            if group.clip is not None:
                group.clip(group.parameters)
            scaler.step(group.optimizer)
            scaler.update()

    def scaler_states(self) -> dict[str, Any]:
        return {name: scaler.state_dict() for name, scaler in self._scalers.items()}

    def load_scaler_states(self, states: Mapping[str, Any]) -> None:
        for name, scaler in self._scalers.items():
            scaler.load_state_dict(states[name])
