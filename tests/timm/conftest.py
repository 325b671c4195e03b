"""Runs kd-timm-train in this process on small pieces of the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate_kit import fresh_accelerate

TINY = [
    *"--model resnet10t --model-kwargs channels=(8,8,16,16) stem_width=8".split(),
    *"--device cpu -b 16 --workers 0 --epochs 2".split(),
    *"--warmup-epochs 0 --lr 0.02 --hflip 0 --color-jitter 0 --scale 0.8 1 --img-size 16 --log-interval 10".split(),
]


@pytest.fixture
def tiny() -> list[str]:
    """Flags of a run that takes a second."""
    return list(TINY)


@pytest.fixture(autouse=True)
def _seeded():
    yield
    torch.manual_seed(0)


@pytest.fixture
def few_digits(monkeypatch):
    """Leaves 64 training and 26 evaluation images, so that an epoch takes four steps of 16."""
    from kd_timm import data
    from kd_timm.digits import Digits

    class Few(Digits):
        evaluated = 26

        def __init__(self, split: str = "train", mode: str = "RGB", transform=None) -> None:
            super().__init__(split, mode, transform)
            rows = 64 if split == "train" else self.evaluated
            self.images, self.targets = self.images[:rows], self.targets[:rows]

    monkeypatch.setattr(data, "Digits", Few)


@pytest.fixture
def stopped(run, monkeypatch):
    """Trains until a signal comes in the n-th step."""
    import signal

    from kd_accelerate.command import Stopped, signals
    from kd_timm import engine

    def go(step: int, *flags: str, name: str) -> None:
        play, calls = engine.PlainStep.__call__, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == step:
                signals.asked = int(signal.SIGTERM)
            return play(*args)

        with monkeypatch.context() as patch:
            patch.setattr(engine.PlainStep, "__call__", interrupted)
            with pytest.raises(Stopped):
                run(*flags, name=name)
        signals.asked = 0

    return go


@pytest.fixture
def run(tmp_path: Path, few_digits):
    """Trains with the tiny settings and returns the session; later flags win."""
    from kd_timm.arguments import parse_args
    from kd_timm.train import Session

    def go(*extra: str, name: str = "run"):
        fresh_accelerate()
        session = Session(parse_args([*TINY, "--output", str(tmp_path), "--experiment", name, *extra]))
        session.results = session.fit()
        return session

    return go
