"""DistillationTrainer by task: which scores are compared, which of them count, and what the task loss is."""

from __future__ import annotations

import copy
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from image_kit import Images, image_classifier
from torch import Tensor, nn
from trainer_kit import (
    NO_DROPOUT,
    TINY,
    Texts,
    bert,
    difference,
    logged,
    moved,
    parts,
    teacher,
    trainer,
    weights,
)
from transformers import Trainer

from kd_plugins import Distiller, DistillError, Needs, Stage
from kd_plugins.nn.codebook import fingerprint_of
from kd_transformers import cache_teacher
from kd_transformers.columns import with_padding
from kd_transformers.playing import divides

BERT = {**TINY, **NO_DROPOUT, "num_hidden_layers": 1}
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The soft-label term of each row, in float64: written anew, not taken from the library."""
    s, t = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * (t.exp() * (t - s)).sum(-1)


def pair(make: Any) -> tuple[Any, Any]:
    """Two networks whose scores are far apart, in evaluation mode."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(make().eval())
        with torch.no_grad():
            for parameter in made[-1].parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4 * seed)
    return made[0], made[1]


def rows_of(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i] for k, v in columns.items()} for i in range(len(next(iter(columns.values()))))]


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **sizes, **heads))


def unequal() -> list[dict[str, Tensor]]:
    """Rows with very different numbers of labels."""
    ids = torch.randint(64, (8, 10), generator=torch.Generator().manual_seed(1))
    return rows_of({"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < 1 + torch.arange(8)[:, None], -100)})


class Divides(Trainer):
    """A user's task loss that divides by the items, as a class below."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        scores = outputs.logits[:, :-1].flatten(0, 1)
        loss = 3 * F.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def total(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """A task loss of the user's that divides by the items."""
    scores = outputs.logits[:, :-1].flatten(0, 1)
    return 3 * F.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """A task loss of the user's that does not."""
    return F.cross_entropy(outputs.logits[:, :-1].mean(1), labels[:, -1])


def test_texts_that_are_packed_in_a_row(tmp_path: Path) -> None:
    """The teacher sees where they begin, as the student does: what it says of a text is what it says of it alone."""
    student, of = pair(llama)
    texts = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 7)]
    with torch.no_grad():
        rows = [kl(*(net(text[None]).logits[:, :-1] for net in (student, of)), 1.0) for text in texts]
    given = {"data_collator": hf.DataCollatorWithFlattening()}
    data = [{"input_ids": text.tolist()} for text in texts]
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, given=given, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(torch.cat(rows, 1).mean()), rel=1e-4)


@pytest.mark.parametrize("loss", ["the model's", "smoothed", "compute_loss_func", "a class below"])
def test_token_losses_are_means_over_the_accumulated_batch(tmp_path: Path, loss: str) -> None:
    """The update is that of the whole batch however it is split, and without a teacher's term it is Trainer's."""
    from kd_transformers import DistillationTrainer

    class Below(DistillationTrainer, Divides):
        pass

    student, of = pair(llama)
    given = {"compute_loss_func": total} if loss == "compute_loss_func" else {}
    args = {**SGD, **({"label_smoothing_factor": 0.2} if loss == "smoothed" else {})}
    args |= {"remove_unused_columns": False}
    cls, stock = (Below, Divides) if loss == "a class below" else (DistillationTrainer, Trainer)

    def update(rows: int, **options: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(student)
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        run = trainer(
            tmp_path, student=model, data=unequal(), given=dict(given), **{"of": of, **options}, **split, **args
        )
        run.train()
        return weights(run.model)

    expected = update(8, distiller=None, cls=stock)
    whole = update(8, cls=cls, options={"alpha": 0.5})
    for rows in (8, 2, 1):
        assert difference(update(rows, cls=cls, options={"alpha": 0.0}), expected) < 1e-6
        assert difference(update(rows, cls=cls, options={"alpha": 0.5}), whole) < 1e-6
    assert difference(whole, expected) > 1e-3


class Searching(Distiller):
    """Asks of held-out rows first; nothing of them is learned."""

    tasks = ("causal-lm",)

    def stages(self) -> list[Stage]:
        return [Stage("search"), Stage("train")]

    def needs(self) -> Needs:
        return Needs(streams={} if self.progress.stage else {"search": 0.5})

    def turns(self, nets: Any, batch: Any) -> Any:
        if not self.progress.stage:
            nets.student(batch.stream("search"))
        yield {"student": self.task(nets.student(batch), batch)}


def test_items_are_those_of_the_accumulated_batch_after_a_stage_with_streams(tmp_path: Path) -> None:
    student, of = pair(llama)
    found = []
    for rows in (8, 2):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        model = copy.deepcopy(student)
        args = {**SGD, "max_steps": 2, **split, "remove_unused_columns": False}
        trainer(tmp_path, Searching(), student=model, of=copy.deepcopy(of), data=unequal(), **args).train()
        found.append(weights(model))
    assert difference(*found) < 1e-6


def test_a_loss_that_ignores_the_items_is_a_mean(tmp_path: Path) -> None:
    """Trainer takes every compute_loss_func for one that divides, and adds up what does not."""
    runs = []
    for rows in (8, 2):
        student, of = pair(llama)
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        given = {"compute_loss_func": mean}
        runs.append(trainer(tmp_path, student=student, of=of, data=unequal(), given=given, **split, **SGD))
        runs[-1].train()
    assert difference(weights(runs[0].model), weights(runs[1].model)) < 1e-6


def test_padding_in_the_labels_is_left_out(tmp_path: Path) -> None:
    """labels=input_ids, as the collator of many a language model makes them, has padding among the labels."""
    student, of = pair(llama)
    texts = Texts(4)
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    with torch.no_grad():
        found = kl(*(net(**inputs).logits[:, :-1] for net in (student, of)), 1.0)
    real = texts.mask[:, 1:]
    data = rows_of({**inputs, "labels": texts.ids})
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    expected = ((found * real).sum(1) / real.sum(1)).mean()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)
    assert float(found.mean()) != pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("numbers", [1, 3])
def test_regression(tmp_path: Path, numbers: int) -> None:
    """The soft target is the teacher's number, as the label is: mean squared errors, of one number or several."""
    options = {"num_labels": numbers, "problem_type": None if numbers == 1 else "regression"}
    student, of, texts = bert(**options), teacher(**options), Texts(4)
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    labels = torch.randn(4, numbers, generator=torch.Generator().manual_seed(0)).squeeze(1)
    with torch.no_grad():
        s, t = (net(**inputs).logits.double() for net in (student, of))
    data = rows_of({**inputs, "labels": labels})
    for method, options in (("kd", {"alpha": 0.25}), ("internal", {"schedule": "all", "gold": 0.75})):
        run = trainer(tmp_path, method, options, student=copy.deepcopy(student), of=of, data=data, **SGD)
        run.train()
        soft, weight = ("kd", 0.25) if method == "kd" else ("soft_labels", 1.0)
        assert logged(run, f"distill/{soft}")[0] == pytest.approx(weight * float((s - t).square().mean()), rel=1e-5)
        task = (s - labels.view(4, numbers)).square().mean()
        assert logged(run, "distill/task")[0] == pytest.approx(0.75 * float(task), rel=1e-5)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 1.0, 1.0, 0.0])])
@pytest.mark.parametrize("task", ["multilabel", "classification", "regression", None])
def test_one_score_of_a_loss_of_ones_own(tmp_path: Path, task: str | None, labels: Tensor) -> None:
    """Nothing tells whether it is a number or the logit of a sigmoid; to the loss of transformers it is a number."""
    student, of = bert(num_labels=1), teacher(num_labels=1)
    data = Texts(4)
    data.labels = labels
    ids = {"input_ids": data.ids, "attention_mask": data.mask}

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.logits.squeeze(1), labels.float())

    with torch.no_grad():
        s, t = (torch.cat([z := model(**ids).logits, torch.zeros_like(z)], 1) for model in (student, of))
    right = (s - t).square().sum(1).mean() if task == "regression" else kl(s, t).mean()
    given = {"compute_loss_func": loss, "task": task}
    run = trainer(tmp_path, "kd", {"alpha": 1.0, "temperature": 4.0}, student=student, of=of, data=data, given=given)
    if task is None:
        with pytest.raises(DistillError, match="does not tell what its scores are: say it with task="):
            run.train()
        return
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(right.item(), rel=1e-4)


def test_one_score_with_whole_labels_of_the_models_own_loss_is_a_number(tmp_path: Path) -> None:
    student, of, data = bert(num_labels=1), teacher(num_labels=1), Texts(4)
    data.labels = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        s, t = (model(input_ids=data.ids, attention_mask=data.mask).logits for model in (student, of))
    run = trainer(tmp_path, "kd", {"alpha": 1.0}, student=student, of=of, data=data)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx((s - t).square().mean().item(), rel=1e-4)


def test_question_answering(tmp_path: Path) -> None:
    """Start and end are two rows of scores over the positions; an answer that is not in the text does not count."""
    student, of = pair(lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**BERT, "num_labels": 2})))
    ids = torch.randint(5, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    starts, ends = torch.tensor([1, 2, 0, 7]), torch.tensor([3, 6, 0, 9])
    data = rows_of({"input_ids": ids, "start_positions": starts, "end_positions": ends})
    with torch.no_grad():
        s, t = (net(input_ids=ids) for net in (student, of))
        task = student(input_ids=ids, start_positions=starts, end_positions=ends).loss
    found = torch.stack([kl(s.start_logits, t.start_logits), kl(s.end_logits, t.end_logits)], 1)
    found[3] = 0.0
    run = trainer(tmp_path, student=student, of=of, data=data, given={"eval_dataset": data}, **SGD)
    before = run.evaluate()
    run.train()
    assert before["eval_loss"] == pytest.approx(float(task), rel=1e-6)
    assert logged(run, "distill/task")[0] == pytest.approx(0.1 * float(task), rel=1e-5)
    assert logged(run, "distill/kd")[0] == pytest.approx(0.9 * float(found.mean(1).mean()), rel=1e-4)


def test_frames_of_sound(tmp_path: Path) -> None:
    """CTC: the frames that come of samples that count, in the mean of each row; the task loss is the model's."""
    from test_matrix import SOUND, SPOKEN, speech

    student, of = pair(lambda: speech(hf.Wav2Vec2ForCTC, 1))
    inputs = {"input_values": SOUND[2:6], "attention_mask": SPOKEN[2:6]}
    labels = torch.randint(1, 8, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        s, t = (net(**inputs).logits for net in (student, of))
        task = student(**inputs, labels=labels).loss
    found = kl(s, t)
    assert found.shape == (4, 14)
    # Two convolutions of 4 samples at stride 2: 40 samples make 19 and then 8 frames.
    expected = torch.cat([found[:2, :8].mean(1), found[2:].mean(1)]).mean()
    run = trainer(tmp_path, student=student, of=of, data=rows_of({**inputs, "labels": labels}), **SGD)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(0.9 * float(expected), rel=1e-4)
    assert logged(run, "distill/task")[0] == pytest.approx(0.1 * float(task), rel=1e-4)


def bart() -> Any:
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in BART.items()}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=64, d_model=16, dropout=0.0, **parts))


BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


@pytest.mark.parametrize(("make", "start"), [(t5, 0), (bart, 2)])
def test_sequence_to_sequence(tmp_path: Path, make: Any, start: int) -> None:
    """The teacher's decoder reads what the student's does: the labels, one token later."""
    student, of = pair(make)
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(5, 64, (4, 6), generator=generator) for _ in range(2))
    labels[0, 3:] = -100
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0  # Of the encoder, and as long as the labels: it must not be taken for theirs.
    later = torch.cat([torch.full((4, 1), start), labels[:, :-1]], 1)
    later = later.masked_fill(later < 0, student.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        s, t = (net(**inputs, decoder_input_ids=later).logits for net in (student, of))
    found, real = kl(s, t), labels != -100
    data = rows_of({**inputs, "labels": labels})
    run = trainer(tmp_path, student=student, of=of, data=data, **SGD)
    run.train()
    expected = ((found * real).sum(1) / real.sum(1)).mean()
    task = F.cross_entropy(s.flatten(0, 1), labels.flatten())
    assert logged(run, "distill/kd")[0] == pytest.approx(0.9 * float(expected), rel=1e-4)
    assert logged(run, "distill/task")[0] == pytest.approx(0.1 * float(task), rel=1e-5)


@pytest.mark.parametrize("method", ["kd", "internal"])
def test_multiple_choice(tmp_path: Path, method: str) -> None:
    """The choices are the classes, each read as a row of its own, whose padding does not count."""
    student, of = pair(lambda: hf.BertForMultipleChoice(hf.BertConfig(**BERT)))
    texts = Texts(12)
    labels = torch.tensor([0, 2, 1, 1])
    losses = []
    for width in (10, 14):
        ids, mask = (F.pad(x, (0, width - 10)).view(4, 3, width) for x in (texts.ids, texts.mask))
        data = rows_of({"input_ids": ids, "attention_mask": mask, "labels": labels})
        options = {"alpha": 1.0} if method == "kd" else {"schedule": "all"}
        run = trainer(tmp_path, method, options, student=copy.deepcopy(student), of=of, data=data, **SGD)
        run.train()
        losses.append(logged(run, "loss")[0])
        if method == "kd":
            with torch.no_grad():
                s, t = (net(input_ids=ids, attention_mask=mask).logits for net in (student, of))
            assert losses[-1] == pytest.approx(float(kl(s, t).mean()), rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_task_that_the_class_does_not_tell(tmp_path: Path) -> None:
    """A class that transformers lists nowhere trains once it is said what its scores are."""
    student, of = pair(lambda: hf.BertForNextSentencePrediction(hf.BertConfig(**BERT)))
    texts = Texts(4)
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    with torch.no_grad():
        expected = kl(*(net(**inputs).logits for net in (student, of))).mean()
    data = rows_of({**inputs, "labels": texts.labels % 2})
    given = {"task": "classification"}
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, given=given, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-4)


def test_classes_of_a_method_that_learns_late_what_it_reads(tmp_path: Path) -> None:
    """afd with a teacher reads its scores, and without one none: their order counts all the same."""
    names, options = ["a", "b", "c"], {"logit_only": True}
    of = teacher(id2label=dict(enumerate(names)))
    other = teacher(id2label=dict(enumerate(names[::-1])))
    with torch.no_grad():
        for parameter, value in zip(other.classifier.parameters(), of.classifier.parameters(), strict=True):
            parameter.copy_(value.flip(0))
    runs = []
    for net in (of, other):
        runs.append(
            trainer(tmp_path, "afd", options, student=bert(id2label=dict(enumerate(names))), of=net, max_steps=1)
        )
        runs[-1].train()
    assert difference(weights(runs[0].model), weights(runs[1].model)) < 1e-6


# Adapters


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("method", ["kd", "internal"])
def test_adapters(tmp_path: Path, method: str) -> None:
    """A LoRA student starts as the model in it: the same terms; adapters and head move, and they alone are saved."""
    options = {"schedule": "all"} if method == "internal" else {}
    runs = [
        trainer(tmp_path / str(i), method, options, student=s, max_steps=1)
        for i, s in enumerate((bert(), lora(bert())))
    ]
    before = weights(runs[1].model)
    for run in runs:
        run.train()
    for term in ("kd", "task", "kl_attention", "cos_hidden", "soft_labels"):
        assert logged(runs[1], f"distill/{term}") == pytest.approx(logged(runs[0], f"distill/{term}"), rel=1e-5)
    names = moved(before, runs[1].model)
    assert names
    assert all("lora" in name or "modules_to_save" in name for name in names)
    runs[1].save_model(str(tmp_path / "saved"))
    assert {"adapter_model.safetensors", "adapter_config.json", "distiller.json"} <= parts(tmp_path / "saved")
    assert "model.safetensors" not in parts(tmp_path / "saved")


def test_a_teacher_with_adapters(tmp_path: Path) -> None:
    """Its classes are put in order, and its vocabulary is checked, as of the model in it."""
    names = ["a", "b", "c"]
    of = teacher(id2label=dict(enumerate(names[::-1])))
    runs = []
    for net in (of, lora(copy.deepcopy(of))):
        runs.append(trainer(tmp_path, student=bert(id2label=dict(enumerate(names))), of=net, max_steps=1))
        runs[-1].train()
    assert logged(runs[0], "distill/kd") == pytest.approx(logged(runs[1], "distill/kd"), rel=1e-6)
    with pytest.raises(DistillError, match="vocabulary of 64 tokens and a BertForSequenceClassification with 99"):
        trainer(tmp_path, of=lora(teacher(vocab_size=99))).train()


# Images


def test_features_of_a_teacher_without_these_classes(tmp_path: Path) -> None:
    """A method that reads no scores of the teacher takes one with other classes, without a head, of another library."""
    data, names = Images(4), {"layers": ("resnet.encoder.stages.0",)}
    of = image_classifier([4, 8], 1)
    others = {
        "other classes": (
            hf.ResNetForImageClassification(hf.ResNetConfig(**{**of.config.to_dict(), "num_labels": 9})),
            {},
        ),
        "no head": (of.resnet, {"teacher_layers": ("encoder.stages.0",)}),
    }
    others["other classes"][0].resnet.load_state_dict(of.resnet.state_dict())
    run = trainer(tmp_path, "nst", names, student=image_classifier([4, 8], 0), of=of, data=data, max_steps=1)
    run.train()
    for net, layers in others.values():
        options = {**names, **layers}
        other = trainer(tmp_path, "nst", options, student=image_classifier([4, 8], 0), of=net, data=data, max_steps=1)
        other.train()
        assert logged(other, "distill/nst") == logged(run, "distill/nst")
    timms = timm.create_model("resnet10t", num_classes=0)
    options = {**names, "teacher_layers": ("layer1",)}
    trainer(tmp_path, "nst", options, student=image_classifier([4, 8], 0), of=timms, data=data, max_steps=1).train()


def test_models_of_timm(tmp_path: Path) -> None:
    """A timm teacher gets its images by position; a timm student comes in transformers' wrapper."""
    of = timm.create_model("resnet10t", num_classes=3).eval()
    student = hf.TimmWrapperForImageClassification(
        hf.TimmWrapperConfig(architecture="resnet10t", num_labels=3, do_pooling=True)
    )
    for net in (image_classifier([4, 8], 0), student):
        data = Images(4)
        with torch.no_grad():
            s = copy.deepcopy(net).train()(pixel_values=data.images).logits
            expected = kl(s, of(data.images)).mean()
        run = trainer(tmp_path, options={"alpha": 1.0}, student=net, of=of, data=data, max_steps=1)
        run.train()
        assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-3)


def test_a_teacher_in_bfloat16(tmp_path: Path) -> None:
    """Without autocast a teacher is asked in its own precision."""
    of, data = image_classifier([4, 8], 1).to(torch.bfloat16).eval(), Images(4)
    student = image_classifier([4, 8], 0)
    with torch.no_grad():
        s = copy.deepcopy(student).train()(data.images).logits
        expected = kl(s, of(data.images.to(torch.bfloat16)).logits.float()).mean()
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-3)


def segformer(order: list[int] | None = None) -> Any:
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [2], "hidden_sizes": [8], "patch_sizes": [7]}
    sizes |= {"strides": [4], "num_attention_heads": [1], "mlp_ratios": [2], "decoder_hidden_size": 8}
    sizes |= {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    names = {i: "abc"[n] for i, n in enumerate(order or [0, 1, 2])}
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**sizes, id2label=names))


def test_segmentation(tmp_path: Path) -> None:
    """Pixels whose label the model ignores (255) are left out; the classes of a teacher's map are put in order."""
    (student, _), (_, of) = pair(segformer), pair(lambda: segformer([2, 0, 1]))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(3, (4, 16, 16), generator=generator)
    labels[0, :8] = 255
    with torch.no_grad():
        # BatchNorm in the student's head is in training mode.
        s, t = copy.deepcopy(student).train()(images).logits, of(images).logits[:, [1, 2, 0]]
    found, real = kl(s.movedim(1, -1), t.movedim(1, -1)).flatten(1), (labels[:, 2::4, 2::4] != 255).flatten(1)
    data = rows_of({"pixel_values": images, "labels": labels})
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    run.train()
    expected = ((found * real).sum(1) / real.sum(1)).mean()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(expected), rel=1e-3)


def test_an_ignored_label_that_the_configuration_does_not_tell(tmp_path: Path) -> None:
    """Of a task loss of the user's own: left out of the soft labels too, once it is said."""
    student, of = pair(segformer)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(3, (4, 16, 16), generator=generator)
    labels[0, :8] = 254

    def loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(F.interpolate(output.logits, labels.shape[1:]), labels, ignore_index=254)

    def train(ignored: int) -> Any:
        model = copy.deepcopy(student)
        model.config.semantic_loss_ignore_index = ignored
        data, given = rows_of({"pixel_values": images, "labels": labels}), {"compute_loss_func": loss}
        run = trainer(tmp_path, options={"alpha": 1.0}, student=model, of=of, data=data, given=given, max_steps=1)
        run.train()
        return run

    with pytest.raises(DistillError, match=r"3 classes .*got 254: .* model\.config\.semantic_loss_ignore_index = 254"):
        train(255)
    with torch.no_grad():
        s, t = copy.deepcopy(student).train()(images).logits, of(images).logits
    found, real = kl(s.movedim(1, -1), t.movedim(1, -1)).flatten(1), (labels[:, 2::4, 2::4] != 254).flatten(1)
    expected = ((found * real).sum(1) / real.sum(1)).mean()
    assert logged(train(254), "distill/kd")[0] == pytest.approx(float(expected), rel=1e-3)


class Bare(nn.Module):
    """A network of the user's own, whose task loss leaves out -1; it has no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        scores = self.head(self.embedding(input_ids))
        loss = None if labels is None else F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-1)
        return {"loss": loss, "logits": scores}


def test_the_ignored_label_of_a_model_without_a_configuration(tmp_path: Path) -> None:
    labels = torch.arange(32).reshape(4, 8) % 5
    labels[:, 6:] = -1
    data = rows_of({"input_ids": torch.arange(32).reshape(4, 8), "labels": labels})

    def run(student: Any) -> Any:
        given = {"task": "token"}
        return trainer(tmp_path, student=student, of=Bare(), data=data, given=given, max_steps=1)

    with pytest.raises(DistillError) as refused:
        run(Bare()).train()
    student = Bare()
    remedy = re.search(r"model\.config = (types\.SimpleNamespace\(.*?\))", str(refused.value))[1]
    student.config = eval(remedy, {"types": types})
    assert run(student).train().global_step == 1


def test_an_unfinished_loss_of_the_users_own_is_told_as_it_is(tmp_path: Path) -> None:
    def loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        raise NotImplementedError("to do")

    with pytest.raises(NotImplementedError, match="^to do$"):
        trainer(tmp_path, given={"compute_loss_func": loss}, max_steps=1).train()


def upernet(width: int) -> Any:
    torch.manual_seed(width)
    backbone = hf.ConvNextConfig(
        hidden_sizes=[width] * 4, depths=[1] * 4, num_stages=4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    options = {"hidden_size": 8, "auxiliary_channels": 4, "auxiliary_in_channels": width, "pool_scales": [1, 2]}
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, num_labels=3, **options))


def test_structured_on_upernet(tmp_path: Path) -> None:
    """Scores at the image's size, another name for the ignored label, a teacher of another kind; a step in bfloat16."""
    student, of = upernet(4), segformer().eval()
    of.config.id2label = student.config.id2label
    labels = torch.randint(3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels[:, :8] = 255
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        s = copy.deepcopy(student).train()(images).logits
        t = torch.nn.functional.interpolate(of(images).logits, (32, 32), mode="bilinear")
    expected = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)[:, 8:].mean()
    options = {"pixel": 1.0, "critic_width": 2, "layers": ["backbone.encoder.stages.0"]}
    options["teacher_layers"] = ["segformer.stages.0"]
    data = rows_of({"pixel_values": images, "labels": labels})
    given: dict[str, Any] = {"student": student, "of": of, "data": data, "max_steps": 2}
    run = trainer(tmp_path, "structured", options, **given)
    run.train()
    assert logged(run, "distill/pixel")[0] == pytest.approx(float(expected), rel=1e-3)
    critic = run.player.groups["critic"].parameters
    assert all(p.grad is None and p.isfinite().all() for p in critic)
    half = trainer(tmp_path, "structured", options, **{**given, "student": upernet(4)}, bf16=True)
    half.train()
    assert logged(half, "distill/critic/wgan_gp")[0] == pytest.approx(
        logged(run, "distill/critic/wgan_gp")[0], rel=0.02
    )


# Columns


def ragged(rows: int = 4) -> Any:
    """Rows as a tokenizer makes them, without padding, with columns of another tokenizer."""
    texts = Texts(rows)
    ids = [[7 + i] * (2 + i) for i in range(rows)]
    own = [row[: int(mask.sum())].tolist() for row, mask in zip(texts.ids, texts.mask, strict=True)]
    return Dataset.from_dict({"input_ids": own, "teacher_input_ids": ids, "labels": texts.labels.tolist()})


def tokenizer() -> Any:
    import tokenizers

    words = {f"w{i}": i for i in range(64)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w1")


def test_the_teachers_columns_are_padded_by_its_own_rule(tmp_path: Path) -> None:
    """A tokenizer's collator knows nothing of them: ids get the teacher's padding token, masks 0."""
    of, student = teacher(vocab_size=99, pad_token_id=5), bert()
    data = ragged()
    with torch.no_grad():
        found = []
        for row in data:
            s, t = (
                net.eval()(torch.tensor([row[name]])).logits
                for net, name in ((student, "input_ids"), (of, "teacher_input_ids"))
            )
            found.append(kl(s, t))
    seen: list[Any] = []
    of.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = {"processing_class": tokenizer(), "eval_dataset": data}
    run = trainer(tmp_path, options={"alpha": 1.0}, student=student, of=of, data=data, given=given, max_steps=1)
    run.train()
    run.evaluate()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(torch.cat(found).mean()), rel=1e-3)
    assert seen[-1]["input_ids"].tolist() == [[7, 7, 5, 5, 5], [8, 8, 8, 5, 5], [9, 9, 9, 9, 5], [10] * 5]
    assert seen[-1]["attention_mask"].sum(1).tolist() == [2, 3, 4, 5]
    of.config.pad_token_id = None
    with pytest.raises(DistillError, match="whose configuration has a pad_token_id"):
        trainer(tmp_path, student=bert(), of=of, data=data, given=given).train()


@pytest.mark.parametrize(
    ("column", "rows", "padded"),
    [
        # A text without a token comes as an empty list, whose numbers are of no type.
        ("input_ids", [[], [7], [7, 7]], [[5, 5], [7, 5], [7, 7]]),
        ("input_values", [[1, 0], [0.5], [0.25, 2.0]], [[1.0, 0.0], [0.5, 0.0], [0.25, 2.0]]),
        ("input_values", [[1, 0], [0.5, 2.0]], [[1.0, 0.0], [0.5, 2.0]]),
        ("input_values", [np.ones(2), np.ones(1)], [[1.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_what_is_padded_has_the_type_of_all_rows(column: str, rows: list[Any], padded: list[Any]) -> None:
    collate = with_padding(hf.default_data_collator, [teacher(pad_token_id=5)])
    batch = collate([{"labels": 0, f"teacher_{column}": row} for row in rows])
    found, expected = batch[f"teacher_{column}"], torch.tensor(padded)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_internal_needs_the_students_tokens(tmp_path: Path) -> None:
    """Attention over other tokens is unrelated; the [CLS] vectors and the soft labels are not."""
    texts = Texts()
    data = Texts(extra={"teacher_input_ids": texts.ids.flip(1), "teacher_attention_mask": texts.mask.flip(1)})
    with pytest.raises(DistillError, match="internal compares attention token by token, and teacher_input_ids holds"):
        trainer(tmp_path, "internal", {"schedule": "all"}, data=data).train()
    run = trainer(tmp_path, "internal", {"schedule": "all", "attention_weight": 0.0}, data=data, max_steps=1)
    run.train()
    assert logged(run, "distill/cos_hidden")[0] > 0


def test_scores_per_token_need_the_students_tokens(tmp_path: Path) -> None:
    """The same number of other tokens would be compared in silence."""
    student, of = pair(lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)))
    texts = Texts(4)
    columns = {"input_ids": texts.ids, "labels": texts.ids % 3, "teacher_input_ids": texts.ids.flip(1)}
    with pytest.raises(DistillError, match="kd compares scores token by token"):
        trainer(tmp_path, student=student, of=of, data=rows_of(columns)).train()


def test_a_stream_whose_columns_are_not_known(tmp_path: Path) -> None:
    """A mapped stream tells no column names; it trains as under Trainer."""
    rows = [{"input_ids": [5, 6, 7 + i], "labels": i % 3, "note": "x"} for i in range(8)]
    updates = []
    for distiller in ("kd", None):
        data = Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)
        assert data.column_names is None
        run = trainer(tmp_path, distiller, {"alpha": 0.0} if distiller else None, data=data, max_steps=2)
        run.train()
        updates.append(weights(run.model))
    assert difference(*updates) < 1e-6


@pytest.mark.parametrize("change", ["float", "integers", "packed"])
def test_a_cache_of_any_teacher(change: str) -> None:
    """Buffers without an axis (BatchNorm's counter), integer and packed weights have a fingerprint too."""
    of, data = image_classifier([4, 8], 1), Images(4)
    if change == "integers":
        of.register_buffer("scales", torch.tensor(3, dtype=torch.int8))
    if change == "packed":
        packed = {"get_extra_state": lambda self: (self.packed, torch.int8), "packed": torch.arange(5000)}
        of.__class__ = type("Packed", (type(of),), packed)
        before = fingerprint_of(of)
        assert fingerprint_of(of) == before
        of.packed[2500] += 1
        assert fingerprint_of(of) != before
    rows = Dataset.from_dict({"pixel_values": data.images.tolist()}).with_format("torch")
    cached = cache_teacher(rows, of)
    with torch.no_grad():
        torch.testing.assert_close(cached["teacher_logits"][:], of.eval()(data.images).logits, rtol=1e-4, atol=1e-5)


def test_terms_reach_the_trackers(tmp_path: Path) -> None:
    """What --report_to starts are callbacks of Trainer, which get our terms with the loss."""
    seen: list[dict[str, float]] = []

    class Tracker(hf.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer(tmp_path, given={"callbacks": [Tracker()]}, max_steps=1).train()
    assert {"loss", "distill/kd", "distill/task"} <= set(seen[0])


def test_whether_a_loss_divides_is_told_by_labels_that_count():
    """Of several processes all say what those with such labels have seen."""
    loss, nan = torch.tensor(0.5), torch.tensor(float("nan"))
    assert divides(loss, loss / 2) is True
    assert divides(loss, loss) is False
    assert divides(nan, nan) is None
    assert divides(loss * 0, loss * 0) is None
    others = torch.tensor([[1, 1]], dtype=torch.int)
    assert divides(nan, nan, lambda seen: torch.cat([seen, others])) is True
