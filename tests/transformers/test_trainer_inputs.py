"""What reaches a method of a batch: row numbers, frames of sound, the decoder's inputs, labels; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from torch.utils.data import IterableDataset
from trainer_kit import Texts, arguments, bert, logged, trainer

from kd_accelerate.streams import StagedDataset
from kd_plugins import Batch, DistillError, View, create_distiller
from kd_plugins.reading.scores import class_scores
from kd_report import load_run
from kd_transformers import DistillationTrainer, cache_teacher
from kd_transformers.columns import with_padding

CRD = {"layers": ["classifier:in"], "negatives": 4}


def wav2vec(cls: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    quiet = ("hidden", "attention", "activation", "feat_proj", "final")
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        mask_time_prob=0.0,
        layerdrop=0.0,
        feat_extract_norm="layer",
        **{f"{name}_dropout": 0.0 for name in quiet},
    )
    return cls(config)


def sounds(labels: Any) -> list[dict[str, Any]]:
    """Four sounds, two of them of half the length."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(4):
        length = 400 if i % 2 else 200
        values = torch.zeros(400)
        values[:length] = torch.randn(length, generator=generator)
        rows.append(
            {"input_values": values, "attention_mask": (torch.arange(400) < length).long(), "labels": labels(i)}
        )
    return rows


def test_padded_frames_do_not_count(tmp_path):
    """Of frames as of tokens, the mean is over those of the sound alone."""
    student, of = (wav2vec(transformers.Wav2Vec2ForAudioFrameClassification, seed) for seed in (0, 1))
    lengths = torch.tensor([200, 400, 200, 400])
    frames = student._get_feat_extract_output_lengths(lengths)
    rows = sounds(lambda i: F.one_hot(torch.arange(int(frames[1])) % 3, 3))
    inputs = transformers.default_data_collator(rows)
    inputs.pop("labels")
    with torch.no_grad():
        s, t = (net.eval()(**inputs).logits for net in (copy.deepcopy(student), of))
    kl = (F.softmax(t / 4, -1) * (F.log_softmax(t / 4, -1) - F.log_softmax(s / 4, -1))).sum(-1)
    means = torch.stack([row[:n].mean() for row, n in zip(kl, frames, strict=True)])
    run = trainer(tmp_path, student=student, of=of, data=rows, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(0.9 * 16 * float(means.mean()), rel=1e-4)


def test_layers_of_a_sound_are_compared_at_its_frames(tmp_path):
    student, of = (wav2vec(transformers.Wav2Vec2ForSequenceClassification, seed) for seed in (0, 1))
    run = trainer(tmp_path, "internal", {"schedule": "all"}, student=student, of=of, data=sounds(int), max_steps=1)
    batch = run._batch(transformers.default_data_collator(sounds(lambda i: i % 3)))
    assert batch.mask.sum(1).tolist() == student._get_feat_extract_output_lengths(torch.tensor([200, 400] * 2)).tolist()


def test_a_mask_of_other_tokens_is_refused():
    view, batch = View(torch.zeros(2, 3, 4)), Batch.of(torch.zeros(2, 8), task="token", mask=torch.ones(2, 8))
    with pytest.raises(DistillError, match=r"Expected a mask of each of the scores \[2, 3, 4\], got \[2, 8\]"):
        class_scores(view, view, batch)


def test_labels_with_an_axis_of_their_own_are_classes():
    view, batch = View(torch.zeros(2, 3)), Batch.of(torch.zeros(2, 8), torch.tensor([[1], [2]]))
    assert class_scores(view, view, batch).hard_labels("dkd")[0].tolist() == [[1], [2]]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_method_of_row_numbers_trains(tmp_path, grouped):
    """Its memory is set up by rows that have numbers, whatever draws them."""
    rows = Dataset.from_list([{k: v.tolist() for k, v in Texts()[i].items()} for i in range(16)])
    sampling = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    run = trainer(tmp_path, "crd", CRD, data=rows, num_train_epochs=1, **sampling)
    run.train()
    assert run.state.global_step == 4
    assert all(value > 0 for value in logged(run, "distill/crd"))


def test_a_staged_set_ends():
    assert list(StagedDataset(list("abc"), create_distiller("kd"), 1, 0)) == list("abc")


def test_one_vector_for_every_choice_is_refused(tmp_path):
    torch.manual_seed(0)
    config = bert().config
    nets = [transformers.BertForMultipleChoice(config) for _ in range(2)]
    choices = {"input_ids": torch.full((3, 4), 7), "attention_mask": torch.ones(3, 4, dtype=torch.long), "labels": 0}
    with pytest.raises(DistillError, match="crd remembers one vector of each example, got 12"):
        trainer(tmp_path, "crd", CRD, student=nets[0], of=nets[1], data=[choices] * 4).train()


def test_a_stream_with_a_length_is_trained_for_its_epochs(tmp_path):
    class Sized(IterableDataset):
        def __len__(self) -> int:
            return 12

        def __iter__(self) -> Any:
            return iter([Texts()[i] for i in range(12)])

    run = trainer(tmp_path, data=Sized(), num_train_epochs=2)
    run.train()
    assert run.state.global_step == 6


def m2m100(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    quiet = dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0
    )
    return transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(vocab_size=40, d_model=16, max_position_embeddings=32, **quiet, **sizes, **heads)
    )


def whisper(seed: int, mels: int) -> Any:
    torch.manual_seed(seed)
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40,
            num_mel_bins=mels,
            d_model=16,
            max_source_positions=20,
            max_target_positions=16,
            dropout=0.0,
            **sizes,
            **heads,
            **tokens,
        )
    )


def test_a_decoder_reads_what_its_model_makes_of_labels(tmp_path):
    """Models that shift the labels in their forward are given what they would have made; the task loss is Trainer's."""
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [8, 9, 2, -100]}] * 4
    student = m2m100(0)
    with torch.no_grad():
        loss = float(student(**{k: torch.tensor([row[k] for row in rows]) for k in rows[0]}).loss)
    run = trainer(tmp_path, student=student, of=m2m100(1), data=rows, options={"alpha": 0.0}, max_steps=1)
    run.train()
    assert logged(run, "distill/task")[0] == pytest.approx(loss, rel=1e-5)


def test_a_teacher_may_hear_features_of_its_own(tmp_path):
    """Other features are no other tokens, and the decoders read the same."""
    torch.manual_seed(0)
    rows = [
        {"input_features": torch.randn(8, 40), "teacher_input_features": torch.randn(12, 40), "labels": [4, 5, 6, 7]}
        for _ in range(4)
    ]
    student, of = whisper(0, 8), whisper(1, 12)
    inputs = transformers.default_data_collator(rows)
    with torch.no_grad():
        s = copy.deepcopy(student).eval()(input_features=inputs["input_features"], labels=inputs["labels"]).logits
        t = of.eval()(input_features=inputs["teacher_input_features"], labels=inputs["labels"]).logits
    expected = F.kl_div(F.log_softmax(s / 4, -1), F.log_softmax(t / 4, -1), log_target=True, reduction="none").sum(-1)
    run = trainer(tmp_path, student=student, of=of, data=rows, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(0.9 * 16 * float(expected.mean()), rel=1e-3)


# The record


def test_a_record_of_rows_without_labels(tmp_path):
    """The decisions are counted, and nothing is said of their rightness."""
    rows = [{k: v for k, v in Texts(8)[i].items() if k != "labels"} for i in range(8)]
    trainer(tmp_path, given={"eval_dataset": rows, "record": True}).train()
    found = load_run(tmp_path).part("after", "predictions", "student")
    assert found["examples"] == 8
    assert 0 <= found["agreement"] <= 1
    assert "accuracy" not in found


def test_a_record_reads_what_the_evaluation_reads(tmp_path):
    """The teacher's own columns are padded, and a loader of the user's own is taken."""

    class Own(DistillationTrainer):
        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            drop = lambda items: transformers.default_data_collator([{**x, "junk": 0} for x in items])  # noqa: E731
            return torch.utils.data.DataLoader(self.eval_dataset, 8, collate_fn=drop)

    rows = [{**Texts(8)[i], "junk": [[1]] * (i % 3)} for i in range(8)]
    trainer(tmp_path, cls=Own, given={"eval_dataset": rows, "record": True}).train()
    run = load_run(tmp_path)
    assert not run.info["notes"]
    assert run.part("after", "predictions", "student", "examples") == 8


def test_a_record_has_the_task_that_was_said(tmp_path):
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(64, 3)

        def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
            logits = self.embedding(input_ids)
            loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    rows = [{"input_ids": [5, 6, 7], "labels": [0, 1, 2]}] * 8
    given = {"task": "token", "record": True, "eval_dataset": rows}
    trainer(tmp_path, student=Tagger(), of=Tagger(), data=rows, given=given, max_steps=1).train()
    run = load_run(tmp_path)
    assert run.info["task"] == "token"
    assert run.part("after", "predictions", "student", "examples") == 24


# What is refused


def test_a_training_of_no_epochs_ends_at_once(tmp_path):
    run = trainer(tmp_path, num_train_epochs=0)
    run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_model": 5, "distiller": "kd"}, "Expected a network .* as teacher, got 5"),
        ({"distiller": "kd", "distiller_args": ["temperature=2"]}, "Expected distiller_args by name"),
        ({"task": "token"}, "task says what a distiller's scores are"),
        ({"distiller": "afd", "peer_models": [torch.nn.Linear(1, 1)]}, "a peer whose forward takes labels"),
    ],
)
def test_what_is_none_is_refused(tmp_path, given, message):
    with pytest.raises(DistillError, match=message):
        DistillationTrainer(bert(), arguments(tmp_path), train_dataset=Texts(), **given)


@pytest.mark.parametrize("gain", [{"accuracy": 0.8}, {"accuracy": ("0.8", "0.3", "1.3")}, [("accuracy", 0.8)]])
def test_no_gain_is_refused(tmp_path, gain):
    with pytest.raises(DistillError, match="gain"):
        trainer(tmp_path).create_model_card(gain=gain)


@pytest.mark.parametrize("given", ["bert", []])
def test_no_teacher_is_refused(given):
    with pytest.raises(DistillError, match="teacher"):
        cache_teacher(Dataset.from_list([{"input_ids": [1]}]), given)


def causal(name: str, seed: int) -> Any:
    """A language model whose scores follow what comes before."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "n_layers": 1, "num_attention_heads": 2, "n_heads": 2}
    sizes |= {"hidden_size": 16, "d_model": 16, "word_embed_proj_dim": 16, "intermediate_size": 32, "ffn_dim": 32}
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = cls(cls.config_class(**sizes, num_key_value_heads=2, pad_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("name", ["OPT", "Mpt"])
def test_packed_texts_are_seen_alike(tmp_path, name):
    """A teacher that takes no positions (MPT), or makes no mask of them (OPT), would see all texts of a row as one."""

    def train(student: Any, rows: Any, collate: Any = None) -> None:
        given = {"data_collator": collate or transformers.DataCollatorWithFlattening()}
        trainer(tmp_path, student=student, of=causal(name, 1), data=rows, given=given, max_steps=1).train()

    texts = [{"input_ids": list(range(3, 3 + n))} for n in (5, 9, 7)]
    with pytest.raises(DistillError, match=f"which LlamaForCausalLM sees apart and {name}ForCausalLM as one"):
        train(causal("Llama", 0), texts)
    train(causal(name, 0), texts)  # as without a teacher
    train(causal("Llama", 0), texts[:1])
    train(
        causal("Llama", 0),
        [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 4,
        transformers.default_data_collator,
    )


@pytest.mark.parametrize("lengths", [[[4, 4], [5, 5]], [[4, 5], [4, 5]]])
def test_choices_of_unequal_lengths_are_not_padded(lengths):
    collate = with_padding(transformers.default_data_collator, [bert(pad_token_id=0)])
    rows = [{"labels": 0, "teacher_input_ids": [[7] * n for n in row]} for row in lengths]
    with pytest.raises(DistillError, match="teacher_input_ids has several sequences a row .*: pad all to one length"):
        collate(rows)
    assert collate([rows[0] | {"teacher_input_ids": [[7] * 4, [8] * 4]}])["teacher_input_ids"].shape == (1, 2, 4)


def test_a_teacher_of_another_image_size_needs_images_of_its_own(tmp_path):
    def vit(size: int) -> Any:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(image_size=size, patch_size=8, num_labels=3, **sizes)
        return transformers.ViTForImageClassification(config)

    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": 1}] * 4
    words = r"ViTForImageClassification does not take the images .*16\*16.*32\*32.*: give .* teacher_pixel_values"
    with pytest.raises(DistillError, match=words):
        trainer(tmp_path, student=vit(16), of=vit(32), data=rows, max_steps=1).train()
    rows = [row | {"teacher_pixel_values": torch.randn(3, 32, 32)} for row in rows]
    trainer(tmp_path, student=vit(16), of=vit(32), data=rows, max_steps=1).train()


def test_a_teacher_of_which_layers_are_read_need_not_end_its_forward(tmp_path):
    """A model of images and texts (CLIP) teaches with its image encoder, and the data have no texts."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    images = sizes | {"image_size": 16, "patch_size": 8}
    student = transformers.ViTForImageClassification(transformers.ViTConfig(**images, num_labels=3))
    clip = transformers.CLIPConfig(text_config=sizes, vision_config=images, projection_dim=8)
    made = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1),
        train_dataset=[{"pixel_values": torch.randn(3, 16, 16), "labels": 1} for _ in range(4)],
        teacher_model=transformers.CLIPModel(clip),
        distiller="rkd",
        distiller_args={"layers": ["vit.layers.0"], "teacher_layers": ["vision_model.post_layernorm"]},
    )
    made.train()
    assert made.state.log_history[0]["distill/rkd"] > 0
