"""One of two processes of a training; started by torchrun from test_trainer_distributed.py."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from distributed_kit import leave
from safetensors.torch import save_file
from trainer_kit import Texts, bert, logged, shifted, teacher, trainer, weights

BATCH = 8
RUNS: dict[str, dict[str, Any]] = {
    "kd": {"options": {"alpha": 0.5}},
    # Also where the first thing asked of it is an evaluation.
    "kd evaluated": {"options": {"alpha": 0.5}},
    "kd accumulated": {"gradient_accumulation_steps": 2},
    "stacked": {"options": {"schedule": "stacked", "gold": 0.5}, "gradient_accumulation_steps": 2},
    # Rows with very different numbers of labels, whose loss is a mean over those of both processes.
    "kd of tokens": {"gradient_accumulation_steps": 2, "options": {"alpha": 0.5}},
    "own": {"options": {"schedule": "all", "project": True}, "max_grad_norm": 0.1},
    # Between the mean of one process, 0.44, and that of both, 0.42.
    "threshold": {"options": {"schedule": "progressive", "threshold": 0.43, "classification_share": 0.25}},
}


def run_of(name: str, folder: Path, processes: int, **changes: Any) -> Any:
    """A training at a global batch of 8, however many processes share it."""
    given = {"distiller": "kd" if name.startswith("kd") else "internal", **RUNS[name], **changes}
    of = teacher(hidden_size=32) if given.get("options", {}).get("project") else teacher()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH // processes,
        "num_train_epochs": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "seed": 5,
        "train_sampling_strategy": "random",
        # Equal global batches: the random order must be drawn in one way.
        "accelerator_config": {"use_seedable_sampler": True},
        "data_seed": 5,
    }
    data: Any = Texts(48)
    if name == "kd of tokens":
        labels = data.ids.masked_fill((data.mask == 0) | (torch.arange(10) > torch.arange(48)[:, None] % 10), -100)
        data = [{**row, "labels": own} for row, own in zip(data, labels, strict=True)]
        of, given["student"] = causal(2), causal(1)
    return trainer(folder, of=of, data=data, **{**settings, **given})


def causal(layers: int) -> Any:
    """A small causal language model."""
    torch.manual_seed(layers)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **sizes, **heads))


def record(run: Any, folder: Path, name: str) -> None:
    """Writes what a process ended with."""
    rank = run.args.process_index
    state = {**weights(run.model), **{f"distiller.{k}": v for k, v in weights(run.distiller).items()}}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{name}_{rank}.safetensors")
    table = run.distiller.progress.table.to_json()
    log = {"loss": logged(run, "loss"), "grad_norm": logged(run, "grad_norm"), "stages": table["starts"]}
    log |= {term: logged(run, term) for term in ("distill/kd", "distill/kl_attention")}
    log["eval_loss"] = run.evaluate(run.train_dataset)["eval_loss"]
    (folder / f"{name}_{rank}.json").write_text(json.dumps(log))


def main(folder: Path) -> None:
    gc.freeze()
    for name in RUNS:
        run = run_of(name, folder / "out", 2)
        if name == "kd evaluated":
            run.evaluate(run.train_dataset)
        run.train()
        record(run, folder, name)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    run = run_of("stacked", folder / "resume", 2, **saving)
    run.train()
    record(run, folder, "whole")
    torch.manual_seed(run.args.process_index)
    run = run_of("stacked", folder / "resume", 2, student=shifted(bert()), **saving)
    run.train(resume_from_checkpoint=str(folder / "resume" / "checkpoint-4"))
    record(run, folder, "resumed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.unfreeze()
    leave()
