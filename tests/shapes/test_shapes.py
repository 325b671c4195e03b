"""Every shape of distiller in every host: one process and two, accumulation, mixed precision, resume."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed_kit import torchrun
from safetensors.torch import load_file
from shapes.base import Host, Job
from shapes.distillers import SHAPES
from shapes.hosts import HOSTS, finished, run
from shapes.nets import EPOCH, ROWS, TinyNet, networks
from shapes.references import REFERENCES, first_step_of_distilling
from torch import Tensor

from kd_plugins import DistillError, bind

STEPS = 3 * EPOCH
WITHIN = EPOCH - 1
OTHERS = [name for name in HOSTS if name != "bare"]
fits = [(host, shape) for host in OTHERS for shape in SHAPES if HOSTS[host].fits(shape)]
everywhere = pytest.mark.parametrize(("host", "shape"), fits)


@pytest.fixture(autouse=True)
def _fresh():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two runs' weights, which must have the same names and be finite."""
    assert a.keys() == b.keys()
    assert all(bool(value.isfinite().all()) for value in [*a.values(), *b.values()])
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.fixture
def start(tmp_path):
    """Makes a run that has not begun."""

    def make(host: str, shape: str, **job: Any) -> Host:
        return HOSTS[host](Job(shape, **job), tmp_path)

    return make


@lru_cache(maxsize=256)
def once(host: str, shape: str, accumulation: int = 1, precision: str = "no", decay: bool = False) -> dict[str, Tensor]:
    """A run that several tests look at."""
    return run(host, shape, accumulation=accumulation, precision=precision, decay=decay)


@lru_cache
def by_hand(shape: str, accumulation: int = 1, **options: Any) -> dict[str, Tensor]:
    """A run of plain torch that several tests look at."""
    return REFERENCES[shape](STEPS, accumulation, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_is_trained(shape, start):
    before, after = start("bare", shape).result(), once("bare", shape)
    still = [key for key in before if float((before[key] - after[key]).abs().max()) < 1e-4]
    # A codebook is made before; a difference of two means of scores does not see the critic's last bias.
    rest = {"codebook": ["distiller.codebook", "distiller.counts"], "wasserstein": ["distiller.critic.judge.bias"]}
    assert still == rest.get(shape, [])


@everywhere
def test_hosts_agree(host, shape):
    assert distance(once(host, shape), once("bare", shape)) <= 1e-6


@pytest.mark.parametrize("shape", REFERENCES)
def test_bare_loop_by_hand(shape):
    assert distance(once("bare", shape), by_hand(shape)) <= 1e-6


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("shape", REFERENCES)
def test_accumulation_by_hand(host, shape):
    expected = by_hand(shape, 2)
    assert distance(once(host, shape, 2), expected) <= 1e-6
    if shape != "own":
        assert distance(once(host, shape, 1), expected) > 1e-3


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("shape", ["own", "progressive", "ensemble", "codebook"])
def test_accumulation_changes_nothing_without_auxiliary_turns(host, shape):
    assert distance(once(host, shape, 2), once(host, shape, 1)) <= 1e-6


@pytest.mark.parametrize(("host", "shape"), [(h, s) for h, s in fits if h != "accelerate"])
def test_hosts_agree_on_accumulation(host, shape):
    assert distance(once(host, shape, 2), once("accelerate", shape, 2)) <= 1e-6


@pytest.mark.parametrize("host", OTHERS)
def test_own_parts_are_clipped_with_the_student(host):
    expected = by_hand("own", 2, clip=0.3)
    assert distance(expected, by_hand("own", 2)) > 1e-2
    assert distance(run(host, "own", accumulation=2, clip=0.3), expected) <= 1e-6


@pytest.mark.parametrize("host", OTHERS)
def test_every_peer_is_clipped_by_itself(host):
    expected = by_hand("online", 2, clip=0.1)
    assert distance(expected, by_hand("online", 2)) > 1e-2
    assert distance(run(host, "online", accumulation=2, clip=0.1), expected) <= 1e-6


@pytest.mark.parametrize("host", ["bare", *OTHERS])
def test_own_parts_follow_the_learning_rate(host):
    assert distance(run(host, "own", decay=True), by_hand("own", decay=True)) <= 1e-6


@pytest.mark.parametrize("host", OTHERS)
def test_peers_and_shared_groups_follow_the_learning_rate(host):
    curved = once("bare", "online", decay=True)
    assert distance(curved, once("bare", "online")) > 1e-2
    assert distance(run(host, "online", decay=True), curved) <= 1e-6


# A host's autocast is one for all shapes; of each kind of turn there is one.
@pytest.mark.parametrize(
    ("host", "shape"), [(h, s) for h, s in fits if h == "accelerate" or s in ("own", "online", "wasserstein", "search")]
)
def test_bf16(host, shape):
    half = once(host, shape, precision="bf16")
    assert distance(half, once("bare", shape, precision="bf16")) <= 1e-2
    assert distance(half, once(host, shape)) > 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_fp16_scales_and_unscales_every_group_by_itself(shape):
    scaler = torch.amp.GradScaler
    with mock.patch("torch.amp.GradScaler", lambda device: scaler(device, init_scale=2.0**8)):
        made = finished("accelerate", shape, precision="fp16")
    assert made.accelerator.native_amp
    assert made.accelerator.scaler.get_scale() == 2**8
    assert {name: s.get_scale() for name, s in made.player._scalers.items()} == {
        group.name: 2**8 for group in made.player if group.name != "own"
    }
    assert 1e-6 < distance(made.result(), once("accelerate", shape)) <= 2e-2


@pytest.mark.parametrize("shape", ["own", "online", "wasserstein"])
def test_fp16_overflow_skips_updates_until_the_scale_fits(shape, start):
    scaler = torch.amp.GradScaler
    with mock.patch("torch.amp.GradScaler", lambda device: scaler(device, init_scale=2.0**34)):
        made = finished("accelerate", shape, precision="fp16", steps=30)
    before, after = start("bare", shape).result(), made.result()
    assert made.accelerator.scaler.get_scale() < 2**34
    assert distance(before, after) > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at", [WITHIN, 2 * EPOCH])
def test_resume_in_a_bare_loop(shape, at):
    assert distance(run("bare", shape, resume_at=at), once("bare", shape)) == 0.0


@pytest.mark.parametrize(
    ("host", "shape", "at"),
    [(h, s, at) for h, s in fits for at in ((2 * EPOCH,) if HOSTS[h].epochs else (WITHIN, 2 * EPOCH + 2))]
    + [(h, s, 2 * EPOCH) for h, s in fits if s in ("search", "progressive") and not HOSTS[h].epochs],
)
def test_resume(host, shape, at):
    assert distance(run(host, shape, resume_at=at), once(host, shape)) == 0.0


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("shape", ["own", "online", "search", "wasserstein"])
def test_resume_under_accumulation(host, shape):
    at = 2 * EPOCH if HOSTS[host].epochs else EPOCH + 2
    assert distance(run(host, shape, resume_at=at, accumulation=2), once(host, shape, 2)) == 0.0


@pytest.mark.parametrize("host", ["bare", *OTHERS])
def test_resume_takes_up_the_own_random_stream(host):
    options = {"own_stream": True}
    whole = run(host, "noisy", options=options)
    assert distance(whole, once(host, "noisy")) > 1e-3
    assert distance(run(host, "noisy", options=options, resume_at=EPOCH), whole) == 0.0


def test_resume_under_fp16_keeps_the_scalers():
    whole = run("accelerate", "online", precision="fp16")
    assert distance(run("accelerate", "online", precision="fp16", resume_at=WITHIN), whole) == 0.0


@pytest.mark.parametrize("host", ["bare", *OTHERS])
def test_no_network_runs_deeper_than_its_stage(host, start):
    """Stages of 1 : 1 : 2 over four epochs; layer3 runs in the last alone, layer2 not in the first."""
    made = start(host, "progressive", steps=4 * EPOCH)
    deep = made.calls()
    made.train(4 * EPOCH)
    calls = {key: n - deep[key] for key, n in made.calls().items()}
    # Hosts that set up when the training starts ask every network once, down to layer2.
    extra = calls["student.layer1"] - 4 * EPOCH
    assert extra in (0, 1)
    # Trainer asks a teacher whether it takes the images.
    asked = {"student": 0, "teacher": int(host == "trainer")}
    assert calls == {
        f"{net}.layer{i}": n * EPOCH + (extra if i < 3 else 0) + asked[net]
        for net in asked
        for i, n in ((1, 4), (2, 3), (3, 2))
    }


def test_dropped_terms_leave_no_trace(start):
    """In a stage the other stages' connectors rest, momentum and all."""
    made = start("bare", "progressive", steps=4 * EPOCH)
    first = made.result()
    made.train(EPOCH)
    second = made.result()
    made.train(4 * EPOCH)
    third = made.result()
    rests = lambda a, b, key: bool((a[key] == b[key]).all())  # noqa: E731
    assert rests(first, second, "distiller.connectors.layer2.weight")
    assert not rests(first, second, "distiller.connectors.layer1.weight")
    assert rests(second, third, "distiller.connectors.layer1.weight")
    assert rests(first, second, "student.layer2.0.weight")
    assert rests(first, second, "student.head.weight")


@pytest.mark.parametrize("host", ["bare", *OTHERS])
def test_streams_are_disjoint_and_whole(host):
    held_out, warm, rest, whole = once(host, "search")["distiller.seen"].bool()
    assert int(warm.sum()) == int(whole.sum()) == ROWS
    assert int(held_out.sum()) == int(rest.sum()) == ROWS // 2
    assert not bool((held_out & rest).any())


@pytest.mark.parametrize("host", ["bare", *OTHERS])
def test_a_stage_begins_with_a_fresh_student_and_no_momentum(host, start):
    made = start(host, "search")
    made.train(2 * EPOCH + 1)
    trained = made.result()
    beta = trained["distiller.mixture.beta"]
    assert float(beta.abs().max()) > 1e-2
    expected = first_step_of_distilling(beta.float())
    assert distance({key: trained[key] for key in expected}, expected) <= 1e-6


def test_a_method_that_looks_at_the_data_first_gets_to_see_it():
    student, teachers, _ = networks(TinyNet, 1, False)
    with pytest.raises(DistillError, match=r"codebook looks at the training set before the training.*batches="):
        bind(SHAPES["codebook"](), student, teachers)


def test_trainer_refuses_what_needs_no_data(start):
    with pytest.raises(DistillError, match=r"makes its own data and Trainer needs a data set.*kd-timm-train"):
        start("trainer", "data_free")


# Two processes

# A run that is resumed, or accumulates, is also whole and updates.
FURTHER = {
    "online": {"accumulation": 2},
    "wasserstein": {"accumulation": 2},
    "search": {"resume_at": 2 * EPOCH},
    "noisy": {"resume_at": EPOCH},
}
JOBS = {f"{host}_{shape}": {"host": host, "shape": shape, **FURTHER.get(shape, {})} for host, shape in fits}
# kd-timm-train seeds every process differently by itself.
JOBS["accelerate_noisy_seeds"] = {"host": "accelerate", "shape": "noisy", "rank_seeds": True}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of all jobs on two processes, by job and rank, and what they have said."""
    folder: Path = tmp_path_factory.mktemp("two")
    said = torchrun(str(Path(__file__).with_name("worker.py")), str(folder), json.dumps(JOBS), timeout=600)
    files = {name: [folder / f"{name}_{rank}" for rank in range(2)] for name in JOBS}
    found = {name: [load_file(f) for f in each] for name, each in files.items() if all(f.is_file() for f in each)}
    return found, said[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_are_one(job, two_processes):
    found, errors = two_processes
    assert job in found, errors
    first, second = found[job]
    assert distance(first, second) == 0.0
    given = JOBS[job]
    assert distance(first, once(given["host"], given["shape"], given.get("accumulation", 1))) <= 1e-5
