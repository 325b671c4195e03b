"""Distillation of dense prediction: against a loop written by hand, its critic, its tasks, and how it is run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_kit import fresh_accelerate
from distributed_kit import keep, kept, on_two_processes
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, bind, create_distiller, make_optimizers, play
from kd_plugins import functional as KF
from kd_plugins.nn.discriminators import Critic
from kd_plugins.testing import TinyNet, tiny_batches

ALONE = {"pixel": 0.0, "pair": 0.0, "holistic": 0.0}
SMALL = {"critic_width": 2, "layers": ("layer1",)}
# Adam would make steps of full size of what is rounding alone.
PLAIN = {"critic.optimizer": "SGD", "critic.options": {"momentum": 0.5}, "critic.lr": 0.01}


def net(width: int, seed: int) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(width, dense=True)


def train(name: str = "structured", steps: int = 3, student: Any = None, rows: int = 8, **options: Any) -> Any:
    """The distiller and the student after a short training; the terms of every step."""
    distiller = create_distiller(name, **{**(SMALL if name == "structured" else {}), **options})
    student, batches = net(4, 0) if student is None else student, tiny_batches(steps, rows, dense=True)
    torch.manual_seed(0)
    nets = bind(distiller, student, net(6, 1), batch=batches[0])
    optimizers = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), nets)
    terms = []
    for batch in batches:
        for turn in distiller.turns(nets, batch):
            terms.append({name: float(v.detach()) for group in turn.values() for name, v in group.items()})
            play(turn, optimizers)
    return distiller, student, terms


def state(*modules: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for module in modules for value in module.state_dict().values()]


def same(a: Sequence[Tensor], b: Sequence[Tensor], atol: float = 0.0) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a, b, strict=True))


# Values


def test_training_as_written_out() -> None:
    """Plain torch, from the equations, in the released code's order: the critic steps after the student, on the maps
    from before the student's step."""
    weights = {"pixel": 2.0, "pair": 3.0, "holistic": 0.5}
    options = {**weights, "granularity": (4, 3), "neighbours": 5, "penalty": 4.0, **PLAIN}
    distiller, ours, _ = train(**options)
    student, teacher = net(4, 0), net(6, 1).eval()
    torch.manual_seed(0)
    critic = Critic(4, 3, 2)
    steps = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    critic_steps = torch.optim.SGD(critic.parameters(), 0.01, momentum=0.5)
    stream = torch.Generator().manual_seed(0)

    def maps(network: TinyNet, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = network.layer1(network.conv1(x).relu())
        return middle, network.head(network.layer2(middle).movedim(1, -1)).movedim(-1, 1)

    for batch in tiny_batches(3, dense=True):
        (f_s, z_s), (f_t, z_t) = maps(student, batch.inputs), [x.detach() for x in maps(teacher, batch.inputs)]
        q_s, q_t = z_s.softmax(1), z_t.softmax(1)
        kl = (q_t * (q_t.log() - q_s.log())).sum(1)
        loss = F.cross_entropy(z_s, batch.labels) + 2 * kl[:, 1:].mean()  # The first row of labels is ignored.
        loss = loss + 3 * KF.structured_pair(f_s, f_t, (4, 3), 5)
        u = torch.randn(8, generator=stream).mul(0.5**0.5).erf().add(1).div(2).view(-1, 1, 1, 1)
        with torch.nn.utils.parametrize.cached():
            between = (u * q_t + (1 - u) * q_s).detach().requires_grad_()
            judged = critic(q_s.detach(), batch.inputs).mean() - critic(q_t, batch.inputs).mean()
            (slope,) = torch.autograd.grad(critic(between, batch.inputs).sum(), between, create_graph=True)
            judged = judged + 4 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
            loss = loss - 0.5 * critic(q_s, batch.inputs).mean()
        steps.zero_grad()
        loss.backward(retain_graph=True)
        steps.step()
        critic_steps.zero_grad()
        judged.backward()
        critic_steps.step()
    assert same(state(ours), state(student), 1e-5)
    assert same(state(distiller.critic), state(critic), 1e-5)


@pytest.mark.parametrize("term", list(ALONE))
def test_each_term_alone(term: str) -> None:
    distiller, _, terms = train(**{**ALONE, term: 0.5})
    critic = {"wgan_gp"} if term == "holistic" else set()
    assert set(terms[0]) == {"task", term} | critic
    assert set(distiller.extras()) == ({"critic"} if critic else set())
    _, _, twice = train(**{**ALONE, term: 1.0})
    assert twice[0][term] == pytest.approx(2 * terms[0][term], rel=1e-4)


def test_ignored_labels_and_other_sizes() -> None:
    """What the teacher says where the label is ignored reaches no pixel-wise term; its map may have another size."""
    from kd_plugins.reading.view import View

    distiller = create_distiller("structured", pixel=1.0, pair=0.0, holistic=0.0)
    labels = torch.randint(3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[:, :4] = 255
    batch = Batch.of(torch.zeros(2, 3, 8, 8), labels, task="segmentation", ignore_index=255)
    student = torch.randn(2, 3, 4, 4)
    teacher = F.interpolate(torch.randn(2, 3, 2, 2), (8, 8), mode="bilinear")
    value = distiller.loss(View(student), View(teacher), batch)["pixel"]
    smaller = F.interpolate(teacher, (4, 4), mode="bilinear", align_corners=False)
    real = torch.arange(4).ge(2)[None, :, None].expand(2, 4, 4)
    torch.testing.assert_close(value, KF.structured_pixel(student, smaller, mask=real))


def test_depth_has_pairs_and_a_critic() -> None:
    """A network that gives one number for each pixel, without an axis of classes."""

    class Depth(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    student, teacher = (Depth(n, dense=True) for n in (4, 6))
    batch = Batch.of(
        torch.randn(4, 3, 12, 12), torch.rand(4, 6, 6), task="depth", criterion=lambda v, y: F.l1_loss(v.logits, y)
    )
    with pytest.raises(DistillError, match=r"compares class probabilities, .* such as a depth: pixel=0"):
        bind(create_distiller("structured", **SMALL), student, teacher, batch=batch)
    distiller = create_distiller("structured", pixel=0.0, **SMALL)
    nets = bind(distiller, student, teacher, batch=batch)
    (turn,) = distiller.turns(nets, batch)
    given = distiller.critic.eval()(student(batch.inputs).unsqueeze(1), batch.inputs)
    assert turn["student"]["holistic"].item() == pytest.approx(-0.1 * given.mean().item(), rel=1e-2, abs=1e-5)
    maps = [m.layer1(m.conv1(batch.inputs).relu()) for m in (student, teacher)]
    torch.testing.assert_close(turn["student"]["pair"], KF.structured_pair(*maps))
    play(turn, make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1), nets))


def test_a_detector_has_pairs_at_each_level() -> None:
    """It returns its losses and no scores; the levels of its pyramid differ in size, and the teacher's in channels."""

    class Detector(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.p3, self.p4 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            level = self.p3(x)
            return {"classes": self.p4(level).square().mean(), "boxes": level.mean()}

    student, teacher, x = Detector(4), Detector(6), torch.randn(2, 3, 16, 12)
    batch = Batch.of(x, [0, 0], task="detection", criterion=lambda view, _: sum(view.output.values()))
    with pytest.raises(DistillError, match="scores"):
        bind(create_distiller("structured", layers=("p3", "p4")), student, teacher, batch=batch)
    distiller = create_distiller("structured", pixel=0, holistic=0, layers=("p3", "p4"))
    nets = bind(distiller, student, teacher, batch=batch)
    (turn,) = distiller.turns(nets, batch)
    levels = [[m.p3(x), m.p4(m.p3(x))] for m in (student, teacher)]
    expected = sum(KF.structured_pair(a, b) for a, b in zip(*levels, strict=True))
    torch.testing.assert_close(turn["student"]["pair"], expected)


def test_refusals() -> None:
    with pytest.raises(DistillError, match="nothing to distil where pixel, pair, holistic are 0"):
        create_distiller("structured", **ALONE)
    with pytest.raises(DistillError, match="leave one node of the map 12 x 12 at the layer 'layer1'"):
        train(granularity=(12, 12))
    labels = torch.randint(4, (2,))
    batch = Batch.of(torch.randn(2, 3, 12, 12), labels)
    with pytest.raises(DistillError, match=r"maps of scores \[B, K, H, W\] of the same classes"):
        bind(create_distiller("structured", pair=0.0), TinyNet(), TinyNet(), batch=batch)
    maps = [nn.Sequential(nn.Linear(5, 18), nn.Unflatten(1, (2, 3, 3))) for _ in range(2)]
    points = Batch.of(torch.randn(2, 5), torch.zeros(2, 3, 3, dtype=torch.long), task="segmentation")
    with pytest.raises(DistillError, match=r"The critic sees images \[B, C, H, W\], got \[2, 5\]"):
        bind(create_distiller("structured", pair=0.0), *maps, batch=points)


# The critic


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (33, 65), (129, 64)])
def test_critic_takes_any_size(size: tuple[int, int]) -> None:
    """Each example on its own; a second derivative of everything."""
    critic, image = Critic(2, 3, 2).eval(), torch.randn(3, 3, 16, 16)
    x = torch.randn(3, 2, *size).softmax(1)
    found = critic(x, image)
    assert found.shape == (3,)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1:2], critic(x[1:2], image[1:2]))
    assert not torch.allclose(found, critic(x, -image))
    gradients = torch.autograd.grad(KF.wgan_gp(critic, x, x.flip(0), given=image), list(critic.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_critic_is_the_released_one_at_its_sizes() -> None:
    """Maps of 65 x 65 leave one place, of 129 x 129 five by five; the convolutions are those of the released code."""
    critic = Critic(19)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (4, 4)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (19, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 1),
    ]
    for size, places in ((64, 1), (65, 1), (97, 3), (129, 5)):
        assert critic.last(critic.layers(torch.zeros(1, 19, size, size))).shape[2:] == (places, places)


def test_penalty_is_differentiated_twice_through_the_critic() -> None:
    """Spectral normalisation and self-attention, against differences."""
    torch.manual_seed(0)
    critic = Critic(2, 1, 1).double().eval()
    for module in critic.modules():
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.7)
    fake, real = torch.rand(2, 2, 40, 40).double(), torch.rand(2, 2, 40, 40).double()
    image, u = torch.rand(2, 1, 40, 40).double(), torch.tensor([0.3, 0.8])
    for name in ("layers.0.parametrizations.weight.original", "layers.6.query.weight", "layers.9.gamma", "last.weight"):

        def loss(value: Tensor, name: str = name) -> Tensor:
            def judge(x: Tensor, given: Tensor) -> Tensor:
                return torch.func.functional_call(critic, {name: value}, (x, given))

            return KF.wgan_gp(judge, fake, real, given=image, u=u)

        start = critic.get_parameter(name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (start,), atol=1e-6, fast_mode=True)


def test_what_the_critic_sees() -> None:
    """Probabilities beside the image; without it, the raw scores, batch-normalised; large maps averaged down."""
    from kd_plugins.reading.view import View

    scores = View(3 * torch.randn(2, 4, 20, 10))
    conditional, released, small = (
        create_distiller("structured", **options)
        for options in ({}, {"conditional": False}, {"critic_size": 5, "conditional": False})
    )
    assert torch.equal(conditional._judged(scores, scores, Batch())[0], scores.logits.softmax(1))
    assert torch.equal(released._judged(scores, scores, Batch())[1], scores.logits)
    torch.testing.assert_close(small._judged(scores, scores, Batch())[0], F.avg_pool2d(scores.logits, (4, 5)))
    distiller, _, _ = train(conditional=False)
    assert isinstance(distiller.critic.norm, nn.BatchNorm2d)
    assert distiller.critic.layers[0].in_channels == 4


# How it is run


def test_the_critic_is_exact_under_autocast() -> None:
    """Under bfloat16 critic and penalty get the very numbers that float32 gives for the same maps."""
    from kd_plugins.reading.view import View

    batch = tiny_batches(1, dense=True)[0]
    terms = []
    for autocast in (False, True):
        torch.manual_seed(0)
        distiller = create_distiller("structured", pair=0.0, critic_width=2)
        bind(distiller, net(4, 0), net(6, 1), batch=batch)
        views = [View(torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
        views[0]._logits.requires_grad_()

        answers = [lambda _, v=view: v for view in views]
        answers[0].begin = lambda _: None
        nets = SimpleNamespace(student=answers[0], teacher=answers[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (turn,) = distiller.turns(nets, batch)
        given = [*distiller.critic.parameters()]
        critic = torch.autograd.grad(turn["critic"]["wgan_gp"], given, retain_graph=True)
        terms.append(
            [turn["critic"]["wgan_gp"], *critic, *torch.autograd.grad(turn["student"]["holistic"], views[0]._logits)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))


def test_a_compiled_student_learns_the_same() -> None:
    """The gradient penalty is on maps that are detached: nothing that is compiled is differentiated twice."""
    eager, first, _ = train()
    compiled, second, _ = train(student=torch.compile(net(4, 0), backend="aot_eager"))
    assert same(state(first, eager), state(second._orig_mod, compiled), 1e-5)


def accelerated(processes: int, precision: str = "no") -> list[Tensor]:
    from accelerate import Accelerator

    from kd_accelerate import TurnPlayer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    student = net(4, 0)
    distiller = create_distiller("structured", holistic=1.0, **PLAIN, **SMALL)
    torch.manual_seed(0)
    nets = bind(distiller, student, net(6, 1), batch=tiny_batches(1, dense=True)[0])
    model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9))
    nets.student.forward = model
    player = TurnPlayer(accelerator, distiller, nets, optimizer, max_grad_norm=0.5)
    for batch in tiny_batches(4, dense=True):
        each = batch.size // processes
        rows = slice(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        with accelerator.accumulate(model):
            player.step(Batch.of(batch.inputs[rows], batch.labels[rows], task="segmentation"))
    return [value.double() for value in state(student, distiller)]


def test_bfloat16_under_accelerate_is_near() -> None:
    exact = accelerated(1)
    fresh_accelerate()
    half = accelerated(1, "bf16")
    assert same(exact, half, 0.05)
    assert not same(exact, half)


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    """Student and critic end where one process ends: the penalty is taken at the same places of the same lines."""
    on_two_processes(__file__, str(tmp_path))
    alone = accelerated(1)
    for found in kept(tmp_path):
        assert same(found, alone, 1e-5)
    assert not same(alone[:4], [v.double() for v in state(net(4, 0))][:4], 1e-3)


# cwd


def test_cwd_of_scores_and_features() -> None:
    distiller, _, terms = train("cwd", layers=("layer2",), weight=2.0, temperature=3.0)
    assert set(terms[0]) == {"task", "cwd", "cwd_logits"}
    (connector,) = distiller.connectors
    assert connector.weight.shape == (12, 8, 1, 1)
    student, teacher, batch = net(4, 0), net(6, 1), tiny_batches(1, dense=True)[0]
    expected = 3 * KF.cwd(student(batch.inputs), teacher(batch.inputs), 3.0)
    assert terms[0]["cwd_logits"] == pytest.approx(expected.item(), rel=1e-2)
    with pytest.raises(DistillError, match="no map to compare"):
        create_distiller("cwd", logit_weight=0.0)
    with pytest.raises(DistillError, match="cwd compares maps of scores"):
        bind(create_distiller("cwd"), TinyNet(), copy.deepcopy(TinyNet()), batch=tiny_batches(1)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep(accelerated(2), sys.argv[1])
