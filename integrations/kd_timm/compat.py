"""Every name of timm and Accelerate that is used though it is not published; a test holds each."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from timm.data.loader import fast_collate
from timm.models._features import feature_take_indices
from timm.models._hub import save_config_for_hf
from timm.utils import NativeScaler

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "fast_collate",
    "feature_take_indices",
    "native_scaler",
    "save_config_for_hf",
    "set_sync_gradients",
]


def native_scaler(scaler: Any) -> NativeScaler | None:
    """Accelerate's scaler of the loss, where there is one, as timm's, which knows its place in a checkpoint."""
    if scaler is None:
        return None
    made = NativeScaler()
    made._scaler = scaler
    return made


def set_sync_gradients(accelerator: Accelerator, sync: bool) -> None:
    """Tells Accelerate whether the coming backward closes an accumulation window, in a loop that counts by itself."""
    accelerator.gradient_state._set_sync_gradients(sync)
