"""Groups of parameters: who moves what, with which optimizer, and what a turn may hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_plugins import Batch, Distiller, DistillError, OptimSpec, Run, bind, create_distiller, make_optimizers, play
from kd_plugins.groups import largest, like, like_student
from kd_plugins.testing import TinyNet, tiny_batches


class Parts(Distiller):
    """A connector of its own and a critic; the turns are given."""

    def __init__(self, turn=None) -> None:
        super().__init__()
        self.connector = nn.Linear(4, 4)
        self.critic = nn.Linear(4, 1)
        self.specs = {"critic": OptimSpec("SGD", lr=0.5)}
        self.turn = turn

    def extras(self):
        return {"critic": self.critic}

    def optimizers(self):
        return self.specs

    def turns(self, nets, batch):
        s, t = nets.student(batch).logits, nets.teacher(batch).logits
        yield from self.turn(self, s, t, batch)


def joint(self, s, t, batch):
    """One graph for both groups: both losses reach student, connector and critic."""
    loss = self.critic(self.connector(s)).mean()
    yield {"critic": {"critic": loss - self.critic(t).mean()}, "student": {"pull": -loss, "l2": (s - t).pow(2).mean()}}


def start(distiller, *, optimizer=None, nets=True):
    torch.manual_seed(0)
    student, teacher = TinyNet(), TinyNet(6)
    batch = tiny_batches(1)[0]
    bound = bind(distiller, student, teacher, batch=batch)
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.1)
    return student, bound, Run(distiller, optimizer, bound if nets else None), batch


def test_a_turn_is_played_as_one_would_by_hand():
    distiller = Parts(joint)
    student, nets, groups, batch = start(distiller)
    s, t = nets.student(batch).logits, nets.teacher(batch).logits
    turn = next(joint(distiller, s, t, batch))
    critic = torch.autograd.grad(turn["critic"]["critic"], list(distiller.critic.parameters()), retain_graph=True)
    loss = turn["student"]["pull"] + turn["student"]["l2"]
    ours = [*student.parameters(), *distiller.connector.parameters()]
    expected = [p - 0.1 * g for p, g in zip(ours, torch.autograd.grad(loss, ours), strict=True)]
    # Both gradients are those of the weights before either update.
    expected += [p - 0.5 * g for p, g in zip(distiller.critic.parameters(), critic, strict=True)]
    for turn in distiller.turns(nets, batch):
        play(turn, groups)
    moved = [*ours, *distiller.critic.parameters()]
    assert all(torch.allclose(p, e, rtol=0, atol=1e-7) for p, e in zip(moved, expected, strict=True))
    assert all(p.grad is None for p in moved)
    assert distiller.progress.step == 1


def test_each_group_gets_only_its_own_gradient():
    def turn(self, s, t, batch):
        yield {"critic": {"critic": self.critic(self.connector(s)).mean()}}
        yield {"student": {"l2": (s - t).pow(2).mean()}}

    distiller = Parts(turn)
    student, nets, groups, batch = start(distiller)
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    turns = distiller.turns(nets, batch)
    play(next(turns), groups)
    assert all(torch.equal(v, weights[k]) for k, v in student.state_dict().items())
    assert not torch.equal(distiller.critic.weight, before["critic.weight"])
    after = distiller.critic.weight.clone()
    play(next(turns), groups)
    assert torch.equal(distiller.critic.weight, after)
    assert torch.equal(distiller.connector.weight, before["connector.weight"])


def test_what_follows_a_yield_sees_the_updated_weights():
    seen = []

    def turn(self, s, t, batch):
        before = self.critic(t).mean()
        yield {"critic": {"critic": before}}
        seen.append((before.item(), self.critic(t).mean().item()))
        yield {"student": {"task": s.mean()}}

    distiller = Parts(turn)
    _, nets, groups, batch = start(distiller)
    for turn in distiller.turns(nets, batch):
        play(turn, groups)
    assert seen[0][1] < seen[0][0]


def test_own_parts_follow_the_students_optimizer_and_curve():
    distiller = Parts(joint)
    student = TinyNet()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.3, betas=(0.5, 0.7))
    groups = make_optimizers(distiller, optimizer)
    own = groups.own.optimizer
    assert type(own) is torch.optim.AdamW
    assert {k: own.param_groups[0][k] for k in ("lr", "weight_decay", "betas")} == {
        "lr": 0.1,
        "weight_decay": 0.3,
        "betas": (0.5, 0.7),
    }
    assert {id(p) for p in groups.own.parameters} == {id(p) for p in distiller.connector.parameters()}
    optimizer.param_groups[0]["lr"] = 0.01
    groups.own.follow(optimizer)
    assert own.param_groups[0]["lr"] == 0.01
    assert {id(p) for p in groups.student} == {id(p) for p in student.parameters()}
    no_parts = make_optimizers(create_distiller("kd"), optimizer)
    assert no_parts.own is None
    assert not list(no_parts)


@pytest.mark.parametrize(("schedule", "rate"), [("constant", 0.5), ("student", 0.05)])
def test_extra_groups_keep_their_rate_or_follow_the_students_curve(schedule, rate):
    distiller = Parts(joint)
    distiller.specs = {"critic": OptimSpec("SGD", lr=0.5, schedule=schedule)}
    optimizer = torch.optim.SGD(TinyNet().parameters(), lr=0.1)
    groups = make_optimizers(distiller, optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    groups["critic"].follow(optimizer)
    assert groups["critic"].optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_group_is_clipped_by_its_own_norm():
    def turn(self, s, t, batch):
        yield {"critic": {"large": 1e4 * self.critic(t).mean()}}
        yield {"student": {"task": s.mean()}}

    distiller = Parts(turn)
    distiller.specs = {"critic": OptimSpec("SGD", lr=1.0, clip=0.25)}
    _, nets, groups, batch = start(distiller)
    before = [p.clone() for p in distiller.critic.parameters()]
    for turn in distiller.turns(nets, batch):
        play(turn, groups)
    moved = torch.cat([(p - b).flatten() for p, b in zip(distiller.critic.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.25, rel=1e-4)


def test_users_override_the_optimizer_of_a_group():
    distiller = Parts(joint)
    distiller.optim_overrides = {"critic": {"lr": 0.25, "optimizer": "RMSprop", "options": {"alpha": 0.5}}}
    group = make_optimizers(distiller, torch.optim.SGD(TinyNet().parameters(), lr=0.1))["critic"]
    assert type(group.optimizer) is torch.optim.RMSprop
    assert (group.optimizer.param_groups[0]["lr"], group.optimizer.param_groups[0]["alpha"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"critics": {"lr": 1.0}}, r"group 'critics', but parts has \['critic'\]\. Did you mean critic\?"),
        ({"critic": {"rate": 1.0}}, "group 'critic' has no option 'rate'; it has optimizer, lr"),
        ({"critic": {"optimizer": "Adaam"}}, r"name of an optimizer in torch\.optim, got 'Adaam'\. Did you mean Adam"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    distiller = Parts(joint)
    distiller.optim_overrides = overrides
    with pytest.raises(DistillError, match=message):
        list(make_optimizers(distiller, torch.optim.SGD(TinyNet().parameters(), lr=0.1)))


def test_wrong_turns_are_refused():
    def unknown(self, s, t, batch):
        yield {"critik": {"x": s.mean()}, "student": {"x": s.mean()}}

    def empty(self, s, t, batch):
        yield {"student": {}}

    for turns, message in (
        (unknown, "group 'critik', but its groups are .*Did you mean critic"),
        (empty, "no loss terms"),
    ):
        distiller = Parts(turns)
        _, nets, groups, batch = start(distiller)
        with pytest.raises(DistillError, match=message):
            play(next(distiller.turns(nets, batch)), groups)


def test_parts_in_the_students_optimizer_are_refused():
    distiller = Parts(joint)
    parameters = [*TinyNet().parameters(), *distiller.connector.parameters()]
    with pytest.raises(DistillError, match="Parts of the distiller are in the student's optimizer"):
        _ = make_optimizers(distiller, torch.optim.SGD(parameters, lr=0.1)).own


def test_shared_groups_move_parameters_of_a_network_beside_its_own_updates():
    class Shares(Parts):
        def shared(self, nets):
            return {"features": list(nets.student.module.layer1.parameters())}

        def optimizers(self):
            return {"critic": OptimSpec("SGD", lr=0.0), "features": OptimSpec("SGD", lr=1.0)}

    def turn(self, s, t, batch):
        yield {"features": {"logits": s.sum()}, "student": {"nothing": 0 * s.sum()}}

    distiller = Shares(turn)
    student, nets, groups, batch = start(distiller)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    for turn in distiller.turns(nets, batch):
        play(turn, groups)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"layer1.0.weight", "layer1.0.bias"}
    with pytest.raises(DistillError, match=r"shares parameters of a network: make_optimizers\(..., nets=nets\)"):
        list(Run(Shares(turn), torch.optim.SGD(student.parameters(), lr=0.1)))


def test_peers_have_optimizers_like_the_students():
    class Mutual(Distiller):
        teachers, peers = 0, True

        def turns(self, nets, batch):
            s, p = (peer(batch) for peer in nets.peers)
            yield {"peer1": {"task": batch.task_loss(p)}, "student": {"task": batch.task_loss(s)}}

    distiller, student, peer = Mutual(), TinyNet(), TinyNet(5)
    nets = bind(distiller, student, peers=[peer])
    groups = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.5), nets)
    batch = tiny_batches(1)[0]
    loss = batch.task_loss(nets.peers[1](batch))
    expected = [
        p - 0.1 * g for p, g in zip(peer.parameters(), torch.autograd.grad(loss, list(peer.parameters())), strict=True)
    ]
    for turn in distiller.turns(nets, batch):
        play(turn, groups)
    assert groups["peer1"].optimizer.param_groups[0]["momentum"] == 0.5
    assert all(torch.allclose(p, e, rtol=0, atol=1e-7) for p, e in zip(peer.parameters(), expected, strict=True))


def test_frozen_parts_of_the_student_stay_out():
    student = TinyNet()
    student.conv1.requires_grad_(False)
    distiller = create_distiller("kd")
    nets = bind(distiller, student, TinyNet(6))
    groups = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.1))
    before = student.conv1.weight.clone()
    for turn in distiller.turns(nets, tiny_batches(1)[0]):
        play(turn, groups)
    assert torch.equal(student.conv1.weight, before)


def test_frozen_parts_of_a_critic_stay_out():
    distiller = Parts(joint)
    distiller.critic.bias.requires_grad_(False)
    student, nets, run, batch = start(distiller)
    weight, bias, (before,) = distiller.critic.weight, distiller.critic.bias, [distiller.critic.bias.clone()]
    with torch.no_grad():
        real, fake = (nets.teacher(batch).logits, distiller.connector(student(batch.inputs)))
        expected = weight - 0.5 * (fake - real).mean(0)
    run.step(batch)
    assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.equal(bias, before)


@pytest.mark.parametrize(
    "cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_an_optimizer_is_made_like_another(cls):
    net = TinyNet()
    first = cls(net.parameters(), lr=0.03, weight_decay=0.01)
    second = like(first, {0: list(TinyNet().parameters())})
    a, b = (
        {k: v for k, v in o.param_groups[0].items() if k not in ("params", "initial_lr", "follows")}
        for o in (first, second)
    )
    assert a == b


def test_own_parts_take_the_hyper_parameters_of_the_largest_group() -> None:
    weight, bias, own = (nn.Parameter(torch.zeros(n)) for n in (8, 2, 4))
    optimizer = torch.optim.SGD(
        [{"params": [bias], "weight_decay": 0.0}, {"params": [weight]}], lr=0.1, weight_decay=0.3
    )
    assert largest(optimizer) == 1
    assert like(optimizer, {1: [own]}).param_groups[0]["weight_decay"] == 0.3


def test_a_peer_is_left_to_the_fallback_where_the_student_is():
    """timm's Muon trains the parameters of such groups with AdamW; a group's mark is none of its defaults."""
    optim = pytest.importorskip("timm.optim")
    student, peer = TinyNet(), TinyNet()
    first = optim.create_optimizer_v2(student, "muon", lr=0.1, weight_decay=0.1, fallback_list=["head.weight"])
    second = like(first, like_student(first, student, peer))

    def fallen(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        marked = {id(p) for g in optimizer.param_groups if g.get("use_fallback") for p in g["params"]}
        return [name for name, p in net.named_parameters() if id(p) in marked]

    assert fallen(peer, second) == fallen(student, first) == ["head.weight"]


class Averaging(torch.optim.SGD):
    """Counts its steps under a name that is a default and no argument."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.defaults["k"] = 0
        for group in self.param_groups:
            group.setdefault("k", 0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
        return super().step(closure)


@pytest.mark.parametrize("counter", ["k", "step"])
def test_what_an_optimizer_has_counted_begins_anew_in_another(counter) -> None:
    """A count corrects the bias of averages that the other has not: a second training makes it of a used optimizer."""
    cls = Averaging if counter == "k" else pytest.importorskip("timm.optim").Adan
    net, other = TinyNet(), TinyNet()
    first = cls(net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    first.step()
    assert first.param_groups[0][counter] == 2
    second = like(first, {0: list(other.parameters())})
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    second.step()
    assert second.param_groups[0][counter] == 1


class Parted(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


def test_a_peers_parameters_are_treated_as_the_students():
    """By name where the student has it, else by kind; here weight decay spares vectors, the head has its own rate."""

    def net(width: int, deep: bool = False) -> nn.Module:
        body = [nn.Linear(4, width), nn.LayerNorm(width), *([nn.Linear(width, width)] if deep else [])]
        return Parted(nn.Sequential(*body), nn.Linear(width, 2))

    student, peer = net(8), net(6, deep=True)
    vectors = [p for p in student.parameters() if p.dim() == 1 and p is not student.head.bias]
    groups = [
        {"params": [student.body[0].weight]},
        {"params": vectors, "weight_decay": 0.0},
        {"params": list(student.head.parameters()), "lr": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)
    split = like_student(optimizer, student, peer)
    names = {id(p): name for name, p in peer.named_parameters()}
    found = {number: sorted(names[id(p)] for p in part) for number, part in split.items()}
    assert found == {
        0: ["body.0.weight", "body.2.weight"],
        1: ["body.0.bias", "body.1.bias", "body.1.weight", "body.2.bias"],
        2: ["head.bias", "head.weight"],
    }
    distiller = create_distiller("afd", logit_only=True)
    made = Run(distiller, optimizer, bind(distiller, student, peers=[peer], batch=Batch(torch.zeros(2, 4))))["peer1"]
    rates = {group["follows"]: (group["lr"], group["weight_decay"]) for group in made.optimizer.param_groups}
    assert rates == {0: (0.1, 0.3), 1: (0.1, 0.0), 2: (0.5, 0.3)}
    for group, lr in zip(optimizer.param_groups, (0.01, 0.02, 0.03), strict=True):
        group["lr"] = lr
    made.follow(optimizer)
    assert {g["follows"]: g["lr"] for g in made.optimizer.param_groups} == {0: 0.01, 1: 0.02, 2: 0.03}


def test_an_optimizer_of_other_things_than_parameters_is_refused():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults

    student = TinyNet()
    optimizer = Lookahead(torch.optim.SGD(student.parameters(), lr=0.1))
    with pytest.raises(DistillError, match="a Lookahead cannot be made of parameters alone"):
        like(optimizer, {0: list(TinyNet().parameters())})
