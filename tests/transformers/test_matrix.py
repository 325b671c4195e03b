"""The table of docs/hosts/transformers.md: every y trains, everything else is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from image_kit import Images, image_classifier
from test_trainer_networks import vit
from test_trainer_tasks import BERT, llama, rows_of, segformer, t5
from trainer_kit import Texts, bert, logged, trainer

from kd_plugins import DistillError
from kd_plugins.catalog.registry import get_distiller

PAGE = (Path(__file__).parents[2] / "docs" / "hosts" / "transformers.md").read_text()


def cells() -> list[tuple[str, str, bool]]:
    """Model, method, and whether they fit."""
    rows = PAGE.partition("## Which method fits which model")[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [(row[0], name, y == "y") for row in table[2:] for name, y in zip(table[0][1:], row[1:], strict=True)]


def depth_estimator() -> Any:
    """A small DPT, whose maps are far enough from constant ones to differ."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 32, "patch_size": 16, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    sizes |= {"backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False, "use_batch_norm_in_fusion_residual": False}
    model = hf.DPTForDepthEstimation(hf.DPTConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def speech(cls: Any, layers: int, **options: Any) -> Any:
    """A small Wav2Vec2 without dropout."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"conv_dim": (4, 4), "conv_kernel": (4, 4), "conv_stride": (2, 2), "feat_extract_norm": "layer"}
    sizes |= {"num_conv_pos_embedding_groups": 1, "num_conv_pos_embeddings": 2, "vocab_size": 8, "pad_token_id": 0}
    drops = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout")
    none = dict.fromkeys([*drops, "layerdrop", "mask_time_prob"], 0.0)
    return cls(hf.Wav2Vec2Config(**sizes, **none, **options))


def video(layers: int) -> Any:
    """A small ViViT."""
    sizes = {"image_size": 16, "num_frames": 2, "tubelet_size": [1, 8, 8], "hidden_size": 16, "intermediate_size": 16}
    return hf.VivitForVideoClassification(
        hf.VivitConfig(**sizes, num_hidden_layers=layers, num_attention_heads=2, num_labels=3)
    )


def detector(blocks: int) -> Any:
    """A small DETR."""
    backbone = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, blocks], layer_type="basic", out_features=["stage2"]
    )
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in DETR.items()}
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, backbone=None, d_model=8, num_queries=4, **parts
    )
    # DETR freezes a ResNet of transformers whole, of whose layers nothing could be learnt then.
    return hf.DetrForObjectDetection(config).requires_grad_()


def boxes(items: list[Any]) -> dict[str, Any]:
    """The collator of transformers' detection script."""
    images = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": images, "labels": [item["labels"] for item in items]}


DETR = {"layers": 1, "attention_heads": 1, "ffn_dim": 8}
TEXTS = Texts(8)
SOUND = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
SPOKEN = (torch.arange(64) < torch.where(torch.arange(8) < 4, 40, 64)[:, None]).long()
INPUTS = {"input_ids": TEXTS.ids, "attention_mask": TEXTS.mask}
TOKENS = TEXTS.ids.masked_fill(TEXTS.mask == 0, -100)
ALL = {"schedule": "all"}
STAGE = "model.backbone.model.encoder.stages.1"
# How a network of a depth is made, and the rows.
MODELS: dict[str, tuple[Any, Any]] = {
    "text classification": (bert, TEXTS),
    "multi-label classification": (
        lambda n: bert(n, problem_type="multi_label_classification"),
        rows_of({**INPUTS, "labels": torch.eye(3)[TEXTS.labels]}),
    ),
    "regression": (lambda n: bert(n, num_labels=1), rows_of({**INPUTS, "labels": TEXTS.labels.float()})),
    "multiple choice": (
        lambda n: hf.BertForMultipleChoice(hf.BertConfig(**{**BERT, "num_hidden_layers": n})),
        rows_of({**{k: v.view(4, 2, 10) for k, v in INPUTS.items()}, "labels": TEXTS.labels[:4] % 2}),
    ),
    "token classification": (
        lambda n: hf.BertForTokenClassification(hf.BertConfig(**BERT)),
        rows_of({**INPUTS, "labels": torch.where(TOKENS < 0, -100, TOKENS % 3)}),
    ),
    "masked language model": (
        lambda n: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
        rows_of({**INPUTS, "labels": TOKENS}),
    ),
    "causal language model": (lambda n: llama(), rows_of({**INPUTS, "labels": TOKENS})),
    "sequence to sequence": (lambda n: t5(), rows_of({**INPUTS, "labels": TOKENS})),
    "question answering": (
        lambda n: hf.BertForQuestionAnswering(hf.BertConfig(**{**BERT, "num_labels": 2})),
        rows_of({**INPUTS, "start_positions": TEXTS.labels, "end_positions": TEXTS.labels + 1}),
    ),
    "image classification (ResNet)": (lambda n: image_classifier([4, 8], n), Images(8)),
    "image classification (ViT)": (vit, Images(8, size=32)),
    "audio classification": (
        lambda n: speech(hf.Wav2Vec2ForSequenceClassification, n, num_labels=3),
        rows_of({"input_values": SOUND, "labels": TEXTS.labels}),
    ),
    "video classification": (
        video,
        rows_of({"pixel_values": torch.randn(8, 2, 3, 16, 16), "labels": TEXTS.labels}),
    ),
    "speech recognition (CTC)": (
        lambda n: speech(hf.Wav2Vec2ForCTC, n),
        rows_of({"input_values": SOUND, "attention_mask": SPOKEN, "labels": 1 + TEXTS.ids[:, :5] % 7}),
    ),
    "segmentation": (
        lambda n: segformer(),
        rows_of({"pixel_values": torch.randn(8, 3, 16, 16), "labels": torch.randint(3, (8, 16, 16))}),
    ),
    "depth estimation": (
        lambda n: depth_estimator(),
        rows_of({"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.rand(8, 32, 32)}),
    ),
    "object detection (DETR)": (
        detector,
        [
            {"pixel_values": image, "labels": {"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}}
            for image in torch.randn(8, 3, 32, 32)
        ],
    ),
}
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    **{("afd", name): {"logit_only": True} for name in MODELS if name != "image classification (ResNet)"},
    **{("noisy", name): {"messy": 0.0, "sigma": 0.1} for name in ("multi-label classification", "regression")},
    ("noisy", "speech recognition (CTC)"): {"messy": 0.0, "logit_sigma": 0.1},
    ("nst", "segmentation"): {"layers": ("segformer.stages.0",)},
    ("quest", "segmentation"): {"layers": ("segformer.stages.0",)},
    ("structured", "segmentation"): {"layers": ("segformer.stages.0",)},
    ("nst", "depth estimation"): {"layers": ("neck.convs.0",)},
    ("quest", "depth estimation"): {"layers": ("neck.convs.0",)},
    ("cwd", "depth estimation"): {"layers": ("neck.convs.0",)},
    ("structured", "depth estimation"): {"layers": ("neck.convs.0",), "pixel": 0.0, "granularity": (1, 1)},
    **{(name, "object detection (DETR)"): {"layers": (STAGE,)} for name in ("nst", "quest")},
    ("cwd", "object detection (DETR)"): {"layers": (STAGE,), "logit_weight": 0.0},
    ("structured", "object detection (DETR)"): {
        "layers": (STAGE,),
        "pixel": 0.0,
        "holistic": 0.0,
        "granularity": (1, 1),
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "internal": ALL,
    "quest": {"words": 2},
    "structured": {"critic_width": 4},
    "noisy": {"messy": 0.5},
    "crd": {"negatives": 4, "others": "rows"},
}
OF_EXAMPLES = ("crd", "pkt", "rkd")
"""The methods whose layers need not be maps."""
# transformers computes no loss of these.
LOSSES = {"depth estimation": lambda output, labels, **_: (output.predicted_depth - labels).abs().mean()}


def test_methods_like_those_of_the_table() -> None:
    """What the page says of the methods that have no column."""
    kd, nst, tokens = get_distiller("kd").tasks, get_distiller("nst"), {"token", "causal-lm", "ctc"}
    for name in ("dkd", "dist", "endd"):
        assert set(get_distiller(name).tasks) == set(kd) - {"multilabel", "regression", "ctc"}
    for name in ("at", "fitnet", "reviewkd", "sp", "vid", *OF_EXAMPLES):
        assert get_distiller(name).tasks == nst.tasks
        assert get_distiller(name).maps == (name not in OF_EXAMPLES)
    assert not tokens & set(nst.tasks)


# Of the models that have no maps one of each kind.
@pytest.mark.parametrize("model", ["text classification", "regression", "multiple choice", "audio classification"])
@pytest.mark.parametrize("method", OF_EXAMPLES)
def test_methods_that_read_no_maps(tmp_path: Path, model: str, method: str) -> None:
    test_method_and_model(tmp_path, model, method, (method, model) != ("crd", "multiple choice"))


@pytest.mark.parametrize(("model", "method", "fits"), cells())
def test_method_and_model(tmp_path: Path, model: str, method: str, fits: bool) -> None:
    make, data = MODELS[model]
    torch.manual_seed(0)
    # A step for each stage.
    steps = 2 if method == "ksanc" else 1
    given: dict[str, Any] = {"student": make(1), "of": make(2), "data": data, "max_steps": steps, "learning_rate": 0.1}
    given["given"] = {"compute_loss_func": LOSSES[model]} if model in LOSSES else {}
    given["given"] |= {"data_collator": boxes} if "detection" in model else {}
    options = {**DEFAULTS.get(method, {}), **OPTIONS.get((method, model), {})}
    if not fits:
        with pytest.raises(DistillError):
            trainer(tmp_path, method, options, **given).train()
        return
    run = trainer(tmp_path, method, options, **given)
    run.train()
    terms = {name for entry in run.state.log_history for name in entry if name.startswith("distill/")} - {
        "distill/task"
    }
    assert terms
    assert all(np.isfinite(logged(run, name)).all() for name in terms)
    assert any(value != 0 for name in terms for value in logged(run, name))
