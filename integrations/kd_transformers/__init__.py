"""Distillation for HuggingFace Trainer."""

from kd_transformers.trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
