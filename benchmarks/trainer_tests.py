"""Runs transformers' own Trainer tests twice, as they are and with DistillationTrainer in Trainer's place.

    python -m benchmarks trainer_tests CHECKOUT [PYTEST OPTIONS]

CHECKOUT is a clone of transformers at the tag of the installed version, which is what is tested; of the clone only the
tests are used, `tests/trainer` where no test is named. Prints the number of tests of each outcome and every test whose
outcome differs, and exits with 1 where one does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

_IN_PLACE = "KD_TRAINER_IN_PLACE"


def put_in_place() -> None:
    """Lets `from transformers import Trainer` give DistillationTrainer."""
    from kd_transformers import DistillationTrainer

    for name in ("transformers.trainer", "transformers"):
        vars(sys.modules[name])["Trainer"] = DistillationTrainer


if os.environ.get(_IN_PLACE) and __name__ != "__main__":
    # As a plugin of pytest, which is imported before any test and before the conftest of the clone.
    put_in_place()


def outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test in a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}.{case.get('name')}"] = next(iter(kinds), "passed")
    return found


def run(checkout: Path, options: list[str], *, in_place: bool) -> dict[str, str]:
    """The outcomes of the tests of a checkout."""
    tests = options if any((checkout / o.partition("::")[0]).exists() for o in options) else ["tests/trainer", *options]
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-q", "-p", Path(__file__).stem, f"--junitxml={report}", *tests]
        environment = {**os.environ, "PYTHONPATH": path, _IN_PLACE: "1" if in_place else ""}
        done = subprocess.run([sys.executable, *words], cwd=checkout, env=environment, check=False)
        if not report.is_file():
            raise SystemExit(f"pytest ended with {done.returncode} and no report: see above.")
        return outcomes(report)


def main(argv: list[str]) -> int:
    """Runs both and compares."""
    if not argv or not (Path(argv[0]) / "tests").is_dir():
        print(f"Expected the folder of a clone of transformers, with its tests, got {argv[:1] or 'nothing'}.")
        return 2
    checkout, options = Path(argv[0]).resolve(), argv[1:]
    stock, ours = (run(checkout, options, in_place=in_place) for in_place in (False, True))
    for name, found in (("Trainer", stock), ("DistillationTrainer", ours)):
        print(f"{name}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items())))
    differs = [name for name in sorted({*stock, *ours}) if stock.get(name) != ours.get(name)]
    for name in differs:
        print(f"{name}: {stock.get(name, 'absent')} with Trainer, {ours.get(name, 'absent')} with DistillationTrainer")
    return int(bool(differs))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
