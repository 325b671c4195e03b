"""The pitfalls of distilling in a Trainer, each of which a plain override of compute_loss falls into."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer_kit import (
    CHECKPOINTING,
    At,
    Texts,
    arguments,
    bert,
    calls,
    difference,
    logged,
    moved,
    plain,
    shifted,
    teacher,
    trainer,
    weights,
)

from kd_plugins import DistillError
from kd_transformers import DistillationTrainer

PROJECT = {"schedule": "all", "project": True}


def test_p01_accumulation_does_not_inflate(tmp_path: Path) -> None:
    """A model that takes **kwargs but ignores num_items_in_batch multiplies loss and gradient by the accumulation."""
    one = trainer(tmp_path, per_device_train_batch_size=8, max_steps=1)
    four = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    for run in (one, four):
        run.train()
    assert logged(one, "loss")[0] == pytest.approx(logged(four, "loss")[0], abs=1e-6)
    assert logged(one, "grad_norm")[0] == pytest.approx(logged(four, "grad_norm")[0], abs=1e-5)
    assert logged(one, "distill/kd")[0] == pytest.approx(logged(four, "distill/kd")[0], abs=1e-6)


def test_p01_accumulation_may_begin_in_another_training(tmp_path: Path) -> None:
    """What a model does with the number of items is asked whatever the accumulation is at first."""
    same: dict[str, Any] = {"data": Texts(8), "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0}
    later, fresh = trainer(tmp_path, **same), trainer(tmp_path, gradient_accumulation_steps=2, **same)
    later.train()
    later.args.gradient_accumulation_steps = 2
    for run in (later, fresh):
        run.train()
    assert logged(later, "distill/task")[-1] == pytest.approx(logged(fresh, "distill/task")[0], abs=1e-6)


def test_p01_unfinished_window_is_a_mean_too(tmp_path: Path) -> None:
    """The last window of an epoch holds fewer micro-batches and is divided by their number."""
    same: dict[str, Any] = {"data": Texts(10), "per_device_train_batch_size": 2, "learning_rate": 0.0}
    windows = trainer(tmp_path, gradient_accumulation_steps=4, max_steps=2, **same)
    single = trainer(tmp_path, max_steps=5, **same)
    for run in (windows, single):
        run.train()
    assert windows.state.global_step == 2
    assert logged(windows, "loss")[1] == pytest.approx(logged(single, "loss")[4], abs=1e-6)
    assert logged(windows, "grad_norm")[1] == pytest.approx(logged(single, "grad_norm")[4], rel=1e-5)


def own_run(folder: Path, **args: Any) -> Any:
    """internal with a learned projection, 16 to 32, in the group "own"."""
    return trainer(folder, "internal", PROJECT, of=teacher(hidden_size=32), **args)


def test_p02_own_parts_are_trained(tmp_path: Path) -> None:
    """Modules on the trainer are not in the optimizer, so they never move."""
    run = own_run(tmp_path)
    before: dict[str, Tensor] = {}
    run.add_callback(At(on_train_begin=lambda state: before.update(weights(run.distiller.projections))))
    run.train()
    assert set(moved(before, run.distiller.projections)) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_p02_own_gradients_are_zeroed(tmp_path: Path) -> None:
    """Trainer zeroes the gradients of its model only; at a learning rate of 0 the others would grow with every step."""
    run = own_run(tmp_path, learning_rate=0.0, per_device_train_batch_size=16, max_steps=3, max_grad_norm=0.0)
    norms: list[float] = []

    def norm(state: Any) -> None:
        norms.append(float(run.distiller.projections["1"].weight.grad.norm()))

    run.add_callback(At(on_pre_optimizer_step=norm))
    run.train()
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)


def test_p02_own_gradients_are_clipped_with_the_student(tmp_path: Path) -> None:
    """Trainer clips the parameters of its model only."""
    run = own_run(tmp_path, max_grad_norm=1e-3, max_steps=1)
    norms: list[tuple[float, float]] = []

    def norm(state: Any) -> None:
        own, student = ([p.grad for p in m.parameters() if p.grad is not None] for m in (run.distiller, run.model))
        norms.append(tuple(float(torch.cat([g.flatten() for g in gs]).norm()) for gs in (own, student)))

    run.add_callback(At(on_pre_optimizer_step=norm))
    run.train()
    own, student = norms[0]
    assert own > 0
    assert student > 0
    assert (own**2 + student**2) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    assert logged(run, "grad_norm")[0] > 1e-3


def test_p02_own_parts_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Parts that no checkpoint holds start afresh on resume, without an error, under old Adam moments."""
    run = own_run(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    run.train()
    saved = load_file(tmp_path / "checkpoint-3" / "distiller.safetensors")
    assert difference(saved, dict(run.distiller.state_dict())) == 0.0
    moments = torch.load(tmp_path / "checkpoint-3" / "distiller_optimizers.pt", weights_only=True)
    assert len(moments["optimizers"]["own"]["state"]) == 4


def test_p03_teacher_stays_in_evaluation_mode(tmp_path: Path) -> None:
    """A teacher inside the trained module is put in train mode at every step; one given in train mode stays noisy."""
    noisy = teacher(dropout=True).train()
    run = trainer(tmp_path, of=noisy, learning_rate=0.0, per_device_train_batch_size=16, max_steps=3)
    modes: set[bool] = set()
    noisy.register_forward_pre_hook(lambda module, args: modes.update(m.training for m in module.modules()))
    run.train()
    assert modes == {False}
    assert len(set(logged(run, "distill/kd"))) == 1


def test_p03_teacher_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    """A teacher inside the trained module is saved with it."""
    run = trainer(tmp_path, save_strategy="epoch", num_train_epochs=1)
    run.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(saved) == set(bert().state_dict())
    assert not list(run.distiller.parameters())


def test_p03_teacher_gets_no_gradient_and_does_not_change(tmp_path: Path) -> None:
    """The teacher is frozen."""
    of = teacher()
    before = weights(of)
    trainer(tmp_path, "internal", {"schedule": "all"}, of=of).train()
    assert difference(before, weights(of)) == 0.0
    assert all(p.grad is None for p in of.parameters())


def test_p04_attention_is_read_under_sdpa(tmp_path: Path) -> None:
    """With sdpa, output_attentions gives an empty tuple, and a loss over zip(...) is silently 0."""
    student, of = bert(), teacher()
    assert student.config._attn_implementation == of.config._attn_implementation == "sdpa"
    before = weights(student)
    run = trainer(tmp_path, "internal", {"schedule": "all", "hidden_weight": 0.0}, student=student, of=of, max_steps=1)
    run.train()
    eager_s, eager_t = bert(attn_implementation="eager"), teacher(attn_implementation="eager")
    batch = {k: v[:4] for k, v in Texts().batch().items()}
    with torch.no_grad():
        s, t = (net.eval()(**batch, output_attentions=True) for net in (eager_s, eager_t))
    expected = 0.0
    real = batch["attention_mask"].double()
    for ours, theirs in ((0, 1), (1, 3)):
        p_s, p_t = s.attentions[ours].double(), t.attentions[theirs].double()
        rows = torch.xlogy(p_t, p_t / p_s.clamp_min(1e-300)).sum(-1).mean(1)
        expected += float(((rows * real).sum(1) / real.sum(1)).mean())
    assert logged(run, "distill/kl_attention")[0] == pytest.approx(expected, rel=1e-5)
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved(before, student)


def test_p05_attention_is_read_before_dropout(tmp_path: Path) -> None:
    """Eager attention gives the probabilities after dropout in train mode: half of them 0, and the KL infinite."""
    runs = []
    for rate in (0.0, 0.5):
        student = bert(attention_probs_dropout_prob=rate)
        options = {"schedule": "progressive", "hidden_weight": 0.0}
        runs.append(trainer(tmp_path, "internal", options, student=student, max_steps=3, learning_rate=0.0))
        runs[-1].train()
    without, with_dropout = (logged(run, "distill/kl_attention")[0] for run in runs)
    assert without > 0
    assert with_dropout == pytest.approx(without, rel=1e-5)


def test_p06_loss_does_not_depend_on_padding(tmp_path: Path) -> None:
    """Padded queries have attention too, which must not enter the mean."""
    losses = []
    for length in (10, 20):
        run = trainer(tmp_path, "internal", {"schedule": "all"}, data=Texts(length=length), num_train_epochs=1)
        run.train()
        losses.append([logged(run, f"distill/{name}") for name in ("kl_attention", "cos_hidden", "soft_labels")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_p07_predictions_are_logits_alone(tmp_path: Path) -> None:
    """Hidden states in what compute_loss returns would be gathered as predictions, and reach compute_metrics."""
    shapes: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(np.shape(prediction.predictions))
        return {}

    given = {"compute_metrics": metrics, "eval_dataset": Texts(12)}
    run = trainer(tmp_path, "internal", {"schedule": "all"}, given=given, eval_strategy="epoch")
    run.train()
    assert shapes == [(12, 3), (12, 3)]
    assert run.predict(Texts(9)).predictions.shape == (9, 3)


@pytest.mark.parametrize(("distiller", "options"), [("kd", {"alpha": 1.0}), ("internal", {})])
def test_p08_evaluation_is_the_task_loss(tmp_path: Path, distiller: str, options: dict[str, Any]) -> None:
    """The distillation's loss differs between phases, and costs a teacher: evaluation computes the task loss alone."""
    of = teacher()
    run = trainer(tmp_path, distiller, options, of=of, given={"eval_dataset": Texts(12)}, num_train_epochs=3)
    run.train()
    with calls({"teacher": of}) as counts:
        ours = run.evaluate()
    stock = plain(tmp_path, student=run.model, given={"eval_dataset": Texts(12)}).evaluate()
    assert ours["eval_loss"] == stock["eval_loss"]
    assert counts == {"teacher": 0}


def test_p09_label_smoothing_acts_on_the_task_loss(tmp_path: Path) -> None:
    """An override that takes outputs.loss ignores label_smoothing_factor silently."""
    runs = [trainer(tmp_path, options={"alpha": 0.5}, max_steps=1, label_smoothing_factor=f) for f in (0.0, 0.5)]
    for run in runs:
        run.train()
    batch = {k: v[:4] for k, v in Texts().batch().items()}
    labels = batch.pop("labels")
    logits = bert().eval()(**batch).logits
    expected = [F.cross_entropy(logits, labels, label_smoothing=f).item() / 2 for f in (0.0, 0.5)]
    assert [logged(run, "distill/task")[0] for run in runs] == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert logged(runs[0], "distill/kd") == pytest.approx(logged(runs[1], "distill/kd"), rel=1e-6)


@pytest.mark.parametrize("arrow", [True, False])
def test_p10_teacher_columns_survive(tmp_path: Path, arrow: bool) -> None:
    """remove_unused_columns drops what the student's forward does not take, without an error."""
    rows = Texts()
    ids = rows.ids.flip(1) + 60
    data: Any = Texts(extra={"teacher_input_ids": ids, "teacher_attention_mask": rows.mask.flip(1), "idx": rows.labels})
    if arrow:
        data = Dataset.from_list([{k: v.tolist() for k, v in data[i].items()} for i in range(len(data))])
        data = data.with_format("torch")
    of, student = teacher(vocab_size=128), bert()
    seen: dict[str, Any] = {}
    of.register_forward_pre_hook(lambda m, args, kwargs: seen.update(teacher=kwargs), with_kwargs=True)
    student.register_forward_pre_hook(lambda m, args, kwargs: seen.update(student=kwargs), with_kwargs=True)
    run = trainer(tmp_path, student=student, of=of, data=data, max_steps=1, given={"eval_dataset": data})
    run.train()
    assert set(seen["teacher"]) == {"input_ids", "attention_mask"}
    assert torch.equal(seen["teacher"]["input_ids"], ids[:4])
    assert torch.equal(seen["teacher"]["attention_mask"], rows.mask.flip(1)[:4])
    assert set(seen["student"]) - {"num_items_in_batch"} == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(seen["student"]["input_ids"], rows.ids[:4])
    run.evaluate()
    assert set(seen["student"]) - {"num_items_in_batch"} == {"input_ids", "attention_mask", "labels"}
    run.predict(data)
    assert set(seen["student"]) - {"num_items_in_batch"} == {"input_ids", "attention_mask", "labels"}


def test_p11_teacher_runs_in_bfloat16(tmp_path: Path) -> None:
    """Autocast lives in the prepared student's forward, so that a bare teacher runs in float32."""
    of, student, dtypes = teacher(), bert(), {}
    of.classifier.register_forward_hook(lambda m, args, out: dtypes.update(teacher=out.dtype))
    student.classifier.register_forward_hook(lambda m, args, out: dtypes.update(student=out.dtype))
    run = trainer(tmp_path, student=student, of=of, bf16=True)
    run.train()
    assert dtypes == {"teacher": torch.bfloat16, "student": torch.bfloat16}
    assert np.isfinite(logged(run, "loss")).all()


def test_p11_evaluation_before_training_is_prepared(tmp_path: Path) -> None:
    """A teacher that accelerate has prepared makes an earlier evaluate() run the student unprepared."""
    ours = trainer(tmp_path, given={"eval_dataset": Texts()}, bf16=True)
    stock = plain(tmp_path, given={"eval_dataset": Texts()}, bf16=True)
    dtypes = []
    ours.model.classifier.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    assert set(dtypes) == {torch.bfloat16}


def test_p12_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    """Reentrant activation checkpointing hides the captured tensors' gradients, without an error."""
    for options in ({"hidden_weight": 0.0}, {"attention_weight": 0.0}, {}):
        student = bert()
        before = weights(student)
        args = {f"{CHECKPOINTING}_checkpointing": True}
        args[f"{CHECKPOINTING}_checkpointing_kwargs"] = {"use_reentrant": True}
        run = trainer(tmp_path, "internal", {"schedule": "all", **options}, student=student, **args)
        with pytest.raises(DistillError, match="use_reentrant"):
            run.train()
        assert difference(before, weights(student)) == 0.0


@pytest.mark.parametrize("schedule", ["all", "stacked"])
def test_p12_checkpointing_changes_nothing(tmp_path: Path, schedule: str) -> None:
    """Non-reentrant activation checkpointing gives the same gradients, also where a forward stops early."""
    runs = []
    for checkpointing in (False, True):
        # eager, because the layers' own output must be computed the same way with and without.
        student = bert(attn_implementation="eager")
        args = {"optim": "sgd", "num_train_epochs": 3, f"{CHECKPOINTING}_checkpointing": checkpointing}
        runs.append(trainer(tmp_path, "internal", {"schedule": schedule}, student=student, **args))
        runs[-1].train()
    assert difference(weights(runs[0].model), weights(runs[1].model)) < 1e-6


def test_p13_momentum_moves_nothing_outside_a_phase(tmp_path: Path) -> None:
    """A term that is multiplied by 0 still moves its weights by Adam's momentum; a dropped term does not."""
    options = {"schedule": "progressive", "freeze_lower": True, "fresh_optimizer": False}
    run = trainer(tmp_path, "internal", options, num_train_epochs=4, weight_decay=0.1)
    seen: dict[int, list[str]] = {}
    last: dict[str, Tensor] = weights(run.model)

    def step(state: Any) -> None:
        seen.setdefault(run.distiller.progress.stage, []).extend(moved(last, run.model))
        last.update(weights(run.model))

    run.add_callback(At(on_step_end=step))
    run.train()
    first, second, labels = (set(seen[stage]) for stage in range(3))
    assert first
    assert second
    assert all(".layer.0." in name or "embeddings" in name for name in first)
    assert all(".layer.1." in name for name in second)
    assert labels == set(dict(run.model.named_parameters()))


def test_p13_parameters_of_later_phases_are_in_the_optimizer(tmp_path: Path) -> None:
    """What is frozen when the optimizer is made never trains: nothing is frozen by flags."""
    run = trainer(tmp_path, "internal", {"schedule": "progressive"}, num_train_epochs=4)
    before = weights(run.model)
    run.train()
    assert set(moved(before, run.model)) == set(dict(run.model.named_parameters()))


def test_p14_phase_is_restored_without_callback_states(tmp_path: Path) -> None:
    """A stateful callback forgets its phase on resume; the phase is read from the checkpoint and the step."""
    options = {"schedule": "progressive"}
    args: dict[str, Any] = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, "internal", options, **args).train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]) == {"TrainerControl"}
    run = trainer(tmp_path, "internal", options, student=shifted(bert()), **args)
    stages: list[int] = []
    run.add_callback(At(on_step_end=lambda state: stages.append(run.distiller.progress.stage)))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert stages == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2]


def test_p14_longer_training_keeps_the_phases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another num_train_epochs on resume would shift fractional phases: the table in the checkpoint counts."""
    options = {"schedule": "progressive"}
    args: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    first = trainer(tmp_path, "internal", options, num_train_epochs=4, **args)
    first.train()
    starts = list(first.distiller.progress.table.starts)
    longer = trainer(tmp_path, "internal", options, num_train_epochs=8, **args)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "stages are kept" in caplog.text
    assert longer.distiller.progress.table.starts == starts == [0, 4, 8]
    rates = logged(longer, "learning_rate")
    # The last phase has 24 steps now, and its curve reaches the end.
    assert rates[-24:] == pytest.approx([1e-2 * (24 - i) / 24 for i in range(24)], rel=1e-6)


def test_p15_model_init_gets_its_own_taps(tmp_path: Path) -> None:
    """model_init makes a new model inside train(): what was built for the first one points to a dead student."""
    made: list[Any] = []

    def init() -> Any:
        made.append(bert(seed=len(made)))
        return made[-1]

    run = trainer(
        tmp_path, "internal", PROJECT, of=teacher(hidden_size=32), given={"model_init": init}, num_train_epochs=1
    )
    before: list[dict[str, Tensor]] = []
    parts = []
    for _ in range(2):
        run.train()
        before.append(weights(run.model))
        parts.append(run.distiller)
    assert run.model is made[-1]
    assert len(made) == 3
    assert len(moved(dict(bert(seed=2).state_dict()), run.model)) == len(list(run.model.parameters()))
    # Every run starts with fresh parts of the distiller, not with the last run's.
    assert parts[0] is not parts[1]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.teachers[0].modules()]
    assert max(hooks) <= 2


def test_p16_single_class_teacher_does_not_broadcast(tmp_path: Path) -> None:
    """KL of three classes against one broadcasts without an error."""
    with pytest.raises(DistillError, match="3 in the student and 1"):
        trainer(tmp_path, of=teacher(num_labels=1))


def test_p16_permuted_labels_are_put_in_order(tmp_path: Path) -> None:
    """Nothing checks label2id: a teacher with the same classes in another order teaches the wrong ones."""
    names, order = ["a", "b", "c"], [2, 0, 1]
    of, permuted = (teacher(id2label=dict(enumerate(n))) for n in (names, [names[i] for i in order]))
    with torch.no_grad():
        for ours, theirs in zip(permuted.classifier.parameters(), of.classifier.parameters(), strict=True):
            ours.copy_(theirs[order])
    runs = []
    for net in (of, permuted):
        runs.append(trainer(tmp_path, of=net, student=bert(id2label=dict(enumerate(names)))))
        runs[-1].train()
    assert difference(weights(runs[0].model), weights(runs[1].model)) == 0.0
    wrong = trainer(tmp_path, of=permuted)  # A student without names takes the teacher's order as it is.
    wrong.train()
    assert logged(wrong, "distill/kd")[0] != pytest.approx(logged(runs[0], "distill/kd")[0], rel=1e-3)


@pytest.mark.slow
def test_p18_compiled_training_is_the_same(tmp_path: Path) -> None:
    """A compiled forward gives zero gradients, not none, outside the loss, and AdamW then decays those weights."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    runs, outside = [], []
    for compiled in (False, True):
        options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        run = trainer(tmp_path, "internal", {}, max_steps=6, weight_decay=0.1, adam_epsilon=1e-3, **options)
        before = weights(run.model)

        def step(state: Any, run: Any = run, before: dict[str, Tensor] = before) -> None:
            if state.global_step <= 2:
                outside.append([n for n in moved(before, run.model) if "layer.0." not in n and "embeddings" not in n])

        run.add_callback(At(on_step_end=step))
        run.train()
        runs.append(run)
    assert runs[0].distiller.progress.table.starts == [0, 2, 3]
    assert outside == [[]] * 4
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), abs=1e-5)
    assert difference(weights(runs[0].model), weights(runs[1].model)) < 1e-5
    assert counters["stats"]["unique_graphs"] >= 3


def test_p19_data_parallel_is_refused(tmp_path: Path) -> None:
    """DataParallel replicates the student and leaves the teacher on one GPU."""
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(DistillError, match="one process for each GPU"):
        DistillationTrainer(bert(), args, train_dataset=Texts(), teacher_model=teacher(), distiller="kd")
    args._n_gpu = 0
    for student, of in ((nn.DataParallel(bert()), teacher()), (bert(), nn.DataParallel(teacher()))):
        with pytest.raises(DistillError, match=r"got nn.DataParallel.*: give the network itself"):
            DistillationTrainer(student, args, train_dataset=Texts(), teacher_model=of, distiller="kd")


def test_p20_no_step_waits_for_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log call in compute_loss waits for the device at every micro-step and floods the history.

    One step in ten does: whether the loss is still finite is looked at there.
    """
    counts: dict[str, int] = {}
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counting(self: Tensor, *args: Any, original: Any = original, name: str = name) -> Any:
            if "masking_utils" not in sys._getframe(1).f_code.co_filename:  # In the networks' own forwards.
                counts[name] = counts.get(name, 0) + 1
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counting)
    per_step = []
    for make in (lambda **k: plain(tmp_path, **k), lambda **k: trainer(tmp_path, "internal", {"schedule": "all"}, **k)):
        found = []
        for steps in (4, 12):
            run = make(max_steps=steps, logging_steps=100, num_train_epochs=3, data=Texts(64))
            counts.clear()
            run.train()
            found.append(sum(counts.values()))
            assert len(run.state.log_history) == 1
        per_step.append((found[1] - found[0]) / 8)
    assert per_step[1] == per_step[0] + 1 / 8


def test_p20_terms_are_means_since_the_last_log(tmp_path: Path) -> None:
    """Terms are logged under their names with the loss, averaged over micro-batches, once each."""
    same: dict[str, Any] = {"data": Texts(8), "per_device_train_batch_size": 2, "learning_rate": 0.0}
    every, seldom = (trainer(tmp_path, logging_steps=n, **same) for n in (1, 4))
    for run in (every, seldom):
        run.train()
    for name in ("loss", "distill/kd", "distill/task"):
        values = logged(every, name)
        assert len(values) == 8
        assert logged(seldom, name) == pytest.approx([sum(values[:4]) / 4, sum(values[4:]) / 4], rel=1e-6)
    total = [a + b for a, b in zip(logged(every, "distill/kd"), logged(every, "distill/task"), strict=True)]
    assert logged(every, "loss") == pytest.approx(total, rel=1e-5)
