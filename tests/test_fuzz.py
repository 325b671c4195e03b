"""Any option of any method, any flag of both scripts: one sentence or a run, never a traceback, never NaN as a result.

`pytest -m slow tests/test_fuzz.py` tries 200 of each, drawn anew each time, or as many as `KD_FUZZ` says.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_kit import fresh_accelerate
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from kd_accelerate.command import flags
from kd_plugins import DistillError, create_distiller
from kd_plugins.catalog.installed import entries_by_name, ours
from kd_plugins.catalog.options import options_of, parse
from kd_plugins.catalog.registry import get_distiller, options_from_strings
from kd_plugins.catalog.values import choices_of
from kd_plugins.reading.network import adapt
from kd_plugins.testing.networks import tiny_network, training_set
from kd_plugins.testing.runs import Setting, Training
from kd_report.runs import read_rows

METHODS = sorted(name for name, (entry, *_) in entries_by_name().items() if ours(entry))
# Small numbers alone where a large one would only take long or fill the memory.
NUMBERS = ["-1", "0", "1", "2", "3", "0.5", "-0.1", "nan", "inf", "-inf", "1e-300", "1e30", "1e300"]
WORDS = [*NUMBERS, "", " ", "x", "none", "true", "[]", "[1", "1,2", "layer2", "(1,2,3)", "é", "../x", "{}"]

# A run leaves nothing to the next one, in whatever fixture.
common: dict[str, Any] = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
few = settings(max_examples=10, derandomize=True, phases=[Phase.generate], **common)
many = settings(max_examples=int(os.environ.get("KD_FUZZ", 200)), print_blob=True, **common)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Options


@st.composite
def with_options(draw: Any) -> tuple[str, list[str]]:
    """A method and a few of its options as they stand on a command line."""
    name = draw(st.sampled_from(METHODS))
    options = options_of(get_distiller(name))
    chosen = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=3, unique=True))
    given = []
    for option in chosen:
        choices = [str(choice) for choice in choices_of(options[option].annotation)]
        given.append(f"{option}={draw(st.sampled_from([*choices, *WORDS]))}")
    return name, given


def sentence_or_training(name: str, strings: list[str]) -> None:
    try:
        options = {**get_distiller(name).example, **options_from_strings(name, strings)}
        probe = create_distiller(name, **options)
        count = probe.teachers if isinstance(probe.teachers, int) else {"many": 2, "or peers": 0}[probe.teachers]
        setting = Setting(
            make=lambda: create_distiller(name, **options),
            student=tiny_network(probe, 0),
            teachers=[tiny_network(probe, i + 1) for i in range(count)],
            peers=[tiny_network(probe, 1)] if probe.peers else [],
            batches=training_set(probe),
            steps=4,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
            adapt=adapt,
        )
        run = Training(setting)
        if run.total <= 12:
            run.train()
        logs = run.run.logs()
    except DistillError:
        return
    assert all(map(math.isfinite, logs.values())), (name, strings)


@few
@given(with_options())
def test_options(given):
    sentence_or_training(*given)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_takes_a_word_or_refuses_it(name):
    cls = get_distiller(name)
    for option in options_of(cls):
        for word in WORDS:
            try:
                (value,) = parse(cls, [f"{option}={word}"]).values()
            except DistillError:
                continue
            assert finite(value), (option, word)


# Flags


@st.composite
def some_flags(draw: Any, parser: Any, skipped: set[str]) -> list[str]:
    """A few flags of a parser with values."""
    known = {action.dest: action for action in flags(parser).values() if action.dest not in skipped}
    words = []
    for name in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4, unique=True)):
        action = known[name]
        several = isinstance(action.nargs, int) and action.nargs or draw(st.integers(1, 3))
        count = (
            0 if action.nargs == 0 else several if action.nargs in ("*", "+") or isinstance(action.nargs, int) else 1
        )
        numbers = action.type is not None and action.type is not str
        pool = list(map(str, action.choices)) if action.choices else NUMBERS if numbers else WORDS
        values = [draw(st.sampled_from([*pool, "x"])) for _ in range(count)]
        flag = max(action.option_strings, key=len)
        words += [f"{flag}={values[0]}"] if count == 1 and action.nargs is None else [flag, *values]
    return words


def ended(main: Any, words: list[str], capsys: Any) -> tuple[int, str]:
    fresh_accelerate()
    torch.manual_seed(0)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    if status:
        assert status == 2, (words, err)
        assert ": error: " in err.strip().splitlines()[-1] or "error: " in err, (words, err)
    return status, err


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


TIMM = "--model lenet5 --in-chans 1 -b 4 -vb 4 -j 0 --epochs 1 --warmup-epochs 0 --lr 0.01 --num-classes 2 --device cpu"
# What starts compilers or processes, writes elsewhere, asks the network, is of the whole process, or may want NaN.
NOT_TIMM = set(
    "help config data_dir data output experiment device device_modules epochs workers torchcompile torchscript fuser"
    " fast_norm pretrained local_rank allow_nonfinite log_wandb report_to list_layers dataset ood_dataset no_record"
    " img_size input_size".split()
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight pictures of two classes, in two splits."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for i in range(8):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (28, 28), generator=torch.Generator().manual_seed(i)).byte()
            Image.fromarray(pixels.numpy()).save(path)
    return folder


def timm_flags() -> Any:
    from kd_timm.arguments import build_parser

    return some_flags(build_parser(), NOT_TIMM)


def sentence_or_timm_run(words: list[str], images: Path, folder: Path, capsys: Any) -> None:
    from kd_timm.train import main

    number = len(list(folder.iterdir()))
    place = ["--data-dir", str(images), "--output", str(folder), "--experiment", str(number)]
    status, _ = ended(main, [*TIMM.split(), *place, *words], capsys)
    if not status:
        run = folder / str(number)
        assert finite(json.loads((run / "results.json").read_text())), words
        assert finite(read_rows(run / "history.jsonl")), words


@few
@given(words=timm_flags())
@pytest.mark.filterwarnings("ignore")
def test_flags_of_kd_timm_train(words, images, tmp_path_factory, capsys):
    sentence_or_timm_run(words, images, tmp_path_factory.mktemp("runs"), capsys)


TEXT = "--max_steps 2 --max_seq_length 8 --vocab_size 60 --student_layers 1 --student_hidden_size 8 --student_heads 2"
TEXT += " --disable_tqdm True --use_cpu --per_device_train_batch_size 4 --save_strategy no --report_to none"
NOT_TEXT = set(
    "help config output_dir logging_dir max_steps use_cpu report_to train_file dataset_name task_name validation_file"
    " push_to_hub full_determinism local_rank deepspeed fsdp_config allow_nonfinite cache_dir trackio_space_id"
    " ood_dataset debug do_train do_eval metric hub_model_id torch_compile torch_compile_backend torch_compile_mode"
    " run_name optim record".split()
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{a} {b},{a}\n" for a in ("red", "blue") for b in "abcdefgh"))
    return file


def text_flags() -> Any:
    from kd_transformers.arguments import build_parser

    return some_flags(build_parser(), NOT_TEXT)


def sentence_or_text_run(words: list[str], rows: Path, folder: Path, capsys: Any) -> None:
    from kd_transformers.train import main

    place = ["--train_file", str(rows), "--validation_file", str(rows), "--output_dir", str(folder / "run")]
    status, _ = ended(main, [*TEXT.split(), *place, "--cache_dir", str(rows.parent / "cache"), *words], capsys)
    if not status and (folder / "run" / "all_results.json").is_file():
        assert finite(json.loads((folder / "run" / "all_results.json").read_text())), words


@few
@given(words=text_flags())
@pytest.mark.filterwarnings("ignore")
def test_flags_of_kd_transformers_train(words, rows, tmp_path_factory, capsys):
    sentence_or_text_run(words, rows, tmp_path_factory.mktemp("runs"), capsys)


# Many


@pytest.mark.slow
@many
@given(with_options())
def test_many_options(given):
    sentence_or_training(*given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@many
@given(words=timm_flags())
def test_many_flags_of_kd_timm_train(words, images, tmp_path_factory, capsys):
    sentence_or_timm_run(words, images, tmp_path_factory.mktemp("runs"), capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@many
@given(words=text_flags())
def test_many_flags_of_kd_transformers_train(words, rows, tmp_path_factory, capsys):
    sentence_or_text_run(words, rows, tmp_path_factory.mktemp("runs"), capsys)
