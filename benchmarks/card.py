"""Trains networks of CIFAR size side by side on one card: the images lie on it, and a step is one CUDA graph.

A loader that decodes images and a loop that launches kernels cost more than a network of this size does. Here the
order, crops and flips of an epoch are drawn on the card, a step (crop, both networks, the method's loss, backward,
SGD) is captured once and replayed, and several trainings replay on streams of their own. The distiller is bound as in
any bare loop. What is captured holds the learning rate and how far the training is, so it is captured anew where a
rate or a stage begins, and in each of the first `--warm-epochs` epochs of a method whose terms grow. Without a card
the same steps run on the CPU.

Images are padded by 4, cropped and flipped; SGD has a momentum of 0.9, and not Nesterov's; the last, smaller batch of
an epoch is left out. `python -m benchmarks quality LIST` runs it for lists with `on_card: true`, which have no other
commands.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from datasets import Image, load_dataset
from safetensors.torch import load_file, save_file
from timm.utils import ParseKwargs
from torch import Tensor, nn

import kd_timm.models  # noqa: F401 (registers the networks)
from kd_plugins import Batch, bind, create_distiller
from kd_plugins.catalog.registry import options_from_strings
from kd_plugins.finite import check_weights
from kd_plugins.run import Run

PAD = 4


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of one training; those of kd-timm-train where they mean the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks card", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet: images and `label`")
    parser.add_argument("--rows", type=int, help="train on the first N images alone")
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as shortcut=B")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--teacher", help="without --distill it is only compared with")
    parser.add_argument("--teacher-checkpoint", type=Path)
    parser.add_argument("--distill")
    parser.add_argument("--distill-args", nargs="*", default=[])
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--decay-milestones", type=int, nargs="*", default=[150, 180, 210])
    parser.add_argument("--decay-rate", type=float, default=0.1)
    parser.add_argument("--warm-epochs", type=int, default=0, help="capture anew in each of the first N epochs")
    parser.add_argument("--eager", action="store_true", help="capture nothing, for a method that waits for the card")
    parser.add_argument("--log-epochs", type=int, default=20, help="epochs between two lines of the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


@cache
def read(folder: str, split: str, rows: int | None, device: str, pad: int) -> tuple[Tensor, Tensor]:
    """A split on the card: images `[N, C, H + 2 pad, W + 2 pad]`, bytes with a black margin, and labels `[N]`."""
    data = load_dataset("parquet", data_files={split: f"{folder}/{split}.parquet"}, split=split)
    data = data if rows is None else data.take(rows)
    column = next(name for name, feature in data.features.items() if isinstance(feature, Image))
    # [:] reads a column at once; without it each row is read, and decoded, for itself.
    images = torch.from_numpy(np.stack([np.atleast_3d(image) for image in data[column][:]])).permute(0, 3, 1, 2)
    found = F.pad(images, [pad] * 4).to(device), torch.tensor(data["label"][:], device=device)
    if found[0].is_cuda:
        torch.cuda.synchronize()  # Other trainings read them on other streams.
    return found


def network(name: str, args: argparse.Namespace, weights: Path | None = None) -> nn.Module:
    """A network as timm makes it, in the layout that cards convolve fastest."""
    model = timm.create_model(name, num_classes=args.num_classes, **args.model_kwargs)
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.to(args.device, memory_format=torch.channels_last)


def save(model: nn.Module, path: Path) -> None:
    """A network's weights, as `network` loads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


class Epoch:
    """The batches of an epoch, cut on the card: a captured step reads buffers that are filled anew for each epoch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.images, self.labels = read(args.data, "train", args.rows, args.device, PAD)
        self.size, count = args.batch_size, len(self.labels)
        self.steps = count // self.size
        if not self.steps:
            raise SystemExit(f"Expected at least one batch of {self.size} images, got {count} images in all: -b N.")
        self.random = torch.Generator(args.device).manual_seed(args.seed)
        self.order, self.at = (torch.zeros(n, dtype=torch.long, device=args.device) for n in (count, 1))
        self.place = torch.zeros(count, 2, dtype=torch.long, device=args.device)
        self.flipped = torch.zeros(count, 1, dtype=torch.long, device=args.device)
        self.side = torch.arange(self.images.shape[-1] - 2 * PAD, device=args.device)

    def begin(self) -> None:
        """Draws the order of the images, and of each the place of its crop and whether it is flipped."""
        torch.randperm(len(self.order), generator=self.random, out=self.order)
        self.place.random_(0, 2 * PAD + 1, generator=self.random)
        self.flipped.random_(0, 2, generator=self.random)
        self.at.zero_()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next images `[B, C, H, W]`, bytes, their labels `[B]` and their rows `[B]`."""
        here = self.at + torch.arange(self.size, device=self.at.device)
        self.at += self.size
        chosen, place = self.order[here], self.place[here]
        columns = self.side + self.flipped[here] * (self.side.flip(0) - self.side)
        rows, columns = place[:, :1] + self.side, place[:, 1:] + columns
        images = self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2), self.labels[chosen], chosen


def half(like: Tensor) -> AbstractContextManager[Any]:
    """Forwards in bfloat16 on a card."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=like.is_cuda)


class CardRun(Run):
    """A bare loop's run with such forwards."""

    def autocast(self) -> AbstractContextManager[Any]:
        return half(self.student[0])


class Training:
    """One training; `steps()` yields after each step, so that a loop can go around several of them."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.args = args = parse(argv)
        self.cuda = torch.device(args.device).type == "cuda"
        self.stream = torch.cuda.Stream() if self.cuda else None

    @property
    def ready(self) -> bool:
        """Whether the weights of the teacher are there that it is to learn from."""
        return not self.args.distill or self.args.teacher_checkpoint is None or self.args.teacher_checkpoint.is_file()

    def steps(self) -> Iterator[None]:
        """Trains, evaluates, and writes `last.safetensors` and `results.json`."""
        args, start, found = self.args, time.perf_counter(), {}
        torch.manual_seed(args.seed)
        self.student, self.epoch = network(args.model, args), Epoch(args)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay
        )
        self.run = self.bound() if args.distill else None
        starts = self.run.distiller.progress.table.starts if self.run is not None else [0]
        self.anew = [*args.decay_milestones, *(start // self.epoch.steps for start in starts)]
        for number in range(args.epochs):
            self.student.train()
            self.epoch.begin()
            left = self.epoch.steps
            if number in (*self.anew, *range(args.warm_epochs)):
                decays = sum(number >= milestone for milestone in args.decay_milestones)
                self.optimizer.param_groups[0]["lr"] = args.lr * args.decay_rate**decays
                if self.run is not None:
                    self.run.distiller.progress.at(number * left)
                # The first steps of a stage make what stays: the momentum, and what the libraries keep.
                for _ in range(min(3, left - 1)):
                    self.step()
                    left -= 1
                    yield
                again = self.captured() if self.cuda and not args.eager else self.step
            for _ in range(left):
                again()
                yield
            if (number + 1) % args.log_epochs == 0 or number + 1 == args.epochs:
                found, took = self.evaluate(), time.perf_counter() - start
                says = " ".join(f"{k} {v:.2f}" for k, v in found.items())
                print(f"{args.output} epoch {number + 1} loss {self.loss:.3f} {says} {took:.0f} s", flush=True)
        check_weights({"The network": self.student}, "lower the learning rate.")
        save(self.student, args.output / "last.safetensors")
        (args.output / "seconds.txt").write_text(f"{took:.1f}\n")
        (args.output / "results.json").write_text(json.dumps({"evaluation": found, "args": vars(args)}, default=str))

    def bound(self) -> Run:
        """The method, bound as in any bare loop."""
        args = self.args
        distiller = create_distiller(args.distill, **options_from_strings(args.distill, args.distill_args))
        teacher = network(args.teacher, args, args.teacher_checkpoint)
        each = self.epoch.steps
        nets = bind(
            distiller, self.student, teacher, batch=self.batch(), total_steps=args.epochs * each, epoch_steps=each
        )
        run = CardRun(distiller, self.optimizer, nets)
        run.watch.stops = False  # It waits for the card in every tenth step; the weights are looked at in the end.
        return run

    def batch(self) -> Batch:
        """The next images, normalised, and their labels."""
        images, labels, rows = self.epoch.batch()
        mean, std = (channels(self.student, name, images.shape[1]) for name in ("mean", "std"))
        known = dict(mean=mean, std=std, index=rows, rows=len(self.epoch.labels))
        return Batch.of(normalised(images, self.student), labels, **known)

    def step(self) -> None:
        """One step; leaves its loss in `loss`."""
        batch = self.batch()
        if self.run is not None:
            self.loss = self.run.step(batch)
            return
        with half(batch.inputs):
            scores = self.student(batch.inputs)
        loss = F.cross_entropy(scores.float(), batch.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()

    def captured(self) -> Callable[[], None]:
        """One step as a graph: what repeats it, with all that is fixed in it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        if self.run is not None:
            self.run.logs()
        return graph.replay

    def evaluate(self) -> dict[str, float]:
        """Of the test split, in hundredths: what is right, and what the teacher says too."""
        images, labels = read(self.args.data, "test", None, self.args.device, 0)
        chosen = choices(self.student, images)
        found = {"top1": 100 * (chosen == labels).double().mean().item()}
        weights = self.args.teacher_checkpoint
        if weights is not None and weights.is_file():
            teacher = network(self.args.teacher, self.args, weights)
            found["agreement"] = 100 * (chosen == choices(teacher, images)).double().mean().item()
        return found


def normalised(images: Tensor, model: nn.Module) -> Tensor:
    """Bytes as a network takes them."""
    mean, std = (constant(channels(model, name, images.shape[1]), images.device) for name in ("mean", "std"))
    return (images / 255 - mean) / std


def channels(model: nn.Module, name: str, count: int) -> tuple[float, ...]:
    """A network's `mean` or `std`: of grey images, as timm has it, the mean of that of the colours."""
    values = tuple(model.pretrained_cfg[name])
    return values if len(values) == count else (sum(values) / len(values),) * count


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of the channels on the card: a step that is captured copies nothing from the host."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@torch.no_grad()
def choices(model: nn.Module, images: Tensor) -> Tensor:
    """The class that a network chooses for each of the images `[N, 3, H, W]`: `[N]`."""
    model.eval()
    with half(images):
        return torch.cat([model(normalised(part, model)).argmax(1) for part in images.split(1000)])


def train_all(commands: Sequence[Sequence[str]], at_once: int) -> None:
    """Runs trainings, given by their flags, so many at once; one that learns from another waits for its weights."""
    torch.backends.cudnn.benchmark = True
    waiting = [Training(command) for command in commands]
    running: dict[Training, Iterator[None]] = {}
    while waiting or running:
        for training in [training for training in waiting if training.ready][: at_once - len(running)]:
            waiting.remove(training)
            running[training] = training.steps()
        if not running:
            missing = {str(training.args.teacher_checkpoint) for training in waiting}
            raise SystemExit(f"Expected the teachers' weights, found none at {', '.join(sorted(missing))}.")
        ended: list[Training] = []
        while not ended:
            for training, steps in running.items():
                try:
                    with torch.cuda.stream(training.stream):
                        next(steps)
                except StopIteration:
                    ended.append(training)
                except Exception:
                    # The others have nothing to do with it.
                    print(f"FAILED {training.args.output}\n{traceback.format_exc()}", flush=True)
                    ended.append(training)
        for training in ended:
            del running[training]


def main(argv: list[str]) -> int:
    train_all([argv], 1)
    return 0
