"""A student that lies in parts on two processes learns what a whole one learns on one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as hf
from accelerate.utils import DistributedType
from distributed_kit import on_two_processes
from safetensors.torch import load_file
from sharded_worker import RUNS, ZERO, run_of, whole
from torch import nn
from trainer_kit import bert, difference, logged, teacher

from kd_accelerate.sharding import check_reached, check_sharded, is_sharded
from kd_plugins import DistillError, bind, create_distiller
from kd_transformers.compat import Hooks


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes ended with under FSDP2; one start for all tests, because importing takes most of the time."""
    folder = tmp_path_factory.mktemp("fsdp")
    on_two_processes(str(Path(__file__).with_name("sharded_worker.py")), str(folder), timeout=600)
    return folder


def ended(folder: Path, name: str) -> dict[str, Any]:
    return load_file(folder / f"{name}.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_fsdp_equals_one_process(tmp_path: Path, fsdp: Path, name: str) -> None:
    """Weights of student, own parts and extra groups, losses and joint norms."""
    one = run_of(name, tmp_path, 1)
    one.train()
    assert difference(ended(fsdp, name), whole(one)) < 1e-5
    log = json.loads((fsdp / f"{name}.json").read_text())
    for term in ("loss", "grad_norm"):
        assert log[term] == pytest.approx(logged(one, term), rel=1e-4, abs=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ZERO)
def test_deepspeed_equals_one_process(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed.")
    worker = str(Path(__file__).with_name("sharded_worker.py"))
    on_two_processes(worker, str(tmp_path), str(stage), timeout=900)
    for name in ZERO[stage]:
        one = run_of(name, tmp_path / "one", 1)
        one.train()
        assert difference(ended(tmp_path, name), whole(one)) < 1e-5, name
    assert difference(ended(tmp_path, "kd"), ended(tmp_path, "loaded")) == 0.0
    assert difference(ended(tmp_path, "unbroken"), ended(tmp_path, "resumed")) == 0.0


@pytest.mark.distributed
def test_resume_of_shards_is_exact(fsdp: Path) -> None:
    """From sharded checkpoints, in the middle of a phase, by a student that began elsewhere."""
    assert (fsdp / "resume" / "checkpoint-5" / "pytorch_model_fsdp_0").is_dir()
    assert difference(ended(fsdp, "unbroken"), ended(fsdp, "resumed")) == 0.0


@pytest.mark.distributed
def test_teacher_may_be_sharded(fsdp: Path) -> None:
    """By the user, `fully_shard`; the student is the same to the last bit."""
    assert difference(ended(fsdp, "stacked"), ended(fsdp, "teacher")) == 0.0


@pytest.mark.distributed
def test_export_is_whole(fsdp: Path) -> None:
    """`save_model` writes the student in one piece, also where checkpoints hold shards."""
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(fsdp / "saved").state_dict()
    expected = {k: v for k, v in ended(fsdp, "critic").items() if not k.startswith("distiller.")}
    assert difference(loaded, expected) == 0.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("afd", "moves weights of the student in a turn beside its own"),
        ("dfa", "begins with the student's first weights anew"),
        ("ksanc", "leaves the student alone"),
    ],
)
def test_refusals(name: str, reason: str) -> None:
    """What needs the student's whole weights beside its own backward."""
    distiller = create_distiller(name)
    nets = bind(distiller, bert(), teacher())
    with pytest.raises(DistillError, match=reason):
        check_sharded(distiller, nets, zero=3)


def test_zero_3_refuses_a_backward_from_inside(tmp_path: Path) -> None:
    """A phase without scores; ZeRO-2 keeps the weights."""
    run = run_of("stacked", tmp_path, 1, max_steps=3)
    run.train()
    check_sharded(run.distiller, run._nets, zero=2)
    with pytest.raises(DistillError, match="begins inside a layer"):
        check_sharded(run.distiller, run._nets, zero=3)


def test_own_parts_are_refused_where_deepspeed_scales_the_loss() -> None:
    distiller = create_distiller("kd")
    nets = bind(distiller, bert(), teacher())
    check_sharded(distiller, nets, scaled=True)
    distiller.part = nn.Linear(2, 2)
    with pytest.raises(DistillError, match="DeepSpeed's fp16 leaves scaled"):
        check_sharded(distiller, nets, scaled=True)


@pytest.mark.parametrize("should_save", [True, False])
def test_one_process_writes_the_whole_student(should_save: bool) -> None:
    """All gather it; the states of the others are empty."""
    saved: list[str] = []
    plugin = SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type="SHARDED_STATE_DICT"))
    accelerator = SimpleNamespace(state=plugin, get_state_dict=lambda model: saved.append("gathered") or {})
    given: dict[str, Any] = {"is_fsdp_enabled": True, "accelerator": accelerator, "model": None}
    args = SimpleNamespace(should_save=should_save)
    host: Any = SimpleNamespace(**given, args=args, _save=lambda folder, state_dict: saved.append(folder))
    Hooks.save_shards_whole(host, "a")
    assert saved == (["gathered", "a"] if should_save else ["gathered"])


def test_other_shards_are_refused() -> None:
    """FSDP1 and Megatron replace modules; a step without a gradient of the student moves nothing."""
    for kind, name in ((DistributedType.FSDP, "FSDP1"), (DistributedType.MEGATRON_LM, "Megatron-LM")):
        accelerator: Any = SimpleNamespace(distributed_type=kind, is_fsdp2=False)
        with pytest.raises(DistillError, match=name):
            is_sharded(accelerator)
    with pytest.raises(DistillError, match="shard its layers, too"):
        check_reached(create_distiller("kd"), list(nn.Linear(2, 2).parameters()))
