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
from kd_plugins.binding import needs_in
from kd_timm.compat import fast_collate
from kd_timm.digits import DIGITS_DEFAULTS, Digits
from kd_timm.flags import flag_group

__all__ = [
    "LOADER_ARGUMENTS",
    "Data",
    "Targets",
    "add_arguments",
    "apply_data_defaults",
    "create_data",
    "create_datasets",
    "plain_loader",
    "uses_mixup",
]

# Arguments that timm's loader takes under their own names.
LOADER_ARGUMENTS = (
    *("batch_size", "no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter"),
    *("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "worker_seeding"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of data and augmentation."""
    _add_dataset(parser)
    _add_augmentation(parser)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR", help="path to dataset (positional is deprecated)")
    add, switch = flag_group(parser, "Dataset parameters")
    add("--data-dir", metavar="DIR", help="path to dataset (root dir)")
    add(
        "--dataset",
        default="",
        metavar="NAME",
        help='dataset type + name ("<type>/<name>"); empty: a folder or tar of images; "digits": scikit-learn\'s'
        " handwritten digits, also taken when no data is named",
    )
    add("--train-split", default="train", metavar="NAME", help="dataset train split")
    add("--val-split", default="validation", metavar="NAME", help="dataset validation split")
    switch("--dataset-download", help="allow download for torch/ and tfds/ datasets that support it")
    add("--class-map", default="", type=str, metavar="FILENAME", help="path to class to idx mapping file")
    add("--input-img-mode", type=str, help="image conversion mode for input images")
    add("--input-key", type=str, help="dataset key for input images")
    add("--target-key", type=str, help="dataset key for target labels")
    switch("--dataset-trust-remote-code", help="allow a hub dataset to run code of its repository")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add, switch = flag_group(parser, "Augmentation and regularization parameters")
    switch("--no-aug", help="disable all training augmentation")
    add("--train-crop-mode", type=str, help="crop mode in training")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="PCT", help="random resize scale")
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="RATIO", help="random aspect ratio")
    add("--hflip", type=float, default=0.5, help="horizontal flip probability")
    add("--vflip", type=float, default=0.0, help="vertical flip probability")
    add("--color-jitter", type=float, default=0.4, metavar="PCT", help="color jitter factor")
    add("--color-jitter-prob", type=float, metavar="PCT", help="probability of applying color jitter")
    add("--grayscale-prob", type=float, metavar="PCT", help="probability of grayscale conversion")
    add("--gaussian-blur-prob", type=float, metavar="PCT", help="probability of gaussian blur")
    add("--aa", type=str, metavar="NAME", help='AutoAugment policy, e.g. "rand-m9-mstd0.5"')
    switch("--bce-loss", help="binary cross entropy, with or without Mixup/CutMix")
    switch("--bce-sum", help="sum over classes in the binary cross entropy")
    add("--bce-target-thresh", type=float, help="threshold for binarizing softened targets of --bce-loss")
    add("--bce-pos-weight", type=float, help="positive weighting of --bce-loss")
    add("--reprob", type=float, default=0.0, metavar="PCT", help="random erase probability")
    add("--remode", type=str, default="pixel", help="random erase mode")
    add("--recount", type=int, default=1, help="random erase count")
    add("--mixup", type=float, default=0.0, help="mixup alpha, enabled if > 0")
    add("--cutmix", type=float, default=0.0, help="cutmix alpha, enabled if > 0")
    add("--cutmix-minmax", type=float, nargs="+", help="cutmix min/max ratio, overrides alpha")
    add("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are enabled")
    add("--mixup-mode", type=str, default="batch", help='"batch", "pair" or "elem"')
    add("--mixup-off-epoch", default=0, type=int, metavar="N", help="turn mixup off after this epoch")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--train-interpolation", type=str, default="random", help="training interpolation")
    add("--drop", type=float, default=0.0, metavar="PCT", help="dropout rate")
    add("--drop-path", type=float, metavar="PCT", help="drop path rate")
    add("--drop-block", type=float, metavar="PCT", help="drop block rate")


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
    """

    train: Any
    evaluation: Any
    config: dict[str, Any]
    classes: tuple[str, ...] | None = None
    streams: dict[str, Any] = field(default_factory=dict)
    mixup: FastCollateMixup | None = None
    staged: StagedRows | None = None

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


def apply_data_defaults(args: argparse.Namespace) -> None:
    """Resolves which data set is meant and, for the embedded one, the defaults that belong to it."""
    args.data_dir = args.data_dir or args.data
    if not args.dataset and not args.data_dir:
        args.dataset = "digits"
    if args.dataset != "digits":
        return
    size_given = args.img_size is not None or args.input_size is not None or "img_size" in args.model_kwargs
    for name, value in DIGITS_DEFAULTS.items():
        if getattr(args, name) is None and not (name == "img_size" and size_given):
            setattr(args, name, value)


def create_datasets(args: argparse.Namespace, channels: int) -> tuple[Any, Any, tuple[str, ...] | None]:
    """Makes the training and the evaluation data set.

    Args:
        args: Parsed arguments, after `apply_data_defaults`.
        channels: Image channels of the model.

    Returns:
        Training set, evaluation set (None without `--val-split`), class names where they are known.
    """
    mode = args.input_img_mode or ("RGB" if channels == 3 else "L")
    if args.dataset == "digits":
        train: Any = Digits(args.train_split, mode)
        return train, Digits(args.val_split, mode) if args.val_split else None, train.classes
    if not args.dataset and not os.path.exists(args.data_dir):
        raise DistillError(f"Expected a folder or tar of images, but {args.data_dir} does not exist: mend --data-dir.")
    common: dict[str, Any] = dict(
        root=args.data_dir,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=mode,
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    train = create_dataset(args.dataset, split=args.train_split, is_training=True, seed=args.seed, **common)
    evaluation = create_dataset(args.dataset, split=args.val_split, **common) if args.val_split else None
    classes = _class_names(train, args.target_key)
    if evaluation is not None and classes is not None:
        theirs = _class_names(evaluation, args.target_key)
        if theirs is not None and theirs != classes:
            raise DistillError(
                f"The training split has the classes {_few(classes)} and the evaluation split {_few(theirs)}: the same"
                " folders, in the same order, must be in both (--class-map fixes the order)."
            )
    return train, evaluation, classes


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
        mixup = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            # One logit decides between two classes.
            num_classes=max(args.num_classes, 2),
        )
    collate: Any = mixup or fast_collate
    needs = [] if distiller is None else [needs_in(distiller, i) for i in range(len(distiller.stages()))]
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
    training: dict[str, Any] = {name: getattr(args, name) for name in LOADER_ARGUMENTS} | dict(
        is_training=True,
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        interpolation=(not args.no_aug and args.train_interpolation) or config["interpolation"],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        distributed=distributed,
        persistent_workers=False,
    )

    def loader(dataset: Any) -> Any:
        made = create_loader(dataset, collate_fn=CollateIndex(collate) if index else collate, **training)
        if len(made) == 0:
            raise DistillError(
                f"The {len(dataset)} training rows do not fill one batch of {args.batch_size}: lower --batch-size."
            )
        return made

    loaded = loader(train)
    if distiller is not None and not distiller.data:
        # A method that makes its own inputs gets as many empty batches.
        empty = torch.empty(args.batch_size, 0, device=device)
        loaded = [(empty, empty)] * len(loaded)
    return Data(
        train=loaded,
        evaluation=None
        if evaluation is None
        else plain_loader(
            evaluation,
            config,
            args.validation_batch_size or args.batch_size,
            device,
            workers=args.workers,
            pin_memory=args.pin_mem,
            distributed=distributed,
        ),
        config=config,
        classes=classes,
        streams={name: loader(rows) for name, rows in streams.items()},
        mixup=mixup,
        staged=staged,
    )


def plain_loader(
    dataset: Any,
    config: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    distributed: bool = False,
) -> Any:
    """A loader of a data set in its order, without augmentation."""
    keys = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_loader(
        dataset,
        config["input_size"],
        batch_size,
        **{key: config[key] for key in keys},
        num_workers=workers,
        pin_memory=pin_memory,
        device=device,
        distributed=distributed,
        persistent_workers=False,
    )


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
