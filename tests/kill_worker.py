"""Kills a training script at chosen places, resumes it, and compares what it leaves with a run that was not killed.

`python tests/kill_worker.py timm|transformers POINTS SEED [SHAPE ...]` prints `{"shapes", "killed", "equal", "lost"}`
as JSON; the points are shared out to the shapes of methods in turn. A run is killed where it opens, renames or removes
something in its folder for the n-th time; in the middle of a file that it writes after that; or at some moment. A
signal ends kd-timm-train, which writes a state wherever it is. Every run is a fork of this process, which has imported
everything and trained nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TIMM = "--device cpu --workers 0 --epochs 3 --warmup-epochs 0 --checkpoint-hist 2 --resume auto --seed 7".split()
TINY = "--model tiny_shapes_student --num-classes 3 --lr 0.1 --momentum 0.9 -b 8 --model-ema --no-aug".split()
DIGITS = "--model resnet10t --model-kwargs channels=(8,8,8,8) stem_width=8 -b 128 --img-size 16 --lr 0.02".split()
DIGITS += "--opt adamw --model-ema --drop 0.1 --distill afd --distill-args layer=layer4 --peer resnet10t".split()
TEXT = [
    *"--max_steps 6 --max_train_samples 96 --max_eval_samples 32 --max_seq_length 16 --vocab_size 300".split(),
    *"--per_device_train_batch_size 8 --learning_rate 1e-3 --disable_tqdm True --save_strategy steps".split(),
    *"--use_cpu --save_steps 2 --save_total_limit 2 --logging_steps 3 --resume_from_checkpoint auto".split(),
]
POOLED = "layers=bert.pooler teacher_layers=bert.pooler".split()
TOKENS = "layers=bert.encoder.layer.0.output teacher_layers=bert.encoder.layer.1.output".split()
TAUGHT = "--train_teacher --teacher_layers 4 --teacher_hidden_size 16 --teacher_heads 2".split()
# What each shape of method is shown by, in each script.
SHAPES: dict[str, dict[str, list[str]]] = {
    "timm": {
        "adversarial": DIGITS,
        **{
            name: [*TINY, *taught]
            for name, taught in {
                "own": ["--teacher"],
                "online": ["--peer"],
                "search": ["--teacher"],
                "data_free": ["--teacher", "--epoch-updates"],
                "wasserstein": ["--teacher"],
                "progressive": ["--teacher"],
                "ensemble": ["--teacher"] * 3,
                "codebook": ["--teacher"],
                "noisy": ["--teacher"],
                "balanced": ["--teacher"],
            }.items()
        },
        "alone": TINY,
    },
    "transformers": {
        "stages": [*TEXT, *TAUGHT, "--distill", "internal"],
        "search": [*TEXT, *TAUGHT, "--distill", "ksanc", "--distill_args", *TOKENS],
        "bank": [*TEXT, *TAUGHT, "--distill", "crd", "--distill_args", *POOLED],
        "noisy": [*TEXT, *TAUGHT, "--distill", "noisy"],
        "cached": [*TEXT, *TAUGHT, "--distill", "kd", "--cache_teacher"],
        "sum": [*TEXT, *TAUGHT, "--distill", "kd+rkd", "--distill_args", *POOLED],
        "alone": TEXT,
    },
}
SCRIPTS = {"timm": "kd_timm.train", "transformers": "kd_transformers.train"}
# Files that differ by where a run was, or are of a tokenizer its last call.
PLACED = {"run.json", "manifest.json", "args.yaml", "training_args.bin", "tokenizer.json", "tokenizer_config.json"}
TIMES = ("runtime", "per_second", "preparation_time", "seconds", "seconds_per_step", "arguments", "total_flos")
PLACES = ("best_model_checkpoint", "train_teacher")


def words(host: str, shape: str, root: Path, folder: Path) -> list[str]:
    """The command line of a run, whose data and teachers lie in `root`."""
    given = SHAPES[host][shape]
    if host == "timm":
        return [*_timm(shape, root), "--output", str(folder.parent), "--experiment", folder.name]
    rows = root / "rows.csv"
    if not rows.exists():
        texts = [f"{a} {colour} {b}" for colour in ("red", "green", "blue") for a in "abcdefgh" for b in "pqrs"]
        rows.write_text("text,label\n" + "".join(f"{text},{text.split()[1]}\n" for text in texts))
    files = ["--train_file", str(rows), "--validation_file", str(rows), "--cache_dir", str(root / "cache")]
    return [*given, *files, "--output_dir", str(folder)]


def _timm(shape: str, root: Path) -> list[str]:
    """The flags of a shape for kd-timm-train; the tiny ones' networks are registered and their images written."""
    given, made, flags = SHAPES["timm"][shape], {}, []
    if shape == "adversarial":
        return [*TIMM, *given]
    from PIL import Image
    from shapes.distillers import SHAPES as CLASSES
    from shapes.nets import Images, networks
    from shapes.timm_host import TinyTimmNet, _models

    student, teachers, peers = networks(TinyTimmNet, given.count("--teacher"), "--peer" in given)
    made["tiny_shapes_student"] = student
    for i, teacher in enumerate(teachers):
        save_file(teacher.state_dict(), root / f"teacher{i}.safetensors")
        made[f"tiny_shapes_teacher{i}"] = teacher
        weights = str(root / f"teacher{i}.safetensors")
        flags += ["--teacher", f"tiny_shapes_teacher{i}", "--teacher-checkpoint", weights]
    for i, peer in enumerate(peers):
        made[f"tiny_shapes_peer{i}"] = peer
        flags += ["--peer", f"tiny_shapes_peer{i}"]
    _models(made)
    data = Images()
    for split in ("train", "validation"):
        for i, (pixels, label) in enumerate(zip(data.pixels, data.labels.tolist(), strict=True)):
            path = root / "images" / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    if shape != "alone":
        flags += ["--distill", f"shapes.distillers:{CLASSES[shape].__name__}", "--data-dir", str(root / "images")]
    else:
        flags += ["--data-dir", str(root / "images"), "--drop", "0"]
    tiny = [word for word in given if word not in ("--teacher", "--peer", "--epoch-updates")]
    if shape == "data_free":
        tiny.remove("--no-aug")
        flags += ["--epoch-updates", "6"]
    return [*TIMM, *tiny, *flags]


def run(
    host: str,
    argv: list[str],
    folder: Path,
    *,
    place: int = 0,
    size: int = 0,
    seconds: float = 0.0,
    number: int = signal.SIGKILL,
) -> tuple[int, str]:
    """A run in a process of its own.

    Args:
        host: Which script.
        argv: Its words.
        folder: Its output.
        place: Which opening, renaming or removing in the folder it is killed at, counted from 1.
        size: From that place on, it is killed when a file grows beyond so many bytes.
        seconds: After how long it is killed.
        number: By which signal, then.

    Returns:
        The number of places that it passed, -1 where it was killed, -2 where it failed, and what it said.
    """
    reading, writing = os.pipe()
    log = folder.parent / "said.txt"
    child = os.fork()
    if not child:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        # Python ignores it, and gives an error that a script could tell of.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        passed = [0]

        def hook(event: str, args: Any) -> None:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            changes |= event == "open" and isinstance(args[1], str) and bool({*"wax+"} & {*args[1]})
            if changes and str(folder) in str(args[0]):
                passed[0] += 1
                if passed[0] == place and size:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                elif passed[0] == place:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        if seconds:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        status = importlib.import_module(SCRIPTS[host]).main(argv)
        os.write(writing, str(passed[0]).encode())
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 20)
    os.close(reading)
    failed = -1 if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 128 + number else -2
    return (failed if status else int(told)), log.read_text(errors="replace")


def left(folder: Path) -> dict[str, Any]:
    """What a run has left, without what tells times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        # What a kill leaves of a file in the making is of no run.
        torn = path.suffix == ".partial" or path.name.startswith(".tmp")
        if path.is_file() and path.name not in PLACED and not torn and "state.old" not in path.parts:
            name, content = str(path.relative_to(folder)), path.read_bytes()
            if path.suffix == ".json":
                found[name] = _untimed(json.loads(content))
            elif path.suffix == ".jsonl":
                found[name] = [_untimed(json.loads(line)) for line in content.splitlines()]
            elif path.suffix == ".pt":
                # Pickle writes equal values in several ways.
                found[name] = _plain(torch.load(path, weights_only=True))
            else:
                found[name] = content
    return found


def _plain(value: Any) -> Any:
    """Nested values with tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _untimed(value: Any) -> Any:
    if isinstance(value, list):
        return [_untimed(item) for item in value]
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if not k.endswith(TIMES) and k not in PLACES}
    return value


def main(host: str, points: int, seed: int, shapes: list[str]) -> dict[str, Any]:
    """Kills and compares."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    importlib.import_module(SCRIPTS[host])
    draw, lost, killed = random.Random(seed), [], 0
    shapes = shapes or list(SHAPES[host])
    with tempfile.TemporaryDirectory() as name:
        root, wholes = Path(name), {}
        for point in range(points):
            shape = shapes[point % len(shapes)]
            folder = root / str(point) / "run"
            folder.parent.mkdir()
            if shape not in wholes:
                whole = root / shape / "run"
                whole.parent.mkdir()
                began = time.monotonic()
                places, said = run(host, words(host, shape, root, whole), whole)
                if places < 0:
                    raise RuntimeError(f"{shape} fails without a kill: {said[-2000:]}")
                wholes[shape] = places, time.monotonic() - began, left(whole)
            places, took, expected = wholes[shape]
            argv, kills = words(host, shape, root, folder), []
            # Twice, so that a run that was resumed is killed as well.
            for _ in range(2):
                kinds = ["place", "place", "middle", "middle", "moment"] + ["signal"] * 2 * (host == "timm")
                kind, place = draw.choice(kinds), draw.randint(1, places)
                moment, size = draw.uniform(0.2, 1.0) * took, int(10 ** draw.uniform(0, 4))
                how: dict[str, Any] = {"seconds": moment} if kind in ("moment", "signal") else {"place": place}
                how |= {"number": signal.SIGTERM} if kind == "signal" else {}
                how |= {"size": size} if kind == "middle" else {}
                ended, said = run(host, argv, folder, **how)
                killed += ended == -1
                kills += [how] if ended == -1 else []
                if ended == -2:
                    break
            if ended != -2:
                ended, said = run(host, argv, folder)
            now = left(folder) if ended >= 0 else {}
            other = [name for name in {*expected, *now} if expected.get(name) != now.get(name)]
            if other:
                lost.append({"shape": shape, "kills": kills, "files": sorted(other)[:5]})
                lost[-1] |= {"said": said[-1500:]} if ended < 0 else {}
            print(f"{point} {shape} {kills} {'lost' if other else 'equal'}", file=sys.stderr, flush=True)
    return {"shapes": len({*shapes[:points]}), "killed": killed, "equal": points - len(lost), "lost": lost}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
