"""DistillationTrainer against Trainer, against a loop written by hand, and as a Trainer."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from trainer_kit import (
    At,
    Texts,
    arguments,
    bert,
    calls,
    difference,
    logged,
    moved,
    parts,
    plain,
    teacher,
    trainer,
    weights,
)
from transformers import BertForSequenceClassification, Trainer, get_linear_schedule_with_warmup

from kd_plugins import Batch, Distiller, DistillError, Needs, View, create_distiller
from kd_plugins.catalog.registry import from_json
from kd_transformers import DistillationTrainer


@pytest.mark.parametrize("args", [{}, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}])
def test_without_a_distiller_it_is_trainer(tmp_path: Path, args: dict[str, Any]) -> None:
    """No teacher and no distiller: the same weights and the same log, to the last bit."""
    runs = []
    for cls in (Trainer, DistillationTrainer):
        student = bert(dropout=True)
        run = trainer(tmp_path, None, cls=cls, student=student, train_sampling_strategy="random", **args)
        run.train()
        runs.append(run)
    assert difference(weights(runs[0].model), weights(runs[1].model)) == 0.0
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert logged(runs[0], "grad_norm") == logged(runs[1], "grad_norm")
    assert runs[0].evaluate(Texts(8))["eval_loss"] == runs[1].evaluate(Texts(8))["eval_loss"]


def test_kd_equals_a_loop_written_by_hand(tmp_path: Path) -> None:
    """AdamW, linear schedule with warmup, weight decay, clipping, accumulation: every weight within 1e-6."""
    student, of, data = bert().double(), teacher().double(), Texts(16)
    run = trainer(
        tmp_path,
        options={"temperature": 2.0, "alpha": 0.7},
        student=copy.deepcopy(student),
        data=data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=0.5,
    )
    decayed = set(run.get_decay_parameter_names(student))
    run.train()
    groups = [
        {"params": [p for n, p in student.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in student.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 8)
    student.train()
    of.eval()
    for step in range(8):
        for micro in range(2):
            first = (4 * step + 2 * micro) % 16
            batch = {name: value[first : first + 2] for name, value in data.batch().items()}
            output = student(**batch)
            with torch.no_grad():
                soft = of(**{k: v for k, v in batch.items() if k != "labels"}).logits
            log_s, log_t = (F.log_softmax(x / 2.0, -1) for x in (output.logits, soft))
            distilled = (log_t.exp() * (log_t - log_s)).sum(-1).mean() * 4.0
            ((0.3 * output.loss + 0.7 * distilled) / 2).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert difference(weights(student), weights(run.model)) < 1e-6


def test_setup_leaves_the_random_state_alone(tmp_path: Path) -> None:
    """Distilling with a weight of 0 draws the same shuffle and dropout as training alone."""
    runs = []
    for options in (None, {"alpha": 0.0}):
        run = trainer(
            tmp_path,
            None if options is None else "kd",
            options,
            student=bert(dropout=True),
            train_sampling_strategy="random",
            seed=3,
        )
        run.train()
        runs.append(run)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), abs=1e-6)


def test_student_is_exported_clean(tmp_path: Path) -> None:
    """The saved student loads without a missing or unexpected key; the distiller lies beside it."""
    run = trainer(tmp_path, "internal", {"project": True, "schedule": "all"}, of=teacher(hidden_size=32))
    stock = plain(tmp_path)
    for each in (run, stock):
        each.train()
    stock.save_model(str(tmp_path / "stock"))
    run.save_model(str(tmp_path / "export"))
    student, info = BertForSequenceClassification.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert difference(weights(student), weights(run.model)) == 0.0
    assert set(load_file(tmp_path / "export" / "model.safetensors")) == set(bert().state_dict())
    assert (tmp_path / "export" / "config.json").read_text() == (tmp_path / "stock" / "config.json").read_text()
    assert parts(tmp_path / "export") - parts(tmp_path / "stock") == {"distiller.json", "distiller.safetensors"}
    again = from_json(tmp_path / "export" / "distiller.json")
    assert again.config == run.distiller.config
    saved = load_file(tmp_path / "export" / "distiller.safetensors")
    assert difference(saved, dict(run.distiller.state_dict())) == 0.0


def test_checkpoint_is_complete(tmp_path: Path) -> None:
    """In the middle of a phase that runs one layer, the checkpoint holds all of them and what a resumed run needs."""
    trainer(tmp_path, "internal", {}, num_train_epochs=3, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert set(load_file(folder / "model.safetensors")) == set(bert().state_dict())
    ours = {"distiller.json", "distiller.safetensors", "distiller_optimizers.pt", "distiller_random_0.safetensors"}
    assert ours | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= parts(folder)
    state = json.loads((folder / "distiller.json").read_text())
    assert state["distiller"] == "internal"
    assert (state["progress"]["step"], state["progress"]["stage"]) == (2, 0)


def test_resume_from_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint without a distiller, or with another one, does not resume silently."""
    plain(tmp_path / "a", save_strategy="epoch").train()
    with pytest.raises(DistillError, match=r"Expected distiller\.json"):
        trainer(tmp_path / "a", save_strategy="epoch").train(resume_from_checkpoint=True)
    trainer(tmp_path / "b", save_strategy="epoch").train()
    with pytest.raises(DistillError, match="was written with the distiller 'kd'"):
        trainer(tmp_path / "b", "internal", {"schedule": "all"}).train(resume_from_checkpoint=True)


def test_resume_with_other_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the distiller has stored stays, and that is said; what does not fit it is an error in words."""
    both = {"num_train_epochs": 2, "save_strategy": "epoch"}
    trainer(tmp_path, "internal", {"schedule": "all"}, **both).train()
    again = trainer(tmp_path, "internal", {"schedule": "all", "attention_weight": 0.5}, **both)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "other options, attention_weight=0.5 in place of" in caplog.text
    other = trainer(tmp_path, "internal", {"schedule": "all", "project": True}, of=teacher(hidden_size=32), **both)
    with pytest.raises(DistillError, match="does not fit the distiller of this run, which has project=True"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("alone", [False, True])
def test_peers_and_parts_are_of_the_best_checkpoint(tmp_path: Path, alone: bool, caplog: Any) -> None:
    """What is left after load_best_model_at_end is of one step: the student, its peer and the method's own networks."""
    scores = iter([2.0, 1.0])
    given = {
        "eval_dataset": Texts(8),
        "compute_metrics": lambda _: {"found": next(scores)},
        "peer_models": [bert(seed=1)],
    }
    run = trainer(
        tmp_path,
        "afd+internal",
        {"afd.logit_only": True, "internal.schedule": "all", "internal.project": True},
        of=teacher(hidden_size=32),
        given=given,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=alone,
        load_best_model_at_end=True,
        metric_for_best_model="found",
    )
    run.train()
    best, last = (tmp_path / f"checkpoint-{step}" for step in (4, 8))
    assert difference(weights(run.model), load_file(best / "model.safetensors")) == 0.0
    if alone:
        assert "peers and parts of the method are those of the last step" in caplog.text
        caplog.clear()
        run.best_loaded(tmp_path / "gone")  # which Trainer tells
        assert not caplog.text
        return
    for name, module in (("peer1", run.peer_models[0]), ("distiller", run.distiller)):
        assert difference(dict(module.state_dict()), load_file(best / f"{name}.safetensors")) == 0.0
        assert difference(dict(module.state_dict()), load_file(last / f"{name}.safetensors")) > 0.0
    for name in ("peer1.safetensors", "model.safetensors"):
        run.state.best_model_checkpoint = str(last)
        run._load_best_model()
        run.state.best_model_checkpoint = str(best)
        (best / name).write_bytes(b"damaged")
        run._load_best_model()
        assert f"all networks stay those of the last step: {name} has 7 bytes" in caplog.text
        (best / name).unlink()
        for kept, module in (("model", run.model), ("peer1", run.peer_models[0])):
            assert difference(weights(module), load_file(last / f"{kept}.safetensors")) == 0.0


def test_model_init_and_repeated_training(tmp_path: Path) -> None:
    """A hyperparameter search trains again and again: every run starts with a fresh student and fresh parts."""
    options = {"schedule": "stacked", "project": True}
    given = {"model_init": lambda trial=None: bert(), "eval_dataset": Texts(8)}
    run = trainer(tmp_path, "internal", options, of=teacher(hidden_size=32), given=given, num_train_epochs=4)
    results = []
    for _ in range(2):
        run.train()
        results.append((weights(run.model), weights(run.distiller), run.evaluate()["eval_loss"]))
    assert difference(results[0][0], results[1][0]) == 0.0
    assert difference(results[0][1], results[1][1]) == 0.0
    assert results[0][2] == results[1][2]


def test_hyperparameter_search(tmp_path: Path) -> None:
    """Trials differ by what they search, and the distiller follows."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given = {"model_init": lambda trial=None: bert(), "eval_dataset": Texts(8)}
    run = trainer(tmp_path, "internal", {"schedule": "all"}, given=given, num_train_epochs=1, eval_strategy="epoch")
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-2])},
        n_trials=2,
        backend="optuna",
    )
    assert np.isfinite(best.objective)


def test_training_twice_goes_on(tmp_path: Path) -> None:
    """A second train() goes on with the same student, in the phases of a new training."""
    run = trainer(tmp_path, "internal", {"schedule": "progressive"}, num_train_epochs=4)
    run.train()
    distiller, before, stages = run.distiller, weights(run.model), []
    run.add_callback(At(on_step_end=lambda state: stages.append(run.distiller.progress.stage)))
    run.train()
    assert run.distiller is distiller
    assert moved(before, run.model)
    assert stages == [0] * 4 + [1] * 4 + [2] * 8


def test_evaluate_and_predict_need_no_training(tmp_path: Path) -> None:
    """Before train(): as Trainer does, without the teacher."""
    of = teacher()
    ours = trainer(tmp_path, "internal", of=of, given={"eval_dataset": Texts(8)})
    stock = plain(tmp_path, given={"eval_dataset": Texts(8)})
    with calls({"teacher": of}) as counts:
        assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
        np.testing.assert_array_equal(ours.predict(Texts(8)).predictions, stock.predict(Texts(8)).predictions)
    assert counts["teacher"] == 0


def test_best_model_and_metrics(tmp_path: Path) -> None:
    """compute_metrics, metric_for_best_model and load_best_model_at_end work as in Trainer."""

    def metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    run = trainer(
        tmp_path,
        "internal",
        {"schedule": "progressive", "gold": 1.0},
        given={"eval_dataset": Texts(12), "compute_metrics": metrics},
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run.train()
    losses = logged(run, "eval_loss")
    assert len(losses) == len(logged(run, "eval_accuracy")) == 4
    assert run.state.best_metric == min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert difference(best, weights(run.model)) == 0.0


def test_compute_loss_func(tmp_path: Path) -> None:
    """A loss of the user's own takes the place of the task loss, and divides by the items of the accumulated batch."""
    seen: list[int] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        seen.append(int(num_items_in_batch.item()))
        return 5 * F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    one = trainer(
        tmp_path, given={"compute_loss_func": loss}, per_device_train_batch_size=8, learning_rate=0.0, max_steps=1
    )
    one.train()
    assert seen[-1] == 8
    two = trainer(
        tmp_path,
        given={"compute_loss_func": loss},
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_steps=1,
    )
    two.train()
    assert seen[-2:] == [8, 8]
    reference = trainer(tmp_path, per_device_train_batch_size=8, learning_rate=0.0, max_steps=1)
    reference.train()
    assert logged(one, "distill/task")[0] == pytest.approx(5 * logged(reference, "distill/task")[0], rel=1e-6)
    for name in ("loss", "distill/task", "grad_norm"):
        assert logged(two, name)[0] == pytest.approx(logged(one, name)[0], rel=1e-5)


class Weighted(Trainer):
    """A user's trainer with a task loss of its own, under the signature that tutorials give it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 7 * F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_base_class_may_change_the_task_loss(tmp_path: Path) -> None:
    """DistillationTrainer before a trainer with its own compute_loss takes that as the task loss."""

    class Both(DistillationTrainer, Weighted):
        pass

    runs = [trainer(tmp_path, cls=cls, max_steps=1) for cls in (DistillationTrainer, Both)]
    for run in runs:
        run.train()
    assert logged(runs[1], "distill/task")[0] == pytest.approx(7 * logged(runs[0], "distill/task")[0], rel=1e-6)
    assert logged(runs[1], "distill/kd") == logged(runs[0], "distill/kd")
    data = Texts()
    with torch.no_grad():
        expected = 7 * F.cross_entropy(runs[1].model.eval()(data.ids, data.mask).logits, data.labels)
    assert runs[1].evaluate(data)["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_override_that_hides_the_distillation_is_an_error(tmp_path: Path) -> None:
    """compute_loss without super() would train without the teacher and say nothing."""

    class Hiding(DistillationTrainer):
        compute_loss = Weighted.compute_loss

    with pytest.raises(DistillError, match="hides the distillation"):
        trainer(tmp_path, cls=Hiding).train()


def test_an_override_may_add_to_the_loss(tmp_path: Path) -> None:
    """compute_loss with super() changes the whole loss."""

    class Doubling(DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return 2 * loss if self._playing else loss

    runs = [trainer(tmp_path, cls=cls, max_steps=1) for cls in (DistillationTrainer, Doubling)]
    for run in runs:
        run.train()
    assert logged(runs[1], "loss")[0] == pytest.approx(2 * logged(runs[0], "loss")[0], rel=1e-6)


def test_a_distiller_object_is_taken_as_it_is(tmp_path: Path) -> None:
    """An object in place of a name, once: set up for one training, it is refused by the next."""
    distiller = create_distiller("kd", temperature=2.0)
    run = DistillationTrainer(
        bert(), arguments(tmp_path), train_dataset=Texts(), teacher_model=teacher(), distiller=distiller
    )
    assert run.distiller is distiller
    run.train()
    with pytest.raises(DistillError, match="was set up for another training"):
        trainer(tmp_path, distiller)


def test_iterable_dataset(tmp_path: Path) -> None:
    """A data set without a length trains by max_steps, phases included."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([Texts()[i % 16] for i in range(64)])

    run = trainer(tmp_path, "internal", {"schedule": "progressive"}, data=Stream(), max_steps=8)
    stages: list[int] = []
    run.add_callback(At(on_step_end=lambda state: stages.append(run.distiller.progress.stage)))
    run.train()
    assert stages == [0, 0, 1, 1, 2, 2, 2, 2]


class Passes(Distiller):
    """Looks at the training set, 2020."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def prepare(self, nets: Any, batches: Any) -> None:
        self.read.extend(batch.size for batch in batches)

    def loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        return {"kd": (student.logits - teacher.logits).square().mean()}


def test_the_pass_before_the_training_ends_in_an_endless_stream(tmp_path: Path) -> None:
    """It reads no more than the training does."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (Texts()[i % 16] for i in itertools.count())

    distiller = Passes()
    trainer(tmp_path, distiller, data=Endless(), max_steps=3, gradient_accumulation_steps=2).train()
    assert len(distiller.read) == 6


def test_the_pass_before_the_training_has_the_loaders_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch alone is not worth them."""
    workers: list[int] = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            workers.append(kwargs["num_workers"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("kd_transformers.trainer.DataLoader", Loader)
    distiller = Passes()
    trainer(tmp_path, distiller, dataloader_num_workers=1, max_steps=1).train()
    assert workers == [0, 1]
    assert sum(distiller.read) == len(Texts())


def test_multi_label_is_seen_by_the_labels(tmp_path: Path) -> None:
    """Float labels are one sigmoid for each class from the first step on, as transformers itself decides."""
    data, student, of = Texts(), bert(), teacher()
    data.labels = F.one_hot(data.labels, 3).float()
    run = trainer(tmp_path, options={"temperature": 1.0, "alpha": 1.0}, student=student, of=of, data=data, max_steps=1)
    inputs = {k: v[:4] for k, v in data.batch().items() if k != "labels"}
    with torch.no_grad():
        s, t = student.eval()(**inputs).logits, of(**inputs).logits
    run.train()
    p_s, p_t = s.sigmoid(), t.sigmoid()
    terms = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    assert logged(run, "distill/kd")[0] == pytest.approx(float(terms.sum(-1).mean()), rel=1e-4)


def test_composition(tmp_path: Path) -> None:
    """kd+internal: one task loss, the terms of both."""
    run = trainer(tmp_path, "kd+internal", {"internal.schedule": "all", "kd.alpha": 0.5}, max_steps=2)
    run.train()
    entry = run.state.log_history[0]
    terms = {name.removeprefix("distill/") for name in entry if name.startswith("distill/")}
    assert {"kd", "kl_attention", "cos_hidden"} <= terms


@pytest.mark.parametrize("distiller", ["kd", "internal"])
def test_bfloat16_is_finite(tmp_path: Path, distiller: str) -> None:
    """bf16=True trains, and what is saved stays float32."""
    run = trainer(tmp_path, distiller, bf16=True, num_train_epochs=4)
    before = weights(run.model)
    run.train()
    assert np.isfinite(logged(run, "loss")).all()
    assert np.isfinite(logged(run, "grad_norm")).all()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert len(moved(before, run.model)) == len(before)


class Half(DistillationTrainer):
    """fp16 on the CPU, where fp16=True is float32 without a scaler: forced, with a real one."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)


@pytest.mark.parametrize("distiller", ["kd", "internal"])
def test_float16_scales_and_unscales(tmp_path: Path, distiller: str) -> None:
    """Every group's gradient is divided by the loss scale once: the norms are those of float32."""
    options = {"project": True, "schedule": "all"} if distiller == "internal" else {}
    of = teacher(hidden_size=32) if distiller == "internal" else teacher()
    runs = []
    for cls in (DistillationTrainer, Half):
        run = trainer(tmp_path, distiller, options, cls=cls, of=of, optim="sgd", max_steps=4)
        run.train()
        runs.append(run)
    half = runs[1]
    assert half.accelerator.scaler is not None
    assert half.accelerator.native_amp
    assert half.accelerator.scaler.get_scale() == Half.scale
    assert logged(half, "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=2e-2)
    assert logged(half, "loss") == pytest.approx(logged(runs[0], "loss"), rel=2e-2)
    own = [weights(run.distiller) for run in runs]
    if own[0]:
        assert difference(own[0], own[1]) < 1e-2


def test_float16_overflow_is_skipped(tmp_path: Path) -> None:
    """An overflow leaves student and own parts where they are, and the scale falls."""

    class Overflowing(Half):
        scale = 2.0**60

    options = {"project": True, "schedule": "all"}
    run = trainer(tmp_path, "internal", options, cls=Overflowing, of=teacher(hidden_size=32), max_steps=1)
    student = weights(run.model)
    own: dict[str, Tensor] = {}
    run.add_callback(At(on_train_begin=lambda state: own.update(weights(run.distiller.projections))))
    run.train()
    assert difference(student, weights(run.model)) == 0.0
    assert difference(own, weights(run.distiller.projections)) == 0.0
    assert run.accelerator.scaler.get_scale() < Overflowing.scale


class Rows(Distiller):
    """Reads the numbers of the rows, and a stream of half of them."""

    teachers = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Batch, Batch]] = []

    def needs(self) -> Needs:
        return Needs(streams={"search": 0.5}, index=True)

    def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
        self.seen.append((batch, batch.stream("search")))
        return {}


@pytest.mark.parametrize("arrow", [True, False])
def test_rows_and_streams(tmp_path: Path, arrow: bool) -> None:
    """Row numbers pass the user's collator and unused columns, and a stream holds rows that the batches do not."""
    data: Any = Texts(extra={"idx": torch.arange(16)})
    ids = data.ids
    if arrow:
        data = Dataset.from_list([{k: v.tolist() for k, v in data[i].items()} for i in range(len(data))])
        data = data.with_format("torch")
    run = DistillationTrainer(bert(), arguments(tmp_path), train_dataset=data, distiller=Rows())
    collator = run.data_collator
    run.train()
    assert run.data_collator is collator
    found: tuple[set[int], set[int]] = set(), set()
    for batches in run.distiller.seen:
        for batch, rows in zip(batches, found, strict=True):
            assert set(batch.kwargs) == {"attention_mask"}
            assert torch.equal(batch.inputs, ids[batch.index])
            rows |= set(batch.index.tolist())
    assert len(found[0]) == len(found[1]) == 8
    assert not found[0] & found[1]


def test_streams_follow_a_batch_size_that_is_found(tmp_path: Path) -> None:
    """auto_find_batch_size begins anew with fewer rows, in the batches of a stream as well."""

    class Large(Rows):
        def loss(self, student: View, teacher: View, batch: Batch) -> dict[str, Tensor]:
            super().loss(student, teacher, batch)
            if batch.size + batch.stream("search").size > 4:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return {}

    args = arguments(tmp_path, auto_find_batch_size=True)
    run = DistillationTrainer(bert(), args, train_dataset=Texts(), distiller=Large())
    run.train()
    assert {tuple(batch.size for batch in batches) for batches in run.distiller.seen[-16:]} == {(2, 2)}
