"""What cannot work is refused with the reason before the first step, and the student stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from test_matrix import depth_estimator
from test_trainer_networks import Images, resnet, vit
from test_trainer_tasks import rows_of
from torch import nn
from trainer_kit import NO_DROPOUT, TINY, Texts, arguments, bert, difference, teacher, trainer, weights

from kd_plugins import DistillError, create_distiller
from kd_transformers import DistillationTrainer


def named(names: list[str], make: Any = bert) -> Any:
    return make(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def unknown() -> Any:
    return hf.BertForNextSentencePrediction(hf.BertConfig(**{**TINY, "num_hidden_layers": 1}))


def sound(vocabulary: int = 8) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    convolutions = {"conv_dim": (4,), "conv_kernel": (4,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embedding_groups": 1, "num_conv_pos_embeddings": 2}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(vocab_size=vocabulary, **sizes, **convolutions, **positions))


def causal(vocabulary: int) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=vocabulary, **sizes, **heads))


AT_CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "unknown distiller": ({"distiller": "kdd"}, "[Dd]id you mean.*kd"),
    "option typo": ({"options": {"temprature": 2.0}}, "[Dd]id you mean.*temperature"),
    "ill-typed option": ({"options": {"temperature": "hot"}}, "temperature"),
    "value out of range": ({"options": {"alpha": 1.5}}, "alpha to be float from 0 to 1"),
    "options of an object": ({"distiller": create_distiller("kd"), "options": {"alpha": 0.5}}, "given by name"),
    "no distiller": ({"distiller": 3}, "Expected a distiller or the name of one"),
    "two teachers": ({"distiller": "internal", "of": [teacher(), teacher()]}, "internal needs one teacher, got 2"),
    "peers": ({"given": {"peer_models": [bert()]}}, "trains one student, got 1 peers"),
    "other number of classes": ({"of": teacher(num_labels=5)}, "3 in the student and 5"),
    "other class names": (
        {"student": named(["a", "b", "c"]), "of": named(["a", "b", "d"], teacher)},
        "name their 3 classes differently",
    ),
    "regression": (
        {"distiller": "dkd", "student": bert(num_labels=1), "of": teacher(num_labels=1)},
        "a model for regression",
    ),
    "regression by its type": (
        {"distiller": "dkd", "student": bert(problem_type="regression"), "of": teacher(problem_type="regression")},
        "a model for regression",
    ),
    "question answering": (
        {"student": hf.BertForQuestionAnswering(hf.BertConfig(**{**TINY, "num_labels": 2, "num_hidden_layers": 1}))}
        | {"of": teacher(num_labels=2)},
        "Expected a teacher for question answering, as the student is, got BertForSequenceClassification",
    ),
    "sound": ({"distiller": "dkd", "student": sound(), "of": sound()}, "Wav2Vec2ForCTC is a model for ctc"),
    "another alphabet": ({"student": sound(), "of": sound(9)}, "tokens to choose from, got 8 in the student and 9"),
    "a kind that is not known": (
        {"student": unknown(), "of": unknown()},
        "the class BertForNextSentencePrediction does not tell what its scores are: say it with task=",
    ),
    "a task that is not known": (
        {"student": unknown(), "of": unknown(), "given": {"task": "tokens"}},
        "Expected a task among classification, .*, got 'tokens'",
    ),
    "a padded vocabulary": (
        {"student": causal(64), "of": causal(80)},
        r"teacher\.resize_token_embeddings\(64\) drops them",
    ),
    "masked language models of two vocabularies": (
        {
            "student": hf.BertForMaskedLM(hf.BertConfig(**{**TINY, "num_hidden_layers": 1})),
            "of": hf.BertForMaskedLM(hf.BertConfig(**{**TINY, "vocab_size": 65, "num_hidden_layers": 1})),
        },
        "tokens to choose from, got 64 in the student and 65",
    ),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
def test_refused_at_construction(tmp_path: Path, case: str) -> None:
    """What the networks' configurations and the options tell needs no data."""
    given, message = AT_CONSTRUCTION[case]
    with pytest.raises(DistillError, match=f"(?s){message}"):
        trainer(tmp_path, **given)


def test_missing_teacher(tmp_path: Path) -> None:
    """A method with a teacher says how to give one; a teacher without a method says so."""
    for missing in (None, []):
        with pytest.raises(DistillError, match="kd needs at least one teacher, got 0: give one"):
            DistillationTrainer(
                bert(), arguments(tmp_path), train_dataset=Texts(), teacher_model=missing, distiller="kd"
            )
    with pytest.raises(DistillError, match="without a distiller"):
        DistillationTrainer(bert(), arguments(tmp_path), train_dataset=Texts(), teacher_model=teacher())


class Convolutions(nn.Module):
    """A classifier of token ids without any attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([nn.Conv1d(8, 8, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        x = self.embed(input_ids).transpose(1, 2)
        for layer in self.layers:
            x = layer(x).relu()
        logits = self.head(x.mean(-1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def config(**options: Any) -> Any:
    return hf.BertConfig(**{**TINY, **NO_DROPOUT, "num_hidden_layers": 2, **options})


class Numberless(torch.utils.data.IterableDataset):
    """Images that come in a row."""

    def __iter__(self) -> Any:
        return iter([Images()[i] for i in range(8)])


BEFORE_TRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"distiller": "internal", "of": teacher(num_attention_heads=4)},
        "as many heads",
    ),
    "hidden sizes": (
        {"distiller": "internal", "of": teacher(hidden_size=32)},
        r"hidden states \[B, L, H\] of one size H, got .* 16\] at the student's layer 1 and .* 32\]",
    ),
    "shallow teacher": ({"distiller": "internal", "of": bert(1)}, "at least as deep as the student, got 1"),
    "layer pair": ({"distiller": "internal", "options": {"layers": "1:9"}}, "layer pair 1:9 does not exist"),
    "no attention": (
        {"distiller": "internal", "student": resnet([1, 1]), "of": vit(2), "data": Images(size=32)},
        "attention can be read, got ResNetForImageClassification",
    ),
    "no attention in a plain module": ({"distiller": "internal", "student": Convolutions()}, "no transformer layers"),
    "layer path": (
        {
            "distiller": "nst",
            "options": {"layers": ("resnet.encoder.stage.0",)},
            "student": resnet([1, 1]),
            "of": resnet([1, 1]),
            "data": Images(),
        },
        "(?s)no module 'resnet.encoder.stage.0'.*stages",
    ),
    "stages that are no maps": (
        {"distiller": "nst", "student": vit(1), "of": vit(2), "data": Images(8, size=32)},
        r"nst reads maps \[B, C, H, W\], got .* at the layer -1 of ViT",
    ),
    "vocabulary": (
        {"of": teacher(vocab_size=99)},
        "vocabulary of 64 tokens and .* with 99:",
    ),
    "padding": ({"of": teacher(pad_token_id=1)}, "token 0 as padding and .* with 1:"),
    "another problem": (
        {"of": teacher(problem_type="multi_label_classification")},
        "a teacher for classification, .* with problem_type='multi_label_classification'",
    ),
    "teacher without a head": ({"of": hf.BertModel(config(num_hidden_layers=4))}, "to return its scores"),
    "no task loss": (
        {
            "distiller": "nst",
            "options": {"layers": ("neck.convs.0",)},
            "student": depth_estimator(),
            "of": depth_estimator(),
            "data": rows_of({"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.rand(4, 32, 32)}),
        },
        "DPTForDepthEstimation gives no task loss .*: where it has none, give one, compute_loss_func=",
    ),
    "row numbers of a stream": (
        {"distiller": "crd", "student": resnet([1, 1]), "of": resnet([1, 1]), "data": Numberless(), "max_steps": 2},
        "crd reads row numbers .* which neither a stream nor a loader of your own gives: give a train_dataset",
    ),
    "empty data": ({"data": [], "max_steps": 3}, "empty train_dataset"),
    "empty data, shuffled": ({"data": [], "train_sampling_strategy": "random"}, "empty train_dataset: give rows"),
}


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    """What only a batch tells is refused before the student has changed, or its mode, or the random state's use."""
    given, message = BEFORE_TRAINING[case]
    given = {"student": bert(), **given}
    before = weights(given["student"])
    with pytest.raises(DistillError, match=message):
        trainer(tmp_path, **given).train()
    assert difference(before, weights(given["student"])) == 0.0
    assert all(p.grad is None for p in given["student"].parameters())


def test_vocabulary_of_an_arrow_data_set(tmp_path: Path) -> None:
    """Where the columns are known, other vocabularies are refused at construction."""
    from datasets import Dataset

    data = Texts()
    rows = [{k: v.tolist() for k, v in data[i].items()} for i in range(4)]
    with pytest.raises(DistillError, match="vocabulary of 64 tokens"):
        trainer(tmp_path, of=teacher(vocab_size=99), data=Dataset.from_list(rows))


def test_vocabulary_beside_inputs_that_the_teacher_alone_takes(tmp_path: Path) -> None:
    """They are columns of its own and no tokens of its own; where it has tokens, every teacher reads them."""
    tiny = hf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3)
    types, ids = (torch.zeros(16, 10, dtype=torch.long) for _ in range(2))
    data = Texts(extra={"token_type_ids": types})
    with pytest.raises(DistillError, match=r"vocabulary of 64 tokens and .* with 99:"):
        trainer(
            tmp_path, student=hf.DistilBertForSequenceClassification(tiny), of=teacher(vocab_size=99), data=data
        ).train()
    data = Texts(extra={"teacher_input_ids": ids})
    trainer(tmp_path, of=[teacher(vocab_size=99), teacher(vocab_size=99)], data=data, max_steps=1).train()
    with pytest.raises(DistillError, match="every teacher, got teachers with vocabularies of 64 and 99 tokens"):
        trainer(tmp_path, of=[teacher(vocab_size=99), teacher()], data=data).train()


def test_float_labels_are_a_task_of_their_own(tmp_path: Path) -> None:
    """A method that fits classes alone refuses multi-label data, which only the labels tell."""

    class Classes(type(create_distiller("kd"))):  # type: ignore[misc]
        tasks = ("classification",)

    data = Texts()
    data.labels = torch.nn.functional.one_hot(data.labels, 3).float()
    with pytest.raises(DistillError, match="a model for multilabel"):
        trainer(tmp_path, Classes(), data=data).train()


def test_peers_in_another_order(tmp_path: Path) -> None:
    """Peers learn from the student's labels, so their classes must be numbered alike."""

    class Mutual(type(create_distiller("kd"))):  # type: ignore[misc]
        teachers, peers = 0, True

    peer = named(["b", "a", "c"])
    with pytest.raises(DistillError, match="number their classes as the student does"):
        DistillationTrainer(
            named(["a", "b", "c"]), arguments(tmp_path), train_dataset=Texts(), peer_models=[peer], distiller=Mutual()
        )
