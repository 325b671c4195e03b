"""Every name of timm and Accelerate that is used though it is not published, or not yet settled.

`timm.task` is public and young: names moved until 1.0.31. A test holds each of these names and its signature.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from timm.data.loader import fast_collate
from timm.models._features import feature_take_indices
from timm.models._hub import save_config_for_hf
from timm.task import (
    ClassificationEvaluator,
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationEvaluator,
    TokenDistillationTask,
    TrainingTask,
    evaluation_sample_limit,
    load_task_ema_checkpoint,
    resolve_classification_loss,
    resume_task_checkpoint,
)
from timm.utils import NativeScaler

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "ClassificationEvaluator",
    "ClassificationTask",
    "FeatureDistillationTask",
    "LogitDistillationTask",
    "MultiLabelClassificationEvaluator",
    "TokenDistillationTask",
    "TrainingTask",
    "evaluation_sample_limit",
    "fast_collate",
    "feature_take_indices",
    "load_task_ema_checkpoint",
    "native_scaler",
    "resolve_classification_loss",
    "resume_task_checkpoint",
    "save_config_for_hf",
    "set_sync_gradients",
]


def native_scaler(scaler: Any) -> NativeScaler:
    """Accelerate's scaler of the loss as timm's, which knows its place in a checkpoint."""
    made = NativeScaler()
    made._scaler = scaler
    return made


def set_sync_gradients(accelerator: Accelerator, sync: bool) -> None:
    """Tells Accelerate whether the coming backward closes an accumulation window, in a loop that counts by itself."""
    accelerator.gradient_state._set_sync_gradients(sync)
