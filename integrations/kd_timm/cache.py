"""--cache-teacher: what the teachers say of each view of each training image, asked once and replayed."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, cycle, islice
from pathlib import Path
from tarfile import TarInfo
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from rich.progress import track
from safetensors.torch import load_file, save_file
from timm.models import parse_model_name
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from kd_accelerate import cached
from kd_plugins import Batch, Distiller, DistillError, Net, Reads
from kd_plugins import functional as KF
from kd_plugins.binding import needs_of_stages, needs_pass
from kd_plugins.errors import told
from kd_plugins.reading.network import Network
from kd_plugins.reading.view import TopK, View
from kd_plugins.states import read_json, replacing, write_json
from kd_timm.batches import batches
from kd_timm.build import check_model_name, place
from kd_timm.data import DATASET_ARGUMENTS, LOADER_ARGUMENTS, Datasets, plain_loader
from kd_timm.engine import TrainingRun
from kd_timm.rows import Replayed, Targets, Transformed
from kd_timm.teachers import Teacher, named_teachers, published

# Rows of a file; fewer where it holds layers.
_BLOCK, _SMALL_BLOCK = 4096, 256
_LOOKED_AT = 16

Question = tuple[int, int, int]
"""A view, and its rows from and to."""


class AbsentNetwork(Network):
    """A teacher that is not loaded, since what it says is in the cache; refuses whatever that does not hold.

    Args:
        kept: The layers that the cache holds.
    """

    def __init__(self, kept: Sequence[str | int]) -> None:
        super().__init__(nn.Module())
        self.kept = kept

    def read(self, *args: Any, **options: Any) -> Any:
        raise DistillError(
            "--cache-teacher holds the teacher's scores of the images as they are and the layers that are named, and"
            " this method asks for more (other images or layers, attention, dropout): leave --cache-teacher out."
        )

    layers = stages = classifier = read

    def install(self, reads: Reads) -> None:
        if reads.hidden or reads.attentions or not set(reads.features) <= set(self.kept):
            self.read()


class Answers:
    """The files of a cache: of each view, blocks of rows with what the teachers say, mapped into memory.

    Args:
        folder: Where they lie.
        rows: Rows of the training set.
        names: What is in them.
        block: Rows in a file.
    """

    def __init__(self, folder: Path, rows: int, names: Sequence[str], block: int) -> None:
        self.folder, self.rows, self.names, self.block = folder, rows, names, block
        self._view, self._open = -1, dict[int, list[Tensor]]()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_view": -1, "_open": {}}  # A worker maps the files itself.

    def __call__(self, view: int, row: int) -> tuple[Tensor, ...]:
        """What there is of one row, in the order of the names."""
        if view != self._view:
            self._view, self._open = view, {}
        start = row - row % self.block
        if start not in self._open:
            kept = load_file(self.file((view, start, 0)))
            self._open[start] = [kept[name] for name in self.names]
        return tuple(tensor[row - start] for tensor in self._open[start])

    def questions(self, views: int) -> list[Question]:
        """All blocks of so many views."""
        starts = range(0, self.rows, self.block)
        return [(view, start, min(start + self.block, self.rows)) for view in range(views) for start in starts]

    def file(self, question: Question) -> Path:
        """Where the answers lie."""
        return self.folder / f"view-{question[0]}-{question[1]}.safetensors"


class TeacherCache:
    """What the teachers of a run say, in a folder under all that it depends on.

    Args:
        args: Parsed arguments.
        config: The student's data configuration.
        data: The training set, and its class names, where they are known.
        distiller: The method.
    """

    def __init__(
        self, args: argparse.Namespace, config: Mapping[str, Any], data: Datasets, distiller: Distiller
    ) -> None:
        dataset = data.train
        self.args, self.config = args, config
        self.layers = _layers(distiller, len(args.teacher))
        if dataset is None or isinstance(dataset, IterableDataset):
            raise DistillError(
                "--cache-teacher needs training rows by number, which data that are streamed or made do not have."
            )
        self.facts = {
            "data": _digest([_named(args, "dataset", "train_split", "epoch_repeats"), _rows_id(dataset)]),
            "teachers": _teachers_id(args),
            "augmentation": _digest({k: getattr(args, k) for k in (*LOADER_ARGUMENTS.values(), "no_prefetcher")}),
            "images": _digest([dict(config), args.train_interpolation, args.input_img_mode]),
            "classes": _digest([args.num_classes, data.classes]),
            "precision": f"{args.device} {args.amp_dtype if args.amp else 'float32'}",
        }
        self.top, self.temperature = args.cache_top_k, 1.0
        if self.top and self.top < args.num_classes:
            self.temperature = cached.temperature_read(distiller, len(args.teacher), "--cache-top-k")
            self.facts["top k"] = f"{self.top} at temperature {self.temperature:g}"
        if any(self.layers):
            self.facts["layers"] = json.dumps(self.layers)
        self.folder = Path(args.cache_teacher) / _digest(self.facts)[:16]
        self.scores = ["logits", "classes"] if "top k" in self.facts else ["logits"]
        maps = [f"{i}:{layer}" for i, layers in enumerate(self.layers) for layer in layers]
        block = _SMALL_BLOCK if maps else _BLOCK
        self.answers = Answers(self.folder, len(dataset), [*self.scores, *maps], block)
        self.known = self.folder / "teachers.json"

    def teachers(self, make: Callable[[], list[Teacher]]) -> list[Teacher]:
        """The teachers; where the cache knows them, without their networks."""
        self.make = make
        if not self.known.is_file():
            return make()
        known = zip(self.absent(), read_json(self.known), strict=True)
        return [Teacher(network=network, **about) for network, about in known]

    def absent(self) -> list[Network]:
        """What stands for the teachers."""
        return [AbsentNetwork(layers) for layers in self.layers]

    def fill(self, run: TrainingRun, teachers: Sequence[Teacher], epochs: int) -> None:
        """Asks the teachers what they have not been asked, and puts the answers beside the training images.

        Args:
            run: The run, with its loaders.
            teachers: The teachers, whose networks are not kept.
            epochs: Of the training.
        """
        replayed, accelerator = run.data.replayed, run.accelerator
        assert replayed is not None
        self.run, self.replayed = run, replayed
        replayed.views = self.args.cache_views or epochs
        kept = self.folder / f"evaluation-{_evaluation_id(run)}.safetensors"
        questions = self.answers.questions(replayed.views)[accelerator.process_index :: accelerator.num_processes]
        if accelerator.is_main_process:
            with told("--cache-teacher: the folder cannot be made", OSError, remedy="name one that can be written"):
                self.folder.mkdir(parents=True, exist_ok=True)
            cached.note_facts(self.folder / "facts.json", self.facts, self.folder.parent.glob("*/facts.json"))
            self._look()
        accelerator.wait_for_everyone()
        missing, evaluated = [q for q in questions if not cached.whole(self.answers.file(q))], cached.whole(kept)
        if missing or not evaluated:
            if any(isinstance(t.network, AbsentNetwork) for t in teachers):
                teachers = self.make()
                for teacher in teachers:
                    place(teacher.module, self.args, accelerator.device)
            self._ask(teachers, missing)
            if not evaluated:
                _save(kept, {"scores": self._ask_evaluation(teachers)})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not self.known.is_file():
            about = [{"name": t.name, "order": t.order, "misfit": t.misfit} for t in teachers]
            write_json(self.known, about, shared=True)
        accelerator.wait_for_everyone()
        self.told = load_file(kept)["scores"]
        replayed.answers = self.answers
        # Of any block: a process need not have one of its own.
        view, start, end = self.answers.questions(1)[0]
        size = self.answers.file((view, start, end)).stat().st_size / (end - start)
        run.reporter.line(f"{self.folder} holds {replayed.views} views of each image, {size:.0f} bytes each.")

    def first_batch(self) -> tuple[Tensor, Targets]:
        """The first rows in their first view, with what the teachers say of them."""
        size = min(self.args.batch_size, self.answers.rows, self.answers.block)
        inputs, labels = next(self._read([(0, 0, size)]))
        told = zip(*(self.answers(0, row) for row in range(size)), strict=True)
        return inputs, Targets(labels, torch.arange(size), tuple(map(torch.stack, told))).to(inputs.device)

    def as_told(self, batch: Batch, nets: Sequence[Net]) -> Batch:
        """A batch with what the cache will say of it, for a method that is tried before."""
        pairs = zip(nets, self.layers, strict=True)
        views = [net(batch, reads=Reads(features=layers)) for net, layers in pairs]
        logits, features = tuple(v.logits for v in views), tuple(v.features for v in views)
        return dataclasses.replace(batch, teacher_logits=logits, teacher_features=features)

    def told_by(self, told: tuple[Tensor, ...]) -> dict[str, Any]:
        """What each teacher says of a batch, as the batch has it."""
        scores, maps = told[: len(self.scores)], iter(told[len(self.scores) :])
        logits: Any = scores[0].unbind(1)
        if len(scores) == 2:
            pairs = zip(logits, scores[1].unbind(1), strict=True)
            logits = tuple(TopK(s, c.long(), self.temperature) for s, c in pairs)
        if self.args.channels_last:
            maps = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in maps)
        return {
            "teacher_logits": logits,
            "teacher_features": tuple({layer: next(maps) for layer in layers} for layers in self.layers),
        }

    def asked(self) -> list[Callable[[Tensor], Tensor]]:
        """What the teachers of the student's classes say of the evaluation images, in the order of the loaders."""
        return [_replay(scores) for scores in self.told.unbind(1)]

    def _look(self) -> None:
        """Compares some images with those that the teachers were asked about."""
        rows = sorted({i * self.answers.rows // _LOOKED_AT for i in range(_LOOKED_AT)})
        digest = hashlib.sha256()
        for row in rows:
            image, label = self.replayed.item(row, 0)
            digest.update(np.ascontiguousarray(image).tobytes() + str(label).encode())
        seen, file = {"images": digest.hexdigest()}, self.folder / "images.json"
        if not file.is_file():
            write_json(file, seen, shared=True)
        elif read_json(file) != seen:
            raise DistillError(
                f"The images are not those that the teachers of {self.folder} were asked about: files or the libraries"
                " that read and augment them have changed. Name another folder, --cache-teacher DIR."
            )

    def _ask(self, teachers: Sequence[Teacher], missing: Sequence[Question]) -> None:
        """Asks about blocks of rows, and writes each as soon as it is whole."""
        rows = self._answered(teachers, missing)
        for question in missing:
            _, start, end = question
            kept = (torch.stack(x).contiguous() for x in zip(*islice(rows, end - start), strict=True))
            _save(self.answers.file(question), dict(zip(self.answers.names, kept, strict=True)))

    def _answered(self, teachers: Sequence[Teacher], missing: Sequence[Question]) -> Iterator[tuple[Tensor, ...]]:
        """What the teachers say of each row of some blocks, in the order of the names."""
        # In the teachers' own class order; a method's view of them is in the student's.
        nets = [_net(teacher) for teacher in teachers]
        rows = sum(end - start for _, start, end in missing)
        read, steps = self._read(missing), -(-rows // self.args.batch_size)
        quiet, first = not self.run.reporter.terminal, True
        for inputs, _ in track(read, "asking the teachers", total=steps, disable=quiet, transient=True):
            kept = self._kept(nets, inputs)
            if first:
                cached.check_twice(kept, self._kept(nets, inputs))
                size = sum(x.nbytes for x in kept) / len(inputs)
                self._check_room(size, rows * self.run.accelerator.num_processes)
            first = False
            yield from zip(*kept, strict=True)

    def _kept(self, nets: Sequence[Net], images: Tensor) -> list[Tensor]:
        """What is written of some images: scores `[N, teachers, K]`, or the highest of them, and layers, by name."""
        views = _views(self.run, nets, images, self.args.batch_size, self.layers)
        scores = [view.logits for view in views]
        if len({s.shape for s in scores}) > 1 or scores[0].dim() != 2:
            raise DistillError(
                "--cache-teacher holds one vector of scores of each teacher, all of one length, got"
                f" {', '.join(str(list(s.shape)) for s in scores)}: leave it out."
            )
        found = {"logits": torch.stack(scores, 1)}
        if "top k" in self.facts:
            kept, classes = KF.top_k(found["logits"], self.top, self.temperature)
            found = {"logits": kept, "classes": classes.int()}
        maps = {f"{i}:{name}": x for i, view in enumerate(views) for name, x in view.features.items()}
        for name, x in maps.items():
            if len(x) != len(scores[0]):
                raise DistillError(
                    f"--cache-teacher holds what a layer gives of each image, and {name} gives {list(x.shape)} of"
                    f" {len(scores[0])} images: leave it out."
                )
        found |= maps
        return [found[name][: len(images)].cpu() for name in self.answers.names]

    def _check_room(self, size: float, rows: int) -> None:
        """Refuses what the disk does not hold, before the teachers are asked for hours."""
        needed, free = size * rows / 2**30, shutil.disk_usage(self.folder).free / 2**30
        if needed > free:
            raise DistillError(
                f"--cache-teacher: {rows:,} answers of {size:,.0f} bytes are {needed:,.1f} GiB, and the disk of"
                f" {self.folder} has {free:,.1f} left: keep fewer views, --cache-views, or smaller layers."
            )

    def _ask_evaluation(self, teachers: Sequence[Teacher]) -> Tensor:
        """Scores `[N, teachers, K]` of this process's evaluation images, and those of another kind behind them."""
        known, found = [_net(teacher, order=teacher.order) for teacher in teachers if not teacher.misfit], []
        for loader in filter(None, (self.run.data.evaluation, self.run.data.other)):
            # A copy: workers that outlive a pass would be there when the run first reads, which draws random numbers.
            read = copy.copy(loader)
            if hasattr(read, "loader"):
                read.loader = copy.copy(read.loader)
            for inputs, _ in batches(read):
                if known:
                    views = _views(self.run, known, self.run.images(inputs))
                    found.append(torch.stack([view.logits.cpu() for view in views], 1))
        return torch.cat(found) if found else torch.empty(0, 0, 0)

    def _read(self, questions: Sequence[Question]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of blocks of rows, as training shows them, in batches of its size."""
        args, transform = self.args, self.replayed.transform
        options: dict[str, Any] = {"num_workers": args.workers, "use_prefetcher": not args.no_prefetcher}
        options["device"] = self.run.accelerator.device
        loader = plain_loader(_Asked(self.replayed, questions), self.config, args.batch_size, **options)
        # The loader has set that of an evaluation.
        self.replayed.transform = transform
        for inputs, labels in batches(loader):
            yield self.run.images(inputs), labels


class _Asked(Transformed, Dataset[tuple[Any, Any]]):
    """The rows of blocks, one block after the other."""

    def __init__(self, replayed: Replayed, questions: Sequence[Question]) -> None:
        self.dataset, self.questions = replayed, questions
        self.ends = list(accumulate(end - start for _, start, end in questions))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        number = bisect_right(self.ends, item)
        view, _, end = self.questions[number]
        return self.dataset.item(end - (self.ends[number] - item), view)


def _net(teacher: Teacher, **options: Any) -> Net:
    """A teacher that is asked."""
    return Net(teacher.network, Reads, frozen=True, transform=teacher.transform, **options)


def _replay(scores: Tensor) -> Callable[[Tensor], Tensor]:
    """A teacher's scores of images in the order in which they come, pass after pass."""
    rows = cycle(scores)
    return lambda images: torch.stack([*islice(rows, len(images))]).to(images.device)


@torch.no_grad()
def _views(
    run: TrainingRun, nets: Sequence[Net], images: Tensor, size: int = 0, layers: Sequence[tuple[str | int, ...]] = ()
) -> list[View]:
    """What the teachers say; a batch that is too small is filled up, since its size may change the last bits."""
    if len(images) < size:
        images = torch.cat([images, images[:1].expand(size - len(images), -1, -1, -1)])
        images = run.images(images)
    with run.autocast():
        reads = [Reads(features=layers[i] if layers else ()) for i in range(len(nets))]
        return [net(Batch.of(images), reads=one) for net, one in zip(nets, reads, strict=True)]


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    with cached.making(file) as missing:
        if missing:
            with replacing(file, shared=True) as partial:
                save_file(tensors, partial)


def _layers(distiller: Distiller, teachers: int) -> list[tuple[str | int, ...]]:
    """The layers of each teacher that a method reads; refuses one that reads more than the cache can hold."""
    found, name = [cached.layers_of(distiller, i) for i in range(teachers)], distiller.name
    reasons = (
        (None in found, "holds scores and layers that are named one by one", "reads attention, all layers or a glob"),
        (needs_pass(distiller), "follows the training", "looks at the images before it"),
        (any(n.streams for n in needs_of_stages(distiller)), "follows the training stream", "reads others too"),
    )
    for refused, does, wants in reasons:
        if refused:
            raise DistillError(f"--cache-teacher {does}, and {name} {wants}: leave it out.")
    return [layers or () for layers in found]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _named(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What the flags say of data: but a batch size, of streamed data alone, and a folder, which may have moved."""
    asides = ("batch_size", "data_dir", "dataset_download")
    return {k: getattr(args, k) for k in (*names, *DATASET_ARGUMENTS.values()) if k not in asides}


def _rows_id(dataset: Any) -> str:
    """Changes with the rows of a data set, as far as their kind can tell without reading every image."""
    reader = getattr(dataset, "reader", dataset)
    root, inner = getattr(reader, "root", ""), getattr(reader, "dataset", reader)
    files = [_file_id(root, *sample) for sample in getattr(reader, "samples", ())]
    rows = len(dataset) if hasattr(dataset, "__len__") else 0
    digest = hashlib.sha256(_digest([rows, files, getattr(inner, "_fingerprint", "")]).encode())
    for name in ("data", "targets"):
        held = getattr(inner, name, None)
        if isinstance(held, (np.ndarray, Tensor, list)):
            digest.update(np.ascontiguousarray(held).tobytes())
    return digest.hexdigest()


def _file_id(root: str, image: Any, *others: Any) -> list[Any]:
    """Name and size of an image, in a folder or in a tar, and what lies beside it, such as its label."""
    if isinstance(image, TarInfo):
        known = [image.name, image.size, image.mtime]
    else:
        known = [os.path.relpath(image, root), os.path.getsize(image)]
    return [*known, *(x.name if isinstance(x, TarInfo) else str(x) for x in others)]


def _teachers_id(args: argparse.Namespace) -> str:
    """Changes with the teachers' names, arguments and weights: of a file its hash, of published ones where they are."""
    found: list[Any] = []
    for name, path, kwargs in named_teachers(args):
        check_model_name(name, "--teacher")
        source, model = parse_model_name(name)
        found.append([name, kwargs])
        if path:
            files = (Path(path), Path(path).with_suffix(".json"), Path(path).with_name("config.json"))
            found.append(cached.files_id(*filter(Path.is_file, files)))
        elif source == "local-dir":
            found.append(cached.files_id(model))
        else:
            cfg: Any = timm.get_pretrained_cfg(model) if source is None else None
            repository, file = (model, None) if source else (cfg and cfg.hf_hub_id, cfg and cfg.hf_hub_filename)
            kept = _hub_file(repository, file)
            if repository and not kept:
                published(name, kwargs)  # Puts the file there.
                kept = _hub_file(repository, file)
            found.append([timm.__version__, cfg.to_dict() if cfg else "", kept])
    return _digest(found)


def _hub_file(repository: str | None, file: str | None) -> str:
    """What the hub's cache calls the weights of a repository, by their hash; empty where it has none."""
    name, _, revision = (repository or "").partition("@")
    file = file or "pytorch_model.bin"
    # As timm, which takes safetensors where there are some.
    safe = file.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"
    for one in (safe, file) if name else ():
        kept = try_to_load_from_cache(name, one, revision=revision or None)
        if isinstance(kept, str):  # and not the mark of a file that a repository does not have
            return Path(kept).resolve().name
    return ""


def _evaluation_id(run: TrainingRun) -> str:
    """Changes with the evaluation images and their order, and with a process's share of them."""
    named = _named(run.args, "dataset", "val_split", "ood_dataset", "ood_split", "no_prefetcher")
    loaders = filter(None, (run.data.evaluation, run.data.other))
    parts = [[named, _rows_id(loader.dataset), len(loader)] for loader in loaders]
    return _digest([parts, run.accelerator.process_index, run.accelerator.num_processes])[:16]
