"""AFD: against a loop written by hand, its properties, its networks, and each host."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_kit import fresh_accelerate
from distributed_kit import keep, kept, on_two_processes
from image_kit import Images, image_classifier, image_trainer
from precision_kit import share_of_the_way
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, Reads, bind, create_distiller, make_optimizers, play
from kd_plugins.methods.afd import AFD, sources
from kd_plugins.testing import CLAUSES, TinyNet, check_distiller


class Net(nn.Module):
    """Two layers and a classifier; counts its forwards. `stride` sets the size of the map at `features`."""

    def __init__(self, width: int, seed: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # No bias before a norm: under Adam the rounding of a gradient that is 0 is a step of full size.
            self.stem = nn.Conv2d(3, width, 3, stride, 1, bias=not norm)
            self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
            self.features = nn.Conv2d(width, width, 3, 1, 1, bias=not norm)
            self.head = nn.Linear(width, 4)
        self.calls = 0

    def maps(self, x: Tensor) -> Tensor:
        return self.features(self.norm(self.stem(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.maps(x).relu().mean((2, 3)))


def batches(count: int = 3, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch.of(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def networks(widths: Sequence[int], norm: bool = True) -> list[Net]:
    """Networks whose second has smaller maps."""
    return [Net(w, 10 + k, 2 if k == 1 else 1, norm) for k, w in enumerate(widths)]


RATES = {"features": {"lr": 0.02}, "discriminator": {"lr": 0.01}}


def start(nets: Sequence[nn.Module], *, offline: bool = False, **options: Any) -> tuple[AFD, Any, Any]:
    """A distiller that is set up, the networks, and the optimizers."""
    distiller = AFD(layer="features", **options)
    distiller.optim_overrides = {k: v for k, v in RATES.items() if k in distiller.extras()}
    student, *others = nets
    torch.manual_seed(0)
    given: dict[str, Any] = {"teacher": others[0]} if offline else {"peers": others}
    bound = bind(distiller, student, batch=batches()[0], **given)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    return distiller, bound, make_optimizers(distiller, optimizer, bound)


def train(nets: Sequence[nn.Module], steps: int = 3, **options: Any) -> AFD:
    distiller, bound, groups = start(nets, **options)
    for step in range(steps):
        for turn in distiller.turns(bound, batches()[step % 3]):
            play(turn, groups)
    return distiller


def state(*modules: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for module in modules for value in module.state_dict().values()]


def same(a: Sequence[Tensor], b: Sequence[Tensor], atol: float = 0.0) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a, b, strict=True))


# Values


def divergence(own: Tensor, other: Tensor, t: float) -> Tensor:
    """T^2 KL(softmax(other / T) || softmax(own / T)), written out."""
    p, q = (other.detach() / t).softmax(1), (own / t).softmax(1)
    return t**2 * (p * (p / q).log()).sum(1).mean()


def by_hand(nets: list[Net], distiller: AFD, steps: int, *, offline: bool, temperature: float, of: Any) -> None:
    """The same training in plain torch, from the equations; changes the networks and the distiller's parts."""
    trained = nets[:1] if offline else nets
    transfers, judges = distiller.transfers, distiller.discriminators
    logit = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in trained]
    low = [
        torch.optim.Adam([*n.stem.parameters(), *n.norm.parameters(), *n.features.parameters(), *t.parameters()], 0.02)
        for n, t in zip(trained, transfers, strict=True)
    ]
    critic = [torch.optim.Adam(judge.parameters(), 0.01) for judge in judges]
    if offline:
        nets[1].eval()
    for step in range(steps):
        x, y = batches()[step % 3].inputs, batches()[step % 3].labels
        maps = [net.maps(x) if k < len(trained) else net.maps(x).detach() for k, net in enumerate(nets)]
        logits = [net.head(m.relu().mean((2, 3))) for net, m in zip(nets, maps, strict=True)]
        small = min(m.shape[-1] for m in maps)
        pooled = [F.avg_pool2d(m, m.shape[-1] // small) for m in maps]
        even = [transfers[k](m) if k < len(trained) else m for k, m in enumerate(pooled)]
        for k, judge in enumerate(judges):
            real = [((1 - judge(even[j].detach()).sigmoid()) ** 2).mean() for j in of[k]]
            fake = (judge(even[k].detach()).sigmoid() ** 2).mean()
            critic[k].zero_grad()
            (sum(real) / len(real) + fake).backward()
            critic[k].step()
        gradients = []
        for k in range(len(trained)):
            pulls = [divergence(logits[k], logits[j], temperature) for j in of[k]]
            loss = F.cross_entropy(logits[k], y) + sum(pulls) / len(pulls)
            fool = ((1 - judges[k](even[k]).sigmoid()) ** 2).mean()
            own = list(nets[k].parameters())
            below = low[k].param_groups[0]["params"]
            gradients.append(
                (
                    torch.autograd.grad(fool, below, retain_graph=True),
                    torch.autograd.grad(loss, own, retain_graph=True),
                )
            )
        for k in range(len(trained)):
            for optimizer, parameters, gradient in (
                (low[k], low[k].param_groups[0]["params"], gradients[k][0]),
                (logit[k], list(nets[k].parameters()), gradients[k][1]),
            ):
                for p, g in zip(parameters, gradient, strict=True):
                    p.grad = g
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    ("widths", "offline", "topology", "of"),
    [
        ((4, 4), False, "cycle", [[1], [0]]),
        ((4, 6), False, "cycle", [[1], [0]]),
        ((4, 6, 5), False, "cycle", [[2], [0], [1]]),
        ((4, 6, 5), False, "all", [[1, 2], [0, 2], [0, 1]]),
        ((6, 4), True, "cycle", [[1]]),
    ],
)
def test_equals_a_loop_by_hand(widths, offline, topology, of):
    ours, theirs = networks(widths), networks(widths)
    options = {"temperature": 2.0, "topology": topology, "offline": offline}
    parts, _, _ = start(theirs, **options)
    # Set-up is made the same by the seed alone.
    trained = train(ours, 5, **options)
    by_hand(theirs, parts, 5, offline=offline, temperature=2.0, of=of)
    assert same(state(*ours, *trained.discriminators), state(*theirs, *parts.discriminators), 2e-5)
    assert not same(state(*ours), state(*networks(widths)), 1e-2)
    learned = [list(t.parameters()) for t in trained.transfers]
    assert [bool(t) for t in learned] == [w != (widths[1] if offline else max(widths)) for w in widths[: len(learned)]]


def test_a_cycle_of_two_is_mutual():
    """Everybody learns from the one before; with two networks that is the other one, as in all pairs."""
    for options in ({}, {"discriminators": "one"}, {"feature_loss": "l1"}):
        cycle, pairs, two, three = networks((4, 6)), networks((4, 6)), networks((4, 6, 5)), networks((4, 6, 5))
        parts = [train(nets, topology=t, **options) for nets, t in ((cycle, "cycle"), (pairs, "all"))]
        assert same(state(*cycle, parts[0]), state(*pairs, parts[1]))
        train(two, topology="cycle", **options)
        train(three, topology="all", **options)
        assert not same(state(*two), state(*three), 1e-4)


def test_sources_of_a_cycle_are_a_permutation():
    for k in range(2, 7):
        assert sorted(j for i in range(k) for j in sources(i, k, "cycle")) == list(range(k))
        assert all(i not in sources(i, k, t) for i in range(k) for t in ("cycle", "all"))


def test_losses_are_the_papers():
    nets = networks((4, 4))
    distiller, bound, _ = start(nets)
    batch = batches()[0]
    judged, last = distiller.turns(bound, batch)
    x = batch.inputs
    even = [F.adaptive_avg_pool2d(net.maps(x), 4) for net in nets]
    d = [[judge(m).sigmoid() for m in even] for judge in distiller.discriminators]
    for k, name in enumerate(("student", "peer1")):
        real, fake = d[k][1 - k], d[k][k]
        expected = (1 - real).square().mean() + fake.square().mean()
        torch.testing.assert_close(judged["discriminator"][name], expected)
        torch.testing.assert_close(last["features"][name], (1 - fake).square().mean())
    assert list(last) == ["features", "peer1", "student"]


def test_one_discriminator_tells_the_networks_apart():
    nets = networks((4, 4, 4))
    distiller, bound, _ = start(nets, discriminators="one")
    judged, last = distiller.turns(bound, batches()[0])
    even = [F.adaptive_avg_pool2d(net.maps(batches()[0].inputs), 4) for net in nets]
    (judge,) = distiller.discriminators
    p = [judge(m).softmax(1) for m in even]
    expected = sum(((torch.eye(3)[k] - p[k]) ** 2).sum(1).mean() / 2 for k in range(3))
    torch.testing.assert_close(judged["discriminator"]["which"], expected)
    for k, name in enumerate(("student", "peer1", "peer2")):
        torch.testing.assert_close(last["features"][name], ((1 - p[k][:, (k - 1) % 3]) ** 2).mean())


def test_l1_is_the_distance_of_the_maps():
    nets = networks((4, 4))
    distiller, bound, _ = start(nets, feature_loss="l1")
    (last,) = distiller.turns(bound, batches()[0])
    even = [F.adaptive_avg_pool2d(net.maps(batches()[0].inputs), 4) for net in nets]
    torch.testing.assert_close(last["features"]["student"], (even[0] - even[1]).abs().mean())
    assert len(distiller.discriminators) == 0


def test_each_loss_moves_its_own_part_in_one_forward():
    nets = networks((4, 6))
    distiller, bound, _ = start(nets)
    calls = [net.calls for net in nets]
    judged, last = distiller.turns(bound, batches()[0])
    assert [net.calls for net in nets] == [c + 1 for c in calls]

    def reached(loss: Tensor, module: nn.Module) -> bool:
        found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        return any(g is not None for g in found)

    judge, fool = judged["discriminator"]["student"], last["features"]["student"]
    first, second = distiller.discriminators
    assert reached(judge, first)
    assert not any(reached(judge, module) for module in (*nets, second, distiller.transfers[0]))
    assert reached(fool, nets[0].features)
    assert reached(fool, distiller.transfers[0])
    assert not any(reached(fool, module) for module in (nets[0].head, nets[1], second))
    logits = last["student"]["logits"]
    assert reached(logits, nets[0].head)
    assert not reached(logits, nets[1])
    # Only the turn that the host is given decides what moves: the group of the features holds no discriminator.
    ids = {id(p) for p in first.parameters()}
    assert not ids & {id(p) for group in distiller.shared(bound).values() for p in group}


def test_the_halves_alone():
    batch = batches()[0]
    for options, groups, terms in (
        ({"logit_only": True}, {"peer1", "student"}, {"task", "logits"}),
        ({"adversarial_only": True}, {"discriminator", "features", "peer1", "student"}, {"task"}),
    ):
        distiller, bound, _ = start(networks((4, 4)), **options)
        turns = list(distiller.turns(bound, batch))
        assert {name for turn in turns for name in turn} == groups
        assert set(turns[-1]["student"]) == terms
    distiller, bound, _ = start(networks((4, 4)), offline=True, adversarial_only=True)
    assert not distiller.needs().teacher.logits
    assert distiller.needs().student.logits


def test_logit_only_offline_is_soft_labels():
    ours, theirs = networks((4, 6)), networks((4, 6))
    train(ours, offline=True, logit_only=True, temperature=4.0)
    student, teacher = theirs[0], theirs[1].eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for batch in batches():
        logits = student(batch.inputs)
        loss = F.cross_entropy(logits, batch.labels) + divergence(logits, teacher(batch.inputs), 4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(state(ours[0]), state(student), 1e-6)


def test_features_follow_the_students_learning_rate():
    _, _, groups = start(networks((4, 4)))
    for group in groups.optimizer.param_groups:
        group["lr"] = 0.05
    for name in RATES:
        groups[name].follow(groups.optimizer)
        assert groups[name].optimizer.param_groups[0]["lr"] == RATES[name]["lr"] / 2


def test_options_take_effect_in_the_training():
    distiller, bound, _ = start(networks((4, 6)))
    batch = batches()[0]
    before = list(distiller.turns(bound, batch))[-1]["student"]["logits"]
    distiller.logit_weight = 0.25
    torch.testing.assert_close(list(distiller.turns(bound, batch))[-1]["student"]["logits"], before / 4)
    distiller.adversarial_only = True
    assert set(list(distiller.turns(bound, batch))[-1]["student"]) == {"task"}


# Networks and options


def test_keeps_the_contract_with_a_teacher():
    for options in ({}, {"discriminators": "one", "teacher_layer": "layer1", "layer": "layer2"}):
        assert check_distiller("afd", options={"hidden": 8, **options}, teacher=TinyNet(6), peers=[]) == CLAUSES


@pytest.mark.parametrize("topology", ["cycle", pytest.param("all", marks=pytest.mark.slow)])
def test_keeps_the_contract_with_three_peers(topology):
    torch.manual_seed(1)
    peers = [TinyNet(5), TinyNet(4), TinyNet(3)]
    assert check_distiller("afd", options={"topology": topology, "hidden": 8}, peers=peers) == CLAUSES


def test_with_kd_from_a_teacher():
    torch.manual_seed(0)
    assert check_distiller("kd+afd", options={"hidden": 8}, teacher=TinyNet(6), peers=[TinyNet(5)]) == CLAUSES


def test_beside_peers_it_reads_nothing_of_a_teacher():
    student, peer = networks((4, 6))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    distiller = create_distiller("kd+afd", **{"afd.layer": "features"})
    bind(distiller, student, teacher, peers=[peer], batch=batches()[0])
    assert distiller.needs().teacher == Reads(softened=4.0)  # what kd reads


def test_peers_that_start_nearly_the_same_are_warned_of(caplog):
    student, other = networks((4, 4))
    alike = copy.deepcopy(student)
    nn.init.normal_(alike.head.weight)
    bind(AFD(layer="features"), student, peers=[other], batch=batches()[0])
    assert not caplog.records
    bind(AFD(layer="features"), student, peers=[alike], batch=batches()[0])
    assert "student and peer1 start with the same weights but for" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logit_only": True, "adversarial_only": True}, "nothing to distil"),
        ({"logit_only": True, "feature_loss": "l1"}, "logit_only has no feature loss"),
        ({"logit_only": True, "discriminators": "one"}, "have no discriminators"),
        ({"feature_loss": "l1", "discriminators": "one"}, "have no discriminators"),
        ({"temperature": 0.0}, "temperature"),
        ({"logit_weight": 0.0}, "logit_weight to be float above 0"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(DistillError, match=words):
        create_distiller("afd", **options)


def test_networks_that_do_not_fit():
    student, peer = networks((4, 6))
    batch = batches()[0]
    with pytest.raises(DistillError, match=r"at least one --peer NAME .*or a --teacher NAME"):
        bind(AFD(layer="features"), student)
    with pytest.raises(DistillError, match="needs no teacher, got 1"):
        bind(AFD(layer="features"), student, Net(4, 3), peers=[peer])
    with pytest.raises(DistillError, match="needs one teacher, got 2"):
        bind(AFD(layer="features"), student, [Net(4, 3), Net(4, 4)])
    with pytest.raises(DistillError, match="student and peer1 have the same architecture and weights"):
        bind(AFD(layer="features"), student, peers=[copy.deepcopy(student)], batch=batch)
    with pytest.raises(DistillError, match="one of peer_layers for each of 1 peers"):
        bind(AFD(layer="features", peer_layers=("stem", "stem")), student, peers=[peer], batch=batch)
    with pytest.raises(DistillError, match="teacher_layer is for the offline form"):
        bind(AFD(layer="features", teacher_layer="stem"), student, peers=[peer], batch=batch)
    with pytest.raises(DistillError, match=r"afd without logit_only=true reads maps \[B.*\[6, 4\] at the layer 'head'"):
        bind(AFD(layer="head"), student, peers=[peer], batch=batch)
    other = Net(4, 9)
    other.head = nn.Linear(4, 7)
    with pytest.raises(DistillError, match="logits of the same classes"):
        bind(AFD(layer="features"), student, peers=[other], batch=batch)
    distiller = create_distiller("afd", layer="features", logit_only=True, **{"features.lr": 0.1})
    nets = bind(distiller, student, peers=[peer], batch=batch)
    with pytest.raises(DistillError, match="group 'features', but afd has no extra groups"):
        list(make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets))


def test_peers_of_other_architectures_have_layers_of_their_own():
    class Other(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 5, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))

    torch.manual_seed(0)
    student, peer = Net(4, 1), Other()
    before = state(student, peer)
    distiller = train([student, peer], peer_layers=("1",))
    assert distiller.transfers[0][0].weight.shape[:2] == (5, 4)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(student, peer), strict=True) if a.dim() > 1)


def test_labels_of_several_classes():
    """Multi-label: the others' sigmoids are what is learned."""
    nets = networks((4, 4))
    distiller, bound, _ = start(nets)
    one = batches()[0]
    targets = F.one_hot(one.labels, 4).float()
    batch = Batch.of(
        one.inputs,
        targets,
        task="multilabel",
        criterion=lambda view, labels: F.binary_cross_entropy_with_logits(view.logits, labels),
    )
    *_, last = distiller.turns(bound, batch)
    a, b = (net(one.inputs) for net in nets)
    p, q = (b / 3).sigmoid(), (a / 3).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(last["student"]["logits"], 9 * kl.sum(1).mean())
    torch.testing.assert_close(last["peer1"]["task"], F.binary_cross_entropy_with_logits(b, targets))


# Hosts

DIGITS = [
    *"--device cpu --in-chans 1 --model lenet5_half --epochs 2 --warmup-epochs 0 -b 32 -j 0".split(),
    *"--train-split train[:512] --val-split validation[:100] -vb 100".split(),
    *"--opt adamw --lr 5e-3 --smoothing 0 --hflip 0 --color-jitter 0 --log-interval 1000".split(),
]


def test_by_name_in_kd_timm_train(tmp_path):
    import timm
    from safetensors.torch import load_file

    from kd_timm.arguments import parse_args
    from kd_timm.train import Session

    def run(name: str, *flags: str) -> tuple[Session, dict[str, Any]]:
        session = Session(
            parse_args([*DIGITS, "--distill", "afd", "--output", str(tmp_path), "--experiment", name, *flags])
        )
        return session, session.fit()

    rates = ["--distill-args", "features.lr=1e-3", "discriminator.lr=1e-3"]
    session, results = run("online", "--peer", "lenet5_half", "--peer", "lenet5", *rates)
    assert [peer["model"] for peer in results["peers"]] == ["lenet5_half", "lenet5"]
    assert results["peers"][0]["top1"] > 25
    assert results["evaluation"]["top1"] > 25
    groups = {g.name: g.optimizer.param_groups[0]["lr"] for g in session.distillation.player if g.spec}
    # At the end of the cosine, as a share of the student's rate.
    assert groups["features"] == groups["discriminator"] < 1e-3
    for name, file, classes in (
        ("lenet5_half", "model_best.safetensors", 10),
        ("lenet5", results["peers"][1]["file"], 10),
    ):
        made = timm.create_model(name, in_chans=1, num_classes=classes, checkpoint_path=tmp_path / "online" / file)
        assert load_file(tmp_path / "online" / file).keys() == made.state_dict().keys()
    fresh_accelerate()
    teacher = ["--teacher", "lenet5", "--teacher-checkpoint", str(tmp_path / "online" / results["peers"][1]["file"])]
    session, results = run("offline", *teacher, *rates)
    assert "peers" not in results
    assert results["evaluation"]["top1"] > 25
    assert results["evaluation"]["agreement"] > 10
    assert set(session.distillation.player.groups) == {"features", "discriminator"}


def trainer(folder: Path, **options: Any) -> Any:
    rates = {"layer": "resnet.encoder.stages.1", "features.lr": 1e-3, "discriminator.lr": 1e-3}
    return image_trainer(folder, image_classifier([4, 8], 0), distiller="afd", distiller_args=rates, **options)


def test_in_trainer_with_peers_and_label_smoothing(tmp_path):
    peer = image_classifier([4, 12], 1)
    before = copy.deepcopy(peer)
    host = trainer(tmp_path, peer_models=[peer], label_smoothing_factor=0.2)
    host.train()
    data = Images()
    scores = before.train()(data.images[:8]).logits
    first = host.state.log_history[0]
    # The host's loss is the peers' too.
    expected = F.cross_entropy(scores, data.labels[:8], label_smoothing=0.2).item()
    assert first["distill/peer1/task"] == pytest.approx(expected, abs=1e-5)
    plain = F.cross_entropy(scores, data.labels[:8]).item()
    assert abs(first["distill/peer1/task"] - plain) > 1e-3
    assert {"distill/logits", "distill/features/student", "distill/discriminator/peer1"} <= set(first)
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), peer.parameters(), strict=True))
    host.save_model(str(tmp_path / "saved"))
    loaded = type(peer).from_pretrained(tmp_path / "saved" / "peer1")
    assert same(state(loaded), state(peer))
    assert same(state(type(host.model).from_pretrained(tmp_path / "saved")), state(host.model))


def test_model_init_begins_with_fresh_peers(tmp_path):
    peer = image_classifier([4, 12], 1)
    options = {"layer": "resnet.encoder.stages.1", "features.lr": 1e-3, "discriminator.lr": 1e-3}
    model_init = {"model_init": lambda: image_classifier([4, 8], 0), "peer_models": [peer]}
    host = image_trainer(tmp_path, None, distiller="afd", distiller_args=options, **model_init)
    runs = []
    for _ in range(2):
        host.train()
        runs.append([value.clone() for value in (*state(host.model), *state(peer))])
    assert same(*runs)


def test_in_trainer_with_a_teacher(tmp_path):
    teacher = image_classifier([4, 12], 1)
    before = state(teacher)
    host = trainer(tmp_path, teacher_model=teacher)
    host.train()
    assert same(before, state(teacher))
    assert {"distill/logits", "distill/features/student"} <= set(host.state.log_history[0])
    assert set(host.model.state_dict()) == set(image_classifier([4, 8], 0).state_dict())


def accelerated(folder: Path, processes: int, precision: str = "no") -> list[Tensor]:
    """A short training under Accelerate, with accumulation and clipping, stopped and taken up in the middle."""
    from accelerate import Accelerator

    from kd_accelerate import TurnPlayer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)

    def begin() -> tuple[TurnPlayer, list[Net]]:
        nets = networks((4, 4, 4), norm=False)
        distiller = AFD(layer="features", topology="cycle")
        distiller.optim_overrides = RATES
        torch.manual_seed(0)
        bound = bind(distiller, nets[0], peers=nets[1:], batch=batches(1, 4)[0])
        model, optimizer = accelerator.prepare(nets[0], torch.optim.SGD(nets[0].parameters(), lr=0.1, momentum=0.9))
        bound.student.forward = model
        return TurnPlayer(accelerator, distiller, bound, optimizer, max_grad_norm=0.5), nets

    player, nets = begin()
    for step in range(4):
        if step == 2:
            player.save(folder / "distiller")
            kept = {"model": nets[0].state_dict(), "optimizer": player.optimizer.state_dict()}
            accelerator.wait_for_everyone()
            player, nets = begin()
            nets[0].load_state_dict(kept["model"])
            player.optimizer.load_state_dict(kept["optimizer"])
            player.load(folder / "distiller")
        for half in batches(8, 8)[2 * step : 2 * step + 2]:
            rows = slice(accelerator.process_index, None, processes)
            with accelerator.accumulate(player.model):
                player.step(Batch.of(half.inputs[rows], half.labels[rows]))
    return [value.double() for value in state(*nets, player.distiller)]


def test_bfloat16_goes_the_way_of_float32(tmp_path):
    """It keeps eight bits: the networks end within a fifth of the way that they have gone."""
    begin = [value.double() for value in state(*networks((4, 4, 4), norm=False))]
    exact = accelerated(tmp_path / "float32", 1)
    fresh_accelerate()
    half = accelerated(tmp_path / "bfloat16", 1, "bf16")
    assert 0 < share_of_the_way(begin, exact, half) < 0.2


@pytest.mark.distributed
def test_two_processes_with_accumulation_clipping_and_resume(tmp_path):
    on_two_processes(__file__, str(tmp_path))
    alone = accelerated(tmp_path / "alone", 1)
    for found in kept(tmp_path):
        assert same(found, alone, 1e-5)
    assert not same(alone, [v.double() for v in state(*networks((4, 4, 4), norm=False))], 1e-3)
    saved = json.loads((tmp_path / "distiller" / "distiller.json").read_text())
    assert saved["distiller"] == "afd"


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep(accelerated(Path(sys.argv[1]), 2), sys.argv[1])
