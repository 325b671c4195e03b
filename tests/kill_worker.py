"""Kills a training script at chosen places, resumes it, and compares what it leaves with a run that was not killed.

`python tests/kill_worker.py timm|transformers POINTS SEED` prints `{"killed", "equal", "lost"}` as JSON. A place is the
n-th time that the run opens, renames or removes something in its folder, or a moment in between. Every run is a fork of
this process, which has imported everything and trained nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

TIMM = [
    *"--model resnet10t --model-kwargs channels=(8,8,8,8) stem_width=8 --device cpu -b 128 --workers 0".split(),
    *"--epochs 3 --warmup-epochs 0 --img-size 16 --lr 0.02 --opt adamw --model-ema --drop 0.1 --resume auto".split(),
    *"--distill afd --distill-args layer=layer4 --peer resnet10t --checkpoint-hist 2".split(),
]
TEXT = [
    *"--max_steps 6 --max_train_samples 96 --max_eval_samples 32 --max_seq_length 16 --vocab_size 300".split(),
    *"--per_device_train_batch_size 8 --learning_rate 1e-3 --disable_tqdm True --save_strategy steps".split(),
    *"--use_cpu --save_steps 2 --save_total_limit 2 --logging_steps 1 --train_teacher --teacher_layers 4".split(),
    *"--teacher_hidden_size 16 --teacher_heads 2 --distill internal --resume_from_checkpoint auto".split(),
]
SCRIPTS = {"timm": "kd_timm.train", "transformers": "kd_transformers.train"}
# Files that tell times, places and how often a run was resumed, or of a tokenizer its last call and where it came from.
TIMED = {"run.json", "results.json", "state.json", "manifest.json", "args.yaml", "trainer_state.json"}
TIMED |= {"all_results.json", "train_results.json", "student_results.json", "eval_results.json", "training_args.bin"}
TIMED |= {"tokenizer.json", "tokenizer_config.json"}


def words(host: str, folder: Path) -> list[str]:
    if host == "timm":
        return [*TIMM, "--output", str(folder.parent), "--experiment", folder.name]
    root = folder.parents[1]
    rows = root / "rows.csv"
    if not rows.exists():
        texts = [f"{a} {colour} {b}" for colour in ("red", "green", "blue") for a in "abcdefgh" for b in "pqrs"]
        rows.write_text("text,label\n" + "".join(f"{text},{text.split()[1]}\n" for text in texts))
    files = ["--train_file", str(rows), "--validation_file", str(rows), "--cache_dir", str(root / "cache")]
    return [*TEXT, *files, "--output_dir", str(folder)]


def run(host: str, folder: Path, *, place: int = 0, seconds: float = 0.0) -> int:
    """A run in a process of its own; returns how it ended, as `os.waitpid` does, or the places that it passed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        passed = [0]

        def hook(event: str, args: Any) -> None:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            changes |= event == "open" and isinstance(args[1], str) and bool({*"wax+"} & {*args[1]})
            if changes and str(folder) in str(args[0]):
                passed[0] += 1
                if passed[0] == place:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        if seconds:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        status = importlib.import_module(SCRIPTS[host]).main(words(host, folder))
        os.write(writing, str(passed[0]).encode())
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 20)
    os.close(reading)
    return -1 if status else int(told)


def left(folder: Path) -> dict[str, Any]:
    """What a run has left, without what tells times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in TIMED and path.suffix != ".partial" and "state.old" not in path.parts:
            found[str(path.relative_to(folder))] = path.read_bytes()
    rows = [json.loads(line) for line in found["history.jsonl"].splitlines()]
    timed = ("runtime", "per_second", "preparation_time")
    found["history.jsonl"] = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows]
    return found


def main(host: str, points: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    importlib.import_module(SCRIPTS[host])
    draw, lost, killed = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        places = run(host, Path(root, "whole", "run"))
        took = time.monotonic() - began
        whole = left(Path(root, "whole", "run"))
        for point in range(points):
            folder = Path(root, str(point), "run")
            folder.parent.mkdir()
            # Twice, so that a run that was resumed is killed as well.
            for _ in range(2):
                by_place = draw.random() < 0.7
                how: dict[str, Any] = {"place": draw.randint(1, places)} if by_place else {}
                how = how or {"seconds": draw.uniform(0.2, 1.0) * took}
                killed += run(host, folder, **how) == -1
            ended = run(host, folder)
            now = left(folder) if ended != -1 else {}
            other = [name for name in {*whole, *now} if whole.get(name) != now.get(name)]
            if other:
                lost.append({**how, "ended": ended, "files": sorted(other)[:5]})
    return {"killed": killed, "equal": points - len(lost), "lost": lost}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
