"""`python -m benchmarks NAME`."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "speed": "seconds per step against the floor",
    "phases": "internal, phase by phase, in time and memory, beside the way by hand",
    "nst": "NST's forms",
    "quest": "QuEST's loss in pieces, and all at once",
    "vocabulary": "soft labels over a vocabulary in chunks, and all at once",
    "tokens": "settings of kd where every token has scores",
    "detector": "NST on Faster R-CNN",
    "recording": "what a record for the report adds to a run",
    "camvid": "segmentation of CamVid",
    "quality": "lists of training runs",
    "card": "one training of a list whose trainings share a card",
    "robustness": "students of a list of runs on corrupted and attacked images",
    "filters": "a picture of networks' first filters",
    "results": "the tables of docs/results.md, from the runs' results",
    "timm_parity": "timm's own train.py and kd-timm-train with the same flags",
    "trainer_tests": "transformers' own Trainer tests, with DistillationTrainer in Trainer's place",
    "idx_data": "MNIST and Fashion-MNIST as parquet files",
    "demo_data": "the demo's training paragraphs, a part of them held out to choose its settings on",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(
            "usage: python -m benchmarks NAME [options]\n" + "\n".join(f"  {n:13} {what}" for n, what in NAMES.items())
        )
        return 2
    return int(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
