"""Random images, small image classifiers of transformers, and a short training of them under Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Images(torch.utils.data.Dataset):
    """Random images of three classes, as dicts."""

    def __init__(self, rows: int = 16, channels: int = 3, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(rows, channels, size, size, generator=generator)
        self.labels = torch.randint(3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[row], "labels": self.labels[row]}


def image_classifier(widths: Sequence[int], seed: int, depths: Sequence[int] = (1, 1)) -> Any:
    """A residual network whose stages have these widths and depths."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    options = {"embedding_size": 4, "layer_type": "basic", "num_labels": 3, "downsample_in_first_stage": False}
    return ResNetForImageClassification(ResNetConfig(hidden_sizes=list(widths), depths=list(depths), **options))


def image_trainer(folder: Path, student: Any, *, epochs: int = 2, rows: int = 16, **options: Any) -> Any:
    """A `DistillationTrainer` of an image classifier; options that `TrainingArguments` has go there."""
    from transformers import TrainingArguments

    from kd_transformers import DistillationTrainer

    given = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
    args = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **given,
    )
    return DistillationTrainer(student, args, train_dataset=Images(rows), **options)
