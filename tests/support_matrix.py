"""The tables of docs/support.md, from the registry and what the tests run: `python tests/support_matrix.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from kd_plugins import get_distiller, list_distillers
from kd_plugins.catalog.about import HOSTS, Description, describe
from kd_plugins.catalog.installed import distribution_of
from kd_plugins.testing import CLAUSES

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "support.md"
TASKS = (
    "classification",
    "multilabel",
    "regression",
    "token",
    "causal-lm",
    "ctc",
    "segmentation",
    "depth",
    "detection",
)
TWO_PROCESSES = {
    "afd": "methods/test_afd.py::test_two_processes_with_accumulation_clipping_and_resume",
    "dfa": "methods/test_dfa_hosts.py::test_two_processes_with_accumulation_clipping_and_resume",
    "kd": "timm/test_distillation.py::test_two_processes",
    "ksanc": "methods/test_ksanc.py::test_two_processes_are_one_on_the_whole_batch",
    "nst": "timm/test_distillation.py::test_two_processes",
    "quest": "methods/test_quest.py::test_two_processes_have_the_words_of_the_first",
    "structured": "methods/test_structured.py::test_two_processes",
}
"""The tests that start two processes with a method; for others those of tests/shapes do, with one of their shape."""


def names() -> list[str]:
    """The methods of this distribution."""
    return [name for name in list_distillers() if str(distribution_of(name)).startswith("kd-plugins ")]


def starts_processes(test: str) -> bool:
    """Whether there is a test of that name, marked as one that starts processes."""
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return any("distributed" in ast.unparse(mark) for node in found for mark in node.decorator_list)


def tables() -> dict[str, str]:
    """The tables by name."""
    about = [describe(name) for name in names()]
    # The contract trains each method in bf16 and fp16 (tests/test_contract.py).
    precision = "float32, bf16, fp16" if "precision" in CLAUSES else "float32"
    return {
        "tasks": _table(
            ("method", "networks", *TASKS),
            [[_page(a), a.networks, *("y" if task in a.tasks else "-" for task in TASKS)] for a in about],
        ),
        "hosts": _table(
            ("method", *HOSTS, "precision", "two processes"),
            [[_page(a), *("-" if host in a.refusals else "y" for host in HOSTS), precision, _tried(a)] for a in about],
        ),
        "refusals": _table(
            ("host", "refuses", "because it"),
            [[host, _page(a), a.refusals[host]] for host in HOSTS for a in about if host in a.refusals],
        ),
    }


def _tried(about: Description) -> str:
    return "tested" if about.name in TWO_PROCESSES else "by its shape"


def _page(about: Description) -> str:
    return f"[`{about.name}`](methods/{about.name}.md)"


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [list(columns), ["---"] * len(columns), *rows])


def filled(text: str) -> str:
    """A page with the tables between its markers."""
    for name, table in tables().items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: f"{m[1]}\n{t}\n{m[2]}", text, flags=re.S
        )
    return text


if __name__ == "__main__":
    assert all(get_distiller(name) for name in TWO_PROCESSES)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
