"""The command line: timm's defaults, and clear errors for what is not accepted."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

import kd_timm
from kd_timm.arguments import REFUSED, build_parser, parse_args
from kd_timm.build import LOSS_ARGUMENTS, MODEL_ARGUMENTS, TASK_ARGUMENTS
from kd_timm.data import DATASET_ARGUMENTS, LOADER_ARGUMENTS, MIXUP_ARGUMENTS, SIZES_ARGUMENTS
from kd_timm.train import main

_spec = spec_from_file_location("timm_defaults", Path(__file__).with_name("timm_defaults.py"))
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
DEFAULTS = {**_module.DEFAULTS, **_module.NEWER}

OURS = {"distill", "distill_args", "teacher", "teacher_checkpoint", "teacher_kwargs", "peer", "peer_kwargs"}
OURS |= {"checkpoint_format", "report_to", "list_layers", "ood_dataset", "ood_split", "epoch_updates", "best_on_eval"}
OURS |= {"allow_nonfinite", "no_record", "cache_teacher", "cache_views", "cache_top_k"}
# Of the script of timm 1.0.31, known by its tests alone.
UNSEEN = {"stop_epoch", "save_epochs"}


def test_every_flag_of_timms_has_timms_default():
    args = vars(parse_args([]))
    # None in timm's newest script too, and by then resolved.
    resolved = {"smoothing": 0.1, "eval_metric": "top1"}
    expected = {name: DEFAULTS[name] for name in DEFAULTS if name not in REFUSED}
    # A list that is not given is none, or has no items.
    assert {name: args[name] or None for name in expected} == {n: v or None for n, v in (expected | resolved).items()}


def test_flags_are_timms_or_ours_and_few_are_refused():
    names = set(vars(parse_args([])))
    assert names - OURS - UNSEEN == set(DEFAULTS) - set(REFUSED)
    assert set(REFUSED) == {"drop_connect", "amp_impl"}


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
    tables = (MODEL_ARGUMENTS, DATASET_ARGUMENTS, LOADER_ARGUMENTS, MIXUP_ARGUMENTS, SIZES_ARGUMENTS)
    for table in (*tables, *(names for _, names in TASK_ARGUMENTS.values())):
        read |= set(table.values())
    read |= {name for names in LOSS_ARGUMENTS.values() for name in names}
    read |= {f"loss_{kind}" for kind in ("pos_weight", "class_weight")}
    # By name in a loop.
    read |= {"jsd_loss", "bce_loss", "train_num_samples", "val_num_samples"}
    package = Path(kd_timm.__path__[0])
    text = "\n".join(p.read_text() for p in package.glob("*.py"))
    flags = set(vars(parse_args([]))) - {"config"}
    assert [flag for flag in flags if flag not in read and f"args.{flag}" not in text] == []


def test_what_timm_documents_of_policies_is_taken():
    for policy in ("rand-m9-mstd0.5-inc1-n3-p0.3-mmax15", "rand-mstd1-tweights-t3a", "augmix-m5-w4-d2-b1-a.5", "3a"):
        assert parse_args(["--aa", policy]).aa == policy
    assert parse_args(["--mixup", "0.2", "--mixup-prob", "0.5"]).mixup_prob == 0.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--drop-connect", "0.1"], "--drop-path"),
        (["--amp-impl", "apex"], "apex"),
        (["--kd-temperature=3"], "--kd-temperature does nothing without --kd-model-name"),
        (["--asl-clip=0"], "--asl-clip does nothing without --loss asl"),
        (["--torchscript", "--torchcompile"], "exclude each other"),
        (["--aug-splits", "3", "--no-prefetcher"], "--no-prefetcher does not go with --aug-splits"),
        (["--aug-splits", "3", "--cutmix", "1"], "--cutmix does not go with --aug-splits"),
        (["--distill", "kd", "--kd-model-name", "x"], "--distill kd --teacher MODEL"),
        (["--distill", "kd", "--naflex-loader"], "this loader gives patches"),
        (["--kd-model-name", "x", "--task", "multilabel"], "--task does not go with --kd-model-name: timm's"),
        (["--naflex-loader", "--cutmix-minmax", "0.2", "0.8"], "does not go with --naflex-loader: it mixes whole"),
        (["--bce-loss", "--loss", "asl"], "two losses"),
        (["--kd-t", "3"], "short for --kd-temperature, --kd-teacher-feature-dim, --kd-token-distill-type"),
        (["--modle", "resnet18"], "Did you mean --model"),
        (["--teacher-checkpoint", "x"], "--teacher"),
        (["--model-kwargs", "depth"], "key=value"),
        (["--eval-metric", "f1"], "--eval-metric: invalid choice: 'f1'"),
        (["--drop", "3"], "--drop: expected a number from 0 to below 1, got 3"),
        (["--smoothing", "1"], "--smoothing: expected a number from 0 to below 1, got 1"),
        (["--epochs", "0"], "--epochs: expected a whole number, at least 1, got 0"),
        (["--lr-base-scale", "srqt"], "invalid choice: 'srqt'"),
        (["--sched", "cosin"], "invalid choice: 'cosin' (choose from 'cosine', 'tanh', "),
        (["--clip-grad", "-1"], "--clip-grad: expected a number above 0, got -1"),
        (["--scale", "2", "1"], "--scale: expected the smaller number first and the larger above 0, got 2.0 1.0"),
        (["--ood-split", "test"], "--ood-split does nothing without --ood-dataset"),
        (["--mixup-prob", "0.5"], "--mixup-prob does nothing without --mixup or --cutmix or --cutmix-minmax"),
        (["--aa", "rand-mx"], "expected a letter and a number in 'mx'"),
    ],
)
def test_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert words in capsys.readouterr().err


def test_timms_flags_may_be_abbreviated_and_ours_do_not_stand_in_the_way():
    args = parse_args(["--drop-p", "0.3", "--rep=0.2", "--no-pers", "--distill-l", "0.5", "--kd-mod", "x"])
    assert (args.drop_path, args.reprob, args.persistent_workers) == (0.3, 0.2, False)
    assert (args.distill_loss_weight, args.kd_model_name, args.report_to) == (0.5, "x", [])


def test_what_the_newer_losses_are_called():
    args = parse_args(["--bce-loss", "--bce-pos-weight", "2"])
    assert (args.loss, args.loss_pos_weight) == ("bce", "2.0")
    several = parse_args(["--task", "multilabel"])
    assert (several.smoothing, several.eval_metric) == (0.0, "map")


def test_the_rules_name_flags():
    names = set(vars(parse_args([])))
    from kd_timm.arguments import _RULES

    assert {name for rule in ("needs", "alone") for listed in _RULES[rule].values() for name in listed} <= names
    assert {name for pair in _RULES["exclude"] for name in pair} <= names
    flags = build_parser()._option_string_actions
    assert {flag.partition(" ")[0] for rule in ("needs", "alone") for flag in _RULES[rule]} <= set(flags)


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
    path.write_text(yaml.safe_dump({**DEFAULTS, "amp_impl": "native", "persistent_workers": False, "epochs": 3}))
    args = parse_args(["-c", str(path)])
    assert (args.epochs, args.persistent_workers) == (3, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "Did you mean epochs"),
        ("epochs: [1]", "epochs"),
        ("epochs: 1.5", "epochs"),
        ("amp: 1", "amp"),
        ("drop_connect: 0.2", "--drop-path"),
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
