"""DistillationTrainer with other networks: text models by structure, images, token models, teachers' own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from image_kit import Images
from torch import Tensor
from trainer_kit import NO_DROPOUT, TINY, Texts, bert, calls, logged, moved, teacher, trainer, weights

from kd_plugins import DistillError
from kd_plugins import functional as KF
from kd_plugins.reading.network import adapt

DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
TEXT_MODELS: dict[str, Any] = {
    "roberta": lambda n: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**TINY, **NO_DROPOUT, num_hidden_layers=n, pad_token_id=0)
    ),
    "distilbert": lambda n: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=64, dim=16, n_layers=n, n_heads=2, hidden_dim=32, num_labels=3, max_position_embeddings=24
        )
    ),
    "electra": lambda n: hf.ElectraForSequenceClassification(
        hf.ElectraConfig(**TINY, **NO_DROPOUT, num_hidden_layers=n, embedding_size=8)
    ),
    "mpnet": lambda n: hf.MPNetForSequenceClassification(
        hf.MPNetConfig(**TINY, **NO_DROPOUT, num_hidden_layers=n, pad_token_id=0)
    ),
    "deberta-v2": lambda n: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**TINY, **NO_DROPOUT, **DEBERTA, num_hidden_layers=n)
    ),
}


def vit(layers: int) -> Any:
    config = hf.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=layers,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    return hf.ViTForImageClassification(config)


def resnet(depths: list[int], width: int = 8) -> Any:
    sizes = [width, 2 * width]
    config = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=sizes,
        depths=depths,
        layer_type="basic",
        num_labels=3,
        downsample_in_first_stage=True,
    )
    return hf.ResNetForImageClassification(config)


def finite(run: Any, *terms: str) -> None:
    """Every logged value of the terms is finite, and above 0 at some point."""
    for term in terms:
        values = logged(run, f"distill/{term}")
        assert values
        assert np.isfinite(values).all()
        assert max(values) > 0


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_by_structure(tmp_path: Path, name: str) -> None:
    """internal stacked reads every layer of text models that no code here names, and stops where a phase ends."""
    torch.manual_seed(0)
    student, of = TEXT_MODELS[name](2), TEXT_MODELS[name](4)
    run = trainer(tmp_path, "internal", student=student, of=of, max_steps=6)
    before = weights(student)
    stack = next(m for m in student.modules() if isinstance(m, torch.nn.ModuleList))
    with calls({"lower": stack[0], "upper": stack[1]}) as counts:
        run.train()
    assert run.distiller.pairs == {1: 2, 2: 4}
    # One forward of all layers to find them and one to measure, then six steps, of which two need one layer.
    assert counts["lower"] - counts["upper"] == 2
    finite(run, "kl_attention", "cos_hidden", "soft_labels")
    assert len(moved(before, student)) > len(before) // 2


def test_vision_transformers(tmp_path: Path) -> None:
    """A pair of ViTs under internal: no mask, one image a row."""
    run = trainer(tmp_path, "internal", student=vit(2), of=vit(4), data=Images(8, size=32), max_steps=6)
    run.train()
    finite(run, "kl_attention", "cos_hidden", "soft_labels")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((-1,), ["resnet.encoder.stages.1"]), ((0, -1), None), (("resnet.encoder.stages.0.layers.0",), None)],
)
def test_convolutional_networks(tmp_path: Path, layers: tuple[Any, ...], expected: list[str] | None) -> None:
    """A pair of ResNets under nst: stage numbers, or module paths."""
    options = {"layers": layers}
    run = trainer(
        tmp_path,
        "nst",
        options,
        student=resnet([1, 1]),
        of=resnet([2, 2], width=16),
        data=Images(8, size=32),
        max_steps=3,
    )
    before = weights(run.model)
    run.train()
    finite(run, "nst", "task")
    assert moved(before, run.model)
    if expected:
        assert list(run.player.nets.student.network.tap._handles) == expected


def test_the_layers_of_one_stack_are_stages(tmp_path: Path) -> None:
    """By number as by module path; of two stacks, or layers that share their weights, none has a number."""

    def train(folder: str, layers: tuple[Any, ...], teacher_layers: tuple[Any, ...]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        options = {"layers": layers, "teacher_layers": teacher_layers}
        run = trainer(tmp_path / folder, "rkd", options, student=bert(2), of=bert(4), max_steps=2)
        run.train()
        return weights(run.model)

    path = "bert.encoder.layer"
    numbered, named = train("numbers", (-1,), (-1,)), train("paths", (f"{path}.1",), (f"{path}.3",))
    assert all(torch.equal(numbered[key], named[key]) for key in named)
    assert adapt(bert(3)).stages() == [f"{path}.{i}" for i in range(3)]
    t5 = hf.T5Config(d_model=16, num_layers=2, num_heads=2, d_ff=32, vocab_size=64)
    albert = hf.AlbertConfig(**TINY, num_hidden_layers=2, embedding_size=8)
    for model in (hf.T5ForConditionalGeneration(t5), hf.AlbertForSequenceClassification(albert)):
        with pytest.raises(DistillError, match="no numbered stages"):
            adapt(model).stages()


def test_nst_equals_the_function(tmp_path: Path) -> None:
    """What is logged is the published function of the stages' outputs."""
    student, of, data = resnet([1, 1]), resnet([2, 2]), Images(8, size=32)
    inputs = data.images[:4]
    with torch.no_grad():
        theirs = of.eval()(inputs, output_hidden_states=True).hidden_states[-1]
        ours = student.train()(inputs, output_hidden_states=True).hidden_states[-1]
    run = trainer(tmp_path, "nst", {"weight": 3.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    assert logged(run, "distill/nst")[0] == pytest.approx(3.0 * float(KF.nst(ours, theirs, "poly")), rel=1e-5)


def test_token_classification(tmp_path: Path) -> None:
    """kd per token: labels of -100 and padding are left out, every example counts the same."""
    config = {**TINY, **NO_DROPOUT, "num_hidden_layers": 1}
    torch.manual_seed(0)
    student, of = (hf.BertForTokenClassification(hf.BertConfig(**config)) for _ in range(2))
    data = Texts()
    data.labels = torch.where(data.mask.bool(), data.ids % 3, -100)
    data.labels[:, 0] = -100
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    batch = {k: v[:4] for k, v in data.batch().items()}
    labels = batch.pop("labels")
    with torch.no_grad():
        s, t = ((net.eval()(**batch).logits / 4).log_softmax(-1) for net in (student, of))
    rows = (t.exp() * (t - s)).sum(-1) * 16
    expected = torch.stack([row[label != -100].mean() for row, label in zip(rows, labels, strict=True)]).mean()
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)


def test_token_classes_in_another_order(tmp_path: Path) -> None:
    """The order of the classes counts for token models too."""
    config = {**TINY, **NO_DROPOUT, "num_hidden_layers": 1}
    names, order = ["O", "PER", "LOC"], [2, 0, 1]
    torch.manual_seed(0)
    of = hf.BertForTokenClassification(hf.BertConfig(**config, id2label=dict(enumerate(names))))
    permuted = hf.BertForTokenClassification(
        hf.BertConfig(**config, id2label={i: names[o] for i, o in enumerate(order)})
    )
    permuted.load_state_dict(of.state_dict())
    with torch.no_grad():
        for parameter in permuted.classifier.parameters():
            parameter.copy_(parameter[order].clone())
    data = Texts()
    data.labels = data.ids % 3
    losses = []
    for net in (of, permuted):
        torch.manual_seed(1)
        student = hf.BertForTokenClassification(hf.BertConfig(**config, id2label=dict(enumerate(names))))
        run = trainer(tmp_path, student=student, of=net, data=data, max_steps=1)
        run.train()
        losses.append(logged(run, "distill/kd")[0])
    assert losses[0] == losses[1] > 0


def test_masked_language_models(tmp_path: Path) -> None:
    """Logits over the vocabulary have no class names to match."""
    config = {**TINY, **NO_DROPOUT, "num_hidden_layers": 1}
    data = Texts()
    data.labels = torch.where(data.mask.bool(), data.ids, -100)
    student, of = (hf.BertForMaskedLM(hf.BertConfig(**{**config, "num_labels": n})) for n in (2, 3))
    run = trainer(tmp_path, student=student, of=of, data=data, max_steps=2)
    run.train()
    finite(run, "kd", "task")


def distilbert() -> Any:
    torch.manual_seed(0)
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    config = hf.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3, **rates)
    return hf.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize("arrow", [True, False])
def test_inputs_that_only_the_teacher_takes(tmp_path: Path, arrow: bool) -> None:
    """A BERT teacher of a DistilBERT needs token_type_ids, which remove_unused_columns would drop silently."""
    of, types = teacher(), Texts().mask.clone()
    types[:, :3] = 0
    with torch.no_grad():
        of.bert.embeddings.token_type_embeddings.weight.mul_(50)
    data: Any = Texts(extra={"token_type_ids": types})
    inputs = {k: v[:4] for k, v in data.batch().items() if k != "labels"}
    if arrow:
        data = Dataset.from_list([{k: v.tolist() for k, v in data[i].items()} for i in range(len(data))])
        data = data.with_format("torch")
    student = distilbert()
    with torch.no_grad():
        s, t = student.eval()(**inputs).logits, of(**inputs, token_type_ids=types[:4]).logits
        wrong = of(**inputs).logits
    run = trainer(
        tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1, given={"eval_dataset": data}
    )
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(KF.kd(s, t)), rel=1e-4)
    assert float(KF.kd(s, t)) != pytest.approx(float(KF.kd(s, wrong)), rel=1e-3)
    assert "eval_loss" in run.evaluate()


def test_inputs_that_only_the_student_takes(tmp_path: Path) -> None:
    """A DistilBERT teacher of a BERT ignores token_type_ids."""
    of = distilbert()
    data = Texts(extra={"token_type_ids": Texts().mask})
    inputs = {k: v[:4] for k, v in data.batch().items() if k != "labels"}
    student = bert()
    with torch.no_grad():
        s = student.eval()(**inputs, token_type_ids=data.mask[:4]).logits
        expected = KF.kd(s, of.eval()(**inputs).logits)
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    """teacher_ columns of another length and vocabulary teach through the logits, from plain dicts too."""
    rows = Texts()
    ids = torch.randint(5, 128, (16, 14), generator=torch.Generator().manual_seed(2))
    data = Texts(extra={"teacher_input_ids": ids, "teacher_attention_mask": torch.ones_like(ids)})
    of, student = teacher(vocab_size=128), bert()
    with torch.no_grad():
        s = student.eval()(rows.ids[:4], rows.mask[:4]).logits
        expected = KF.kd(s, of.eval()(ids[:4]).logits)
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)


class Plain(torch.nn.Module):
    """A plain module that returns a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy if labels.dim() == 1 else F.binary_cross_entropy_with_logits
        return {"loss": loss(logits, labels), "logits": logits}


def test_a_model_that_is_no_transformers_model(tmp_path: Path) -> None:
    """A plain module that returns a dict trains under kd, as it does under Trainer."""
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(16)]
    run = trainer(tmp_path, student=Plain(4), of=Plain(8), data=rows, save_strategy="epoch")
    before = weights(run.model)
    run.train()
    finite(run, "kd", "task")
    assert moved(before, run.model)


def test_float_labels_of_a_model_that_is_no_transformers_model(tmp_path: Path) -> None:
    """They are soft labels, several classes or numbers, which kd compares in different ways."""
    rows = [{"x": torch.randn(4), "labels": torch.eye(3)[i % 3]} for i in range(4)]
    student, of, inputs = Plain(4), Plain(8), torch.stack([row["x"] for row in rows])
    with torch.no_grad():
        expected = KF.kd_multilabel(student(inputs)["logits"], of(inputs)["logits"])
    with pytest.raises(DistillError, match=r"say it with task="):
        trainer(tmp_path, student=student, of=of, data=rows).train()
    given = {"task": "multilabel"}
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=rows, given=given, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)
