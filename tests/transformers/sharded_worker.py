"""One of two processes of trainings whose student is sharded; started by torchrun from test_trainer_sharded.py."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_kit import leave
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from trainer_kit import Texts, bert, logged, shifted, teacher, trainer, weights

from kd_plugins import Batch, Distiller, Needs, Nets, Reads
from kd_plugins.distiller import Turn
from kd_transformers import DistillationTrainer

RUNS: dict[str, dict[str, Any]] = {
    "kd": {"options": {"alpha": 0.5}, "gradient_accumulation_steps": 2},
    "stacked": {"options": {"schedule": "stacked", "gold": 0.5}, "gradient_accumulation_steps": 2},
    # Gradients that begin inside a layer and never pass its output.
    "attention": {"options": {"schedule": "stacked", "hidden_weight": 0.0}},
    "own": {"options": {"schedule": "stacked", "project": True}, "max_grad_norm": 0.1},
    "critic": {},
}
FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


# What DeepSpeed shards of a student: its optimizer and gradients, or its weights too.
ZERO = {2: ["kd", "stacked", "critic"], 3: ["kd", "critic"]}


def deepspeed(stage: int) -> dict[str, Any]:
    """The arguments of a training that DeepSpeed shards."""
    sizes = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {"deepspeed": {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **sizes}}


class Critic(Distiller):
    """A judge of its own turn, which tells the student's vectors from the teacher's."""

    def needs(self) -> Needs:
        return Needs(student=Reads(hidden=(1,)), teacher=Reads(hidden=(1,)))

    def setup(self, nets: Nets, batch: Batch) -> None:
        torch.manual_seed(0)
        self.judge = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

    def extras(self) -> dict[str, nn.Module]:
        return {"judge": self.judge}

    def turns(self, nets: Nets, batch: Batch) -> Iterator[Turn]:
        student, teacher = nets.student(batch), nets.teacher(batch)
        ours, theirs = (view.hidden[1].mean(1) for view in (student, teacher))
        told = self.judge(torch.cat([ours.detach(), theirs]))[:, 0]
        real = torch.arange(len(told)) >= len(ours)
        yield {"judge": {"told": F.binary_cross_entropy_with_logits(told, real.float())}}
        yield {"student": {**self.task(student, batch), "fools": F.softplus(-self.judge(ours)).mean()}}


class OnCPU(DistillationTrainer):
    """Accelerate shards on accelerators alone, and trains by DDP on CPUs whatever was asked for; torch shards there."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            state: Any = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, *args, **kwargs)
        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        assert sharded == (self.args.fsdp_plugin_args is not None)
        return loss


def run_of(name: str, folder: Path, processes: int, **changes: Any) -> Any:
    """A training at a global batch of 8, however many processes share it."""
    given = {
        "distiller": Critic() if name == "critic" else "kd" if name == "kd" else "internal",
        **RUNS[name],
        **changes,
    }
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8 // processes,
        "num_train_epochs": 3,
        "optim": "sgd",
        "learning_rate": 0.05,
        "seed": 5,
        "data_seed": 5,
        "accelerator_config": {"use_seedable_sampler": True},
    }
    if processes > 1 and "deepspeed" not in changes:
        settings |= FSDP
    of = given.pop("of", None) or teacher(**({"hidden_size": 32} if name == "own" else {}))
    return trainer(folder, of=of, data=Texts(48), cls=OnCPU, **{**settings, **given})


def whole(run: Any) -> dict[str, Any]:
    """All weights of the student and the distiller; of a sharded student, where a process has them."""
    student = weights(run.model) if run.args.world_size == 1 else run.accelerator.get_state_dict(run.model_wrapped)
    own = {f"distiller.{k}": v for k, v in weights(run.distiller).items() if not k.endswith("cosine")}
    return {k: v.detach().clone().contiguous() for k, v in {**(student or {}), **own}.items()}


def record(run: Any, folder: Path, name: str) -> None:
    """Writes what the first process ended with."""
    state = whole(run)
    if run.args.process_index == 0:
        save_file(state, folder / f"{name}.safetensors")
        log = {term: logged(run, term) for term in ("loss", "grad_norm")}
        (folder / f"{name}.json").write_text(json.dumps(log))


def main(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    for name in RUNS:
        run = run_of(name, folder / "out", 2)
        run.train()
        record(run, folder, name)
    run.save_model(str(folder / "saved"))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    for part in ("unbroken", "resumed"):
        student = shifted(bert()) if part == "resumed" else None
        run = run_of("own", folder / "resume", 2, student=student, **saving)
        run.train(str(folder / "resume" / "checkpoint-5") if part == "resumed" else None)
        record(run, folder, part)
        torch.manual_seed(run.args.process_index)
    of = teacher()
    for module in (*of.bert.encoder.layer, of):
        fully_shard(module)
    run = run_of("stacked", folder / "out", 2, of=of)
    run.train()
    record(run, folder, "teacher")


def main_of_deepspeed(folder: Path, stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ZERO[stage]:
        run = run_of(name, folder / "out", 2, **deepspeed(stage))
        run.train()
        assert run.is_deepspeed_enabled
        record(run, folder, name)
    # As a script has it: arguments first, under which ZeRO-3 cuts every network that is loaded.
    loaded = {}
    for part, network in (("student", bert()), ("of", teacher())):
        if run.args.process_index == 0:
            network.save_pretrained(folder / part, is_main_process=True)
        run.accelerator.wait_for_everyone()
        loaded[part] = type(network).from_pretrained(folder / part)
        assert all(hasattr(p, "ds_id") == (stage == 3) for p in loaded[part].parameters())
    run = run_of("kd", folder / "out", 2, **loaded, **deepspeed(stage))
    run.train()
    record(run, folder, "loaded")
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    for part in ("unbroken", "resumed"):
        student = shifted(bert()) if part == "resumed" else None
        run = run_of("kd", folder / "resume", 2, student=student, **saving, **deepspeed(stage))
        run.train(str(folder / "resume" / "checkpoint-5") if part == "resumed" else None)
        record(run, folder, part)


if __name__ == "__main__":
    gc.freeze()
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else main_of_deepspeed(Path(sys.argv[1]), int(sys.argv[2]))
    gc.unfreeze()
    leave()
