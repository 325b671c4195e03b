"""The command line: timm's defaults, and clear errors for what is not accepted."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

import kd_timm
from kd_timm.arguments import UNSUPPORTED, parse_args
from kd_timm.build import MODEL_ARGUMENTS
from kd_timm.data import DATASET_ARGUMENTS, LOADER_ARGUMENTS, MIXUP_ARGUMENTS
from kd_timm.train import main

_spec = spec_from_file_location("timm_defaults", Path(__file__).with_name("timm_defaults.py"))
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
DEFAULTS = _module.DEFAULTS

OURS = {"distill", "distill_args", "teacher", "teacher_checkpoint", "teacher_kwargs", "peer", "peer_kwargs"}
OURS |= {"report_to", "list_layers", "ood_dataset", "ood_split", "epoch_updates", "allow_nonfinite", "best_on_eval"}


def test_every_flag_of_timms_has_timms_default():
    args = vars(parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_flags_are_timms_or_ours_and_none_is_both_taken_and_refused():
    names = set(vars(parse_args([])))
    assert names - OURS == set(DEFAULTS)
    assert not names & set(UNSUPPORTED)


class Recorder:
    """Stands for the arguments and notes which of them are read."""

    def __init__(self, args):
        self.args, self.read = args, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.args, name)


def test_every_flag_is_read_somewhere():
    recorder = Recorder(parse_args([]))
    optimizer_kwargs(cfg=recorder)
    scheduler_kwargs(recorder)
    # Read by resolve_input_data_config out of vars(args), and by timm's factories.
    read = recorder.read | {"mean", "std", "interpolation", "crop_pct"}
    for table in (MODEL_ARGUMENTS, DATASET_ARGUMENTS, LOADER_ARGUMENTS, MIXUP_ARGUMENTS):
        read |= set(table.values())
    package = Path(kd_timm.__path__[0])
    text = "\n".join(p.read_text() for p in package.glob("*.py"))
    flags = set(vars(parse_args([]))) - {"config"}
    assert [flag for flag in flags if flag not in read and f"args.{flag}" not in text] == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--naflex-loader"], "does not support yet"),
        (["--kd-temperature=3"], "does not support yet"),
        (["--modle", "resnet18"], "Did you mean --model"),
        (["--teacher-checkpoint", "x"], "--teacher"),
        (["--model-kwargs", "depth"], "key=value"),
        (["--eval-metric", "f1"], "--eval-metric: invalid choice: 'f1'"),
        (["--epochs", "0"], "--epochs: expected a whole number, at least 1, got 0"),
    ],
)
def test_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert words in capsys.readouterr().err


def test_prefixes_are_not_flags(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--epoch", "3"])
    assert "--epochs" in capsys.readouterr().err


def test_config_sits_between_defaults_and_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: resnet18\nlr: 1e-3\nepochs: 7\nscale: [0.5, 1]\nteacher: [resnet34]\n")
    args = parse_args(["-c", str(path), "--epochs", "9"])
    assert (args.model, args.lr, args.epochs, args.scale, args.teacher) == (
        "resnet18",
        1e-3,
        9,
        [0.5, 1.0],
        ["resnet34"],
    )


def test_config_may_be_a_file_that_timms_script_wrote(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump({**DEFAULTS, **UNSUPPORTED, "epochs": 3}))
    assert parse_args(["-c", str(path)]).epochs == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "Did you mean epochs"),
        ("epochs: [1]", "epochs"),
        ("epochs: 1.5", "epochs"),
        ("amp: 1", "amp"),
        ("jsd_loss: true", "not supported"),
    ],
)
def test_config_refused(tmp_path, text, words, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse_args(["-c", str(path)])
    assert words in capsys.readouterr().err


def test_a_file_says_what_the_command_line_would(tmp_path):
    path = tmp_path / "c.yaml"
    values = {
        "data": "here",
        "model-kwargs": {"depth": 3, "names": ["a"], "on": True, "text": "1"},
        "teacher": ["a", "b"],
    }
    values |= {"teacher_kwargs": [{"x": 1}, {}], "teacher_checkpoint": ["", "b.pt"], "distill_args": {"layers": [1, 2]}}
    path.write_text(yaml.safe_dump(values | {"amp": True, "mean": [-0.5, 0.1]}))
    args = parse_args(["--config", str(path), "--teacher", "c", "--teacher=d"])
    assert (args.data, args.model_kwargs) == ("here", values["model-kwargs"])
    # A flag replaces the list of the file.
    assert (args.teacher, args.teacher_kwargs, args.teacher_checkpoint) == (["c", "d"], [{"x": 1}, {}], ["", "b.pt"])
    assert (args.distill_args, args.amp, args.mean) == (["layers=1,2"], True, [-0.5, 0.1])
    assert parse_args(["there", "-c", str(path)]).data == "there"
    # What a run writes of itself says the same again.
    path.write_text(yaml.safe_dump(vars(args) | {"model_kwargs": {}}))
    assert vars(parse_args(["-c", str(path)])) == vars(args) | {"model_kwargs": {}, "config": str(path)}


def test_keyword_values_are_literals_or_text():
    args = parse_args("--model-kwargs depth=3 name=ab w=(1,2) --teacher a --teacher b --teacher-kwargs x=1".split())
    assert args.model_kwargs == {"depth": 3, "name": "ab", "w": (1, 2)}
    assert args.teacher_kwargs == [{"x": 1}]


def test_the_layers_of_a_model_are_listed(capsys):
    small = "--img-size 64 --model-kwargs channels=(8,8,16,16) stem_width=8 --num-classes 5".split()
    assert main(["--list-layers", "resnet10t", *small]) == 0
    printed = capsys.readouterr().out
    assert "images 3x64x64, 5 classes" in printed
    assert "  2  layer2  [8, 8, 8]" in printed
    assert "  layer4.0  BasicBlock" in printed
    found = dict(line.split(maxsplit=1) for line in printed.partition("methods")[2].splitlines()[1:])
    assert {found[name] for name in ("kd", "afd", "nst")} == {"fits"}
    assert "transformer" in found["internal"]
    assert main(["--list-layers", "resnet81"]) == 2
