"""Writes a data set in MNIST's format (Fashion-MNIST, MNIST: four `*-ubyte.gz` files) as parquet files of images."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image


def read(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes: two zeros, the type 8, the number of sizes, the sizes, the bytes."""
    with gzip.open(path) as file:
        data = file.read()
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"Expected an IDX file of bytes, got {path}: give the folder with MNIST's four .gz files.")
    start = 4 + 4 * data[3]
    return np.frombuffer(data, np.uint8, offset=start).reshape(np.frombuffer(data[4:start], ">i4"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks idx_data", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with the four files")
    parser.add_argument("folder", type=Path, help="where train.parquet, test.parquet and results.json go")
    parser.add_argument("--test", type=Path, help="folder whose test split is taken in place of the first one's")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for split, name, source in (("train", "train", args.source), ("test", "t10k", args.test or args.source)):
        images, labels = (read(source / f"{name}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
        features = Features({"image": Image(), "label": ClassLabel(num_classes=int(labels.max()) + 1)})
        data = Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
        data.to_parquet(args.folder / f"{split}.parquet")
        rows[split] = len(data)
        print(f"{split}: {len(data)} images of {images.shape[1]} x {images.shape[2]}")
    (args.folder / "results.json").write_text(json.dumps(rows))
    return 0
