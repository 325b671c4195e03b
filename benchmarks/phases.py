"""`internal`, phase by phase, beside the way that anybody would write it: CPU time and memory of a training step.

    python -m benchmarks phases
    python -m benchmarks phases --lengths 64 256

The other way asks both networks for all hidden states and all attention (`output_hidden_states`, `output_attentions`,
which takes eager attention), and adds the terms that the phase trains; the student's task loss is in neither. All
cases run in one process, once in each round and in random order; a figure is the median of the paired ratios to the
other way in that phase, with its 95 % interval. Memory is what a step allocates at most beyond what there was.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kd_plugins
from benchmarks.speed import Step, bare, bert, interval, named, optimizer, tokens
from benchmarks.timing import compare, machine, peak_bytes, print_table, write


def by_hand(layers: Sequence[int], labels: bool, student: nn.Module, teacher: nn.Module, batch: Any) -> Step:
    """A step of the other way: `layers` of the student learn, each from the teacher's of twice its number."""
    steps, more = optimizer(student), {"output_hidden_states": True, "output_attentions": True}
    student.train()

    def step() -> None:
        ours = student(**named(batch), **more)
        with torch.no_grad():
            theirs = teacher(**named(batch), **more)
        terms: list[Tensor] = []
        for layer in layers:
            logs = [
                network.attentions[i - 1].clamp_min(1e-8).log() for network, i in ((ours, layer), (theirs, 2 * layer))
            ]
            terms.append(F.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean())
            heads = ours.hidden_states[layer][:, 0], theirs.hidden_states[2 * layer][:, 0]
            terms.append(1 - F.cosine_similarity(*heads).mean())
        if labels:
            target = theirs.logits.log_softmax(-1)
            terms.append(F.kl_div(ours.logits.log_softmax(-1), target, log_target=True, reduction="batchmean"))
        sum(terms).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    return step


def measure(length: int, size: int, depth: int, repeats: int) -> dict[str, dict[str, Any]]:
    """The phases of a student of `depth` layers at one length of the texts."""
    data = tokens(length, size)
    batch = kd_plugins.Batch.of(data, data.pop("labels"))

    def made(layers: int, attention: str) -> nn.Module:
        return bert(layers, attn_implementation=attention, max_position_embeddings=length)

    teachers = {kind: made(2 * depth, kind).eval().requires_grad_(False) for kind in ("sdpa", "eager")}
    layers = tuple(range(1, depth + 1))
    # The schedule, the number of its phase, the student's layers that learn there, and whether the labels are taught.
    phases: dict[str, tuple[str, int, tuple[int, ...], bool]] = {"all layers and the labels": ("all", 0, layers, True)}
    for layer in layers:
        phases[f"progressive, layer {layer}"] = ("progressive", layer - 1, (layer,), False)
    for layer in layers[1:]:
        phases[f"stacked, layers 1 to {layer}"] = ("stacked", layer - 1, layers[:layer], False)
    phases["the labels"] = ("stacked", depth, (), True)
    cases: dict[str, Step] = {}
    for title, (schedule, phase, of, labels) in phases.items():
        options = {"schedule": schedule}
        cases[title] = bare("internal", options, made(depth, "sdpa"), teachers["sdpa"], batch, phase=phase)
        cases[f"{title}, by hand"] = by_hand(of, labels, made(depth, "eager"), teachers["eager"], batch)
    seconds = compare(cases, repeats=repeats)
    rows: dict[str, dict[str, Any]] = {}
    for title in phases:
        other = f"{title}, by hand"
        paired = [a / b for a, b in zip(seconds[title], seconds[other], strict=True)]
        rows[title] = {
            "ms": statistics.median(seconds[title]) * 1e3,
            "x_by_hand": statistics.median(paired),
            "interval": interval(paired),
            "mib": peak_bytes(cases[title]) / 2**20,
            "mib_by_hand": peak_bytes(cases[other]) / 2**20,
        }
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks phases", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512], help="tokens of a text")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--layers", type=int, default=3, help="layers of the student; the teacher has twice as many")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; every case runs once in each")
    parser.add_argument("--output", default="benchmarks/results/phases.json", help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "phases": {}}
    for length in args.lengths:
        size = args.tokens // length
        rows = measure(length, size, args.layers, args.repeats)
        title = f"BERT of {2 * args.layers} to {args.layers} layers, length {length}, batch {size}"
        results["phases"][title] = rows
        shown = [
            [phase, row["ms"], row["x_by_hand"], "{:.2f} to {:.2f}".format(*row["interval"]), *list(row.values())[3:]]
            for phase, row in rows.items()
        ]
        print_table(title, ["phase", "CPU ms", "x by hand", "95 %", "MiB", "MiB by hand"], shown)
        write(args.output, results)
    return 0
