"""Settings of `kd` where every token has scores: small language models, and capitals given back to text without.

    python -m benchmarks tokens $DATA/lm/tinyshakespeare/input.txt $DATA/lm/wikitext-2/test.txt --output tokens.json

Both jobs read characters of a file's first 90 %; the rest is held out, and its loss is told, of a student alone and of
students of `kd`, each in the mean over the seeds and paired with the student alone of the same seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    TrainingArguments,
)

from benchmarks.timing import machine, print_table, write
from kd_transformers import DistillationTrainer

__all__ = ["main"]

LENGTH, SYMBOLS = 64, 128
SETTINGS: dict[str, dict[str, float] | None] = {
    "alone": None,
    "T 4, alpha 0.9": {"temperature": 4, "alpha": 0.9},
    "T 1, alpha 0.9": {"temperature": 1, "alpha": 0.9},
    "T 2, alpha 0.5": {"temperature": 2, "alpha": 0.5},
    "T 1, alpha 0.5": {"temperature": 1, "alpha": 0.5},
}


def rows(text: str, job: str) -> TensorDataset:
    """Characters in rows of `LENGTH`, and their labels: themselves, or whether each is a capital."""
    symbols = torch.tensor([min(ord(c), SYMBOLS - 1) for c in text])
    symbols = symbols[: len(symbols) // LENGTH * LENGTH].view(-1, LENGTH)
    if job == "causal-lm":
        return TensorDataset(symbols, symbols)
    capital = (symbols >= ord("A")) & (symbols <= ord("Z"))
    return TensorDataset(symbols + 32 * capital, capital.long())


def network(job: str, layers: int, width: int) -> Any:
    if job == "causal-lm":
        shape: dict[str, Any] = {"n_layer": layers, "n_embd": width, "n_head": 2, "n_positions": LENGTH}
        return GPT2LMHeadModel(GPT2Config(vocab_size=SYMBOLS, bos_token_id=0, eos_token_id=0, **shape))
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
    config = BertConfig(vocab_size=SYMBOLS, intermediate_size=4 * width, max_position_embeddings=LENGTH, **shape)
    return BertForTokenClassification(config)


def collate(examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, labels = (torch.stack(column) for column in zip(*examples, strict=True))
    return {"input_ids": inputs, "labels": labels}


def trained(model: nn.Module, data: Any, held_out: Any, steps: int, seed: int, folder: str, **options: Any) -> float:
    """Trains, and returns the loss on what is held out."""
    given: dict[str, Any] = {"output_dir": folder, "max_steps": steps, "seed": seed, "learning_rate": 3e-3}
    given |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "save_strategy": "no"}
    given |= {"use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "report_to": [], "logging_steps": steps}
    arguments = TrainingArguments(dataloader_pin_memory=False, warmup_steps=steps // 10, **given)
    options |= {"args": arguments, "train_dataset": data, "eval_dataset": held_out, "data_collator": collate}
    trainer = DistillationTrainer(model, record=False, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


def main(argv: Sequence[str]) -> int:
    """Runs the comparison and prints a row for each setting."""
    parser = argparse.ArgumentParser(prog="benchmarks tokens")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--steps", type=int, default=400, help="updates of a student; the teacher has three times as many"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in args.files:
            text = file.read_text(encoding="utf-8", errors="replace")[:1_000_000]
            cut = len(text) * 9 // 10
            for job in ("causal-lm", "token"):
                data, held_out = rows(text[:cut], job), rows(text[cut:][:50_000], job)
                torch.manual_seed(100)
                teacher = network(job, 4, 128)
                theirs = trained(teacher, data, held_out, 3 * args.steps, 100, folder)
                losses: dict[str, list[float]] = {name: [] for name in SETTINGS}
                for seed in range(args.seeds):
                    for name, options in SETTINGS.items():
                        torch.manual_seed(seed)
                        student, kd = network(job, 2, 48), {"distiller": "kd", "teacher_model": teacher}
                        given = {} if options is None else {**kd, "distiller_args": options}
                        losses[name].append(trained(student, data, held_out, args.steps, seed, folder, **given))
                title = f"{file.parent.name}, {job}"
                settings: dict[str, dict[str, Any]] = {}
                for name, values in losses.items():
                    apart = [a - b for a, b in zip(values, losses["alone"], strict=True)]
                    settings[name] = {"loss": statistics.fmean(values), "against alone": apart}
                found[title] = {"teacher": theirs, "settings": settings}
                table = [[name, row["loss"], str(row["against alone"])] for name, row in settings.items()]
                print_table(
                    f"{title}, the teacher {theirs:.3f}", ["setting", "loss", "against alone, each seed"], table
                )
    if args.output:
        write(args.output, {"machine": machine(), "steps": args.steps, "tokens": found})
    return 0
