"""What kd_timm uses of timm and Accelerate beside their published interfaces is there, and as relied on."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import timm.task
import torch
from accelerate import Accelerator
from torch import nn

from kd_timm import compat


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fast_collate", ["batch"]),
        ("feature_take_indices", ["num_features", "indices"]),
        ("save_config_for_hf", ["model", "config_path", "model_config", "model_args", "data_config"]),
        ("evaluation_sample_limit", ["loader"]),
        ("resolve_classification_loss", ["criterion", "device", "multi_label", "criterion_kwargs"]),
        ("ClassificationEvaluator", ["device", "max_samples", "criterion"]),
        ("TrainingTask", ["device", "dtype", "verbose"]),
    ],
)
def test_signatures_of_timm(name, expected):
    assert parameters(getattr(compat, name, None) or getattr(timm.task, name))[: len(expected)] == expected


def test_what_timm_gives():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    images, labels = compat.fast_collate([(image, 1), (image, 0)])
    assert images.shape == (2, 3, 2, 2)
    assert labels.tolist() == [1, 0]
    assert compat.feature_take_indices(4, [0, -1]) == ([0, 3], 3)
    assert timm.task.evaluation_sample_limit(SimpleNamespace(sampler=SimpleNamespace(num_valid_samples=5))) == 5
    assert isinstance(timm.task.resolve_classification_loss(None, torch.device("cpu")), nn.CrossEntropyLoss)
    evaluator = timm.task.ClassificationEvaluator(max_samples=1)
    evaluator.update(torch.eye(3)[:2], torch.tensor([0, 2]))
    assert evaluator.num_samples == 1
    assert evaluator.compute(distributed=False)["top1"] == 100
    ours = {"get_trainable_module", "update_ema", "prepare_distributed", "compile", "get_eval_model"}
    assert ours | {"get_clip_parameters", "get_task_state", "load_task_state"} <= set(dir(timm.task.TrainingTask))


def test_accelerate_is_told_when_gradients_are_synchronized():
    accelerator = Accelerator(cpu=True)
    for sync in (False, True):
        compat.set_sync_gradients(accelerator, sync)
        assert accelerator.sync_gradients is sync


def test_accelerate_names_its_trackers():
    assert {"tensorboard", "wandb"} <= compat.LOGGER_TYPE_TO_CLASS.keys()
    assert compat.LOGGER_TYPE_TO_CLASS["wandb"].name == "wandb"
