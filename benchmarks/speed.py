"""CPU time of a training step against its floor: the student's own step and a forward of the teacher, no loss between.

    python -m benchmarks speed
    python -m benchmarks speed --only text

All cases of a job run in one process, once in each round and in random order. A figure is the median of the paired
ratios to the floor with its 95 % interval (bootstrap). The floor has no soft labels in it, so no method is below it.

Jobs are `images` (CIFAR's ResNets), `text` (BERT at three lengths), `hosts` (`kd` in every host, beside what its users
would write by hand) and `peers` (other libraries, those that are installed: textbrewer, torchdistill).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import kd_plugins
import kd_timm.models  # noqa: F401  (registers the networks)
from benchmarks.timing import compare, machine, print_table, write
from kd_accelerate import TurnPlayer
from kd_timm import DistillationTask
from kd_transformers import DistillationTrainer

Step = Callable[[], Any]
WORDS, CLASSES = 30522, 10
TEMPERATURE, ALPHA = 4.0, 0.9


def bert(layers: int, **changes: Any) -> nn.Module:
    size = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    shape = {"vocab_size": WORDS, "num_labels": CLASSES, "max_position_embeddings": 512}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **{**size, **shape, **changes}))


def tokens(length: int, size: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, WORDS, (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(CLASSES, (size,))}


def resnet(name: str) -> nn.Module:
    return timm.create_model(f"cifar_{name}", num_classes=CLASSES)


def pictures(size: int) -> kd_plugins.Batch:
    return kd_plugins.Batch.of(torch.randn(size, 3, 32, 32), torch.randint(CLASSES, (size,)))


def named(batch: kd_plugins.Batch) -> dict[str, Any]:
    return {str(batch.name): batch.inputs, **batch.kwargs}


def logits(model: nn.Module, batch: kd_plugins.Batch) -> Tensor:
    scores: Tensor = model(batch.inputs) if batch.name is None else model(**named(batch)).logits
    return scores


def soft(student: Tensor, teacher: Tensor) -> Tensor:
    """The soft labels as anybody writes them."""
    ours, theirs = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4, fused=True)


def by_hand(student: nn.Module, batch: kd_plugins.Batch, teacher: nn.Module | None, *, kd: bool = False) -> Step:
    """A step of a loop of one's own: the student's; with a teacher the floor; with `kd` soft labels."""
    steps = optimizer(student)
    student.train()

    def step() -> None:
        scores = logits(student, batch)
        loss = F.cross_entropy(scores, batch.labels)
        if teacher is not None:
            with torch.no_grad():
                target = logits(teacher, batch)
            loss = (1 - ALPHA) * loss + ALPHA * soft(scores, target) if kd else loss
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    return step


def bare(
    name: str,
    options: Mapping[str, Any],
    student: nn.Module,
    teacher: nn.Module,
    batch: kd_plugins.Batch,
    *,
    phase: int = 0,
) -> Step:
    """A step of the bare loop, in a phase of the method."""
    distiller = kd_plugins.create_distiller(name, **options)
    # What quest makes its words of.
    data = [batch] if name != "quest" else [pictures(64) for _ in range(2)]
    nets = kd_plugins.bind(distiller, student, teacher, batch=batch, batches=data, total_steps=10**6)
    groups = kd_plugins.make_optimizers(distiller, optimizer(student), nets)
    groups.max_grad_norm = 1.0
    if phase and distiller.progress.table is not None:
        distiller.progress.at(distiller.progress.table.bounds(phase)[0])
        groups.enter_stage()
    student.train()

    def step() -> None:
        for turn in distiller.turns(nets, batch):
            kd_plugins.play(turn, groups)

    return step


def accelerated(student: nn.Module, teacher: nn.Module, batch: kd_plugins.Batch) -> Step:
    """A step of `TurnPlayer` under Accelerate."""
    accelerator = Accelerator(cpu=True)
    distiller = kd_plugins.create_distiller("kd")
    nets = kd_plugins.bind(distiller, student, teacher, batch=batch, total_steps=10**6)
    model, steps = accelerator.prepare(student, optimizer(student))
    nets.student.forward = model
    player = TurnPlayer(accelerator, distiller, nets, steps, max_grad_norm=1.0)
    student.train()
    return lambda: player.step(batch)


def task(made: Any, student: nn.Module, batch: kd_plugins.Batch) -> Step:
    """A step of timm's `train.py` with one of its tasks."""
    steps = torch.optim.AdamW(made.trainable_module.parameters(), 1e-4, fused=True)
    made.train()

    def step() -> None:
        made(batch.inputs, batch.labels)["loss"].backward()
        nn.utils.clip_grad_norm_(made.trainable_module.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    return step


class Paced(TrainerCallback):
    """Lets a `Trainer` that runs in a thread of its own go on for one step at a time."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done.release()
        self.go.acquire()

    def of(self, trainer: Trainer) -> Step:
        threading.Thread(target=trainer.train, daemon=True).start()
        self.done.acquire()

        def step() -> None:
            self.go.release()
            self.done.acquire()

        return step


class HandTrainer(Trainer):
    """Soft labels in a `Trainer`, as tutorials have them."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        loss = (1 - ALPHA) * outputs.loss + ALPHA * soft(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def trainers(student: Callable[[], nn.Module], teacher: nn.Module, length: int, size: int) -> dict[str, Step]:
    """A step of each `Trainer`, its data loading and callbacks included."""
    rows = tokens(length, 64 * size)
    data = [{name: values[i] for name, values in rows.items()} for i in range(64 * size)]
    made: dict[str, Callable[..., Trainer]] = {
        "Trainer, student alone": Trainer,
        "Trainer, soft labels by hand": partial(HandTrainer, teacher=teacher),
        "DistillationTrainer": partial(DistillationTrainer, teacher_model=teacher, distiller="kd", record=False),
    }
    steps = {}
    for name, trainer in made.items():
        arguments = TrainingArguments(
            tempfile.mkdtemp(), max_steps=10**5, per_device_train_batch_size=size, use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            optim="adamw_torch_fused",
        )  # fmt: skip
        pace = Paced()
        steps[name] = pace.of(trainer(student(), args=arguments, train_dataset=data, callbacks=[pace]))
    return steps


def images(args: argparse.Namespace) -> dict[str, dict[str, Step]]:
    jobs = {}
    layers = {"layers": (0, 1, 2, 3)}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "kd": ("kd", {}),
        "nst, last layer": ("nst", {}),
        "nst, four layers": ("nst", layers),
        "fitnet, last layer": ("fitnet", {}),
        "dfa, last": ("dfa", {"aggregation": "last"}),
        "dfa, uniform": ("dfa", {"aggregation": "uniform"}),
        "quest, 256 words": ("quest", {"words": 256}),
        "quest, 4,096 words": ("quest", {"words": 4096}),
    }
    for big in ("resnet56", "resnet20"):
        teacher, batch = resnet(big).eval().requires_grad_(False), pictures(args.batch)
        cases = {
            "student alone": by_hand(resnet("resnet8"), batch, None),
            "floor": by_hand(resnet("resnet8"), batch, teacher),
            "soft labels by hand": by_hand(resnet("resnet8"), batch, teacher, kd=True),
        }
        for title, (name, options) in methods.items():
            cases[title] = bare(name, options, resnet("resnet8"), teacher, batch)
        jobs[f"{big} to resnet8, 32 x 32, batch {args.batch}"] = cases
    return jobs


def text(args: argparse.Namespace) -> dict[str, dict[str, Step]]:
    jobs = {}
    for length in (64, 256, 512):
        size = max(2, args.batch * 16 // length)
        teacher, inputs = bert(4).eval().requires_grad_(False), tokens(length, size)
        batch = kd_plugins.Batch.of(inputs, inputs.pop("labels"))
        cases = {
            "student alone": by_hand(bert(2), batch, None),
            "floor": by_hand(bert(2), batch, teacher),
            "soft labels by hand": by_hand(bert(2), batch, teacher, kd=True),
            "kd": bare("kd", {}, bert(2), teacher, batch),
            "internal, all layers": bare("internal", {"schedule": "all"}, bert(2), teacher, batch),
            "internal, progressive, layer 1 of 2": bare(
                "internal", {"schedule": "progressive"}, bert(2), teacher, batch
            ),
        }
        jobs[f"BERT of 4 to 2 layers, length {length}, batch {size}"] = cases
    return jobs


def hosts(args: argparse.Namespace) -> dict[str, dict[str, Step]]:
    from timm.task import LogitDistillationTask

    teacher, batch = resnet("resnet56").eval().requires_grad_(False), pictures(args.batch)
    given = {"criterion": nn.CrossEntropyLoss(), "device": torch.device("cpu"), "verbose": False}
    theirs, ours = resnet("resnet8"), resnet("resnet8")
    timms = LogitDistillationTask(theirs, teacher, distill_loss_weight=ALPHA, temperature=TEMPERATURE, **given)
    found = {
        "floor": by_hand(resnet("resnet8"), batch, teacher),
        "soft labels by hand": by_hand(resnet("resnet8"), batch, teacher, kd=True),
        "bare loop": bare("kd", {}, resnet("resnet8"), teacher, batch),
        "Accelerate": accelerated(resnet("resnet8"), teacher, batch),
        "timm's LogitDistillationTask": task(timms, theirs, batch),
        "DistillationTask": task(DistillationTask(ours, "kd", teacher, sample=batch.inputs, **given), ours, batch),
    }
    length, size = 64, max(2, args.batch // 4)
    teacher, inputs = bert(4).eval().requires_grad_(False), tokens(64, size)
    sequences = kd_plugins.Batch.of(inputs, inputs.pop("labels"))
    floor = {"floor": by_hand(bert(2), sequences, teacher)}
    return {
        f"kd in every host, resnet56 to resnet8, batch {args.batch}": found,
        f"kd in Trainer, BERT of 4 to 2 layers, length 64, batch {size}": floor
        | trainers(lambda: bert(2), teacher, length, size),
    }


def peers(args: argparse.Namespace) -> dict[str, dict[str, Step]]:
    size = max(2, args.batch // 4)
    teacher, inputs = bert(4).eval().requires_grad_(False), tokens(64, size)
    batch = kd_plugins.Batch.of(inputs, inputs.pop("labels"))
    cases = {"floor": by_hand(bert(2), batch, teacher), "kd": bare("kd", {}, bert(2), teacher, batch)}
    try:
        cases["textbrewer, kd"] = textbrewer(bert(2), teacher, batch)
    except ImportError as error:
        print(f"textbrewer is left out: {error}.")
    jobs = {f"beside TextBrewer, BERT of 4 to 2 layers, length 64, batch {size}": cases}
    teacher, images = resnet("resnet56").eval().requires_grad_(False), pictures(args.batch)
    cases = {
        "floor": by_hand(resnet("resnet8"), images, teacher),
        "kd": bare("kd", {}, resnet("resnet8"), teacher, images),
        "fitnet": bare("fitnet", {}, resnet("resnet8"), teacher, images),
    }
    try:
        cases["torchdistill, kd"] = torchdistill(resnet("resnet8"), teacher, images)
    except ImportError as error:
        print(f"torchdistill is left out: {error}.")
    return jobs | {f"beside torchdistill, resnet56 to resnet8, batch {args.batch}": cases}


def textbrewer(student: nn.Module, teacher: nn.Module, batch: kd_plugins.Batch) -> Step:
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits, "losses": outputs.loss}

    data = {**named(batch), "labels": batch.labels}
    config = DistillationConfig(temperature=TEMPERATURE, hard_label_weight=1 - ALPHA, kd_loss_weight=ALPHA)
    folder = tempfile.mkdtemp()
    train = TrainingConfig(device=torch.device("cpu"), log_dir=folder, output_dir=folder)
    distiller = GeneralDistiller(train, config, teacher, student, adaptor, adaptor)
    steps = optimizer(student)
    student.train()

    def step() -> None:
        distiller.train_on_batch(data, {})[0].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    return step


def torchdistill(student: nn.Module, teacher: nn.Module, batch: kd_plugins.Batch) -> Step:
    from torchdistill.core.distillation import get_distillation_box

    whole = {"requires_grad": False, "forward_proc": "forward_batch_only", "sequential": []}
    kwargs = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": "."}
    kwargs |= {"teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean"}
    config = {
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
            "kwargs": {"batch_size": batch.size},
        },
        "num_epochs": 1,
        "teacher": whole,
        "student": {**whole, "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-4, "fused": True}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {
            "criterion": {"key": "KDLoss", "kwargs": kwargs}, "weight": 1.0,
        }}}},
    }  # fmt: skip
    data = {"train": torch.utils.data.TensorDataset(batch.inputs, batch.labels)}
    box = get_distillation_box(teacher, student, data, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process()
    return lambda: box.post_forward_process(box.forward_process(batch.inputs, batch.labels))


JOBS = {"images": images, "text": text, "hosts": hosts, "peers": peers}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median, by bootstrap."""
    if len(set(values)) == 1:
        return values[0], values[0]
    found = scipy.stats.bootstrap((np.asarray(values),), np.median, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images in a batch; of texts as many as fit the time")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; every case runs once in each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", choices=JOBS, nargs="*", default=list(JOBS), help="jobs")
    parser.add_argument("--output", default="benchmarks/results/speed.json", help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(), "jobs": {}}
    for name in args.only:
        for title, cases in JOBS[name](args).items():
            seconds = compare(cases, repeats=args.repeats)
            rows = {}
            for case, values in seconds.items():
                paired = [a / b for a, b in zip(values, seconds["floor"], strict=True)]
                ms = statistics.median(values) * 1e3
                rows[case] = {"ms": ms, "x_floor": statistics.median(paired), "interval": interval(paired)}
            shown = [
                [case, row["ms"], f"{row['x_floor']:.3f}", "{:.3f} to {:.3f}".format(*row["interval"])]
                for case, row in rows.items()
            ]
            print_table(title, ["step", "CPU ms (median)", "x floor", "95 %"], shown)
            results["jobs"][title] = rows
            write(args.output, results)
    return 0
