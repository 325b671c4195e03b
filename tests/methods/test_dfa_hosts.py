"""DFA in each host, in bfloat16, and on two processes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_kit import fresh_accelerate
from dfa_kit import LR, MOMENTUM, Net, batches, pair
from distributed_kit import keep, kept, on_two_processes
from image_kit import image_classifier, image_trainer
from precision_kit import share_of_the_way
from torch import Tensor

from kd_plugins import Batch, bind
from kd_plugins.methods.dfa import DFA
from kd_plugins.testing.runs import difference


def test_by_name_in_kd_timm_train(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import load_file, save_file

    from kd_report import render
    from kd_timm import data
    from kd_timm.arguments import parse_args
    from kd_timm.digits import Digits
    from kd_timm.train import Session

    class Few(Digits):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.images, self.targets = self.images[:48], self.targets[:48]

    monkeypatch.setattr(data, "Digits", Few)
    small = {"channels": (8, 8, 16, 16), "stem_width": 8}
    torch.manual_seed(0)
    deep = timm.create_model("resnet18", in_chans=1, num_classes=10, zero_init_last=False, **small)
    save_file(deep.state_dict(), tmp_path / "teacher.safetensors")

    def run(name: str, *flags: str) -> tuple[Session, dict[str, Any]]:
        fresh_accelerate()
        flags = (
            *f"--device cpu --in-chans 1 --model resnet10t --output {tmp_path} --experiment {name}".split(),
            *"--model-kwargs channels=(8,8,16,16) stem_width=8".split(),
            *"--teacher-kwargs channels=(8,8,16,16) stem_width=8 in_chans=1 zero_init_last=False".split(),
            *f"--teacher resnet18 --teacher-checkpoint {tmp_path}/teacher.safetensors".split(),
            *"--warmup-epochs 0 -b 16 -j 0 --opt adamw --lr 5e-3 --log-interval 1000 --distill dfa".split(),
            *flags,
        )
        session = Session(parse_args(flags))
        return session, session.fit()

    groups = ["layers=layer1,layer2", "beta.lr=0.05"]
    session, _ = run("search", "--epochs", "2", "--distill-args", "search_only=true", *groups)
    found = json.loads((tmp_path / "search" / "search.json").read_text())["groups"]
    assert [g["student"] for g in found] == ["layer1", "layer2"]
    assert all(g["teacher"] == [f"{g['student']}.{j}" for j in range(2)] for g in found)
    assert all(abs(g["alpha"][0] - 0.5) > 1e-2 for g in found)
    page = render([tmp_path / "search"])
    assert 'id="method"' in page
    assert "Search for layer2" in page
    session, results = run("file", "--epochs", "1", "--distill-args", f"weights={tmp_path}/search/search.json")
    assert session.distillation.distiller.alpha(1).tolist() == pytest.approx(found[1]["alpha"], abs=1e-6)
    assert results["best_epoch"] == 0
    session, results = run("both", "--epochs", "4", "--distill-args", *groups, "search_epochs=1")
    assert session.distillation.table.to_json()["names"] == ["search layer1", "search layer2", "distill"]
    assert results["best_epoch"] >= 2
    assert (tmp_path / "both" / "search.json").is_file()
    exported = timm.create_model("resnet10t", in_chans=1, num_classes=10, **small)
    exported.load_state_dict(load_file(tmp_path / "both" / "model_best.safetensors"))


def test_workers_that_outlive_an_epoch_see_the_stage_change(tmp_path):
    """The searches hold rows out; the distillation that follows sees all of them."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    host = image_trainer(
        tmp_path,
        image_classifier([4, 8], 0),
        epochs=3,
        rows=32,
        teacher_model=image_classifier([4, 12], 1, [2, 2]),
        distiller="dfa",
        distiller_args={"search_epochs": 1.0},
        **options,
    )
    seen: list[set[int]] = [set() for _ in range(3)]
    step = host.training_step

    def record(model, inputs, *args):
        seen[int(host.state.epoch)].update(inputs["kd_index"].tolist())
        return step(model, inputs, *args)

    host.training_step = record
    host.train()
    assert [len(rows) for rows in seen] == [16, 16, 32]


def test_in_trainer_with_an_image_classifier(tmp_path):
    from kd_report import load_run
    from kd_transformers.recording import RecordCallback

    teacher = image_classifier([4, 12], 1, [2, 3])
    before = copy.deepcopy(teacher.state_dict())
    host = image_trainer(
        tmp_path,
        image_classifier([4, 8], 0),
        epochs=4,
        rows=32,
        teacher_model=teacher,
        distiller="dfa",
        distiller_args={"search_epochs": 1.0, "beta.lr": 0.05},
    )
    host.add_callback(RecordCallback(host))
    host.train()
    distiller = host.distiller
    stages = [f"resnet.encoder.stages.{i}" for i in range(2)]
    assert [s.name for s in distiller.stages()] == [f"search {stage}" for stage in stages] + ["distill"]
    assert [g.teacher for g in distiller.groups] == [
        tuple(f"{stage}.layers.{j}" for j in range(n)) for stage, n in zip(stages, (2, 3), strict=True)
    ]
    assert all(float(distiller.alpha(i).detach().max()) > 1 / n + 1e-3 for i, n in enumerate((2, 3)))
    first, last = host.state.log_history[0], host.state.log_history[15]
    assert {"distill/st", "distill/ts", "distill/beta/st", "distill/beta/ts"} <= set(first)
    assert {"distill/task", "distill/features"} <= set(last)
    assert difference(before, teacher.state_dict())[0] == 0.0
    assert [p["title"] for p in load_run(tmp_path).info["pictures"]] == [
        f"{what} for {stage}" for what in ("Weights", "Search") for stage in stages
    ]
    host.save_model(str(tmp_path / "saved"))
    found = json.loads((tmp_path / "saved" / "search.json").read_text())["groups"]
    assert found[1]["alpha"] == distiller.alpha(1).tolist()


def accelerated(folder: Path, processes: int, precision: str = "no") -> list[Tensor]:
    """A short training under Accelerate with accumulation, stopped and taken up in the middle of a search."""
    from accelerate import Accelerator

    from kd_accelerate import TurnPlayer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    data = batches(24, 8)

    def begin() -> tuple[TurnPlayer, Net]:
        student, teacher = pair()
        torch.manual_seed(accelerator.process_index)
        distiller = DFA(search_share=0.7)
        bound = bind(distiller, student, teacher, batch=batches(1)[0], total_steps=12)
        for p in distiller.parameters():  # the same whatever each process has drawn
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM))
        bound.student.forward = model
        return TurnPlayer(accelerator, distiller, bound, optimizer, max_grad_norm=0.5), student

    player, student = begin()
    for step in range(12):
        if step == 6:
            assert player.distiller.progress.stage == 1
            player.save(folder / "distiller")
            kept = {"model": student.state_dict(), "optimizer": player.optimizer.state_dict()}
            accelerator.wait_for_everyone()
            player, student = begin()
            student.load_state_dict(kept["model"])
            player.optimizer.load_state_dict(kept["optimizer"])
            player.load(folder / "distiller")
        rows = slice(accelerator.process_index, None, processes)
        for half in data[2 * step : 2 * step + 2]:
            held_out = half.streams["search"]
            streams = {"search": Batch.of(held_out.inputs[rows], held_out.labels[rows])}
            with accelerator.accumulate(player.model):
                player.step(Batch.of(half.inputs[rows], half.labels[rows], streams=streams))
    modules = (student, player.distiller)
    return [v.detach().nan_to_num(-1).double() for m in modules for v in m.state_dict().values()]


def test_bfloat16_goes_the_way_of_float32(tmp_path):
    """It keeps eight bits: the networks end within a fifth of the way that they have gone."""
    begin = [value.double() for value in pair()[0].state_dict().values()]
    exact = accelerated(tmp_path / "float32", 1)
    fresh_accelerate()
    half = accelerated(tmp_path / "bfloat16", 1, "bf16")
    assert 0 < share_of_the_way(begin, exact, half) < 0.2


@pytest.mark.distributed
def test_two_processes_with_accumulation_clipping_and_resume(tmp_path):
    on_two_processes(__file__, str(tmp_path))
    alone = accelerated(tmp_path / "alone", 1)
    for found in kept(tmp_path):
        assert max(float((a - b).abs().max()) for a, b in zip(found, alone, strict=True)) < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep(accelerated(Path(sys.argv[1]), 2), sys.argv[1])
