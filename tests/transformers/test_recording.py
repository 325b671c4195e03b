"""A training with Trainer leaves a record, and is not changed by it."""

from __future__ import annotations

import pytest
import torch
from test_trainer_tasks import rows_of, segformer
from trainer_kit import Texts, arguments, bert, difference, plain, teacher, trainer, weights
from transformers import Trainer, TrainerCallback

from kd_plugins import Batch, Nets
from kd_plugins.reading.view import View
from kd_report import load_run, render
from kd_report.analysis import predicted_maps
from kd_transformers import recording
from kd_transformers.recording import RecordCallback

STAGED = ("internal", {"schedule": "progressive"})


@pytest.mark.parametrize(("method", "options"), [("kd", None), STAGED])
def test_recording_changes_no_weight(tmp_path, method, options):
    def train(folder, recorded: bool):
        one = trainer(
            folder,
            method,
            options,
            student=bert(dropout=True),
            given={"eval_dataset": Texts(12)},
            eval_strategy="epoch",
            train_sampling_strategy="random",
            num_train_epochs=3,
        )
        if recorded:
            one.add_callback(RecordCallback(one, names={"student": "small", "teachers": ["large"]}, data="noise"))
        one.train()
        return one

    one = train(tmp_path / "a", True)
    assert difference(weights(one.model), weights(train(tmp_path / "b", False).model)) == 0
    run = load_run(tmp_path / "a")
    assert run.info["status"] == "finished"
    assert run.info["results"]["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"])
    assert [row["step"] for row in run.history if "loss" in row] == list(range(1, 13))
    # Short as it is, the predictions of eight rows, which the page counts, and as many of its layers.
    assert run.part("after", "predictions", "student", "examples") == 8
    assert run.part("after", "examples") == 8
    assert run.array("after", "cka").shape == (2, 4)
    assert run.array("after", "teacher/attention").shape[0] == (2 if options else 4)
    assert run.info["cost"]["parts"]["teacher forward"] > 0
    assert run.info["settings"]["learning_rate"] == 0.01
    page = render([tmp_path / "a"])
    keys = ["results", "calibration", "curves", "attention", "confusion", "cost"]
    assert [key for key in keys if f'id="{key}"' in page] == keys
    assert ('style="fill: var(--soft)"' in page) == (options is not None)


def test_an_interrupted_training_is_recorded_to_its_last_step(tmp_path):
    """A callback says so as a step ends, before Trainer logs it; the next training begins anew."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            if control.should_training_stop:
                recorder.interrupted()

    one = trainer(tmp_path, "kd", max_steps=4)
    recorder = RecordCallback(one)
    one.add_callback(recorder)
    one.add_callback(Stop())
    one.train()
    run = load_run(tmp_path)
    assert run.info["status"] == "interrupted"
    assert [row["step"] for row in run.history] == [1, 2]
    one.remove_callback(Stop)
    one.train()
    assert load_run(tmp_path).info["status"] == "finished"


def test_a_networks_own_hooks_stay(tmp_path):
    """SegFormer's encoder gives its maps through hooks that its first forward installs, here the analysis's."""
    rows = rows_of({"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(3, (4, 16, 16))})
    given = {"eval_dataset": rows}
    one = trainer(tmp_path, student=segformer(), of=segformer(), data=rows, given=given, max_steps=1)
    one.add_callback(RecordCallback(one))
    one.train()
    assert load_run(tmp_path).info["status"] == "finished"
    assert "Predictions" in render([tmp_path])


def test_predictions_side_by_side():
    """A pixel has the colour of its class in every row, and none where its label is ignored."""
    labels = torch.tensor([[0, 1, 255, 2]]).repeat(3, 1, 1)

    def net(shift: int):
        def ask(batch, reads):
            return View(9.0 * torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, shift]] * 3), 3).mT.unsqueeze(2))

        ask.module = torch.nn.Linear(1, 1)
        return ask

    nets = Nets(net(0), [net(2)])
    batch = Batch.of(torch.rand(3, 3, 1, 4), labels, task="segmentation", ignore_index=255)
    rows = predicted_maps(nets, batch, count=2).rows
    assert [(name, len(images)) for name, images in rows.items()] == [
        ("image", 2),
        ("label", 2),
        ("teacher", 2),
        ("student", 2),
    ]
    label, teacher_, student = (rows[name][0] for name in ("label", "teacher", "student"))
    assert label[:, 0, 2].tolist() == [0, 0, 0]
    same = [0, 1, 3]
    assert torch.equal(label[:, :, same], teacher_[:, :, same])
    assert torch.equal(student[:, 0, 3], label[:, 0, 0])
    assert len({tuple(c) for c in teacher_[:, 0].T.tolist()}) == 3
    assert predicted_maps(nets, Batch.of(torch.rand(3, 3, 1, 4), torch.zeros(3))) is None


def test_a_plain_training_is_compared_with_the_teacher_it_might_have_had(tmp_path):
    one = plain(tmp_path, given={"eval_dataset": Texts(12)})
    one.add_callback(RecordCallback(one, teachers=[teacher()]))
    one.train()
    run = load_run(tmp_path)
    assert run.info["method"] is None
    assert 0 <= run.part("after", "predictions", "student", "agreement") <= 1
    assert run.info["data"] == f"{len(one.train_dataset)} training rows and 12 evaluation rows"
    assert "plain training" in render([tmp_path])


def test_a_record_can_be_left_out(tmp_path):
    trainer(tmp_path, given={"record": False}).train()
    assert not (tmp_path / "run.json").exists()


def test_the_result_is_that_of_the_weights_that_stay(tmp_path):
    """The loss of a rate that is far too high is best at the first evaluation."""
    kept = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", learning_rate=10.0)
    one = trainer(tmp_path, given={"eval_dataset": Texts(12), "record": True}, num_train_epochs=3, **kept)
    one.train()
    run, losses = load_run(tmp_path), [row["eval_loss"] for row in one.state.log_history if "eval_loss" in row]
    assert min(losses) < losses[-1]
    assert run.result == ("loss", pytest.approx(min(losses)))
    assert run.info["results"]["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"])


def test_a_loader_of_the_users_own_is_read_no_further_than_others(tmp_path):
    class Own(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(self.eval_dataset, batch_size=4)

    one = Own(bert(), arguments(tmp_path), train_dataset=Texts(), eval_dataset=Texts(24))
    one.add_callback(RecordCallback(one, predicts=False))
    one.train()
    assert load_run(tmp_path).part("after", "examples") == 8


def test_attention_is_of_the_layers_that_learn_from_each_other(tmp_path):
    options = {"layers": "2:3"}
    trainer(tmp_path, "internal", options, given={"eval_dataset": Texts(12), "record": True}).train()
    run = load_run(tmp_path)
    assert run.part("after", "student", "attention") == ["layer 2"]
    assert run.part("after", "teacher", "attention") == ["layer 3"]


def test_a_resumed_training_goes_on_with_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "rows_to_analyse", lambda trained: trained // 2)
    for resume in (None, str(tmp_path / "checkpoint-4")):
        given = {"eval_dataset": Texts(12), "record": True}
        one = trainer(tmp_path, given=given, save_strategy="epoch")
        one.train(resume_from_checkpoint=resume)
    run = load_run(tmp_path)
    assert run.info["resumed"] == 1
    assert [row["step"] for row in run.history] == list(range(1, 9))
    assert run.array("before", "cka") is not None
