"""Compositions: one task loss, every part's terms, and parts that cannot share a training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_plugins import (
    Batch,
    Distiller,
    DistillError,
    Needs,
    OptimSpec,
    Reads,
    Stage,
    bind,
    create_distiller,
    make_optimizers,
    play,
)
from kd_plugins import functional as KF
from kd_plugins.binding import schedule
from kd_plugins.catalog.registry import config_of, from_json
from kd_plugins.compose import Composite
from kd_plugins.testing import TinyNet, check_distiller, tiny_batches


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return TinyNet(), TinyNet(6), tiny_batches(1)[0]


class Critic(Distiller):
    """A critic that judges the logits `[B, K]`, 2020."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(4, 1, bias=False)

    def extras(self):
        return {"critic": self.critic}

    def optimizers(self):
        return {"critic": OptimSpec("SGD", lr=0.1)}

    def turns(self, nets, batch):
        s, t = nets.student(batch), nets.teacher(batch)
        with torch.autocast("cpu", enabled=False):
            yield_critic = self.critic(s.logits.detach().float()).mean() - self.critic(t.logits.float()).mean()
        yield {"critic": {"critic": yield_critic}}
        with torch.autocast("cpu", enabled=False):
            fool = -self.critic(s.logits.float()).mean()
        yield {"student": {**self.task(s, batch), "fool": fool}}


class Maps(Distiller):
    """Maps `[B, C, H, W]` by their mean over channels, 2020."""

    task_weight = 0.5

    def needs(self):
        return Needs(Reads(features=("layer1",)), Reads(False, features=("layer1",)))

    def loss(self, student, teacher, batch):
        return {
            "maps": (student.features["layer1"].float().mean(1) - teacher.features["layer1"].float().mean(1))
            .pow(2)
            .mean()
        }


class Twin(Maps):
    """Maps `[B, C, H, W]` once more, 2020."""

    def loss(self, student, teacher, batch):
        return {"maps": 2 * super().loss(student, teacher, batch)["maps"]}


class Dreams(Distiller):
    """Makes its own images `[B, C, H, W]`, 2020."""

    data = False

    def setup(self, nets, batch):
        assert batch.inputs is None
        self.painter = nn.Linear(3, 3 * 12 * 12)

    def extras(self):
        return {"painter": self.painter}

    def turns(self, nets, batch):
        dreamt = batch.with_inputs(self.painter(self.randn(batch.size, 3)).view(-1, *batch.shape))
        t = nets.teacher(dreamt, input_grad=True)
        s = nets.student(dreamt.with_inputs(dreamt.inputs.detach()))
        sure = -t.logits.float().softmax(1).amax(1).mean()
        yield {"painter": {"sure": sure}, "student": {"kd": KF.kd(s.logits, t.logits, 1.0)}}


def staged(name):
    class Staged(Distiller):
        def stages(self):
            return [Stage("a"), Stage("b")]

    Staged.__name__ = name
    return Staged()


def turns_of(distiller, student, teacher, batch):
    return list(distiller.turns(bind(distiller, student, teacher, batch=batch), batch))


def test_a_glob_stands_for_its_own_parts_layers(pair):
    """What another part reads of the same network is none of its business, whatever it is called."""
    student, teacher, batch = pair

    def terms(name, **options):
        nets = bind(method := create_distiller(name, **options), student, teacher, batch=batch, batches=[batch])
        (turn,) = method.turns(nets, batch)
        return turn["student"]

    alone = terms("nst", layers=("layer?",))
    words = {"quest.layers": ("layer1.0",), "quest.words": 4}
    both = terms("nst+quest", **{"nst.layers": ("layer?",), **words})
    torch.testing.assert_close(both["nst"], alone["nst"], rtol=0, atol=0)
    inner = terms("nst+quest", **{"nst.layers": ("layer*",), **words})
    torch.testing.assert_close(inner["nst"], alone["nst"], rtol=0, atol=0)


def test_the_terms_are_those_of_the_parts_over_one_task_loss(pair):
    student, teacher, batch = pair
    both = create_distiller("kd+nst", **{"kd.alpha": 0.75, "kd.temperature": 2.0, "layers": ("layer2",), "weight": 3.0})
    (turn,) = turns_of(both, student, teacher, batch)
    terms = turn["student"]
    assert list(terms) == ["task", "kd", "nst"]
    with torch.no_grad():
        s, t = student(batch.inputs), teacher(batch.inputs)
    torch.testing.assert_close(terms["task"], 0.25 * nn.functional.cross_entropy(s, batch.labels))
    torch.testing.assert_close(terms["kd"], 0.75 * KF.kd(s, t, 2.0))
    maps = [net.layer2(net.layer1(net.conv1(batch.inputs).relu())) for net in (student, teacher)]
    torch.testing.assert_close(terms["nst"], 3.0 * KF.nst(*maps, "poly", c=0.0, d=2, sigma2=None))


def test_one_forward_serves_all_parts(pair):
    student, teacher, batch = pair
    calls = []
    for net in (student, teacher):
        net.register_forward_hook(lambda module, *_: calls.append(module))
    nets = bind(both := create_distiller("kd+nst", layers=("layer1",)), student, teacher, batch=batch)
    calls.clear()
    list(both.turns(nets, batch))
    assert calls == [student, teacher]


def test_equal_names_of_terms_are_kept_apart(pair):
    (turn,) = turns_of(Composite({"one": Maps(), "two": Twin()}), *pair)
    terms = turn["student"]
    assert set(terms) == {"task", "maps", "two_maps"}
    torch.testing.assert_close(terms["two_maps"], 2 * terms["maps"])
    student, _, batch = pair
    torch.testing.assert_close(terms["task"], 0.25 * nn.functional.cross_entropy(student(batch.inputs), batch.labels))


def test_a_part_that_plays_turns_takes_the_others_with_it(pair):
    both = Composite({"critic": Critic(), "maps": Maps()})
    student, _, batch = pair
    assert both.needs().student.logits
    assert both.needs().student.features == ("layer1",)
    first, second = turns_of(both, *pair)
    assert list(first) == ["critic"]
    assert set(second["student"]) == {"task", "fool", "maps"}
    torch.testing.assert_close(
        second["student"]["task"], 0.5 * nn.functional.cross_entropy(student(batch.inputs), batch.labels)
    )


def test_parts_join_a_method_that_makes_its_own_images(pair):
    """They are set up on images of its shape, read those that it made, and leave its terms alone."""
    student, teacher, _ = pair
    batch = Batch(size=8, shape=(3, 12, 12), classes=4)
    parts = {"dreams": Dreams(), "kd": create_distiller("kd", alpha=0.5), "fitnet": create_distiller("fitnet")}
    parts["fitnet"].layers = parts["fitnet"].teacher_layers = ("layer2",)
    asked = []
    student.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    nets = bind(both := Composite(parts), student, teacher, batch=batch)
    both.parts["dreams"].host.seed(1)
    (turn,) = both.turns(nets, batch)
    assert {group: set(terms) for group, terms in turn.items()} == {
        "painter": {"sure"},
        "student": {"kd", "kd_kd", "fitnet"},
    }
    with torch.no_grad():
        s, t = student(asked[-1]), teacher(asked[-1])
    torch.testing.assert_close(turn["student"]["kd"], KF.kd(s, t, 1.0))
    torch.testing.assert_close(turn["student"]["kd_kd"], 0.5 * KF.kd(s, t, 4.0))
    with pytest.raises(DistillError, match="quest looks at the training set before the training and dreams"):
        Composite({"dreams": Dreams(), "quest": create_distiller("quest")})


def test_a_task_loss_that_one_part_switches_off_is_off(pair):
    both = create_distiller("kd+nst", alpha=1.0, layers=("layer1",))
    (turn,) = turns_of(both, *pair)
    assert set(turn["student"]) == {"kd", "nst"}
    lead = Composite({"kd": create_distiller("kd", alpha=1.0), "critic": Critic()})
    assert set(turns_of(lead, *pair)[1]["student"]) == {"fool", "kd"}


def test_compositions_keep_the_contract():
    check_distiller(lambda: Composite({"critic": Critic(), "maps": Maps()}))
    check_distiller(lambda: Composite({"one": Maps(), "two": Twin(), "kd": create_distiller("kd")}))


def test_the_order_of_the_parts_does_not_matter(pair):
    student, teacher, batch = pair
    states = []
    for name in ("kd+nst", "nst+kd"):
        torch.manual_seed(0)
        student = TinyNet()
        distiller = create_distiller(name, layers=("layer2",))
        nets = bind(distiller, student, teacher, batch=batch)
        groups = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.01))
        for turn in distiller.turns(nets, batch):
            play(turn, groups)
        states.append(student.state_dict())
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-7) for k in states[0])


def test_parts_share_progress_and_generators_are_their_own():
    both = Composite({"one": Maps(), "critic": Critic()})
    schedule(both, 10)
    both.progress.at(7)
    assert [part.progress.step for part in both.methods.values()] == [7, 7]
    one, two = both.methods.values()
    one.generator(), two.generator()
    draws = torch.randn(3, generator=one.generator())
    state = one.host.state()
    assert len(state) == 1
    following = torch.randn(3, generator=one.generator())
    one.host.load(state)
    assert torch.equal(torch.randn(3, generator=one.generator()), following)
    assert not torch.equal(draws, following)


def test_an_option_is_set_at_the_part_that_has_it(pair):
    student, teacher, batch = pair
    distiller = create_distiller("kd+nst", layers=("layer1",))
    nets = bind(distiller, student, teacher, batch=batch)
    with pytest.raises(DistillError, match=r"alpha is an option of kd, .*distiller.methods\['kd'\].alpha"):
        distiller.alpha = 0.5
    distiller.methods["kd"].alpha = 0.5
    ((_, terms),) = [item for turn in distiller.turns(nets, batch) for item in turn.items()]
    torch.testing.assert_close(terms["task"], 0.5 * batch.task_loss(nets.student(batch)))
    distiller.note = "of the loop's own"


def test_parts_that_cannot_share_a_training_are_refused():
    with pytest.raises(DistillError, match="one and two both play turns of their own and cannot be combined"):
        Composite({"one": Critic(), "two": Critic()})
    with pytest.raises(DistillError, match="one and two both have stages"):
        Composite({"one": staged("One"), "two": staged("Two")})
    with pytest.raises(DistillError, match="critic plays turns of its own and cannot follow the stages of two"):
        Composite({"critic": Critic(), "two": staged("Two")})
    with pytest.raises(DistillError, match="'kd' twice in 'kd\\+kd'"):
        create_distiller("kd+kd")
    both = Composite({"one": Critic(), "maps": Maps()})
    both.methods["maps"].__dict__["extras"] = lambda: {"critic": nn.Linear(2, 2)}
    with pytest.raises(DistillError, match="one and maps both have the extra group 'critic'"):
        both.extras()


def test_what_a_composition_needs_is_what_its_parts_need():
    class Mutual(Distiller):
        peers, teachers = True, 0
        tasks = ("classification", "multilabel")

    class Refuses(Distiller):
        accumulation = False
        teachers = "many"

    both = Composite({"mutual": Mutual(), "refuses": Refuses()})
    assert both.peers
    assert both.teachers == "many"
    assert not both.accumulation
    assert both.tasks == ("classification",)
    assert both.name == "mutual+refuses"


def test_parts_are_set_up_prepared_and_updated_each():
    class Counts(Maps):
        def __init__(self, log, name):
            super().__init__()
            self.log, self.label = log, name

        def setup(self, nets, batch):
            self.log.append(f"setup {self.label}")

        def after_update(self):
            self.log.append(f"update {self.label}")

    log: list[str] = []
    both = Composite({"a": Counts(log, "a"), "b": Counts(log, "b")})
    batch, student = tiny_batches(1)[0], TinyNet()
    nets = bind(both, student, TinyNet(), batch=batch)
    assert all(part.ready for part in both.methods.values())
    groups = make_optimizers(both, torch.optim.SGD(student.parameters(), lr=0.01))
    for turn in both.turns(nets, batch):
        play(turn, groups)
    assert log == ["setup a", "setup b", "update a", "update b"]


def test_a_composition_survives_json(tmp_path):
    both = create_distiller("kd+nst", **{"kd.temperature": 2.0, "nst.layers": (1, "layer2"), "nst.kernel": "linear"})
    again = from_json(config_of(both))
    assert config_of(again) == config_of(both)
    assert again.name == "kd+nst"
    assert again.methods["nst"].layers == (1, "layer2")


def test_optimizer_overrides_reach_the_part_that_has_the_group(pair):
    both = Composite({"critic": Critic(), "maps": Maps()})
    both.optim_overrides = {"critic": {"lr": 0.7}}
    groups = make_optimizers(both, torch.optim.SGD(pair[0].parameters(), lr=0.1))
    assert groups["critic"].optimizer.param_groups[0]["lr"] == 0.7


def test_states_of_the_parts_are_kept_by_name():
    both = Composite({"critic": Critic(), "maps": Maps()})
    assert set(both.state_dict()) == {"parts.critic.critic.weight"}
