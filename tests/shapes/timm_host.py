"""The host kd-timm-train: its whole session, on tiny networks that timm is told of and images in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from accelerate_kit import fresh_accelerate
from PIL import Image
from safetensors.torch import save_file
from shapes.base import LR, MOMENTUM, Host, Job
from shapes.nets import CLASSES, EPOCH, MEAN, SEED, SIZE, STD, Images, TinyNet
from timm.models import register_model
from torch.utils.data import RandomSampler
from torch.utils.data.distributed import DistributedSampler

from kd_timm.arguments import parse_args
from kd_timm.data import Datasets
from kd_timm.rows import Rows
from kd_timm.train import Session


class TinyTimmNet(TinyNet):
    """The same network as timm knows models."""

    num_classes = CLASSES
    num_features = 4
    pretrained_cfg = {
        "architecture": "tiny_shapes",
        "num_classes": CLASSES,
        "input_size": (3, SIZE, SIZE),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
    }


class Pictures:
    """The images as a data set of timm gives them."""

    def __init__(self) -> None:
        self.data, self.transform = Images(), None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        picture: Any = Image.fromarray(self.data.pixels[row].permute(1, 2, 0).numpy())
        return picture if self.transform is None else self.transform(picture), int(self.data.labels[row])


def _in_order(self: RandomSampler) -> Iterator[int]:
    """The order of every host: training rows as they are, rows of a stream as `kd_accelerate.Streams` shuffles them."""
    source: Any = self.data_source
    if not isinstance(source, Rows):
        return iter(range(len(source)))
    turn = source.__dict__["turn"] = source.__dict__.get("turn", -1) + 1
    return iter(torch.randperm(len(source), generator=torch.Generator().manual_seed(SEED + 1 + turn)).tolist())


def _shards(micro: int) -> Callable[[DistributedSampler], Iterator[int]]:
    """The same for several processes: consecutive pieces of the global batch."""

    def shard(self: DistributedSampler) -> Iterator[int]:
        order = list(_in_order(mock.Mock(data_source=self.dataset)))
        whole = micro * self.num_replicas
        return iter([row for i, row in enumerate(order) if i % whole // micro == self.rank])

    return shard


class TimmTrained(Host):
    """kd-timm-train, stopped by an interrupt after an epoch and resumed by `--resume`."""

    kind = TinyTimmNet
    epochs = True

    def __init__(self, job: Job, folder: Path, shift: float = 0.0) -> None:
        super().__init__(job, folder, shift)
        fresh_accelerate()
        flags = [
            *f"--model tiny_shapes_student --lr {LR} --opt momentum --momentum {MOMENTUM}".split(),
            *("--sched poly --sched-on-updates --decay-rate 1 --min-lr 0" if job.decay else "--sched none").split(),
            *"--weight-decay 0 --warmup-epochs 0".split(),
            *f"--epochs {-(-job.steps // EPOCH)} -b {job.micro} --grad-accum-steps {job.accumulation}".split(),
            *f"--workers 0 --device cpu --seed {SEED} --output {folder} --experiment run".split(),
            *f"--distill shapes.distillers:{type(self.distiller).__name__} --dataset shapes".split(),
            *["--val-split", ""],
        ]
        flags += ["--smoothing", "0", "--no-aug"] if self.distiller.data else ["--epoch-updates", str(EPOCH)]
        arguments = {**job.options, **({} if self.distiller.data else {"rows": job.micro})}
        if arguments:
            flags += ["--distill-args", *(f"{k}={v}" for k, v in arguments.items())]
        if job.precision == "bf16":
            flags += ["--amp", "--amp-dtype", "bfloat16"]
        if job.clip is not None:
            flags += ["--clip-grad", str(job.clip)]
        if shift:
            flags += ["--resume", str(folder / "run")]
        made = {"tiny_shapes_student": self.student} | {f"tiny_shapes_peer{i}": p for i, p in enumerate(self.peers)}
        for i, teacher in enumerate(self.teachers):
            checkpoint = folder / f"teacher{i}.safetensors"
            save_file(teacher.state_dict(), checkpoint)
            made[f"tiny_shapes_teacher{i}"] = teacher
            flags += ["--teacher", f"tiny_shapes_teacher{i}", "--teacher-checkpoint", str(checkpoint)]
        for i in range(len(self.peers)):
            flags += ["--peer", f"tiny_shapes_peer{i}"]
        _models(made)
        with self._patched():
            self.session = Session(parse_args(flags))
        assert self.session.distillation is not None
        self.distiller = self.session.distillation.distiller

    @contextmanager
    def _patched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target, replacement in (
                (
                    "kd_timm.data.create_datasets",
                    lambda _args, _chans, free: Datasets(None if free else Pictures(), None, None),
                ),
                ("torch.utils.data.RandomSampler.__iter__", _in_order),
                ("torch.utils.data.distributed.DistributedSampler.__iter__", _shards(self.job.micro)),
            ):
                stack.enter_context(mock.patch(target, replacement))
            yield

    def train(self, until: int) -> None:
        step, progress = self.session.step, self.distiller.progress

        class Until:
            """Plays until an update, then interrupts as a user would."""

            def __call__(self, *args: Any) -> Any:
                if progress.step >= until:
                    raise KeyboardInterrupt
                return step(*args)

            def __getattr__(self, name: str) -> Any:
                return getattr(step, name)

        self.session.step = Until()
        with self._patched():
            self.session.fit()
        assert progress.step == until

    def save(self) -> None:
        assert (self.folder / "run").is_dir()

    def load(self) -> None:
        """Session has taken up the checkpoint."""


_CURRENT: dict[str, TinyNet] = {}


def _models(models: dict[str, TinyNet]) -> None:
    """Lets timm's registry give these networks by name."""
    _CURRENT.update(models)
    for name in models:
        if not timm.is_model(name):

            def make(pretrained: bool = False, name: str = name, **kwargs: Any) -> TinyNet:
                return _CURRENT[name]

            make.__name__ = name
            register_model(make)
