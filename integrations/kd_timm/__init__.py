"""Distillation of timm models: kd-timm-train, a task for timm's script, the papers' networks for small images."""

from kd_timm import models
from kd_timm.task import DistillationTask

__all__ = ["DistillationTask", "models"]
