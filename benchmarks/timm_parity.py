"""Runs timm's own train.py and kd-timm-train with the same flags and compares weights and metrics.

    python -m benchmarks timm_parity path/to/pytorch-image-models/train.py [ROW ...]

The script is yours: a checkout of timm's repository beside the installed timm. Each row of flags trains a small network
on 256 of scikit-learn's digits, on the CPU; printed are the largest difference of the weights after the last epoch and
of the columns of summary.csv, or what a script said when it stopped.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from kd_timm.digits import Digits
from kd_timm.train import main as kd_timm_train

NETWORK = "--model resnet10t --model-kwargs channels=(8,8,16,16) stem_width=8 --img-size 16"
VIT = "--model vit_tiny_patch16_224 --model-kwargs depth=2 patch_size=4 embed_dim=32 num_heads=2"
DEIT = (
    "--model deit_tiny_distilled_patch16_224 --model-kwargs depth=2 embed_dim=48 num_heads=3 img_size=32 --img-size 32"
)
# Its configuration says how images are cropped, which timm's script leaves to the default.
SQUASHED = (
    "--model eva02_base_patch14_448 --model-kwargs depth=1 embed_dim=48 num_heads=2 patch_size=4 img_size=16"
    " --img-size 16"
)
NAFLEX = (
    "--model naflexvit_base_patch16_gap --model-kwargs depth=2 embed_dim=32 num_heads=2 patch_size=4 --img-size 16"
    " --naflex-loader"
)
COMMON = "--device cpu --num-classes 10 -b 64 --workers 0 --epochs 2 --warmup-epochs 0 --lr 0.02 --checkpoint-hist 2"
ROWS = {
    "plain": "",
    "accumulation": "--grad-accum-steps 3 --clip-grad 0.5",
    "workers": "--workers 2 --epochs 3 --reprob 0.3",
    "ema": "--model-ema --model-ema-decay 0.9 --epochs 3",
    "ema-cpu": "--model-ema --model-ema-force-cpu",
    "mixup": "--mixup 0.3 --cutmix 0.5 --mixup-off-epoch 1",
    "no-prefetcher": "--no-prefetcher --reprob 0.3 --mixup 0.3",
    "bce": "--bce-loss --bce-target-thresh 0.2",
    "jsd": "--aug-splits 3 --jsd-loss --split-bn --resplit --reprob 0.5 --aa rand-m9-mstd0.5",
    "amp-bfloat16": "--amp --amp-dtype bfloat16 --img-size 32",
    "amp-float16": "--amp --img-size 32",
    "model-dtype": "--model-dtype bfloat16 --img-size 32",
    "torchscript": "--torchscript",
    "fast-norm": f"{VIT} img_size=16 --img-size 16 --fast-norm",
    "adahessian": "--opt adahessian --lr 0.1",
    "agc": "--clip-grad 0.01 --clip-mode agc --opt nadamw",
    "start-epoch": "--epochs 4 --start-epoch 2",
    "abbreviated": "--drop-p 0.1 --warmup-l 0.001 --mom 0.8",
    "tta": "--tta 2",
    "multi-epochs-loader": "--use-multi-epochs-loader --workers 2 --epochs 3",
    "sizes": "--train-img-sizes 16 24 --train-batch-sizes 64 32 --variable-batch-loss-scale linear",
    "progressive": "--train-img-sizes 16 24 --train-size-schedule progressive --epochs 3",
    "vit": f"{VIT} img_size=16 --img-size 16 --opt adamw --layer-decay 0.7",
    "crop-mode": f"{SQUASHED} --crop-pct 0.8",
    "vit-input-size": f"{VIT} img_size=(16,24) --input-size 3 16 24",
    "naflex": f"{NAFLEX} --naflex-train-seq-lens 16 36 --naflex-max-seq-len 36",
    "naflex-mixup": f"{NAFLEX} --naflex-train-seq-lens 16 36 --naflex-max-seq-len 36 --mixup 0.3",
    "sched-on-updates": "--sched-on-updates --warmup-epochs 1 --opt lamb",
    "lr-base": "--lr-base 0.05 --opt adamw --lr-noise 0.3 0.9",
    "resume": "--resume {checkpoint} --model-ema --model-ema-decay 0.9",
    "no-resume-opt": "--resume {checkpoint} --no-resume-opt --opt adamw",
    "kd-logit": "--kd-model-name {teacher} --kd-temperature 2 --distill-loss-weight 0.7",
    "kd-feature": "--kd-model-name {teacher} --kd-distill-type feature --clip-grad 0.5",
    "kd-token": f"{DEIT} --kd-model-name {{teacher}} --kd-distill-type token",
}


def main(argv: Sequence[str]) -> int:
    """Compares the rows that are named behind the script, by default all."""
    if not argv or not Path(argv[0]).is_file() or set(argv[1:]) - set(ROWS):
        print(f"usage: python -m benchmarks timm_parity path/to/train.py [{' | '.join(ROWS)}]")
        return 2
    script, *names = argv
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_digits(folder / "data")
        teacher = _write_teacher(folder / "teacher")
        print("| flags | weights | metrics |\n|---|---|---|")
        for name in names or ROWS:
            flags = ROWS[name].replace("{teacher}", teacher)
            network = "" if "--model " in flags else NETWORK
            common = f"--data-dir {folder / 'data'} --output {folder} {network} {COMMON}"
            if "{checkpoint}" in flags:
                _apart(_timm, script, f"{common} --experiment begun --model-ema".split())
                flags = flags.replace("{checkpoint}", str(folder / "begun" / "checkpoint-0.pth.tar"))
            argv = f"{common} {flags}".split()
            timms = _apart(_timm, script, [*argv, "--experiment", f"{name}-timm"])
            ours = _apart(_kd_timm, [*argv, "--experiment", f"{name}-ours"])
            said = "; ".join(filter(None, (timms and f"timm: {timms}", ours and f"ours: {ours}")))
            found = said or _differences(folder / f"{name}-timm", folder / f"{name}-ours")
            print(f"| `{ROWS[name] or name}` | {found} |", flush=True)
    return 0


def _timm(script: str, argv: list[str]) -> None:
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def _kd_timm(argv: list[str]) -> None:
    if kd_timm_train(argv):
        raise SystemExit("kd-timm-train refused it")


def _apart(run: Callable[..., None], *args: object) -> str:
    """Runs a function in a process of its own, silently; returns what it stopped with."""
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def child() -> None:
        with tempfile.TemporaryFile("w+") as log:
            sys.stdout = sys.stderr = log
            try:
                run(*args)
                said.put("")
            except BaseException as error:
                log.seek(0)
                told = [line for line in log.read().splitlines() if "error: " in line]
                said.put((told or traceback.format_exception_only(error))[-1].strip()[:200])

    process = context.Process(target=child)
    process.start()
    answer = said.get()
    process.join()
    return answer


def _differences(timms: Path, ours: Path) -> str:
    # Its checkpoints hold the arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs = torch.load(timms / "last.pth.tar", map_location="cpu", weights_only=True)["state_dict"]
    weights = load_file(ours / "state" / "model.safetensors")
    if theirs.keys() != weights.keys():
        return "other names of weights |"
    largest = max(float((theirs[k].double() - weights[k].double()).abs().max()) for k in weights)
    rows = [list(csv.DictReader((folder / "summary.csv").open())) for folder in (timms, ours)]
    values = [(float(a[c]), float(b[c])) for a, b in zip(*rows, strict=True) for c in a]
    return f"{largest:.2g} | {max(abs(a - b) for a, b in values):.2g}"


def _write_digits(folder: Path) -> None:
    for split, rows in (("train", 256), ("validation", 100)):
        digits = Digits(split)
        for row in range(rows):
            image, label = digits[row]
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / str(label) / f"{row}.png")


def _write_teacher(folder: Path) -> str:
    """A teacher as timm finds it by name without a network."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 24), stem_width=8)
    save_for_hf(model, str(folder), model_args={"channels": (8, 8, 16, 24), "stem_width": 8}, safe_serialization=True)
    return f"local-dir:{folder}"
