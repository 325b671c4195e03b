"""Data sets and loaders of timm from the command line, with held-out streams and row numbers for distillers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from kd_accelerate.streams import StagedDataset, split
from kd_plugins import Distiller, DistillError
from kd_plugins.binding import needs_of_stages
from kd_timm.arguments import parse_args
from kd_timm.compat import fast_collate
from kd_timm.digits import DIGITS_DEFAULTS, Digits

# Arguments of the data sets, by what timm's factory calls them.
DATASET_ARGUMENTS = {
    **dict(root="data_dir", download="dataset_download", trust_remote_code="dataset_trust_remote_code"),
    **{name: name for name in ("class_map", "batch_size", "input_key", "target_key")},
}
# Those of the training loader.
LOADER_ARGUMENTS = {
    **dict(re_prob="reprob", re_mode="remode", re_count="recount", auto_augment="aa"),
    **{name: name for name in ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")},
    **{name: name for name in ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "worker_seeding")},
}
# Those of Mixup.
MIXUP_ARGUMENTS = {
    **dict(mixup_alpha="mixup", cutmix_alpha="cutmix", cutmix_minmax="cutmix_minmax", label_smoothing="smoothing"),
    **dict(prob="mixup_prob", switch_prob="mixup_switch_prob", mode="mixup_mode"),
}


class Targets(NamedTuple):
    """Labels with the row numbers of their examples, where a distiller asks for them."""

    labels: Tensor
    index: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Targets:
        """Both on another device, as timm's prefetcher asks of a target."""
        return Targets(self.labels.to(*args, **kwargs), self.index.to(*args, **kwargs))


class _Transformed:
    """timm's loader sets the transform of what it is given; here it is that of the whole data set."""

    dataset: Any

    @property
    def transform(self) -> Any:
        """The transform of the whole data set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


class Rows(_Transformed, Dataset[Any]):
    """Some rows of a data set, optionally with their numbers in the whole of it.

    Args:
        dataset: The whole data set; its `transform` is shared.
        rows: Row numbers.
        index: Whether an item carries its row number.
    """

    def __init__(self, dataset: Any, rows: Sequence[int], index: bool = False) -> None:
        self.dataset, self.rows, self.index = dataset, rows, index

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        row = self.rows[item]
        return _numbered(self.dataset[row], row) if self.index else self.dataset[row]

    def __len__(self) -> int:
        return len(self.rows)


class StagedRows(_Transformed, StagedDataset):
    """The training set of a distillation, whose stages may hold rows out for other streams."""


class CollateIndex:
    """Collates `(image, target, row)` with timm's collate function for the first two."""

    def __init__(self, collate: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Any, Any, int]]) -> tuple[Tensor, Targets]:
        images, labels = self.collate([sample[:2] for sample in samples])
        return images, Targets(labels, torch.tensor([sample[2] for sample in samples]))


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: Loader of the training rows.
        evaluation: Loader of the evaluation split; None without one.
        config: timm's resolved data configuration (input size, mean, std, interpolation, crop).
        classes: Class names by label, where the data set has them.
        streams: Loaders of training rows that are held out for a distiller, by stream name.
        mixup: The Mixup collate function, when mixup or cutmix is on.
        staged: The training set of a distillation that wants row numbers or streams; its `epoch_steps`, the updates in
            an epoch, must be set before training.
        other: Loader of the images of another kind; None without them.
    """

    train: Any
    evaluation: Any
    config: dict[str, Any]
    classes: tuple[str, ...] | None = None
    streams: dict[str, Any] = field(default_factory=dict)
    mixup: FastCollateMixup | None = None
    staged: StagedRows | None = None
    other: Any = None

    def set_epoch(self, epoch: int, mixup_off_epoch: int = 0) -> None:
        """Reshuffles distributed samplers and ends mixup when its time has come."""
        for loader in (self.train, *self.streams.values()):
            for part in ("dataset", "sampler"):
                if hasattr(getattr(loader, part, None), "set_epoch"):
                    getattr(loader, part).set_epoch(epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled = not (mixup_off_epoch and epoch >= mixup_off_epoch)

    def stream_iterators(self) -> dict[str, Iterator[Any]]:
        """Endless iterators over the streams; a new set for every epoch, so that a resumed run sees the same rows."""
        return {name: chain.from_iterable(repeat(loader)) for name, loader in self.streams.items()}


def apply_data_defaults(args: argparse.Namespace, data_free: bool = False) -> None:
    """Resolves which data set is meant and, for the embedded one, the defaults that belong to it.

    Args:
        args: Parsed arguments.
        data_free: Whether the training needs no data set; one that is named is for the evaluation.
    """
    args.data_dir = args.data_dir or args.data
    named = bool(args.dataset or args.data_dir)
    if not data_free and (args.epoch_updates or args.best_on_eval):
        raise DistillError("--epoch-updates and --best-on-eval are for methods without data (dafl): leave them out.")
    if data_free:
        args.epoch_updates = args.epoch_updates or 120
    elif not named:
        args.dataset = "digits"
    if args.dataset != "digits":
        return
    size_given = args.img_size is not None or args.input_size is not None or "img_size" in args.model_kwargs
    for name, value in DIGITS_DEFAULTS.items():
        if getattr(args, name) is None and not (name == "img_size" and size_given):
            setattr(args, name, value)


# What does nothing where no image is read for the training.
_OF_DATA = (*LOADER_ARGUMENTS.values(), *MIXUP_ARGUMENTS.values(), "train_split", "train_interpolation", "bce_loss")


def check_data_free(args: argparse.Namespace) -> None:
    """Refuses what means nothing in a training without data, before anything is derived from the arguments."""
    defaults, ignored = vars(parse_args([])), [*_OF_DATA]
    if not args.best_on_eval:
        ignored += ["eval_metric"] + ["sched"] * (args.sched == "plateau")
    elif not ((args.dataset or args.data_dir or args.data) and args.val_split):
        raise DistillError("--best-on-eval chooses on an evaluation set, and none is named: give it, --dataset NAME.")
    given = [name for name in ignored if getattr(args, name) != defaults[name]]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise DistillError(f"{args.distill} trains without data, where {flags} would do nothing: leave it out.")


def create_datasets(
    args: argparse.Namespace, channels: int, data_free: bool = False
) -> tuple[Any, Any, tuple[str, ...] | None]:
    """Makes the training and the evaluation data set.

    Args:
        args: Parsed arguments, after `apply_data_defaults`.
        channels: Image channels of the model.
        data_free: Whether the training needs no data set.

    Returns:
        Training set (None for a training without data), evaluation set (None without `--val-split`), class names where
        they are known.
    """
    if data_free and not (args.dataset or args.data_dir):
        return None, None, None
    mode = args.input_img_mode or ("RGB" if channels == 3 else "L")
    if args.dataset == "digits":
        train: Any = Digits(args.train_split, mode)
        return None if data_free else train, Digits(args.val_split, mode) if args.val_split else None, train.classes
    if not args.dataset and not os.path.exists(args.data_dir):
        raise DistillError(f"Expected a folder or tar of images, but {args.data_dir} does not exist: mend --data-dir.")
    common = _named(args, DATASET_ARGUMENTS) | {"input_img_mode": mode}
    evaluation = create_dataset(args.dataset, split=args.val_split, **common) if args.val_split else None
    if data_free:
        return None, evaluation, None if evaluation is None else _class_names(evaluation, args.target_key)
    train = create_dataset(args.dataset, split=args.train_split, is_training=True, seed=args.seed, **common)
    classes = _class_names(train, args.target_key)
    if evaluation is not None and classes is not None:
        theirs = _class_names(evaluation, args.target_key)
        if theirs is not None and theirs != classes:
            raise DistillError(
                f"The training split has the classes {_few(classes)} and the evaluation split {_few(theirs)}: the same"
                " folders, in the same order, must be in both (--class-map fixes the order)."
            )
    return train, evaluation, classes


def _other_kind(args: argparse.Namespace, channels: int) -> Any:
    """The images of `--ood-dataset`, whatever their labels; None without it."""
    name = args.ood_dataset
    if not name:
        return None
    if "/" not in name or os.path.exists(name):
        if not os.path.exists(name):
            raise DistillError(f"--ood-dataset: expected <type>/<name> or a folder of images, got {name}.")
        named: dict[str, Any] = {"name": "", "root": name}
    else:
        named = {"name": name, "root": args.data_dir}
    keys = {"input_key": args.input_key, "target_key": args.target_key}
    mode = args.input_img_mode or ("RGB" if channels == 3 else "L")
    return create_dataset(split=args.ood_split, input_img_mode=mode, batch_size=args.batch_size, **named, **keys)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _class_names(dataset: Any, target_key: str | None) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    if classes:
        return tuple(map(str, classes))
    reader = getattr(dataset, "reader", None)
    order = getattr(reader, "class_to_idx", None)
    if isinstance(order, Mapping) and sorted(order.values()) == list(range(len(order))):
        return tuple(str(name) for name in sorted(order, key=order.__getitem__))
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    names = getattr(features.get(target_key or "label"), "names", None)
    return tuple(names) if names else None


def _numbered(item: tuple[Any, Any], row: int) -> tuple[Any, Any, int]:
    return (*item, row)


def create_data(
    args: argparse.Namespace,
    config: dict[str, Any],
    datasets: tuple[Any, Any, tuple[str, ...] | None],
    device: torch.device,
    *,
    distributed: bool = False,
    distiller: Distiller | None = None,
) -> Data:
    """Makes the loaders as timm's script makes them.

    Departures: worker processes start anew in each epoch, because the random state of one that lives on cannot be saved
    (timm keeps them: with workers, later epochs draw other augmentations than timm's script at the same seed).

    Args:
        args: Parsed arguments.
        config: Resolved data configuration.
        datasets: What `create_datasets` returned.
        device: Where batches go.
        distributed: Whether several processes share the data.
        distiller: A distiller whose stages may want row numbers or streams of held-out rows. Epochs keep their length:
            where rows are held out, the others come more than once.
    """
    train, evaluation, classes = datasets
    mixup = None
    if uses_mixup(args):
        # One logit decides between two classes.
        mixup = FastCollateMixup(**_named(args, MIXUP_ARGUMENTS), num_classes=max(args.num_classes, 2))
    collate: Any = mixup or fast_collate
    needs = [] if distiller is None else needs_of_stages(distiller)
    index = any(n.index for n in needs)
    streams: dict[str, Any] = {}
    staged = None
    for shares in (n.streams for n in needs if n.streams):
        streams |= split(len(train), shares, args.seed)
    if distiller is not None and (index or streams):
        if isinstance(train, IterableDataset):
            raise DistillError(f"{distiller.name} needs rows by number, which this kind of data set does not have.")
        whole = train
        train = staged = StagedRows(whole, distiller, 1, args.seed, _numbered if index else None)
        streams = {name: Rows(whole, rows, index) for name, rows in streams.items() if name}
    machine: dict[str, Any] = dict(
        num_workers=args.workers, pin_memory=args.pin_mem, device=device, distributed=distributed
    )

    def loader(dataset: Any) -> Any:
        made = plain_loader(
            dataset,
            {**config, "interpolation": (not args.no_aug and args.train_interpolation) or config["interpolation"]},
            args.batch_size,
            is_training=True,
            collate_fn=CollateIndex(collate) if index else collate,
            **_named(args, LOADER_ARGUMENTS),
            **machine,
        )
        if len(made) == 0:
            raise DistillError(
                f"The {len(dataset)} training rows do not fill one batch of {args.batch_size}: lower --batch-size."
            )
        return made

    empty = torch.empty(args.batch_size, 0, device=device)
    size = args.validation_batch_size or args.batch_size
    other = _other_kind(args, config["input_size"][0])
    return Data(
        train=loader(train) if train is not None else [(empty, empty)] * args.epoch_updates * args.grad_accum_steps,
        evaluation=None if evaluation is None else plain_loader(evaluation, config, size, **machine),
        config=config,
        classes=classes,
        streams={name: loader(rows) for name, rows in streams.items()},
        mixup=mixup,
        staged=staged,
        other=None if other is None else plain_loader(other, config, size, **machine),
    )


def _named(args: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: getattr(args, flag) for name, flag in names.items()}


def plain_loader(dataset: Any, config: Mapping[str, Any], batch_size: int, **options: Any) -> Any:
    """A loader of a data set in its order, without augmentation, but for what the options of timm's factory say."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_loader(
        dataset, batch_size=batch_size, persistent_workers=False, **{key: config[key] for key in keys}, **options
    )


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
