"""Every Python block of README and docs runs, and every command line in them is one that our parsers take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                if line.startswith(("kd-timm-train", "kd-transformers-train")):
                    found.append((page.name, line.partition("  #")[0]))
    return found


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
        "evaluation": rows,
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


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page: str, line: str) -> None:
    program, *argv = shlex.split(line)
    if program == "kd-timm-train":
        from kd_timm.arguments import parse_args

        assert parse_args(argv).model
    else:
        from kd_transformers.arguments import parse_args as parse

        assert parse([*argv, "--output_dir", "output", "--use_cpu"]).training


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_a_methods_page_names_every_option(page: Path) -> None:
    from kd_plugins import get_distiller
    from kd_plugins.options import options_of

    text = page.read_text(encoding="utf-8")
    missing = [name for name in options_of(get_distiller(page.stem)) if f"| `{name}` |" not in text]
    assert not missing
