"""Checkpoints of DistillationTrainer: sealed, skipped where they are damaged, resumed to what a whole run ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from image_kit import Images
from safetensors.torch import load_file
from torch import nn
from trainer_kit import bert, difference, logged, plain, trainer, weights
from transformers import Trainer, TrainerCallback

from kd_plugins import DistillError, states
from kd_transformers import DistillationTrainer, compat
from kd_transformers.checkpoints import Resumable, check_same_run

# Six steps of eight; logs and checkpoints fall apart.
RUN: dict[str, Any] = dict(max_steps=6, logging_steps=4, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module", params=[None, "kd"])
def whole(request: Any, tmp_path_factory: Any) -> tuple[Any, Any, Any, Path]:
    """A finished training, and what it was made of."""
    folder = tmp_path_factory.mktemp("whole")
    run = made(folder, request.param)
    return request.param, run, run.train(), folder


def made(folder: Path, distiller: str | None, **args: Any) -> Any:
    """A run; without a distiller that of the script."""
    given: dict[str, Any] = {"student": bert(dropout=True), "cls": DistillationTrainer if distiller else Resumable}
    return trainer(folder, distiller, **{**given, **RUN, "train_sampling_strategy": "random", **args})


def vit(seed: int, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=3))


def losses(run: Any) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in run.state.log_history for key in ("loss", "train_loss") if key in row]


def copied(whole: Any, tmp_path: Path) -> Path:
    shutil.copytree(whole[3], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_the_newest_whole_one_is_taken_and_ends_as_the_whole_run(whole, name, tmp_path, caplog) -> None:
    distiller, first, result, _ = whole
    folder = copied(whole, tmp_path)
    (folder / "checkpoint-6" / "manifest.json").unlink()
    path = folder / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-2])
    run = made(folder, distiller)
    again = run.train(resume_from_checkpoint=True)
    assert f"checkpoint-4: {name} has" in caplog.text
    assert "checkpoint-6: it has no manifest.json" in caplog.text
    assert difference(weights(first.model), weights(run.model)) == 0.0
    assert losses(run) == losses(first)
    assert again.training_loss == result.training_loss
    # The run above has written both anew.
    path.write_bytes(path.read_bytes()[:-2])
    (folder / "checkpoint-6" / "manifest.json").unlink()
    with pytest.raises(DistillError, match=rf"{name} has .* take \S+checkpoint-2 instead"):
        made(folder, distiller).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_no_step_follows_the_last(whole, tmp_path) -> None:
    distiller, first, result, _ = whole
    run = made(copied(whole, tmp_path), distiller)
    again = run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert difference(weights(first.model), weights(run.model)) == 0.0
    assert again.training_loss == result.training_loss


@pytest.mark.parametrize("distiller", [None, "kd"])
def test_weights_that_are_written_under_other_names_are_read(distiller, tmp_path) -> None:
    """transformers writes the layers of a ViT under names that Trainer does not find."""
    falling = iter([3.0, 2.0, 1.0])
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}

    def run_of(folder: str, seed: int, **args: Any) -> Any:
        given = {"eval_dataset": Images(8, size=32), "compute_metrics": lambda _: {"score": next(falling)}}
        data = Images(16, size=32)
        networks = {"student": vit(seed), "of": vit(2)}
        return trainer(tmp_path / folder, distiller, **networks, data=data, given=given, max_steps=6, **args)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    run = run_of("whole", 0, **saving, **best)
    run.train()
    written = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert len(set(written) & set(weights(run.model))) < len(written) / 2
    first, last = (hf.ViTForImageClassification.from_pretrained(tmp_path / "whole" / f"checkpoint-{i}") for i in (2, 6))
    assert difference(weights(first), weights(run.model)) == 0.0 < difference(weights(first), weights(last))
    resumed = run_of("resumed", 1)
    resumed.train(str(tmp_path / "whole" / "checkpoint-4"))
    assert difference(weights(last), weights(resumed.model)) == 0.0


class MadeOtherwiseForImageClassification(hf.ViTForImageClassification):
    """As a user writes one, whose constructor `from_pretrained` cannot call."""

    def __init__(self, config: Any, scale: float) -> None:
        super().__init__(config)
        self.scale = scale


def changed(what: str, seed: int) -> Any:
    """A ViT that its owner has changed after it was made, of which its configuration says nothing."""
    model = vit(seed, layers=2 if what == "fewer layers" else 1)
    if what == "fewer layers":
        model.vit.layers = model.vit.layers[:1]
    elif what == "another head":
        model.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(16, 3))
    elif what == "a part more":
        model.part = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("what", ["fewer layers", "another head", "a part more"])
def test_weights_under_other_names_of_a_model_that_was_changed(what: str, tmp_path: Path) -> None:
    """They are read, too; an error here would lose a training that is at its end."""
    changed(what, 1).save_pretrained(tmp_path / "checkpoint-1")
    run = trainer(tmp_path, None, student=changed(what, 0), data=Images(8, size=32))
    run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert difference(weights(run.model), weights(changed(what, 1))) == 0.0


def test_weights_that_are_missing_are_told(tmp_path, caplog) -> None:
    """Those of a student of fewer layers, or of a class made otherwise, leave the model to Trainer, which says so."""
    vit(0, layers=1).save_pretrained(tmp_path / "checkpoint-1")
    otherwise = MadeOtherwiseForImageClassification(vit(0).config, 2.0)
    for model, told in ((vit(1, layers=2), ""), (otherwise, "from_pretrained cannot read")):
        caplog.clear()
        run = trainer(tmp_path, None, student=model, data=Images(8, size=32))
        before, missing = weights(run.model), [name for name in weights(run.model) if "layers" in name]
        assert not compat.load_renamed(run.model, str(tmp_path / "checkpoint-1"), missing)
        assert difference(before, weights(run.model)) == 0.0
        run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
        assert told in caplog.text
        assert "missing keys in the checkpoint" in caplog.text
    assert not compat.load_renamed(nn.Linear(1, 1), "", ["weight"])


def test_the_loss_since_a_checkpoint_of_trainers_own_is_a_mean_of_these_steps(tmp_path) -> None:
    plain(tmp_path, **{**RUN, "logging_steps": 1}).train()
    run = trainer(tmp_path, None, **{**RUN, "logging_steps": 1})
    result = run.train(str(tmp_path / "checkpoint-4"))
    fifth, sixth = logged(run, "loss")[-2:]
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx((fifth + sixth) / 2)


def test_one_of_another_student_or_optimizer_is_refused(whole, tmp_path) -> None:
    distiller, _, _, folder = whole
    for student in (bert(hidden_size=32), bert(3)):
        with pytest.raises(DistillError, match=r"checkpoint-4 cannot be read \((Runtime|Value)Error: .*another run"):
            made(tmp_path, distiller, student=student).train(str(folder / "checkpoint-4"))
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    states.seal(checkpoint, arguments={"optim": "adamw_torch", "seed": 1})
    check_same_run(checkpoint, {"optim": "adamw_torch", "seed": 2}, named=True)
    with pytest.raises(DistillError, match="the state of --optim adamw_torch, which sgd cannot take up"):
        check_same_run(checkpoint, {"optim": "sgd", "seed": 1}, named=True)


def test_a_rehearsal_says_what_does_not_fit_and_changes_nothing(tmp_path) -> None:
    with pytest.raises(DistillError, match="no module 'nix'"):
        trainer(tmp_path, "fitnet", options={"layers": ("nix",)}).rehearse()
    trainer(tmp_path, None).rehearse()
    tried = made(tmp_path / "a", "kd")
    tried.rehearse()
    tried.train()
    plain = made(tmp_path / "b", "kd")
    plain.train()
    assert difference(weights(tried.model), weights(plain.model)) == 0.0


def test_an_older_one_goes_only_when_the_new_one_is_sealed(tmp_path, monkeypatch) -> None:
    sealed = []
    real = compat.rotate_checkpoints

    def rotate(folder: str, limit: int | None, *args: Any, **kwargs: Any) -> None:
        sealed.append([(p.name, states.damage(p)) for p in sorted(Path(folder).glob("checkpoint-*"))])
        assert limit == 1
        real(folder, limit, *args, **kwargs)

    monkeypatch.setattr(compat, "rotate_checkpoints", rotate)
    made(tmp_path, "kd", save_total_limit=1).train()
    assert [[name for name, _ in s] for s in sealed] == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
    ]
    assert not any(why for s in sealed for _, why in s)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_text(json.dumps({}))
    with pytest.raises(DistillError, match="is whole: start anew"):
        made(tmp_path, "kd").train(resume_from_checkpoint=True)


class Breaks(TrainerCallback):
    """Puts a NaN into the weights after the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.classifier.bias.data.fill_(float("nan"))


@pytest.mark.parametrize("distiller", [None, "kd"])
def test_a_loss_that_stays_nan_stops_the_run(distiller, tmp_path) -> None:
    def broken(goes_on: bool = False, **options: Any) -> Any:
        run = made(tmp_path, distiller, **options)
        run.allow_nonfinite = goes_on
        run.add_callback(Breaks())
        return run

    with pytest.raises(DistillError, match="has a NaN or an infinity in .*: nothing was saved"):
        broken(max_steps=20, save_steps=2).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    once: dict[str, Any] = {"save_strategy": "no", "logging_steps": 100}
    run = broken(max_steps=20, **once)
    with pytest.raises(DistillError, match=r"since step 4 \(epoch"):
        run.train()
    assert run.state.global_step <= 10
    # The last steps are too few for the watch.
    with pytest.raises(DistillError, match="The student has a NaN"):
        broken(max_steps=4, **once).train()
    broken(True, max_steps=12, **once).train()


def test_without_a_distiller_nothing_is_refused_that_trainer_takes(tmp_path) -> None:
    """A loss that is NaN, a checkpoint that somebody has edited; and errors are Trainer's own."""
    both: list[Any] = []
    for cls in (Trainer, DistillationTrainer):
        run = made(tmp_path / cls.__name__, None, cls=cls, max_steps=12)
        run.add_callback(Breaks())
        run.train()
        folder = tmp_path / cls.__name__ / "checkpoint-2"
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        shards = dict.fromkeys(run.model.state_dict(), "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        again = made(tmp_path / "again", None, cls=cls)
        again.train(resume_from_checkpoint=str(folder))
        errors = []
        for path in (tmp_path / "none", folder):
            with pytest.raises((RuntimeError, ValueError)) as error:
                made(tmp_path / "again", None, cls=cls, student=bert(3)).train(resume_from_checkpoint=str(path))
            errors.append((error.type, str(error.value).replace(str(folder), "")))
        both.append((run.state.global_step, weights(again.model), errors))
    (steps, theirs, errors), ours = both[0], both[1]
    assert steps == ours[0] == 12
    assert difference(theirs, ours[1]) == 0.0
    assert errors == ours[2]


def test_a_mean_under_the_name_of_the_trainings_own_is_another(tmp_path) -> None:
    """An evaluation on the training set logs a `train_loss`, too."""
    for cls in (Trainer, DistillationTrainer):
        run = made(tmp_path, None, cls=cls)
        before = run.evaluate(run.train_dataset, metric_key_prefix="train")["train_loss"]
        assert before == pytest.approx(run.evaluate(run.train_dataset)["eval_loss"])
        run.train()
        after = run.evaluate(run.train_dataset, metric_key_prefix="train")["train_loss"]
        assert after == pytest.approx(run.evaluate(run.train_dataset)["eval_loss"]) != pytest.approx(before)


def test_a_device_that_is_full_is_no_damaged_file(tmp_path) -> None:
    with pytest.raises(torch.OutOfMemoryError), states.taking_up(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory.")
