"""What a record for `kd-plugins report` adds to a distilled training of 100 steps: both scripts, and the trainer."""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from benchmarks.timing import compare, machine, print_table, ratios, write

_IMAGES = (
    "--dataset digits --device cpu -j 0 -b 64 --train-split train[:640] --epochs 10 --warmup-epochs 0 --val-interval 5"
)
_TEXT = "--use_cpu --save_strategy no --disable_tqdm True --max_steps 100 --eval_strategy no --student_layers 2"


def fresh() -> None:
    """Accelerate keeps one state for a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def timm_script(folder: Path) -> Callable[[bool], Any]:
    from kd_timm.train import main

    model = ["--output", str(folder), *_IMAGES.split()]
    main([*model, "--model", "cifar_resnet20", "--epochs", "1", "--no-record", "--experiment", "teacher"])
    weights = folder / "teacher" / "model_best.safetensors"
    taught = ["--teacher", "cifar_resnet20", "--teacher-checkpoint", str(weights), "--distill", "kd"]
    given = [*model, "--model", "cifar_resnet20", *taught, "--experiment", "student"]
    return lambda record: main([*given, *([] if record else ["--no-record"])])


def transformers_script(folder: Path) -> Callable[[bool], Any]:
    from kd_transformers.train import main

    given = [*_TEXT.split(), "--max_steps", "2", "--record", "false", "--output_dir", str(folder / "teacher")]
    main([*given, "--student_layers", "4", "--learning_rate", "1e-4"])
    given = [*_TEXT.split(), "--teacher", str(folder / "teacher"), "--distill", "kd"]
    return lambda record: main([*given, "--record", str(record), "--output_dir", str(folder / "student")])


def trainer(folder: Path) -> Callable[[bool], Any]:
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from kd_transformers import DistillationTrainer

    def bert(layers: int) -> Any:
        size = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, vocab_size=4096)
        return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=4, **size))

    ids = torch.randint(5, 4096, (1500, 64))
    rows = Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": [i % 4 for i in range(1500)],
        }
    )
    teacher = bert(4)

    def run(record: bool) -> None:
        args = TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=100, per_device_train_batch_size=32, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, per_device_eval_batch_size=64,
        )  # fmt: skip
        made = DistillationTrainer(
            model=bert(2),
            args=args,
            train_dataset=rows.select(range(1000)),
            eval_dataset=rows.select(range(1000, 1500)),
            teacher_model=teacher,
            distiller="kd",
            record=record,
        )
        made.train()
        made.evaluate()

    return run


HOSTS = {"kd-timm-train": timm_script, "kd-transformers-train": transformers_script, "DistillationTrainer": trainer}


def cases(make: Callable[[Path], Callable[[bool], Any]], folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A run with a record and one without, by name."""
    run = make(folder)

    def quiet(record: bool) -> None:
        fresh()
        with redirect_stdout(StringIO()):
            run(record)

    yield "without", lambda: quiet(False)
    yield "with", lambda: quiet(True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recording", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; a run with and one without a record in each")
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS), default=list(HOSTS), help="which hosts")
    parser.add_argument("--output", default="benchmarks/results/recording.json", help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {"machine": machine(), "hosts": {}}
    rows = []
    for host in args.hosts:
        with tempfile.TemporaryDirectory() as folder:
            seconds = compare(dict(cases(HOSTS[host], Path(folder))), repeats=args.repeats, warmup=1)
        pairs = [b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
        found = {name: statistics.median(values) for name, values in seconds.items()}
        found |= {"ratio": ratios(seconds, "without")["with"], "least": min(pairs), "most": max(pairs)}
        results["hosts"][host] = found
        rows.append([host, *found.values()])
    print_table("CPU seconds of a run", ["host", "without a record", "with one", "ratio", "least", "most"], rows)
    write(args.output, results)
    return 0
