"""Semantic segmentation of CamVid with DistillationTrainer: a small SegFormer, alone or taught by a larger one.

`--data` is a folder of parquet files (`train`, `validation`, `test`) with the columns `image` and `annotation`, class
numbers of which 11 is unlabelled. Images are scaled down; scores are on the labels as they are in the files.

    python -m benchmarks camvid --data $DATA/camvid --network teacher --output teacher
    python -m benchmarks camvid --data $DATA/camvid --teacher teacher --distill structured --output run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from sklearn.metrics import confusion_matrix
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainingArguments, set_seed

from kd_plugins.catalog.registry import options_from_strings
from kd_transformers import DistillationTrainer
from kd_transformers.recording import RecordCallback

CLASSES = "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist".split()
UNLABELLED = len(CLASSES)
# Widths of the four stages, layers of each, width of the decoder.
NETWORKS = {"teacher": ((32, 64, 160, 256), 2, 128), "student": ((16, 32, 64, 128), 1, 64)}
MEAN, STD = (0.41, 0.43, 0.43), (0.30, 0.31, 0.30)


def segformer(name: str) -> SegformerForSemanticSegmentation:
    """A SegFormer with random weights."""
    widths, layers, decoder = NETWORKS[name]
    config = SegformerConfig(
        hidden_sizes=list(widths),
        depths=[layers] * 4,
        num_attention_heads=[1, 2, 5, 8] if name == "teacher" else [1, 2, 4, 8],
        decoder_hidden_size=decoder,
        semantic_loss_ignore_index=UNLABELLED,
        id2label=dict(enumerate(CLASSES)),
        label2id={c: i for i, c in enumerate(CLASSES)},
    )
    return SegformerForSemanticSegmentation(config)


class CamVid(torch.utils.data.Dataset):
    """Images `[3, H, W]` and class numbers; scaled, cropped and mirrored alike to train on.

    Args:
        data: Folder of the parquet files.
        split: As for `load_dataset`: `"test"`, `"train[:300]"`.
        size: H and W.
        train: Whether the rows are to train on; else only the images are scaled.
    """

    def __init__(self, data: str, split: str, size: tuple[int, int], train: bool) -> None:
        files = {name: str(Path(data) / f"{name}.parquet") for name in ("train", "validation", "test")}
        rows = load_dataset("parquet", data_files=files, split=split).with_format("numpy")
        self.rows = [(torch.from_numpy(r["image"].copy()), torch.from_numpy(r["annotation"].copy())) for r in rows]
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        self.scale = v2.Resize(size, antialias=True)
        crop = v2.RandomResizedCrop(size, scale=(0.4, 1.0), ratio=(1.2, 1.5), antialias=True)
        self.change = v2.Compose([crop, v2.RandomHorizontalFlip()]) if train else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        image, labels = (tv_tensors.Image(self.rows[row][0].movedim(2, 0)), tv_tensors.Mask(self.rows[row][1]))
        image, labels = (self.scale(image), labels) if self.change is None else self.change(image, labels)
        return {"pixel_values": self.normalise(image).as_subclass(torch.Tensor), "labels": labels.long()}


def decide(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The class of each pixel of the labels, so that no evaluation keeps scores."""
    return F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear").argmax(1).to(torch.uint8)


def scores(prediction: Any) -> dict[str, float]:
    """Mean over the classes of intersection over union, and the share of right pixels; unlabelled ones left out."""
    truth, guess = prediction.label_ids.ravel(), prediction.predictions.ravel()
    labelled = truth != UNLABELLED
    counts = confusion_matrix(truth[labelled], guess[labelled], labels=range(len(CLASSES)))
    right, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = right[union > 0] / union[union > 0]
    return {"miou": float(iou.mean()), "accuracy": float(right.sum() / counts.sum())}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks camvid", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the parquet files")
    parser.add_argument("--train-split", default="train", help="rows to train on")
    parser.add_argument("--val-split", default="test", help="rows to score")
    parser.add_argument("--network", choices=list(NETWORKS), default="student", help="what is trained")
    parser.add_argument("--teacher", help="folder of a trained network")
    parser.add_argument("--distill", help="the method; none trains alone")
    parser.add_argument("--distill-args", nargs="*", default=[], help="its options, name=value")
    parser.add_argument("--size", nargs=2, type=int, default=(96, 128), help="height and width of the images")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="folder of the network, results.json and the report")
    args = parser.parse_args(argv)
    if bool(args.teacher) != bool(args.distill):
        parser.error("--teacher and --distill go together.")
    set_seed(args.seed)
    student = segformer(args.network)
    given: dict[str, Any] = {}
    if args.distill:
        given = {
            "teacher_model": SegformerForSemanticSegmentation.from_pretrained(args.teacher),
            "distiller": args.distill,
            "distiller_args": options_from_strings(args.distill, args.distill_args),
        }
    training = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        lr_scheduler_type="polynomial",
        warmup_steps=50,
        weight_decay=0.01,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        seed=args.seed,
        logging_steps=46,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=CamVid(args.data, args.train_split, args.size, train=True),
        eval_dataset=CamVid(args.data, args.val_split, args.size, train=False),
        compute_metrics=scores,
        preprocess_logits_for_metrics=decide,
        **given,
    )
    trainer.add_callback(RecordCallback(trainer, host="benchmarks/camvid.py", data=f"CamVid, {args.train_split}"))
    trainer.train()
    trainer.save_model()
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    results = {"evaluation": {name: found[name] for name in ("miou", "accuracy", "loss")}}
    (Path(args.output) / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
    return 0
