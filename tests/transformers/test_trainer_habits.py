"""What users of Trainer do with it: overrides, optimizers of their own, loaders and streams, searches, adapters."""

from __future__ import annotations

import copy
import inspect
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from datasets import load_dataset
from image_kit import Images, image_classifier
from test_matrix import MODELS
from test_trainer_tasks import rows_of, tokenizer
from trainer_kit import Texts, arguments, bert, difference, logged, moved, parts, teacher, trainer, weights
from transformers import Trainer

from kd_plugins import DistillError
from kd_transformers import DistillationTrainer


class OwnOptimizer(DistillationTrainer):
    """An optimizer of the user's, without super."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        return self.optimizer


class OwnScheduler(DistillationTrainer):
    """A curve of the user's, without super."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda step: 0.5)
        return self.lr_scheduler


@pytest.mark.parametrize("own", ["create_optimizer", "create_scheduler", "optimizers"])
@pytest.mark.parametrize("method", ["internal", "afd"])
def test_optimizers_of_the_users_own(tmp_path: Path, own: str, method: str) -> None:
    """The set-up does not hang on them: the method's terms are there, and a resumed run ends as the whole one."""
    cls = {"create_optimizer": OwnOptimizer, "create_scheduler": OwnScheduler}.get(own, DistillationTrainer)
    options = {"schedule": "progressive"} if method == "internal" else {}
    images = method == "afd"

    def run(folder: str, resume: Any = None, **args: Any) -> Any:
        student, given = image_classifier([4, 8], 0) if images else bert(), {}
        if images:
            args |= {"of": image_classifier([4, 8], 1), "data": Images(16)}
        if own == "optimizers":
            optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
            given = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5))}
        made = trainer(tmp_path / folder, method, options, student=student, cls=cls, given=given, max_steps=4, **args)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole", save_strategy="steps", save_steps=2)
    for term in ("discriminator/student", "logits") if images else ("kl_attention", "soft_labels"):
        assert logged(whole, f"distill/{term}")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert difference(weights(whole.model), weights(resumed.model)) == 0.0


def test_a_training_step_that_hides_the_distillation_is_an_error(tmp_path: Path) -> None:
    """training_step without super() would train without the teacher and say nothing."""

    class Hiding(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    run = trainer(tmp_path, cls=Hiding)
    before = weights(run.model)
    with pytest.raises(DistillError, match=r"Hiding.training_step hides the distillation: call super"):
        run.train()
    assert not moved(before, run.model)


def test_an_override_gets_the_students_outputs(tmp_path: Path) -> None:
    """return_outputs=True of super() in training, and the number of items."""
    seen: list[Any] = []

    class Asking(DistillationTrainer):
        def compute_loss(self, *args: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            loss, outputs = super().compute_loss(*args, True, num_items_in_batch)
            seen.append((outputs, num_items_in_batch))
            return (loss, outputs) if return_outputs else loss

    data, student = Texts(8), bert()
    with torch.no_grad():
        expected = student(**data.batch()).logits
    args: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer(tmp_path, cls=Asking, student=student, data=data, **args).train()
    torch.testing.assert_close(torch.cat([outputs.logits for outputs, _ in seen[:2]]), expected, rtol=1e-4, atol=1e-5)
    assert [int(items) for _, items in seen[:2]] == [8, 8]
    seen.clear()
    trainer(tmp_path, "internal", {"schedule": "progressive"}, cls=Asking, max_steps=4).train()
    assert [outputs is None for outputs, _ in seen] == [True, True, False, False]


# Data


def drawn(i: int) -> tuple[int, float, float, float]:
    """A row's number, and what its augmentation draws."""
    return i, random.random(), float(np.random.rand()), float(torch.rand(()))


class Rows(torch.utils.data.Dataset):
    """Draws random numbers for every row that is read, and keeps them."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.seen: list[Any] = []

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Any:
        self.seen.append(drawn(i))
        return self.texts[i]


class Stream(torch.utils.data.IterableDataset):
    """The same as a stream whose source can be read once only; `next(stream)` where it is its own iterator."""

    def __init__(self, itself: bool) -> None:
        self.rows, self.itself = Rows(), itself
        self.source = iter(range(16))

    @property
    def seen(self) -> list[Any]:
        return self.rows.seen

    def __next__(self) -> Any:
        return self.rows[next(self.source)]

    def __iter__(self) -> Any:
        return self if self.itself else (self.rows[i] for i in self.source)


@pytest.mark.parametrize("make", [Rows, lambda: Stream(True), lambda: Stream(False)], ids=["rows", "itself", "once"])
def test_augmentation_sees_the_same_numbers(tmp_path: Path, make: Any) -> None:
    """Also in the rows of the set-up, also in the collator; nothing of a stream is lost or read twice."""
    found = []
    for distiller in (None, "kd"):
        data, collated = make(), []

        def collate(items: list[Any], collated: list[Any] = collated) -> Any:
            collated.append(drawn(0))
            return hf.default_data_collator(items)

        run = trainer(tmp_path, distiller, data=data, given={"data_collator": collate}, max_steps=3)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        run.train()
        found.append((data.seen, collated, run))
    (plain, plain_collated, _), (ours, collated, run) = found
    extra = 1 if isinstance(run.train_dataset, Rows) else 0
    # The set-up reads one batch more of rows that can be read again, and collates one more in any case.
    assert ours[4 * extra :] == plain
    assert collated[1:] == plain_collated
    assert run.state.global_step == 3


def test_loaders_of_the_users_own(tmp_path: Path) -> None:
    """get_train_dataloader without train_dataset: trained as with it, and the first batch is not lost."""

    class Loading(DistillationTrainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(torch.utils.data.DataLoader(Texts(), 4))

    given: dict[str, Any] = {"teacher_model": teacher(), "distiller": "kd"}
    runs = [Loading(bert(), arguments(tmp_path), **given), trainer(tmp_path)]
    for run in runs:
        run.train()
    assert difference(*(weights(run.model) for run in runs)) == 0.0
    with pytest.raises(DistillError, match="neither a stream nor a loader of your own gives"):
        Loading(bert(), arguments(tmp_path), **{**given, "distiller": "crd"}).train()

    class Once(DistillationTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Stream(True), 4)

    with pytest.raises(DistillError, match="got Stream, which can be read only once"):
        Once(bert(), arguments(tmp_path, max_steps=2), **given).train()


def test_labels_of_another_name(tmp_path: Path) -> None:
    """label_names: the method reads them, and the teacher does not need to know their name."""

    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert()

        def forward(self, input_ids: Any, attention_mask: Any, targets: Any = None) -> Any:
            return dict(self.bert(input_ids, attention_mask, labels=targets))

    texts = Texts(8).batch()
    data = rows_of({("targets" if k == "labels" else k): v for k, v in texts.items()})
    given = {"eval_dataset": data}
    ours = trainer(tmp_path, "dkd", student=Renamed(), data=data, given=given, label_names=["targets"], max_steps=1)
    usual = trainer(tmp_path, "dkd", data=Texts(8), given={"eval_dataset": Texts(8)}, max_steps=1)
    for run in (ours, usual):
        run.train()
    assert difference(weights(ours.model.bert), weights(usual.model)) == 0.0
    assert ours.evaluate()["eval_loss"] == usual.evaluate()["eval_loss"]


def test_labels_that_the_teacher_alone_would_take(tmp_path: Path) -> None:
    """A student whose loss is computed outside its forward keeps its labels, and the teacher gets none."""

    class Scores(hf.PreTrainedModel):
        config_class, _supports_sdpa = hf.BertConfig, True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = bert()

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return {"logits": self.bert(input_ids, attention_mask).logits}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    given = {"eval_dataset": Texts(8), "compute_loss_func": loss, "task": "classification"}
    ours = trainer(tmp_path, student=Scores(bert().config), given=given, label_names=["labels"], max_steps=1)
    usual = trainer(tmp_path, given={"eval_dataset": Texts(8)}, max_steps=1)
    for run in (ours, usual):
        run.train()
    assert difference(weights(ours.model.bert), weights(usual.model)) < 1e-6
    assert ours.evaluate()["eval_loss"] == pytest.approx(usual.evaluate()["eval_loss"])


def test_tokens_that_trainer_aligns_in_the_student(tmp_path: Path) -> None:
    """The teacher had the same padding as the student: it follows, and is not refused for it."""
    of, student = teacher(pad_token_id=3), bert(pad_token_id=3)
    run = trainer(tmp_path, student=student, of=of, given={"processing_class": tokenizer()}, max_steps=1)
    run.train()
    assert student.config.pad_token_id == of.config.pad_token_id == 0
    other = trainer(tmp_path, of=teacher(pad_token_id=1), given={"processing_class": tokenizer()}, max_steps=1)
    with pytest.raises(DistillError, match="token 0 as padding and .* with 1"):
        other.train()


def test_predictions_without_labels(tmp_path: Path) -> None:
    run = trainer(tmp_path, "internal", {"schedule": "all"}, max_steps=1)
    run.train()
    data = rows_of({k: v for k, v in Texts(8).batch().items() if k != "labels"})
    with torch.no_grad():
        expected = run.model.eval()(**{k: torch.stack([row[k] for row in data]) for k in data[0]}).logits
    np.testing.assert_allclose(run.predict(data).predictions, expected, rtol=1e-4, atol=1e-6)


# Arguments


def test_names_in_place_of_models_are_refused(tmp_path: Path) -> None:
    for given in ({"teacher_model": "bert-base-uncased"}, {"peer_models": ["bert-base-uncased"]}):
        with pytest.raises(DistillError, match="got 'bert-base-uncased': load it first, with the from_pretrained"):
            DistillationTrainer(bert(), arguments(tmp_path), train_dataset=Texts(), distiller="kd", **given)


def test_the_signature_is_trainers_and_ours() -> None:
    names = list(inspect.signature(Trainer).parameters)
    shown = inspect.signature(DistillationTrainer)
    own = ["teacher_model", "peer_models", "distiller", "distiller_args", "task", "record"]
    assert list(shown.parameters) == [*names, *own]
    assert {shown.parameters[name].kind for name in own} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_search_over_options_of_the_distiller(tmp_path: Path) -> None:
    """Every trial has a distiller with what was found, beside Trainer's own arguments."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen: list[Any] = []

    class Watching(DistillationTrainer):
        def training_step(self, *args: Any) -> Any:
            seen.append((self.distiller.temperature, self.distiller.alpha, self.args.learning_rate))
            return super().training_step(*args)

    given = {"model_init": lambda: bert(), "eval_dataset": Texts(8)}
    run = trainer(tmp_path, "kd", {"alpha": 0.5}, cls=Watching, given=given, max_steps=1, eval_strategy="epoch")
    best = run.hyperparameter_search(
        hp_space=lambda trial: {
            "distiller.temperature": trial.suggest_categorical("distiller.temperature", [2.0, 3.0]),
            "learning_rate": trial.suggest_categorical("learning_rate", [1e-3]),
        },
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.BruteForceSampler(seed=0),
    )
    assert sorted(seen) == [(2.0, 0.5, 1e-3), (3.0, 0.5, 1e-3)]
    assert set(best.hyperparameters) == {"distiller.temperature", "learning_rate"}
    found = {"distiller.tempreature": 1.0}
    with pytest.raises(DistillError, match=r"[Dd]id you mean.*temperature"):
        run.search_options({k.removeprefix("distiller."): v for k, v in found.items()})


@pytest.mark.parametrize("anew", [True, False])
def test_what_a_search_has_found_is_set_by_its_name(tmp_path: Path, anew: bool) -> None:
    """As transformers' guide does: `setattr(trainer.args, name, value)` for each of `best_run.hyperparameters`."""

    def make(**options: Any) -> Any:
        given = {"model_init": lambda: bert()} if anew else {"model": bert()}
        return trainer(tmp_path, "kd", {"alpha": 0.5, **options}, given=given, max_steps=1)

    (expected := make(temperature=2.0)).train()
    run = make()
    run.train()
    if not anew:
        run.model.load_state_dict(bert().state_dict())
    setattr(run.args, "distiller.temperature", 2.0)
    run.train()
    assert run.distiller.config == expected.distiller.config
    assert logged(run, "distill/kd")[-1] == logged(expected, "distill/kd")[0]
    setattr(run.args, "distiller.tempreature", 2.0)
    with pytest.raises(DistillError, match=r"[Dd]id you mean.*temperature"):
        run.train()


def test_the_model_card(tmp_path: Path) -> None:
    """Method, paper, options, teacher and data; "improves" only where the interval of the gain is above 0."""
    run = trainer(tmp_path, "kd+noisy", {"kd.temperature": 3.0, "noisy.sigma": 0.1}, max_steps=1)
    run.teachers[0].config._name_or_path = "someone/teacher"
    run.train()
    cards = []
    for gain in (None, {"accuracy": (0.8, 0.3, 1.3), "f1": (0.2, -0.1, 0.5), "mcc": (-0.3, -0.5, -0.1)}):
        run.create_model_card(dataset="glue", tags="mine", gain=gain)
        cards.append((tmp_path / "README.md").read_text())
    first, second = cards
    for part in ("Distilling the Knowledge", "arxiv.org/abs/1910.05057", "`temperature`: 3.0", "- data: glue"):
        assert part in first
    assert "`someone/teacher`, BertForSequenceClassification" in first
    assert "No gain over the student trained alone was measured." in first
    assert "improves" not in first
    assert {"mine", "knowledge-distillation"} <= set(yaml.safe_load(second.split("---")[1])["tags"])
    assert second.count("improves") == 1
    assert "improves accuracy over the student trained alone by +0.8 (95 % interval +0.3 to +1.3)" in second
    assert "difference in f1" in second
    assert "lowers mcc" in second
    assert second.count("## Distillation\n") == second.count("## Training procedure\n") == 1
    # A data set of files is called by their format, which names nothing.
    file = tmp_path / "rows.json"
    file.write_text('{"input_ids": [1], "labels": 0}')
    run.train_dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path))
    run.create_model_card()
    assert "- data: not named" in (tmp_path / "README.md").read_text()
    with pytest.raises(DistillError, match="the mean gain and the ends of its interval"):
        run.create_model_card(gain={"accuracy": (0.8, 0.9, 1.3)})


# Adapters

HEADS = ["classifier", "qa_outputs"]
ADAPTED = {
    "text classification": "SEQ_CLS",
    "token classification": "TOKEN_CLS",
    "question answering": "QUESTION_ANS",
    "causal language model": "CAUSAL_LM",
    "sequence to sequence": "SEQ_2_SEQ_LM",
    "masked language model": None,
    "multiple choice": None,
    "image classification (ViT)": None,
    "segmentation": None,
}


@pytest.mark.parametrize("model", ADAPTED)
def test_adapters_of_every_task(tmp_path: Path, model: str) -> None:
    """Student and teacher with adapters: the terms of the models in them; adapters alone are moved and saved."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make, data = MODELS[model]

    def lora(net: Any) -> Any:
        config = peft.LoraConfig(task_type=ADAPTED[model], r=2, target_modules="all-linear", exclude_modules=HEADS)
        return peft.get_peft_model(net, config)

    torch.manual_seed(0)
    nets = [make(1), make(2)]
    runs = []
    for wrap in (lambda net: net, lora):
        student, of = (wrap(copy.deepcopy(net)) for net in nets)
        runs.append(trainer(tmp_path, student=student, of=of, data=data, max_steps=1))
        before = weights(runs[-1].model)
        runs[-1].train()
    for term in ("kd", "task"):
        assert logged(runs[1], f"distill/{term}") == pytest.approx(logged(runs[0], f"distill/{term}"), rel=1e-3)
    assert logged(runs[1], "distill/kd")[0] > 0
    names = moved(before, runs[1].model)
    assert names
    assert all("lora" in name or "modules_to_save" in name for name in names)
    runs[1].save_model(str(tmp_path / "saved"))
    assert "adapter_model.safetensors" in parts(tmp_path / "saved")
    assert "model.safetensors" not in parts(tmp_path / "saved")


@pytest.mark.parametrize("method", ["kd", "internal"])
def test_the_active_adapter_trains(tmp_path: Path, method: str) -> None:
    """Of several adapters of a student; all are saved, and no more."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    student = peft.get_peft_model(bert(), config)
    student.add_adapter("second", config)
    student.set_adapter("second")
    before = weights(student)
    run = trainer(tmp_path, method, {"schedule": "all"} if method == "internal" else {}, student=student, max_steps=1)
    run.train()
    names = moved(before, student)
    assert names
    assert all(".second." in name for name in names)
    run.save_model(str(tmp_path / "saved"))
    assert "model.safetensors" not in parts(tmp_path / "saved")
    assert "adapter_model.safetensors" in parts(tmp_path / "saved" / "second")


# Classes that change the loss


class Fused(Trainer):
    """A loss whose own forward makes no scores, as TRL's SFTTrainer."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss, {**outputs, "logits": outputs.logits.detach()}) if return_outputs else loss


def test_a_fused_head_is_refused(tmp_path: Path) -> None:
    """Its scores have no gradient; with Trainer's own loss in a class between, it distils."""

    class Mixed(DistillationTrainer, Fused):
        pass

    with pytest.raises(DistillError, match="whose compute_loss is Trainer.compute_loss"):
        trainer(tmp_path, cls=Mixed).train()

    class Plain(Fused):
        compute_loss = Trainer.compute_loss

    class Distils(DistillationTrainer, Plain):
        pass

    run = trainer(tmp_path, cls=Distils, max_steps=1)
    run.train()
    assert logged(run, "distill/kd")[0] > 0


def test_what_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student, the card, and the distiller beside it."""
    pushed: list[set[str]] = []
    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/student"))
    monkeypatch.setattr(hub, "upload_folder", lambda *_, folder_path, **__: pushed.append(parts(folder_path)))
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.push_to_hub(gain={"accuracy": (0.8, 0.3, 1.3)})
    assert {"README.md", "config.json", "model.safetensors", "distiller.json", "distiller.safetensors"} <= pushed[0]
    assert "improves accuracy" in (tmp_path / "README.md").read_text()
