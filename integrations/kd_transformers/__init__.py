"""Distillation for HuggingFace Trainer."""

from kd_transformers.cache import cache_teacher
from kd_transformers.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "cache_teacher"]
