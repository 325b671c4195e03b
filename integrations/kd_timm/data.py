"""Data sets and loaders of timm from the command line, with held-out streams and row numbers for distillers."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm.data
import torch
from accelerate import PartialState
from torch.utils.data import IterableDataset, default_collate

from kd_accelerate.streams import split
from kd_plugins import Distiller, DistillError
from kd_plugins.binding import needs_of_stages
from kd_plugins.errors import told
from kd_timm.arguments import as_flag, parse_args
from kd_timm.compat import fast_collate
from kd_timm.digits import DIGITS_DEFAULTS, Digits
from kd_timm.rows import CollateTargets, Replayed, Rows, StagedRows, numbered

_logger = logging.getLogger("kd_timm.train")

# Arguments of the data sets, by what timm's factory calls them.
DATASET_ARGUMENTS = {
    **dict(root="data_dir", download="dataset_download", trust_remote_code="dataset_trust_remote_code"),
    **{name: name for name in ("class_map", "batch_size", "input_key", "target_key", "target_format")},
}
# Those of the training loader.
LOADER_ARGUMENTS = {
    **dict(re_prob="reprob", re_mode="remode", re_count="recount", re_split="resplit", auto_augment="aa"),
    **{name: name for name in ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")},
    **{name: name for name in ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "worker_seeding")},
    **dict(num_aug_repeats="aug_repeats", num_aug_splits="aug_splits"),
}
# Those of a loader of images of several sizes.
SIZES_ARGUMENTS = {
    **dict(input_size_choices="train_img_sizes", batch_size_choices="train_batch_sizes"),
    **dict(batch_choice_weights="train_size_probs", batch_choice_schedule="train_size_schedule"),
    **dict(batch_schedule_spread="train_size_schedule_spread", batch_schedule_random_mix="train_size_random_mix"),
    **dict(num_batches="train_batches_per_epoch", batch_choice_seed="seed", batch_schedule_epochs="epochs"),
    **dict(use_multi_epochs_loader="use_multi_epochs_loader"),
}
# Those of Mixup.
MIXUP_ARGUMENTS = {
    **dict(mixup_alpha="mixup", cutmix_alpha="cutmix", cutmix_minmax="cutmix_minmax", label_smoothing="smoothing"),
    **dict(prob="mixup_prob", switch_prob="mixup_switch_prob", mode="mixup_mode"),
}


class Datasets(NamedTuple):
    """What a run reads.

    Attributes:
        train: The training set; None for a training without data.
        evaluation: The evaluation set; None without `--val-split`.
        classes: Class names by label, where they are known.
    """

    train: Any
    evaluation: Any
    classes: tuple[str, ...] | None


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: Loader of the training rows.
        evaluation: Loader of the evaluation split; None without one.
        config: timm's resolved data configuration (input size, mean, std, interpolation, crop).
        classes: Class names by label, where the data set has them.
        streams: Loaders of training rows that are held out for a distiller, by stream name.
        mixup: What mixes, when mixup or cutmix is on and the loader can be told to end it.
        mean_batch: Rows of a batch, on average.
        other: Loader of the images of another kind; None without them.
        replayed: The training set whose augmentation is replayed, with `--cache-teacher`.
    """

    train: Any
    evaluation: Any
    config: dict[str, Any]
    classes: tuple[str, ...] | None
    streams: dict[str, Any]
    mixup: timm.data.Mixup | None
    mean_batch: float
    other: Any
    replayed: Replayed | None

    def set_epoch(self, epoch: int, mixup_off_epoch: int = 0) -> None:
        """Reshuffles distributed samplers and ends mixup when its time has come."""
        for loader in (self.train, *self.streams.values()):
            for name in ("dataset", "batch_sampler", "sampler"):
                part: Any = getattr(loader, name, None)
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled.fill_(not (mixup_off_epoch and epoch >= mixup_off_epoch))


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
        _logger.warning("No data is named: training on 1,297 handwritten digits of scikit-learn. Yours: --data-dir.")
        args.dataset = "digits"
    if args.dataset != "digits":
        return
    size_given = args.img_size is not None or args.input_size is not None or "img_size" in args.model_kwargs
    for name, value in DIGITS_DEFAULTS.items():
        if getattr(args, name) is None and not (name == "img_size" and size_given):
            setattr(args, name, value)


# What does nothing where no image is read for the training, and where none is read at all.
_OF_TRAINING = (*LOADER_ARGUMENTS.values(), *MIXUP_ARGUMENTS.values(), "train_split", "train_interpolation", "loss")
_OF_TRAINING += ("train_num_samples", "epoch_repeats", "use_multi_epochs_loader", "mixup_off_epoch", "save_images")
_OF_STREAMS = ("train_num_samples", "val_num_samples", "epoch_repeats")
_OF_READING = ("class_map", "dataset_download", "dataset_trust_remote_code", "input_key", "target_key")
_OF_EVALUATION = (*_OF_READING, "val_num_samples", "validation_batch_size", "no_prefetcher", "tta")


def check_data_free(args: argparse.Namespace) -> None:
    """Refuses what means nothing in a training without data, before anything is derived from the arguments."""
    ignored, evaluated = [*_OF_TRAINING], (args.dataset or args.data_dir or args.data) and args.val_split
    if not evaluated:
        ignored += _OF_EVALUATION
    if not args.best_on_eval:
        ignored += ["eval_metric"] + ["sched"] * (args.sched == "plateau")
    elif not evaluated:
        raise DistillError("--best-on-eval chooses on an evaluation set, and none is named: give it, --dataset NAME.")
    _refuse_idle(args, ignored, f"{args.distill} trains without data, where")


def _refuse_idle(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuses flags that would do nothing, in a sentence that begins with the reason."""
    defaults = vars(parse_args([]))
    if given := ", ".join(as_flag(name) for name in names if getattr(args, name) != defaults[name]):
        raise DistillError(f"{why} {given} would do nothing: leave it out.")


# The kinds of timm's data sets that find their data without a folder.
_WITHOUT_FOLDER = ("torch", "hfds", "hfids", "tfds", "wds")


def create_datasets(args: argparse.Namespace, channels: int, data_free: bool = False) -> Datasets:
    """Makes the training and the evaluation data set.

    Args:
        args: Parsed arguments, after `apply_data_defaults`.
        channels: Image channels of the model.
        data_free: Whether the training needs no data set.
    """
    if data_free and not (args.dataset or args.data_dir):
        return Datasets(None, None, None)
    mode = _mode(args, channels)
    if args.dataset == "digits":
        if args.task == "multilabel":
            raise DistillError("--task multilabel: a digit has one label; name a data set with several, --dataset.")
        _refuse_idle(args, (*_OF_READING, *_OF_STREAMS), "Digits are read from scikit-learn, where")
        train: Any = Digits(args.train_split, mode)
        evaluation: Any = Digits(args.val_split, mode) if args.val_split else None
        return Datasets(None if data_free else train, evaluation, train.classes)
    if not args.data_dir and args.dataset.partition("/")[0] not in _WITHOUT_FOLDER:
        raise DistillError(
            f"--dataset: expected digits or <type>/<name>, with a type of {', '.join(_WITHOUT_FOLDER)}, got"
            f" {args.dataset!r}; a folder of images is --data-dir."
        )
    if not args.data_dir and args.dataset.startswith("torch/"):
        raise DistillError(
            f"{args.dataset} is read from a folder, where --dataset-download puts it first, and none is named: add"
            " --data-dir DIR."
        )
    if not args.dataset and not os.path.exists(args.data_dir):
        raise DistillError(f"Expected a folder or tar of images, but {args.data_dir} does not exist: mend --data-dir.")
    common = _named(args, DATASET_ARGUMENTS) | {"name": args.dataset, "input_img_mode": mode}
    told_as = args.dataset or args.data_dir
    if args.task == "multilabel":
        hot = args.target_format == "multihot"
        common["target_transform"] = timm.data.MultiLabelTarget(args.num_classes, dense=hot)
    evaluation = theirs = None
    if args.val_split:
        evaluation = _read(told_as, split=args.val_split, num_samples=args.val_num_samples, **common)
        theirs = class_names(evaluation, args.target_key)
    if data_free:
        return Datasets(None, evaluation, theirs)
    of_training = dict(seed=args.seed, repeats=args.epoch_repeats, num_samples=args.train_num_samples)
    train = _read(told_as, split=args.train_split, is_training=True, **of_training, **common)
    classes = class_names(train, args.target_key)
    if evaluation is not None and not args.dataset and args.val_split != args.train_split:
        # Where a folder has no such split, timm reads the whole of it.
        roots = [str(getattr(dataset.reader, "root", "")) for dataset in (train, evaluation)]
        if all(roots) and os.path.commonpath(roots) in roots:
            _logger.warning(
                f"{told_as} has no folders {args.train_split} and {args.val_split}: the training and the evaluation"
                " read the same images. Name splits, --train-split and --val-split, or none to evaluate."
            )
    if classes is not None and theirs not in (None, classes):
        raise DistillError(
            f"The training split has the classes {_few(classes)} and the evaluation split {_few(theirs)}: the same"
            " folders, in the same order, must be in both (--class-map fixes the order)."
        )
    return Datasets(train, evaluation, classes)


def _mode(args: argparse.Namespace, channels: int) -> str:
    """How PIL is to give images of so many channels."""
    if channels not in (1, 3) and not args.input_img_mode:
        raise DistillError(
            f"The model takes {channels} channels, and images are read in colour or grey: name how, --input-img-mode."
        )
    return args.input_img_mode or ("RGB" if channels == 3 else "L")


def _read(told_as: str, **options: Any) -> Any:
    """A data set of timm's factory."""
    named = f"{told_as} ({options['split']})"
    with told(f"{named} cannot be read", Exception, remedy="mend the flags of the data set"):
        dataset = timm.data.create_dataset(**options)
    if not isinstance(dataset, IterableDataset) and (options.get("num_samples") or options.get("repeats")):
        flags = ", ".join(map(as_flag, _OF_STREAMS))
        raise DistillError(f"{named} is no streamed data set, where alone {flags} do something: leave them out.")
    _check_split(dataset, options["name"], options["root"], options["split"])
    _check_columns(dataset, named)
    return dataset


def _check_split(dataset: Any, name: str, root: str, split: str) -> None:
    """Refuses the name of a split that a folder of images does not have, for which timm reads the whole folder.

    Those that the flags have by themselves are told of as a warning: a folder need not have splits.
    """
    if name or not os.path.isdir(root):
        return
    if "[" in split:
        raise DistillError(f"{split}: parts of splits are for digits and hfds/, and {root} is a folder of images.")
    if split not in ("train", "validation") and os.path.samefile(dataset.reader.root, root):
        there = _few(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
        raise DistillError(f"{root} has no folder {split}, but {there}: mend the name of the split.")


def _check_columns(dataset: Any, named: str) -> None:
    """Refuses a data set of `datasets` without the columns of images and labels, which timm would add empty."""
    reader: Any = getattr(dataset, "reader", None)
    columns = list(getattr(getattr(reader, "dataset", None), "features", None) or ())
    if not columns or isinstance(dataset, IterableDataset) or not len(dataset):
        return
    first = reader.dataset[0]
    for flag, key in (("--input-key", reader.image_key), ("--target-key", reader.label_key)):
        # Fields in fields are written with a slash, several with commas.
        if "," not in key and first.get(key if key in first else key.partition("/")[0]) is None:
            there = ", ".join(column for column in columns if first[column] is not None)
            raise DistillError(f"{named} has no column {key!r}, but {there}: name the one that is meant, {flag}.")


def _other_kind(args: argparse.Namespace, channels: int) -> Any:
    """The images of `--ood-dataset`, whatever their labels; None without it."""
    name = args.ood_dataset
    if not name:
        return None
    mode = _mode(args, channels)
    if name == "digits":
        return Digits(args.ood_split, mode)
    named: dict[str, Any] = {"name": "", "root": name}
    if not os.path.exists(name):
        if name.partition("/")[0] not in _WITHOUT_FOLDER:
            raise DistillError(
                f"--ood-dataset: expected digits, a folder of images or <type>/<name>, with a type of"
                f" {', '.join(_WITHOUT_FOLDER)}, got {name}."
            )
        named = {"name": name, "root": args.data_dir}
    named |= {"input_key": args.input_key, "target_key": args.target_key, "batch_size": args.batch_size}
    return _read(f"--ood-dataset {name}", split=args.ood_split, input_img_mode=mode, **named)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def class_names(dataset: Any, target_key: str | None = None) -> tuple[str, ...] | None:
    """The names of a data set's classes in their order, where it knows them; `target_key` is the labels' column."""
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


def check_labels(args: argparse.Namespace, datasets: Datasets) -> None:
    """Refuses labels that are none of the model's classes, as far as they are known without reading every image.

    Args:
        args: Parsed arguments, with the classes of the model.
        datasets: What `create_datasets` returned.
    """
    train, evaluation, classes = datasets
    known = max(args.num_classes, 2)
    if classes is not None and known < len(classes):
        raise DistillError(
            f"The data set has {len(classes)} classes and the model {args.num_classes}: add --num-classes"
            f" {len(classes)}."
        )
    for named, dataset in ((f"--train-split {args.train_split}", train), (f"--val-split {args.val_split}", evaluation)):
        found = set() if args.task == "multilabel" else _labels(dataset)
        if found and min(found) < 0:
            raise DistillError(
                f"{named} has the label {min(found)}, which stands for none: name a split with labels, or their column,"
                " --target-key."
            )
        if found and max(found) >= known:
            raise DistillError(
                f"{named} has labels up to {max(found)}, and the model has {args.num_classes} classes, counted from 0:"
                f" add --num-classes {max(found) + 1}."
            )


def check_average(args: argparse.Namespace, evaluation: Any, other: Any = None) -> None:
    """Refuses `--tta` where the rows that it averages, which follow each other, would not come together."""
    size = args.validation_batch_size or args.batch_size
    given = [dataset for dataset in (evaluation, other) if dataset is not None]
    rows = [len(dataset) for dataset in given if not isinstance(dataset, IterableDataset)]
    if PartialState().num_processes > 1 and args.tta > 1:
        raise DistillError("--tta averages rows that follow each other, and processes take turns at them: use one.")
    if args.tta > 1 and any(count % args.tta for count in (size, *rows)):
        raise DistillError(
            f"--tta {args.tta} averages the scores of {args.tta} rows that follow each other: let"
            f" --validation-batch-size ({size}) and the rows of what is evaluated ({', '.join(map(str, rows))}) be"
            " multiples."
        )


def _labels(dataset: Any) -> set[int]:
    """The labels of a folder, a tar or a table of `datasets`, which lie beside the images; nothing of other kinds."""
    reader: Any = getattr(dataset, "reader", None)
    found: Any = [label for _, label, *_ in getattr(reader, "samples", ())]
    if hasattr(reader, "iter_targets") and not reader.remap_class:
        column = reader.dataset.features.get(reader.label_key)
        found = reader.dataset.unique(reader.label_key) if "int" in str(getattr(column, "dtype", "")) else []
    return {-1 if label is None else label for label in found if label is None or isinstance(label, int)}


def create_data(
    args: argparse.Namespace,
    config: dict[str, Any],
    datasets: Datasets,
    device: torch.device,
    *,
    distiller: Distiller | None = None,
    patch_size: tuple[int, int] = (16, 16),
) -> Data:
    """Makes the loaders as timm's script makes them.

    Departure: with `--mixup-off-epoch` worker processes that live on hear that Mixup has ended.

    Args:
        args: Parsed arguments.
        config: Resolved data configuration.
        datasets: What `create_datasets` returned.
        device: Where batches go.
        distiller: A distiller whose stages may want row numbers or streams of held-out rows. Epochs keep their length:
            where rows are held out, the others come more than once.
        patch_size: Of a model that `--naflex-loader` feeds.
    """
    train, evaluation, classes = datasets
    needs = [] if distiller is None else needs_of_stages(distiller)
    index = any(n.index for n in needs)
    streams: dict[str, Any] = {}
    replayed = Replayed(train) if args.cache_teacher else None
    shown = train if replayed is None else replayed
    for shares in (n.streams for n in needs if n.streams):
        streams |= split(len(train), shares, args.seed)
    if distiller is not None and (index or streams):
        if isinstance(train, IterableDataset):
            raise DistillError(f"{distiller.name} needs rows by number, which this kind of data set does not have.")
        if args.aug_splits:
            raise DistillError(f"--aug-splits repeats rows, and {distiller.name} counts rows or holds some out.")
        shown = StagedRows(shown, distiller, 1, args.seed, numbered if index else None)
        streams = {name: Rows(train, rows, index) for name, rows in streams.items() if name}
    mixup = _mixup(args)
    collate: Any = None if args.no_prefetcher else mixup
    if index or replayed is not None:
        plain = default_collate if args.no_prefetcher else fast_collate
        collate = CollateTargets(collate or plain, index=index, told=replayed is not None)
    distributed = PartialState().num_processes > 1
    machine: dict[str, Any] = dict(
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        distributed=distributed,
        img_dtype=model_dtype(args),
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=args.persistent_workers,
    )

    def make(dataset: Any, size: int, options: Mapping[str, Any]) -> Any:
        if not args.naflex_loader:
            return plain_loader(dataset, config, size, **options)
        options = {key: config[key] for key in ("mean", "std", "interpolation")} | dict(options)
        last = not args.naflex_patchify_channels_first
        return timm.data.create_naflex_loader(dataset, batch_size=size, patchify_channels_last=last, **options)

    def loader(dataset: Any) -> Any:
        interpolation = (not args.no_aug and args.train_interpolation) or config["interpolation"]
        options = {**_named(args, LOADER_ARGUMENTS), **machine, "interpolation": interpolation, "is_training": True}
        unfit = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
        with told("These flags of the training images do not go together", *unfit):
            if args.naflex_loader:
                ranks = dict(rank=PartialState().process_index, world_size=PartialState().num_processes)
                lengths = {"train_seq_lens": args.naflex_train_seq_lens, "mixup_fn": mixup}
                options |= _patch_sizes(args, patch_size) | ranks | lengths
            else:
                options |= _named(args, SIZES_ARGUMENTS) | {"collate_fn": collate}
                dataset = timm.data.AugMixDataset(dataset, num_splits=args.aug_splits) if args.aug_splits else dataset
            made = make(dataset, args.batch_size, options)
        if len(made) == 0:
            raise DistillError(
                f"The {len(dataset)} training rows do not fill one batch of {args.batch_size}: lower --batch-size."
            )
        return made

    reading = dict(machine)
    if distributed and any(kind in args.dataset for kind in ("tfds", "wds")):
        reading["num_workers"] = min(2, args.workers)
    if args.naflex_loader:
        reading |= {"patch_size": patch_size, "max_seq_len": args.naflex_max_seq_len, "crop_pct": config["crop_pct"]}

    other = _other_kind(args, config["input_size"][0])
    check_average(args, evaluation, other)

    def plainly(dataset: Any) -> Any:
        return None if dataset is None else make(dataset, args.validation_batch_size or args.batch_size, reading)

    if args.naflex_loader:
        _logger.info("Using NaFlex loader")
        sizes = args.naflex_patch_sizes
        _logger.info(f"Using variable patch sizes: {sizes}" if sizes else f"Using model patch size: {patch_size}")
    empty = torch.empty(args.batch_size, 0, device=device)
    training = loader(shown) if train is not None else [(empty, empty)] * args.epoch_updates * args.grad_accum_steps
    if isinstance(shown, StagedRows):
        shown.epoch_steps = -(-len(training) // args.grad_accum_steps)
    if args.train_img_sizes:
        _tell_sizes(args, training.batch_sampler)
    return Data(
        train=training,
        evaluation=plainly(evaluation),
        config=config,
        classes=classes,
        streams={name: loader(rows) for name, rows in streams.items()},
        mixup=None if args.naflex_loader else mixup,
        mean_batch=float(training.batch_sampler.average_batch_size if args.train_img_sizes else args.batch_size),
        other=plainly(other),
        replayed=replayed,
    )


def _tell_sizes(args: argparse.Namespace, scheduled: Any) -> None:
    """The lines of timm's script about images of several sizes."""
    _logger.info(
        f"Using scheduled training resolutions {args.train_img_sizes} with batch sizes {scheduled.batch_sizes}."
    )
    if args.train_size_schedule == "progressive":
        _logger.info(
            f"Using progressive resolution schedule over {args.epochs} epochs with"
            f" spread={args.train_size_schedule_spread} and random_mix={args.train_size_random_mix}."
        )
    _logger.info(
        f"Scheduled loader has {len(scheduled)} batches/epoch using policy-average batch size"
        f" {scheduled.average_batch_size:.2f}."
    )


def _mixup(args: argparse.Namespace) -> Any:
    """What mixes images and labels: while a batch is collated, on the device, or patch by patch; None without it."""
    if not uses_mixup(args):
        return None
    for size in args.train_batch_sizes or [args.batch_size]:
        if size % 2:
            raise DistillError(f"A batch of {size}: Mixup mixes pairs, so give an even number.")
    options = _named(args, MIXUP_ARGUMENTS) | {"multi_label": args.task == "multilabel"}
    # One logit decides between two classes.
    options["num_classes"] = args.num_classes if args.task == "multilabel" else max(args.num_classes, 2)
    if not args.naflex_loader:
        made = timm.data.Mixup(**options) if args.no_prefetcher else timm.data.FastCollateMixup(**options)
        # In shared memory, where workers that outlive an epoch see it change.
        made.mixup_enabled = torch.tensor(True).share_memory_()
        return made
    del options["mode"], options["cutmix_minmax"]
    return timm.data.NaFlexMixup(**options, mixup_off_epoch=args.mixup_off_epoch)


def _patch_sizes(args: argparse.Namespace, patch_size: tuple[int, int]) -> dict[str, Any]:
    """The patch sizes that `--naflex-patch-sizes` draws from, or that of the model."""
    sizes, shares = args.naflex_patch_sizes, args.naflex_patch_size_probs
    if not sizes:
        return {"patch_size": patch_size}
    if shares and len(shares) != len(sizes):
        raise DistillError(f"--naflex-patch-size-probs: expected {len(sizes)}, one for each size, got {len(shares)}.")
    return {"patch_size_choices": sizes, "patch_size_choice_probs": shares}


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """The type of the student's weights, and of its images."""
    return getattr(torch, args.model_dtype or "float32")


def _named(args: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: getattr(args, flag) for name, flag in names.items()}


def plain_loader(dataset: Any, config: Mapping[str, Any], batch_size: int, **options: Any) -> Any:
    """A loader of a data set in its order, without augmentation, but for what the options of timm's factory say.

    As in timm's script the centre is cropped, whatever `crop_mode` the model's configuration names.
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    made = dict(batch_size=batch_size, persistent_workers=False) | {key: config[key] for key in keys}
    return timm.data.create_loader(dataset, **made | options)


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
