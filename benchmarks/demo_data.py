"""Writes the training paragraphs of the demo's text, with a part held out: what its settings are chosen on.

The rows that `kd-plugins demo` evaluates on are not among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset

from kd_transformers.docstrings import load_docstrings, split_by_file


def text(folder: Path) -> None:
    """The training paragraphs of the docstrings, split once more by file."""
    data = load_docstrings()["train"]
    held_out = set()
    for label in sorted(set(data["label"])):
        files = [file for file, of in zip(data["file"], data["label"], strict=True) if of == label]
        if len(set(files)) > 1:
            held_out |= split_by_file({file: files.count(file) for file in sorted(set(files))}, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    for name, inside in (("train", False), ("validation", True)):
        rows: Dataset = data.filter(lambda file, inside=inside: (file in held_out) == inside, input_columns="file")
        rows.remove_columns("file").to_parquet(folder / f"{name}.parquet")
        print(f"{name}: {len(rows)} paragraphs")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo_data", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="output/demo_data")
    root = Path(parser.parse_args(argv).folder)
    text(root / "text")
    return 0
