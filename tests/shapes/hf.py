"""The host DistillationTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate_kit import fresh_accelerate
from shapes.base import LR, MOMENTUM, Host, Job
from shapes.distillers import SHAPES
from shapes.nets import MEAN, SEED, STD, TinyHFNet
from transformers import TrainerCallback, TrainingArguments, ViTImageProcessor

from kd_transformers import DistillationTrainer


class Trained(Host):
    """DistillationTrainer, stopped and resumed by its own checkpoints."""

    kind = TinyHFNet

    @classmethod
    def fits(cls, shape: str) -> bool:
        return SHAPES[shape].data

    def __init__(self, job: Job, folder: Path, shift: float = 0.0) -> None:
        super().__init__(job, folder, shift)
        fresh_accelerate()
        args = TrainingArguments(
            str(folder),
            max_steps=job.steps,
            per_device_train_batch_size=job.micro,
            gradient_accumulation_steps=job.accumulation,
            learning_rate=LR,
            lr_scheduler_type="linear" if job.decay else "constant",
            max_grad_norm=job.clip or 0.0,
            bf16=job.precision == "bf16",
            seed=SEED,
            train_sampling_strategy="sequential",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.stop = _Stop(job.steps)
        self.trainer = DistillationTrainer(
            self.student,
            args,
            train_dataset=self.data,
            processing_class=ViTImageProcessor(image_mean=MEAN, image_std=STD),
            teacher_model=self.teachers,
            peer_models=self.peers,
            distiller=self.distiller,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
            callbacks=[self.stop],
        )
        self.resume: str | None = None

    def train(self, until: int) -> None:
        self.stop.until = until
        self.trainer.train(resume_from_checkpoint=self.resume)
        assert self.trainer.state.global_step == self.distiller.progress.step == until

    def save(self) -> None:
        assert (self.folder / f"checkpoint-{self.stop.until}").is_dir()

    def load(self) -> None:
        (checkpoint,) = self.folder.glob("checkpoint-*")
        self.resume = str(checkpoint)


class _Stop(TrainerCallback):
    """Saves and stops after an update that is not the last."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.until < args.max_steps:
            control.should_save = control.should_training_stop = True
