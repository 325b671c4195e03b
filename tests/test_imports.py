"""Imports go one way: kd_transformers, kd_timm -> kd_accelerate, kd_report -> kd_plugins -> torch; without circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "kd_plugins": ROOT / "kd_plugins",
    "kd_accelerate": ROOT / "integrations" / "kd_accelerate",
    "kd_report": ROOT / "integrations" / "kd_report",
    "kd_transformers": ROOT / "integrations" / "kd_transformers",
    "kd_timm": ROOT / "integrations" / "kd_timm",
}
ABOVE = {
    "kd_plugins": {"kd_accelerate", "kd_report", "kd_transformers", "kd_timm"},
    "kd_accelerate": {"kd_report", "kd_transformers", "kd_timm"},
    "kd_report": {"kd_transformers", "kd_timm"},
    "kd_transformers": {"kd_timm"},
    "kd_timm": {"kd_transformers"},
}
HOSTS = {"timm", "transformers", "accelerate", "datasets", "evaluate"}
HEAVY = {"sklearn", "matplotlib", "jinja2", "rich", "yaml", "safetensors", "numpy", "PIL"}


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imports(path: Path, types: bool = False) -> list[tuple[str, bool]]:
    """What a file imports, and whether it does so as soon as it is imported (not in a function).

    What is imported for types only is left out, unless asked for.
    """
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, now: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            now = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if not types:
                return
            now = False
        if isinstance(node, ast.Import):
            found.extend((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the package's name"
            found.extend((f"{node.module}.{alias.name}", now) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, now)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def test_imports_are_recognised(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        "from __future__ import annotations\nimport a.b, c\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import types_only\n"
        "class K:\n    from d import e\n    def f(self):\n        import late\n"
    )
    assert imports(file) == [
        ("__future__.annotations", True),
        ("a.b", True),
        ("c", True),
        ("typing.TYPE_CHECKING", True),
        ("d.e", True),
        ("late", False),
    ]
    assert ("types_only", False) in imports(file, types=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_imports_upwards(package):
    # The contract compares hosts, and the demo draws pages: the two places that look up, when they are called.
    allowed = {("runs.py", "kd_accelerate"), ("demo.py", "kd_report")}
    for path in sources(package):
        for name, now in imports(path):
            upward = top(name) in ABOVE[package] and ((path.name, top(name)) not in allowed or now)
            assert not upward, f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_imports_torch_and_the_standard_library():
    allowed = {*sys.stdlib_module_names, "torch", "kd_plugins"}
    for path in sources("kd_plugins"):
        for name, now in imports(path):
            here = path.relative_to(ROOT)
            assert not now or top(name) in allowed, f"{here} imports {name} when it is imported"
            # The contract plays under Accelerate, and makes a transformer for methods that read its layers.
            late = (path.name, top(name)) in {("runs.py", "accelerate"), ("networks.py", "transformers")}
            late |= top(name) not in HOSTS
            assert late, f"{here} imports the host {name}"


def test_the_functional_losses_import_nothing_of_ours():
    files = sorted((ROOT / "kd_plugins" / "functional").glob("*.py"))
    assert len(files) > 3
    for path in files:
        for name, _ in imports(path):
            ours = top(name) in PACKAGES and not name.startswith("kd_plugins.functional")
            assert not ours, f"{path.relative_to(ROOT)} imports {name}"


def test_only_pages_import_what_pages_are_made_with():
    found = {path.name: {top(name) for name, now in imports(path) if now} for path in sources("kd_report")}
    drawing = {"charts.py", "pages.py"}
    for name, packages in found.items():
        wanted = {"jinja2", "markupsafe", "matplotlib"} if name in drawing else set()
        assert not packages & {"jinja2", "markupsafe", "matplotlib"} - wanted, name
    assert {"jinja2", "matplotlib"} <= found["pages.py"]
    for name in found.keys() - drawing:
        path = PACKAGES["kd_report"] / name
        late = {f"{top(n)}.{n.split('.')[1]}" for n, now in imports(path) if now and top(n) == "kd_report"}
        assert not late & {f"kd_report.{file.removesuffix('.py')}" for file in drawing}, name


@pytest.mark.parametrize("package", ["kd_accelerate", "kd_report", "kd_transformers", "kd_timm"])
def test_hosts_import_no_other_host(package):
    others = dict.fromkeys(("kd_accelerate", "kd_report"), {"timm", "transformers", "datasets", "evaluate"})
    others["kd_transformers"] = {"timm"}
    for path in sources(package):
        for name, now in imports(path):
            bad = now and top(name) in others.get(package, {"transformers", "datasets", "evaluate"})
            assert not bad, f"{path.relative_to(ROOT)} imports {name} when it is imported"


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for root in PACKAGES.values():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def edges(known: dict[str, Path]) -> dict[str, set[str]]:
    """What each module of ours imports of ours, at any time: for types and inside functions included."""

    def module(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    found = {}
    for name, path in known.items():
        found[name] = {module(what) for what, _ in imports(path, types=True)} - {"", name}
    return found


def test_there_is_no_circle():
    try:
        list(TopologicalSorter(edges(modules())).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other, if only for types or in a function: {' -> '.join(error.args[1])}")


# A package or module imports only what stands in earlier lines, of its own line too where it is a package.
LAYERS = (
    (
        "catalog.installed",
        "errors",
        "finite",
        "states",
        "picture",
        "host",
        "averaging",
        "stages",
        "terms",
        "functional",
        "nn",
        "reading",
    ),
    ("catalog.values", "catalog.paper", "catalog.attributes", "catalog.options"),
    ("distiller", "authors"),
    (
        "aggregation",
        "compose",
        "layers",
        "methods",
        "catalog.registry",
        "catalog.about",
        "binding",
        "groups",
        "saving",
    ),
    ("run", "evaluation"),
    ("catalog.cli", "testing", "demo"),
)


def test_the_core_is_layered():
    level = {f"kd_plugins.{name}": number for number, names in enumerate(LAYERS) for name in names}

    def of(module: str) -> int | None:
        while module and module not in level:
            module = module.rpartition(".")[0]
        return level.get(module)

    graph = edges(modules())
    for module, imported in graph.items():
        for other in imported:
            ours, theirs = of(module), of(other)
            if module.startswith("kd_plugins") and None not in (ours, theirs):
                assert theirs <= ours, f"{module} imports {other}, which stands above it"
    placed = {module for module in graph if module.startswith("kd_plugins.") and of(module) is None}
    assert placed <= {"kd_plugins.__main__", "kd_plugins.catalog"}, f"give {placed} a place in LAYERS"


STEPS = [
    "import torch, torch.distributed, importlib.metadata",
    "import kd_plugins; names = kd_plugins.list_distillers(); assert 'kd' in names",
    "assert 'kd_plugins.methods' not in sys.modules, 'listing imports the methods'",
    "import kd_plugins.functional, kd_plugins.testing, kd_plugins.catalog.cli, kd_plugins.compose",
    "[kd_plugins.create_distiller(name) for name in ('kd', 'nst', 'internal', 'kd+nst')]",
]


def test_the_core_loads_no_host_and_nothing_heavy():
    report = "print('|', *sorted({name.partition('.')[0] for name in sys.modules}))"
    script = "\n".join(["import sys", *(line for step in STEPS for line in (step, report))])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    bare, *later = (set(part.split()) for part in done.stdout.split("|")[1:])
    for step, packages in zip(STEPS[1:], later, strict=True):
        extra = (packages - bare) & (HOSTS | HEAVY)
        assert not extra, f"`{step}` loads {sorted(extra)}"


def test_no_file_names_a_folder_outside_the_project():
    forbidden = ["../" + "shared", "/work" + "/", "/opt" + "/kd"]
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not name or not path.is_file() or path.suffix in (".png", ".safetensors", ".npz"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in forbidden:
            assert word not in text, f"{name} names {word}"


# What a plain method of one paper may take, and what one with a part of its own may, each with its docstrings.
SHORT = dict.fromkeys(("at", "dist", "dkd", "fitnet", "pkt", "rkd", "sp", "vid"), 60) | {"crd": 90, "reviewkd": 90}


def test_files_stay_readable():
    for package in PACKAGES:
        for path in sources(package):
            most = SHORT.get(path.stem, 220) if path.parent.name == "methods" else 600
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines of {most}: split it"
