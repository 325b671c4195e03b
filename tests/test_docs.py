"""Every Python block of README and docs runs, every command line is one that our parsers take, every name is there."""

from __future__ import annotations

import fnmatch
import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def command_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, whole; of a block with functions, what it runs of our programs."""
    found = []
    for code in blocks(page, "bash"):
        code = code.replace("\\\n", " ")
        if "() {" in code:
            told = "".join(
                f'{name}() {{ printf "%q " {name} "$@"; echo; }}\n'
                for name in {"pip", *re.findall(r"kd-[a-z-]+", code)}
            )
            code = subprocess.run(["bash", "-ec", told + code], stdout=subprocess.PIPE, text=True, check=True).stdout
        for line in code.splitlines():
            found += [part.strip() for part in line.partition("  #")[0].split("&&")]
    return found


def commands(*programs: str) -> list[tuple[str, str]]:
    """The lines of shell blocks that start one of the programs, with the page that they stand on."""
    return [(page.name, line) for page in PAGES for line in command_lines(page) if line.startswith(programs)]


def surroundings() -> dict[str, object]:
    """What the snippets take for granted: networks, data, TrainingArguments."""
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    student, teacher = (BertForSequenceClassification(BertConfig(num_hidden_layers=n, **size)) for n in (2, 4))
    rows = Dataset.from_dict({"input_ids": [[2, 3, 4]] * 8, "attention_mask": [[1, 1, 1]] * 8, "labels": [0, 1] * 4})
    return {
        "torch": torch,
        "student": student,
        "teacher": teacher,
        "train": rows,
        "augment": lambda rows: rows,
        "evaluation": rows,
        "batches": [{name: torch.tensor(rows[name]) for name in rows.column_names} for _ in range(6)],
        "arguments": TrainingArguments,
    }


def images() -> dict[str, object]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4 = nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.layer4(x).mean((2, 3)))

    loader = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(2)]
    return {"student": Net(), "teacher": Net(), "loader": loader}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = surroundings()
    scope["args"] = scope["arguments"](output_dir=str(tmp_path), max_steps=6, report_to="none", use_cpu=True)
    for code in blocks(page, "python"):
        if "yield {" in code and "class " not in code:
            continue  # an excerpt of a method, for the reader
        if "loader" in code and "DataLoader" not in code:
            scope.update(images())
        exec(compile(code, str(page), "exec"), scope)
    assert scope


@pytest.mark.parametrize(("page", "line"), commands("kd-timm-train", "kd-transformers-train"))
def test_commands_parse(page: str, line: str) -> None:
    from kd_plugins.catalog.registry import options_from_strings

    program, *argv = shlex.split(line)
    if program == "kd-timm-train":
        from kd_timm.arguments import parse_args

        given = parse_args(argv)
        assert given.model
    else:
        from kd_transformers.arguments import parse_args as parse

        arguments = parse([*argv, "--output_dir", "output", "--use_cpu"])
        assert arguments.training
        given = arguments.distillation
    if given.distill and ":" not in given.distill and given.distill != "mine":
        options_from_strings(given.distill, given.distill_args)


@pytest.mark.parametrize(("page", "line"), commands("kd-plugins"))
def test_kd_plugins_commands(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`list` and `info` run; what takes minutes, or a folder of runs, only has to be there."""
    from kd_plugins.catalog.cli import main

    _, *argv = shlex.split(line)
    if argv and argv[0] in ("demo", "report"):
        with pytest.raises(SystemExit) as ended:
            main([argv[0], "--help"])
        assert ended.value.code == 0
    else:
        assert main(argv) == 0
    assert capsys.readouterr().out


def test_the_methods_of_the_page_train() -> None:
    """Every turn of each is what the contract wants, in a few steps on small networks."""
    from kd_plugins import Distiller
    from kd_plugins.testing import TinyNet, networks, runs

    scope: dict[str, object] = {}
    for code in blocks(ROOT / "docs" / "extend.md", "python"):
        if "class " in code:
            exec(code, scope)
    made = [cls for cls in scope.values() if isinstance(cls, type) and cls.__module__ == "builtins"]
    assert len(made) == 5
    for cls in made:
        assert issubclass(cls, Distiller)
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        setting = runs.Setting(cls, TinyNet(), [TinyNet()], [], networks.tiny_batches(), 3, sgd, networks.adapt)
        assert any(runs.walk(runs.Training(setting)).values())


def test_the_first_method_is_short() -> None:
    assert len(blocks(ROOT / "docs" / "extend.md", "python")[0].splitlines()) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


TABLES = ("README.md", "docs/paper_index.md")


@pytest.mark.parametrize("page", TABLES)
def test_tables_of_methods_are_what_the_registry_says(page: str) -> None:
    from kd_plugins.catalog.about import filled

    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == filled(ROOT / page), f"run: kd-plugins list --markdown {' '.join(TABLES)}"


def test_what_runs_where_is_what_the_registry_and_the_tests_say() -> None:
    import support_matrix as support

    page = support.PAGE.read_text(encoding="utf-8")
    assert page == support.filled(page), "run: python tests/support_matrix.py"
    assert set(support.TWO_PROCESSES) <= set(support.names())
    assert all(support.starts_processes(test) for test in support.TWO_PROCESSES.values())


def test_the_site_has_every_page_and_names_no_registry() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert pages == set(re.findall(r": ([\w/]+\.md)$", menu, re.M))
    hosts = re.compile(r"pypi\.org|pythonhosted|huggingface\.co|anaconda|npmjs|docker\.io|ghcr\.io")
    assert not [page.name for page in [*PAGES, ROOT / "mkdocs.yml"] if hosts.search(page.read_text(encoding="utf-8"))]


def test_every_method_has_a_page() -> None:
    from kd_plugins import list_distillers
    from kd_plugins.catalog.installed import distribution_of

    ours = {name for name in list_distillers() if str(distribution_of(name)).startswith("kd-plugins ")}
    assert ours == {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}


def test_the_losses_of_the_index_are_there() -> None:
    from kd_plugins import functional

    named = re.findall(r"^\| `([\w*]+)` \|", (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8"), re.M)
    assert named
    missing = [name for name in named if not fnmatch.filter(dir(functional), name)]
    assert not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_a_methods_page_names_every_option(page: Path) -> None:
    from kd_plugins import get_distiller
    from kd_plugins.catalog.options import options_of

    text = page.read_text(encoding="utf-8")
    missing = [name for name in options_of(get_distiller(page.stem)) if f"| `{name}` |" not in text]
    assert not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_info_shows_the_optimizers_whose_rates_a_page_names(page: Path) -> None:
    from kd_plugins.catalog.about import describe

    assert set(describe(page.stem).groups) == set(re.findall(r"`(\w+)\.lr`", page.read_text(encoding="utf-8")))


def test_the_weights_of_other_libraries() -> None:
    """The options of the migration pages move a student as the settings beside them, but for the length of the step."""
    from torch.nn import functional as F

    from kd_plugins import Batch, bind, create_distiller

    class Scores(nn.Module):
        def __init__(self, z: torch.Tensor) -> None:
            super().__init__()
            self.z = nn.Parameter(z)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.z

    def found(page: str, pattern: str) -> list[float]:
        match = re.search(pattern, (ROOT / "docs" / "migrate" / page).read_text(encoding="utf-8"))
        assert match, pattern
        return [float(number) for number in match.groups()]

    number, ours = r"([\d.]+)", r"`temperature=([\d.]+)`, `alpha=([\d.]+)`"
    # What their code has before the divergence and the cross entropy, their temperature; our temperature and alpha.
    pattern = f"temperature={number}, kd_loss_weight={number}, hard_label_weight={number}.*{ours}"
    t, soft, hard, temperature, alpha = found("textbrewer.md", pattern)
    cases = [(soft, hard, t, temperature, alpha)]
    t, hard, temperature, alpha = found("torchdistill.md", f"temperature: {number}, alpha: {number}` .*{ours}")
    cases.append(((1 - hard) * t**2, hard, t, temperature, alpha))
    soft, hard, alpha = found("timm.md", f"distill-loss-weight {number} --task-loss-weight {number}`.* alpha={number}`")
    cases.append((soft * 16, hard, 4, 4, alpha))
    soft, equal, alpha = found("timm.md", f"1 and 1; `--distill-loss-weight {number}`.*={number}`; `alpha={number}`")
    cases += [(16, 1, 4, 4, equal), (soft * 16, 1, 4, 4, alpha)]
    torch.manual_seed(0)
    z, taught, labels = torch.randn(6, 4), 3 * torch.randn(6, 4), torch.randint(4, (6,))
    for soft, hard, t, temperature, alpha in cases:
        theirs, student = z.clone().requires_grad_(), Scores(z.clone())
        divergence = F.kl_div((theirs / t).log_softmax(1), (taught / t).softmax(1), reduction="batchmean")
        (soft * divergence + hard * F.cross_entropy(theirs, labels)).backward()
        distiller = create_distiller("kd", temperature=temperature, alpha=alpha)
        (turn,) = distiller.turns(bind(distiller, student, Scores(taught)), Batch.of(torch.zeros(6, 1), labels))
        sum(turn["student"].values()).backward()
        assert F.cosine_similarity(student.z.grad.flatten(), theirs.grad.flatten(), dim=0) > 1 - 1e-5, (soft, hard, t)
