"""Seconds per step of distilling, against the floor: the student's step and one teacher forward without gradient."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import kd_plugins
from benchmarks.timing import compare, machine, print_table, ratios, write
from kd_accelerate import TurnPlayer


def bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30522, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=1024,
        num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def text(length: int, batch: int) -> tuple[Callable[[], nn.Module], nn.Module, kd_plugins.Batch, dict[str, Any]]:
    ids = torch.randint(1000, 30000, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    methods = {"kd": {}, "internal": {"schedule": "all"}}
    return lambda: bert(2), bert(4), kd_plugins.Batch.of(inputs, torch.randint(3, (batch,))), methods


def images(batch: int) -> tuple[Callable[[], nn.Module], nn.Module, kd_plugins.Batch, dict[str, Any]]:
    import timm

    teacher = timm.create_model("resnet18", num_classes=10)
    methods = {"kd": {}, "nst": {"layers": (-1,)}, "kd+nst": {"layers": (-2, -1)}}
    data = kd_plugins.Batch.of(torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,)))
    return lambda: timm.create_model("mobilenetv3_small_100", num_classes=10), teacher, data, methods


def plain(student: nn.Module, batch: kd_plugins.Batch, teacher: nn.Module | None) -> Callable[[], None]:
    """A hand-written step; with a teacher, the floor: its forward, and soft labels in one line."""
    network, optimizer = kd_plugins.Network(student), torch.optim.AdamW(student.parameters(), fused=True)
    frozen = kd_plugins.Network(teacher) if teacher is not None else None

    def step() -> None:
        student.train()
        logits = network.logits(network.call(student, batch))
        loss = F.cross_entropy(logits, batch.labels)
        if frozen is not None:
            with torch.no_grad():
                target = frozen.logits(frozen.call(frozen.module, batch))
            loss = loss + F.kl_div(
                F.log_softmax(logits / 4, -1), F.log_softmax(target / 4, -1), log_target=True, reduction="batchmean"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def distilled(
    student: nn.Module, teacher: nn.Module, batch: kd_plugins.Batch, name: str, options: dict[str, Any]
) -> Callable[[], None]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    distiller = kd_plugins.create_distiller(name, **options)
    nets = kd_plugins.bind(distiller, student, teacher, batch=batch, total_steps=1000)
    model, optimizer = accelerator.prepare(student, torch.optim.AdamW(student.parameters(), fused=True))
    nets.student.forward = model
    player = TurnPlayer(accelerator, distiller, nets, optimizer, max_grad_norm=1.0)

    def step() -> None:
        student.train()
        player.step(batch)

    return step


def settings(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    yield f"BERT 4 to 2 layers, length 64, batch {args.batch}", text(64, args.batch)
    yield f"BERT 4 to 2 layers, length 256, batch {args.batch}", text(256, args.batch)
    yield f"resnet18 to mobilenetv3_small, 64 x 64, batch {args.batch}", images(args.batch)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; every case runs once in each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", default="benchmarks/results/speed.json", help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"machine": machine(), "settings": {}}
    for title, (student, teacher, batch, methods) in settings(args):
        teacher, batch = teacher.to(device).eval(), batch.to(device)
        cases = {
            "plain student": plain(student().to(device), batch, None),
            "floor": plain(student().to(device), batch, teacher),
        }
        for name, options in methods.items():
            cases[name] = distilled(student().to(device), teacher, batch, name, options)
        seconds = compare(cases, repeats=args.repeats)
        to_floor, to_plain = ratios(seconds, "floor"), ratios(seconds, "plain student")
        rows = [[n, statistics.median(s) * 1e3, to_floor[n], to_plain[n]] for n, s in seconds.items()]
        print_table(title, ["step", "CPU ms (median)", "x floor", "x plain"], rows)
        results["settings"][title] = {r[0]: {"ms": r[1], "x_floor": r[2], "x_plain": r[3]} for r in rows}
    write(args.output, results)
    return 0
