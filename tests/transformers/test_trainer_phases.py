"""Phases of a schedule under DistillationTrainer: what runs, what moves, at which rate; and resuming in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_kit import At, Texts, arguments, bert, calls, difference, logged, moved, shifted, teacher, trainer, weights
from transformers import get_scheduler

from kd_plugins import DistillError
from kd_plugins.reading.attention import AttentionCall


def parts_of(model: Any) -> dict[str, nn.Module]:
    """What a BERT classifier runs, bottom-up."""
    layers = {f"layer {i}": layer for i, layer in enumerate(model.bert.encoder.layer, 1)}
    return {"embeddings": model.bert.embeddings, **layers, "pooler": model.bert.pooler, "head": model.classifier}


@pytest.mark.parametrize("schedule", ["progressive", "stacked"])
def test_upper_layers_do_not_run(tmp_path: Path, schedule: str) -> None:
    """In a phase that reads layer l, neither network runs what is above l; in the last phase everything runs."""
    run = trainer(tmp_path, "internal", {"schedule": schedule}, num_train_epochs=4)
    student, of = parts_of(run.model), parts_of(run.teachers[0])
    seen: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
    with calls(student) as ours, calls(of) as theirs:

        def reset(state: Any = None) -> None:
            for counts in (ours, theirs):
                counts.update(dict.fromkeys(counts, 0))

        def keep(state: Any) -> None:
            seen[run.distiller.progress.stage] = dict(ours), dict(theirs)
            reset()

        run.add_callback(At(on_train_begin=reset, on_step_end=keep))
        run.train()
    for stage, (layer, teacher_layer) in enumerate([(1, 2), (2, 4)]):
        for counts, top in zip(seen[stage], (layer, teacher_layer), strict=True):
            ran = [name for name, count in counts.items() if count]
            assert ran == ["embeddings", *(f"layer {i}" for i in range(1, top + 1))]
            assert set(counts.values()) <= {0, 1}
    assert all(set(counts.values()) == {1} for counts in seen[2])


@pytest.mark.parametrize("schedule", ["progressive", "stacked"])
def test_terms_of_each_phase(tmp_path: Path, schedule: str) -> None:
    """The layers' terms in their phases, the soft labels and the gold labels in the last."""
    run = trainer(tmp_path, "internal", {"schedule": schedule, "gold": 1.0}, num_train_epochs=4)
    run.train()
    terms = [{n.removeprefix("distill/") for n in e if n.startswith("distill/")} for e in run.state.log_history[:-1]]
    assert terms == [{"kl_attention", "cos_hidden"}] * 8 + [{"soft_labels", "task"}] * 8


def test_every_phase_has_its_own_curve(tmp_path: Path) -> None:
    """Linear with warmup, three times; and a curve whose options are in units of the learning rate."""
    run = trainer(tmp_path, "internal", num_train_epochs=4, warmup_steps=2)
    run.train()
    assert run.distiller.progress.table.starts == [0, 4, 8]
    expected = [0, 0.5, 1, 0.5, 0, 0.5, 1, 0.5, 0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert logged(run, "learning_rate") == pytest.approx([1e-2 * x for x in expected])
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-3}}
    run = trainer(tmp_path, "internal", num_train_epochs=4, **kwargs)
    run.train()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    args = arguments(tmp_path, **kwargs)
    one = get_scheduler(args.lr_scheduler_type, optimizer, 0, 4, scheduler_specific_kwargs={"min_lr": 5e-3})
    rates = [1e-2 * one.lr_lambdas[0](step) for step in range(4)]
    assert rates[-1] > 5e-3
    assert logged(run, "learning_rate")[:8] == pytest.approx(rates * 2)


def test_a_curve_that_cannot_start_anew_is_refused(tmp_path: Path) -> None:
    """A schedule that follows a metric is no function of the step."""
    run = trainer(
        tmp_path,
        "internal",
        given={"eval_dataset": Texts(4)},
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="epoch",
        num_train_epochs=3,
    )
    before = weights(run.model)
    with pytest.raises(DistillError, match="cannot start anew"):
        run.train()
    assert difference(before, weights(run.model)) == 0.0


@pytest.mark.parametrize("fresh", [True, False])
def test_fresh_optimizer_state(tmp_path: Path, fresh: bool) -> None:
    """Every phase starts with empty optimizer state, the projections' included, unless it shall not."""
    options = {"project": True, "fresh_optimizer": fresh}
    run = trainer(tmp_path, "internal", options, of=teacher(hidden_size=32), num_train_epochs=4)
    steps: list[tuple[int, int]] = []

    def keep(state: Any) -> None:
        word = run.model.bert.embeddings.word_embeddings.weight
        own = run.distiller.projections["1"].weight
        optimizers = run.player.plain_optimizer, run.player.own.optimizer
        found = (o.state.get(p, {}).get("step", 0) for o, p in zip(optimizers, (word, own), strict=True))
        steps.append(tuple(int(s) for s in found))

    run.add_callback(At(on_step_end=keep))
    run.train()
    student, own = zip(*steps, strict=True)
    if fresh:
        assert student == (*range(1, 5), *range(1, 5), *range(1, 9))
        assert own == (*range(1, 5), *range(1, 5), *[0] * 8)
    else:
        assert student == tuple(range(1, 17))
        assert own == (*range(1, 9), *[8] * 8)


def test_freeze_lower(tmp_path: Path) -> None:
    """With freeze_lower the second phase leaves the first layer and the embeddings where they are."""
    options = {"schedule": "progressive", "freeze_lower": True}
    run = trainer(tmp_path, "internal", options, num_train_epochs=4, weight_decay=0.1)
    at: dict[int, dict[str, Tensor]] = {}
    run.add_callback(At(on_step_end=lambda state: at.update({state.global_step: weights(run.model)})))
    run.train()
    now = {name: value for name, value in at[8].items() if not torch.equal(value, at[4][name])}
    assert now
    assert all(".layer.1." in name for name in now)


def test_threshold_ends_a_phase(tmp_path: Path) -> None:
    """A phase ends with the epoch whose mean cosine falls below the threshold; the next has its whole curve."""
    options = {"schedule": "progressive", "threshold": 1.9, "classification_share": 0.25}
    run = trainer(tmp_path, "internal", options, num_train_epochs=8)
    run.train()
    assert run.distiller.progress.table.starts == [0, 4, 8]
    rates = logged(run, "learning_rate")
    assert rates[4] == pytest.approx(1e-2)
    assert rates[8:] == pytest.approx([1e-2 * (24 - i) / 24 for i in range(24)])
    assert "distill/soft_labels" in run.state.log_history[8]
    never = trainer(tmp_path, "internal", {**options, "threshold": 1e-9}, num_train_epochs=8)
    never.train()
    assert never.distiller.progress.table.starts == [0, 12, 24]


def test_threshold_survives_resume_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """The checkpoint of an epoch's last step knows that the phase has ended."""
    options = {"schedule": "progressive", "threshold": 1.9}
    args: dict[str, Any] = {"num_train_epochs": 6, "save_strategy": "steps", "save_steps": 4}
    first = trainer(tmp_path, "internal", options, **args)
    first.train()
    again = trainer(tmp_path, "internal", options, student=shifted(bert()), **args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.distiller.progress.table.starts == first.distiller.progress.table.starts
    assert logged(again, "learning_rate") == logged(first, "learning_rate")
    assert difference(weights(first.model), weights(again.model)) == 0.0


@pytest.mark.parametrize(("schedule", "step"), [("progressive", 9), ("stacked", 12)])
def test_resume_is_exact(tmp_path: Path, schedule: str, step: int) -> None:
    """Mid-phase and mid-epoch, or between two phases; accumulation, AdamW, dropout, clipping, an own group: 0.0."""

    def make(student: Any) -> Any:
        return trainer(
            tmp_path,
            "internal",
            {"schedule": schedule, "project": True, "gold": 0.5},
            student=student,
            of=teacher(hidden_size=32),
            data=Texts(24),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=4,
            max_grad_norm=0.5,
            weight_decay=0.1,
            warmup_steps=2,
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=3,
        )

    whole = make(bert(dropout=True, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    whole.train()
    assert whole.distiller.progress.table.starts == [0, 6, 12]
    torch.manual_seed(99)
    other = make(shifted(bert(dropout=True, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)))
    other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert other.state.global_step == whole.state.global_step == 24
    assert difference(weights(whole.model), weights(other.model)) == 0.0
    assert difference(weights(whole.distiller), weights(other.distiller)) == 0.0
    assert logged(whole, "loss") == logged(other, "loss")
    moments = [run.player.plain_optimizer.state_dict()["state"] for run in (whole, other)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_attention_is_read_as_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two ways that round otherwise is tried with the weights of a run's beginning, which are others here."""

    def make(name: str) -> Any:
        options = {"schedule": "all", "project": True}
        saving: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return trainer(tmp_path / name, "internal", options, of=teacher(hidden_size=32), **saving)

    def modes(run: Any) -> list[str]:
        return [layer.mode for layer in run._nets.student.network.attention.layers]

    real, student = AttentionCall.mode, bert().config.hidden_size // bert().config.num_attention_heads
    whole = make("whole")
    whole.train()
    assert modes(whole) == ["share", "share"]
    monkeypatch.setattr(AttentionCall, "mode", lambda *args: "record" if args[1].shape[-1] == student else real(*args))
    anew, other = make("anew"), make("other")
    anew.train()
    assert modes(anew) == ["record", "record"]
    assert difference(weights(whole.model), weights(anew.model)) > 0.0
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert modes(other) == ["share", "share"]
    assert difference(weights(whole.model), weights(other.model)) == 0.0


def test_resume_needs_the_same_phases(tmp_path: Path) -> None:
    """Other options that make other phases are refused."""
    args: dict[str, Any] = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, "internal", **args).train()
    state = json.loads((tmp_path / "checkpoint-6" / "distiller.json").read_text())
    assert state["stages"]["names"] == ["layer 1", "layer 2", "classification"]
    other = trainer(tmp_path, "internal", {"layers": "2:4"}, **args)
    with pytest.raises(DistillError, match="has the stages"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_shorter_training_keeps_the_phases(tmp_path: Path) -> None:
    """Fewer epochs on resume: the stages that fit keep their starts, and the last one ends earlier."""
    args: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, "internal", num_train_epochs=4, **args).train()
    shorter = trainer(tmp_path, "internal", num_train_epochs=3, **args)
    shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert shorter.distiller.progress.table.starts == [0, 4, 8]
    assert logged(shorter, "learning_rate")[8:] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_too_few_steps_for_the_phases(tmp_path: Path) -> None:
    """Every phase needs a step."""
    run = trainer(tmp_path, "internal", max_steps=2)
    before = weights(run.model)
    with pytest.raises(DistillError, match="at least one step for each of the 3 stages"):
        run.train()
    assert not moved(before, run.model)
