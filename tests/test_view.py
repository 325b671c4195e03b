"""Batches, declarations and views; the networks as a method sees them."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import kd_plugins
from kd_plugins import Attention, Batch, Distiller, DistillError, Needs, Network, Reads, View, bind
from kd_plugins.reading.network import adapt
from kd_plugins.reading.view import Features
from kd_plugins.testing import TinyNet
from kd_plugins.testing.networks import tiny_tokens, tiny_transformer


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3])


class Reader(Distiller):
    """Reads what it is told to."""

    def __init__(self, needs: Needs | None = None) -> None:
        super().__init__()
        self.declared = needs or Needs()

    def needs(self):
        return self.declared

    def loss(self, student, teacher, batch):
        return {}


# --- Batch ------------------------------------------------------------------------------------------------------------


def test_a_tensor_and_a_mapping_make_a_batch(images):
    batch = Batch.of(images, LABELS, index=torch.arange(4))
    assert (batch.size, batch.name, batch.mask) == (4, None, None)
    tokens = {"attention_mask": torch.tensor([[1, 1, 0]]), "input_ids": torch.tensor([[5, 6, 0]]), "labels": LABELS[:1]}
    batch = Batch.of(tokens)
    assert batch.name == "input_ids"
    assert torch.equal(batch.inputs, tokens["input_ids"])
    assert torch.equal(batch.mask, tokens["attention_mask"])
    assert set(batch.kwargs) == {"attention_mask"}
    assert torch.equal(batch.labels, LABELS[:1])
    assert set(tokens) == {"attention_mask", "input_ids", "labels"}
    decoded = {**tokens, "decoder_input_ids": torch.tensor([[7, 8, 9]])}
    assert Batch.of(decoded).mask.tolist() == [[1, 1, 1]]
    assert Batch.of({**decoded, "decoder_attention_mask": torch.tensor([[0, 1, 1]])}).mask.tolist() == [[0, 1, 1]]
    assert Batch.of({"waves": images}).name == "waves"
    assert Batch.of({"a": images, "b": images}, name="b").kwargs.keys() == {"a"}
    with pytest.raises(DistillError, match="at least one input"):
        Batch.of({})


def test_a_batch_is_changed_by_copies(images):
    batch = Batch.of(images, LABELS, task="classification")
    smaller = batch.with_inputs(images[:2]).with_labels(LABELS[:2])
    assert (smaller.size, batch.size) == (2, 4)
    assert torch.equal(smaller.labels, LABELS[:2])
    assert batch.labels is LABELS
    with pytest.raises(AttributeError):
        batch.size = 3


def test_a_batch_moves_with_all_it_holds(images):
    stream = Batch.of(images, LABELS)
    extra = {"extra": (LABELS, "text"), "named": Attention(images, None)}
    batch = Batch.of({"input_ids": LABELS[None], **extra}, LABELS, streams={"search": stream})
    moved = batch.to("meta")
    assert isinstance(moved.kwargs["named"], Attention)
    assert moved.kwargs["named"].scores.device.type == "meta"
    assert {moved.inputs.device.type, moved.labels.device.type, moved.kwargs["extra"][0].device.type} == {"meta"}
    assert moved.kwargs["extra"][1] == "text"
    assert moved.stream("search").inputs.device.type == "meta"
    assert moved.size == batch.size


def test_an_undeclared_stream_is_an_error(images):
    with pytest.raises(DistillError, match=r"reads the stream 'search' but the host gave no streams: declare it"):
        Batch.of(images).stream("search")


@pytest.mark.parametrize(
    ("task", "scores", "labels"),
    [
        ("token", torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)),
        ("multilabel", torch.zeros(2, 3), torch.ones(2, 3)),
        ("regression", torch.zeros(2, 1), torch.ones(2, 1)),
        ("classification", torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
    ],
)
def test_no_softmax_is_taken_of_what_has_none(task, scores, labels):
    with pytest.raises(
        DistillError, match=rf"for scores .* of the task {task} that may not be meant: give Batch.of\(..., criterion="
    ):
        Batch.of(torch.zeros(2, 3), labels, task=task).task_loss(View(scores))


def test_the_task_loss_leaves_out_what_the_batch_says():
    labels = torch.tensor([1, 255, 2])
    scores = torch.arange(900.0).view(3, 300) / 100
    expected = -scores.log_softmax(1)[[0, 2], [1, 2]].mean()
    assert Batch.of(scores, labels, ignore_index=255).task_loss(View(scores)) == pytest.approx(expected.item())
    shares = torch.full((3, 300), 1 / 300)
    soft = Batch.of(scores, shares, ignore_index=255).task_loss(View(scores))
    assert soft == pytest.approx(-scores.log_softmax(1).mean().item())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_class_numbers_may_be_integers_of_any_size(dtype):
    scores, labels = torch.arange(6.0).view(3, 2) ** 2, torch.tensor([1, 0, 1])
    expected = -scores.log_softmax(1)[range(3), labels].mean()
    assert Batch.of(scores, labels.to(dtype)).task_loss(View(scores)) == pytest.approx(expected.item())
    with pytest.raises(DistillError, match=r"integers, or shares of the classes \[3, 2\], got torch.float32 \[3\]"):
        Batch.of(scores, labels.float()).task_loss(View(scores))


def test_the_task_loss_is_the_hosts(images):
    logits = torch.randn(4, 4)
    view = View(_logits=logits)
    assert torch.equal(Batch.of(images, LABELS).task_loss(view), F.cross_entropy(logits, LABELS))
    smooth = Batch.of(images, LABELS, criterion=lambda v, y: F.cross_entropy(v.logits, y, label_smoothing=0.1))
    assert torch.equal(smooth.task_loss(view), F.cross_entropy(logits, LABELS, label_smoothing=0.1))
    with pytest.raises(DistillError, match=r"needs labels, but the batch has none: give labels .*label_names"):
        Batch.of(images).task_loss(view)


def test_a_loss_computed_in_the_forward_belongs_to_its_labels(images):
    batch = Batch.of(images, LABELS)
    view = View(_logits=torch.randn(4, 4), loss=torch.tensor(3.0), labels=batch.labels)
    assert batch.task_loss(view) == 3.0
    with pytest.raises(DistillError, match="saw other labels: ask the network with the relabelled batch"):
        batch.with_labels(LABELS.flip(0)).task_loss(view)


def test_pixel_noise_is_divided_by_std(images):
    noise = torch.ones(4, 3, 8, 8)
    scaled = Batch.of(images, std=(0.5, 0.25, 0.1)).pixels(noise)
    assert torch.allclose(scaled[0, :, 0, 0], torch.tensor([2.0, 4.0, 10.0]))
    assert scaled.dtype == noise.dtype
    with pytest.raises(DistillError, match=r"needs the mean and std .* pass Batch.of\(..., mean=..., std=...\)"):
        Batch.of(images).pixels(noise)


# --- Needs and views --------------------------------------------------------------------------------------------------


def test_declarations_add_up_without_repeats():
    a = Needs(Reads(False, features=("x", -1)), Reads(False), {"search": 0.5})
    b = Needs(Reads(True, features=("x", "y"), hidden=(1,)), Reads(False, attentions=(2,)), index=True)
    both = a | b
    assert both.student == Reads(True, features=("x", -1, "y"), hidden=(1,))
    assert both.teacher == Reads(False, attentions=(2,))
    assert both.streams == {"search": 0.5}
    assert both.index
    assert not Reads(hidden=()).taps
    assert both.teacher.taps


def test_the_size_is_that_of_the_inputs_or_of_the_labels():
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(5)
    made = Batch(images), Batch(list(images), labels), Batch(), Batch(images, size=2)
    assert [batch.size for batch in made] == [3, 5, 0, 2]
    assert (Batch.of(images).size, Batch.of(images).with_inputs(images[:1]).size) == (3, 1)


def test_what_was_not_read_is_named():
    features = Features({"layer1": torch.ones(1), "blocks.0": torch.ones(2), "blocks.1": torch.ones(3)})
    features.globs["blocks.*"] = ["blocks.0", "blocks.1"]
    assert [len(f) for f in features.select("blocks.*")] == [2, 3]
    assert [len(f) for f in features.select("layer1")] == [1]
    with pytest.raises(DistillError, match=r"Nothing was read at 'layer2'.*Did you mean layer1.*Declare it in needs"):
        features["layer2"]
    with pytest.raises(DistillError, match="Nothing was read at 'heads"):
        features.select("heads.*")


def test_scores_are_found_in_what_networks_return(images):
    class Returns(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x.mean((2, 3)))

    batch, scores = Batch.of(images), images.mean((2, 3))
    for make in (
        lambda s: s,
        lambda s: {"logits": s},
        lambda s: (s, None),
        lambda s: (s.sum(), s),  # a loss before the scores
        lambda s: type("Output", (), {"logits": s}),
    ):
        assert torch.equal(Network(Returns(make)).read(batch, Reads()).logits, scores)
    with pytest.raises(DistillError, match="Expected Returns to return its scores"):
        Network(Returns(lambda s: "text")).read(batch, Reads())


def test_inputs_go_by_name_with_the_rest_of_the_arguments():
    class Named(nn.Module):
        def forward(self, *, input_ids, attention_mask=None):
            return input_ids.float() * attention_mask

    ids, mask = torch.tensor([[5, 6]]), torch.tensor([[1, 0]])
    batch = Batch.of({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(Network(Named()).read(batch, Reads()).logits, ids.float() * mask)
    with pytest.raises(DistillError, match="was asked with a batch that has no inputs"):
        Network(Named()).read(Batch(), Reads())


def test_the_plain_adapter_says_what_it_cannot(images):
    network, batch = Network(TinyNet()), Batch.of(images)
    with pytest.raises(
        DistillError, match="no numbered stages that are known here: give module paths, such as 'layer1'"
    ):
        network.read(batch, Reads(features=(-1,)))
    with pytest.raises(DistillError, match="no transformer layers"):
        network.read(batch, Reads(hidden=(1,)))


def test_adapters_look_through_wrappers():
    net = TinyNet()
    assert adapt(torch.compile(net, backend="eager")).module is net
    assert type(adapt(net)) is Network


# --- Nets and bind ----------------------------------------------------------------------------------------------------


def test_a_view_holds_what_was_declared_and_no_more(images):
    student, teacher = TinyNet(), TinyNet(6)
    reader = Reader(Needs(Reads(features=("layer*",)), Reads(False, features=("layer1", "layer2:in"))))
    nets = bind(reader, student, teacher, batch=Batch.of(images, LABELS))
    s, t = nets.student(Batch.of(images)), nets.teacher(Batch.of(images))
    assert list(s.features) == ["layer1", "layer2"]
    assert torch.equal(s.logits, student(images))
    assert t.features["layer1"] is t.features["layer2:in"]
    assert not t.features["layer1"].requires_grad
    with pytest.raises(DistillError, match="did not run so far"):
        _ = t.logits
    assert nets.teacher(Batch.of(images), reads=Reads()).logits.shape == (4, 4)


def test_the_teacher_is_frozen_and_in_evaluation(images):
    teacher = TinyNet().train()
    nets = bind(Reader(), TinyNet(), teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.train()
    nets.teacher(Batch.of(images, LABELS))
    assert not any(m.training for m in teacher.modules())


def test_a_gradient_reaches_the_input_of_a_frozen_teacher_on_demand(images):
    nets = bind(Reader(), TinyNet(), TinyNet(), batch=Batch.of(images, LABELS))
    images.requires_grad_()
    assert not nets.teacher(Batch.of(images)).logits.requires_grad
    (gradient,) = torch.autograd.grad(nets.teacher(Batch.of(images), input_grad=True).logits.sum(), images)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not nets.teacher(Batch.of(images), input_grad=True).logits.requires_grad


@pytest.mark.parametrize(
    ("attributes", "teachers", "peers", "message"),
    [
        ({}, 0, 0, "needs one teacher, got 0: give one"),
        ({}, 2, 0, "needs one teacher, got 2: leave the others out"),
        ({"teachers": 0}, 1, 0, "needs no teacher, got 1"),
        ({"teachers": 3}, 2, 0, "needs 3 teachers, got 2"),
        ({"teachers": "many"}, 0, 0, "needs at least one teacher, got 0"),
        ({"peers": True}, 1, 0, "trains several networks together: give at least one more"),
        ({}, 1, 1, "trains one student, got 1 peers"),
    ],
)
def test_numbers_of_networks_that_do_not_fit_are_refused(attributes, teachers, peers, message):
    reader = type("Counts", (Reader,), attributes)()
    with pytest.raises(DistillError, match=message):
        bind(reader, TinyNet(), [TinyNet() for _ in range(teachers)], peers=[TinyNet() for _ in range(peers)])


def test_a_method_without_teacher_says_so_when_asked_for_one():
    nets = bind(type("None_", (Reader,), {"teachers": 0})(), TinyNet())
    with pytest.raises(DistillError, match="reads a teacher, and none was given"):
        _ = nets.teacher


def test_setup_happens_once_with_the_first_batch_and_leaves_no_trace(images):
    calls = []

    class SetsUp(Reader):
        def setup(self, nets, batch):
            calls.append(torch.is_grad_enabled())
            nets.student(batch)
            torch.randn(3)
            self.connector = nn.Linear(2, 2)

    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 4))
    reader = SetsUp()
    nets = bind(reader, student, TinyNet())
    before, state = student[1].running_mean.clone(), torch.get_rng_state()
    assert not calls
    next(iter(reader.turns(nets, Batch.of(images, LABELS))))
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert not torch.equal(student[1].running_mean, before)  # by the turn itself, once
    assert student[1].num_batches_tracked == 1
    nets.student(Batch.of(images, LABELS))
    assert calls == [False]


def test_setup_refuses_before_any_training(images):
    nets = bind(Reader(Needs(Reads(features=("layer9",)))), TinyNet(), TinyNet())
    with pytest.raises(DistillError, match="Did you mean layer"):
        nets.student(Batch.of(images, LABELS))


def test_a_teacher_gets_its_own_images_columns_and_class_order(images):
    from kd_plugins.binding import connect

    teacher = TinyNet()
    nets = connect(Reader(), adapt(TinyNet()), [adapt(teacher)], transforms=[lambda x: 2 * x], orders=[[3, 2, 1, 0]])
    with torch.no_grad():
        assert torch.equal(nets.teacher(Batch.of(images)).logits, teacher(2 * images).flip(1))

    class Named(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float() * attention_mask

    ids = torch.tensor([[5, 6]])
    own = {"input_ids": ids + 1, "attention_mask": torch.tensor([[0, 1]])}
    batch = Batch.of({"input_ids": ids, "attention_mask": torch.ones(1, 2)}, teacher_kwargs=own)
    nets = bind(Reader(), Named(), Named())
    assert nets.student(batch).logits.tolist() == [[5, 6]]
    assert nets.teacher(batch).logits.tolist() == [[0, 7]]


def test_everything_public_is_there():
    assert all(hasattr(kd_plugins, name) for name in kd_plugins.__all__)


def test_a_criterion_may_read_an_output_without_scores():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, pictures, targets):
            return {"loss": self.layer(torch.stack(pictures)).square().mean() + targets[0]}

    targets = [torch.tensor(1.0)]
    batch = Batch([torch.ones(2)], targets, {"targets": targets}, criterion=lambda view, _: view.output["loss"], size=1)
    view = Network(Losses()).read(batch, Reads())
    assert batch.task_loss(view) > 1
    with pytest.raises(DistillError, match="Expected Losses to return its scores"):
        _ = view.logits


@pytest.mark.parametrize(
    ("network", "path"),
    [
        (lambda: TinyNet(), "head"),
        (lambda: timm.create_model("resnet10t", num_classes=3), "fc"),
        (lambda: timm.create_model("mobilenetv3_small_050", num_classes=3), "classifier"),
        (lambda: tiny_transformer(1), "classifier"),
    ],
    ids=["plain", "timm's resnet", "timm's mobilenet", "bert"],
)
def test_what_the_classifier_gets_can_be_asked_for(network, path):
    adapter = adapt(network())
    assert adapter.classifier() == path
    adapter.module.eval()
    text = "bert" in type(adapter.module).__name__.lower()
    batch = tiny_tokens(1)[0] if text else Batch.of(torch.randn(2, 3, 64, 64))
    view = adapter.read(batch, Reads(features=(f"{path}:in",)))
    made = adapter.module.get_submodule(path)(view.features[f"{path}:in"])
    torch.testing.assert_close(made, view.logits)
