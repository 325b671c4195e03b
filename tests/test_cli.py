"""The command `kd-plugins`, as a terminal and as a pipe see it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
from importlib.metadata import EntryPoint, entry_points, version

import pytest

import kd_plugins
from kd_plugins.catalog.about import describe, filled
from kd_plugins.catalog.cli import main
from kd_plugins.catalog.installed import GROUP, ROWS, list_distillers
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.catalog.paper import Paper
from kd_plugins.distiller import Distiller
from kd_plugins.errors import DistillError


class Shown(Distiller):
    """A method [for show].

    Args:
        shape: Of maps `[B, C, H, W]`.
    """

    paper = Paper("A [bold]Title", ("Jörg Müller", "Aaron van den Oord"), "ICML", 2021, arxiv="2101.00001")
    peers = True
    tasks = ("classification", "segmentation")

    def __init__(self, *, shape: int = 4) -> None:
        super().__init__()

    def optimizers(self) -> dict[str, OptimSpec]:
        return {"critic": OptimSpec(lr=3e-5)}


@pytest.fixture
def shown(monkeypatch):
    """Shown under a name of its own, and an entry that cannot be imported, beside what is installed."""
    module = types.ModuleType("shown_by_test")
    module.Shown = Shown
    monkeypatch.setitem(sys.modules, "shown_by_test", module)
    extra = [
        EntryPoint("shown", "shown_by_test:Shown", GROUP),
        EntryPoint("shattered", "no_such_module_here:Nothing", GROUP),
    ]
    found = [*entry_points(group=GROUP), *extra]
    monkeypatch.setattr(
        "kd_plugins.catalog.installed._entry_points",
        lambda group, _: [entry for entry in found if entry.group == group],
    )


def test_the_list_has_one_line_for_each_and_says_what_is_broken(shown, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == list_distillers()
    assert "online" in rows["shown"]
    assert re.search(r" classification, segmentation +bare, accelerate, transformers, timm +Müller", rows["shown"])
    assert "2021" in rows["shown"]
    assert "Müller & van den Oord, ICML 2021: A [bold]Title" in rows["shown"]
    assert "broken: " in rows["shattered"]
    assert "No module named 'no_such_module_here'" in rows["shattered"]
    assert f"kd-plugins {version('kd-plugins')}" in rows["kd"]
    for name in ("kd", "nst", "internal"):
        assert "broken" not in rows[name]
        assert str(describe(name).paper.year) in rows[name]


@pytest.mark.parametrize(("width", "columns"), [(80, 5), (160, 7)])
def test_a_narrow_window_has_fewer_columns_and_whole_words(width, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["list"]) == 0
    head, *lines = [re.sub(r"\x1b\[[0-9;]*m", "", x) for x in capsys.readouterr().out.splitlines() if x.strip()]
    assert len(head.split()) == columns
    assert max(map(len, [head, *lines])) <= width
    for word in ("classification,", "segmentation,", "regression"):
        assert any(word in line for line in lines)


def test_nobody_who_stops_reading_sees_a_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "kd_plugins", "list"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (141, "")


def test_the_list_of_our_own_methods_needs_no_torch():
    code = (
        "import sys; from kd_plugins.catalog import cli, installed; found = installed._entry_points;"
        "installed._entry_points = lambda *of: [e for e in found(*of) if e.value.startswith('kd_plugins.')];"
        "cli.main(['list']); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[0] for line in out[1:-1]} >= {"kd", "nst", "internal"}
    assert out[-1] == "[]"


def test_what_the_list_reads_is_what_the_classes_say():
    """Else: kd-plugins list --markdown README.md docs/paper_index.md kd_plugins/catalog/methods.json."""
    assert filled(ROWS) == ROWS.read_text(encoding="utf-8")


def test_public_names_are_there_when_they_are_asked_for():
    assert all(getattr(kd_plugins, name) is not None for name in kd_plugins.__all__)
    assert set(kd_plugins.__all__) <= set(dir(kd_plugins))
    with pytest.raises(AttributeError, match="no attribute 'Distillers'"):
        getattr(kd_plugins, "Distillers")  # noqa: B009


def test_without_a_command_it_lists(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    main(["list"])
    assert bare == capsys.readouterr().out


def test_a_terminal_of_80_columns_loses_no_text(shown, capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(
        "kd_plugins.catalog.cli._console", lambda: Console(force_terminal=True, width=80, color_system=None)
    )
    main(["list"])
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "no_such_module_here" in "".join(line[line.rfind("  ") :].strip() for line in out.splitlines())


def test_info_shows_paper_options_groups_and_bibtex(shown, capsys):
    assert main(["info", "shown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("shown: A method [for show].\n")
    for text in (
        "A [bold]Title (Müller & van den Oord, ICML 2021)",
        "https://arxiv.org/abs/2101.00001",
        "tasks:         classification, segmentation",
        "teachers:      1",
        "not timm-task: trains several networks together",
        "shape: int = 4    Of maps `[B, C, H, W]`.",
        "critic: OptimSpec(optimizer='Adam', lr=3e-05",
        "@inproceedings{muller2021bold,",
        "author = {Jörg Müller and Aaron van den Oord},",
    ):
        assert text in out


def test_info_keeps_a_long_name_of_a_fact_apart_from_the_fact(capsys):
    assert main(["info", "dafl"]) == 0
    facts = [line for line in capsys.readouterr().out.splitlines() if re.match(r"(kind|not \S+|class):", line)]
    assert "not transformers: makes its own data" in facts
    assert {re.match(r"[^:]+: +", line).end() for line in facts} == {len("not transformers: ")}


def test_markdown_is_printed_or_put_between_markers(capsys, tmp_path):
    assert main(["list", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "| `kd` | Distils the teacher's softened class probabilities | Hinton et al." in table
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "docs" / "methods" / "kd.md").touch()
    page = tmp_path / "docs" / "index.md"
    page.write_text("Before\n<!-- papers -->\nold\n<!-- /papers -->\nafter\n")
    assert main(["list", "--markdown", str(page)]) == 0
    before, marker, _, _, row, end, after = page.read_text().splitlines()
    assert (before, marker, end, after) == ("Before", "<!-- papers -->", "<!-- /papers -->", "after")
    assert row.startswith("| [`kd`](methods/kd.md) | Distilling the Knowledge in a Neural Network | Hinton et al., ")
    page.write_text("no markers")
    assert main(["list", "--markdown", str(page)]) == 2
    assert "<!-- methods -->" in capsys.readouterr().err
    assert main(["list", "--markdown", str(tmp_path / "none.md")]) == 2
    assert re.search(r"none\.md cannot be filled \(FileNotFoundError: .*name a text file", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["kd", "nst", "internal"])
def test_info_explains_every_option_of_a_method(name, capsys):
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    assert describe(name).paper.bibtex in out
    for option in describe(name).options.values():
        assert f"  {option.name}: {option.type} = " in out
        assert option.help, f"{name} does not document {option.name}"
        assert option.help in out


def test_info_of_a_composition_shows_its_parts_with_their_prefixes(capsys):
    assert main(["info", "kd+nst"]) == 0
    out = capsys.readouterr().out
    assert "  kd.temperature: float" in out
    assert "  nst.weight: float" in out


def test_errors_are_plain_and_exit_with_2(shown, capsys):
    assert main(["info", "internl"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kd-plugins: ")
    assert "Did you mean internal?" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert main(["info", "shattered"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["frobnicate"])
    assert stopped.value.code == 2


def test_demo_and_report_get_the_rest_of_the_command_line(monkeypatch):
    given = {}
    for command, name in (("demo", "kd_plugins.demo"), ("report", "kd_report")):
        module = types.ModuleType(name)
        module.main = lambda argv, command=command: given.update({command: argv})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["demo", "--epochs", "1"]) == 0
    assert main(["report", "runs/a", "--help"]) == 0
    assert given == {"demo": ["--epochs", "1"], "report": ["runs/a", "--help"]}

    def fail(argv: list[str]) -> int:
        raise DistillError("expected a run, got nothing")

    monkeypatch.setattr(sys.modules["kd_report"], "main", fail)
    assert main(["report"]) == 2


def test_the_module_is_the_command(monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["kd_plugins", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("kd_plugins", run_name="__main__", alter_sys=True)
        return ended.value.code

    assert run("--version") == 0
    assert capsys.readouterr().out == f"kd-plugins {version('kd-plugins')}\n"
    assert run("info", "nothing_like_it") == 2
    assert capsys.readouterr().err.startswith("kd-plugins: expected an installed distiller, got 'nothing_like_it'")
