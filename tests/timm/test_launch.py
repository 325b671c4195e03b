"""A script like timm's train.py with a distiller put in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import timm.task
from PIL import Image
from safetensors.torch import save_file

from kd_timm.launch import main

SCRIPT = """
import argparse, json, sys
import timm, torch
from timm.data import resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--mean", type=float, nargs=3)
parser.add_argument("--output")
args = parser.parse_args()
torch.manual_seed(0)
model = timm.create_model(args.model, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
config = resolve_data_config(vars(args), model=model)
loss = LabelSmoothingCrossEntropy(0.1)
task = ClassificationTask(model=model, criterion=loss, device=torch.device("cpu"), verbose=False)
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3, updates_per_epoch=4)
result = task(torch.randn(4, 3, 32, 32), torch.arange(4))
result["loss"].backward()
task.update_ema(step=1)
found = {"terms": sorted(result), "total": task.distiller.progress.total, "mean": list(task.config["mean"])}
open(args.output, "w").write(json.dumps(found | {"name": __name__, "argv": sys.argv[1:]}))
"""


def script(folder: Path, text: str = SCRIPT) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def test_the_task_of_the_script_is_a_distiller(tmp_path: Path) -> None:
    path, out, weights = script(tmp_path), tmp_path / "out.json", tmp_path / "teacher.safetensors"
    save_file(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), weights)
    flags = ["--model", "resnet10t", "--mean", "0.1", "0.2", "0.3", "--output", str(out)]
    ours = ["--distill", "kd", "--distill-args", "temperature=2", "--teacher", "cifar_resnet8"]
    ours += ["--teacher-checkpoint", str(weights)]
    assert main([str(path), *flags, *ours]) == 0
    found = json.loads(out.read_text())
    assert found["terms"] == ["kd", "loss", "output", "task"]
    assert (found["total"], found["mean"]) == (12, [0.1, 0.2, 0.3])
    assert (found["name"], found["argv"]) == ("__main__", flags)
    assert timm.task.ClassificationTask.__module__.startswith("timm.")


def test_the_teacher_s_classes_are_put_in_the_order_of_the_data(tmp_path: Path) -> None:
    names = list("abcdefghij")
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    made = "create_dataset('', root=args.output.rsplit('/', 1)[0], split='train', is_training=True)\nloss ="
    text = SCRIPT.replace("import resolve_data_config", "import create_dataset, resolve_data_config")
    text = text.replace("loss =", made, 1).replace('{"terms"', '{"order": task._nets.teachers[0].order, "terms"')
    teacher = timm.create_model("cifar_resnet8", num_classes=10)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    config = {"architecture": "cifar_resnet8", "num_classes": 10, "label_names": names[::-1]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": teacher.pretrained_cfg}))
    flags = ["--model", "resnet10t", "--mean", "0", "0", "0", "--output", str(tmp_path / "out.json")]
    ours = ["--distill", "kd", "--teacher", "cifar_resnet8"]
    ours += ["--teacher-checkpoint", str(tmp_path / "teacher.safetensors")]
    assert main([str(script(tmp_path, text)), *flags, *ours]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["order"] == list(range(10))[::-1]
    # Of outputs beyond the names of the data nobody knows the class.
    for name in names[2:]:
        shutil.rmtree(tmp_path / "train" / name)
    assert main([str(script(tmp_path, text)), *flags, *ours]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["order"] == [9, 8, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("import timm\nmodel = timm.create_model('resnet18')", [], "1.0.27 or newer"),
        (
            "import timm.task as t\nif 0: t.ClassificationTask()\nt.TokenDistillationTask(None, 'resnet18')",
            [],
            "timm's own distillation",
        ),
        ("import timm.task\nif 0: timm.task.ClassificationTask()", [], "nothing was distilled"),
        (SCRIPT, ["--distill-args", "temprature=2"], "temperature"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, more: list[str], message: str
) -> None:
    argv = [str(script(tmp_path, text)), "--distill", "kd", "--teacher", "cifar_resnet8", *more]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_method_with_optimizers_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(script(tmp_path)), "--model", "resnet10t", "--output", str(tmp_path / "x"), "--distill", "afd"]
    assert main(argv) == 2
    assert "kd-timm-train" in capsys.readouterr().err
