"""What the methods that compare layers do beyond their distances: stages, warm-up, the order of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from kd_plugins import Batch, Distiller, DistillError, bind, create_distiller, make_optimizers, play
from kd_plugins.layers import LayerDistiller
from kd_plugins.testing import TinyNet, tiny_batches


def bound(name: str, **options):
    batches = tiny_batches(2)
    distiller = create_distiller(name, **options)
    student = TinyNet()
    nets = bind(distiller, student, TinyNet(6), batch=batches[0], total_steps=4, epoch_steps=2)
    return distiller, nets, batches


def test_fitnet_learns_from_the_hints_first_and_from_the_task_then():
    distiller, nets, batches = bound("fitnet", layers=("layer1",), hint_share=0.5)
    optimizers = make_optimizers(distiller, SGD(nets.student.module.parameters(), lr=0.01), nets=nets)
    terms, head = [], nets.student.module.head.weight.clone()
    for step in range(4):
        for turn in distiller.turns(nets, batches[step % 2]):
            terms.append(sorted(turn["student"]))
            play(turn, optimizers)
        assert torch.equal(nets.student.module.head.weight, head) == (step < 2)
        if step == 1:  # What is not read is not run.
            nets.teacher.module.register_forward_hook(lambda *_: pytest.fail("the teacher runs after the hints"))
    with pytest.raises(DistillError, match="hint_share to be float from 0 below 1, got 1"):
        create_distiller("fitnet", hint_share=1.0)
    assert terms == [["fitnet"]] * 2 + [["task"]] * 2


def test_reviewkd_grows_its_weight():
    distiller, nets, batches = bound("reviewkd", layers=("layer1", "layer2"), warmup=0.4)
    distiller.progress.total = 10
    values = []
    for step in (0, 1, 4, 9):
        distiller.progress.step = step
        (turn,) = distiller.turns(nets, batches[0])
        values.append(turn["student"]["reviewkd"].item())
    assert values == pytest.approx([0.0, values[3] / 4, values[3], values[3]])
    assert values[3] > 0


def test_reviewkd_goes_from_shallow_to_deep():
    with pytest.raises(DistillError, match="shallow to deep"):
        bound("reviewkd", layers=("layer2", "layer1"))


def test_reviewkd_fuses_the_deeper_layers_into_each():
    """The shallow layer's distance reaches the student's deep layer, and not the other way round."""
    distiller, nets, batches = bound("reviewkd", layers=("layer1", "layer2"))
    student, views = nets.student.module, (nets.student(batches[0]), nets.teacher(batches[0]))
    shallow, deep = distiller.pairs(*views)
    _, passed = distiller.fusions[1](deep.student, None, deep.teacher.shape[2:])
    fused, _ = distiller.fusions[0](shallow.student, passed, shallow.teacher.shape[2:])
    assert fused.shape == shallow.teacher.shape
    (grad,) = torch.autograd.grad(fused.square().sum(), student.layer2[0].weight)
    assert grad.any()


def test_vid_trains_the_variance_towards_the_error():
    distiller, nets, batches = bound("vid", layers=("layer2",), variance=5.0)
    optimizers = make_optimizers(distiller, SGD(nets.student.module.parameters(), lr=0.1), nets=nets)
    part = distiller.connectors[0]
    assert torch.allclose(part(torch.zeros(1, 8, 1, 1))[1], torch.tensor(5.0), atol=1e-4)
    for _ in range(3):
        for turn in distiller.turns(nets, batches[0]):
            play(turn, optimizers)
    # The tiny teacher's activations are far below a variance of 5.
    assert (part(torch.zeros(1, 8, 1, 1))[1] < 4.999).all()


def test_a_student_in_bfloat16_meets_the_trained_parts():
    student, teacher = TinyNet().bfloat16(), TinyNet(6)
    distiller = create_distiller("fitnet", layers=("layer2",))
    (batch,) = tiny_batches(1)
    nets = bind(distiller, student, teacher)
    half = Batch.of(batch.inputs.bfloat16(), batch.labels)
    (turn,) = distiller.turns(nets, half)
    assert turn["student"]["fitnet"].isfinite()


class Widened(LayerDistiller):
    """Squared distances, through a convolution where the channels differ."""

    teachers = "many"

    def connect(self, student, teacher):
        same = student.shape[1] == teacher.shape[1]
        return None if same else nn.Conv2d(student.shape[1], teacher.shape[1], 1)

    def distance(self, student, teacher, part, batch):
        return ((student if part is None else part(student)) - teacher).square().mean()


def test_a_pair_without_a_trained_part_leaves_the_others_theirs():
    batch = tiny_batches(1)[0]
    student, teacher = TinyNet(4), TinyNet(4)
    teacher.layer2[0] = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    teacher.head = nn.Linear(6, 4)
    distiller = Widened(layers=("layer1", "layer2"))
    nets = bind(distiller, student, teacher, batch=batch)
    s, t = nets.student(batch), nets.teacher(batch)
    (part,) = distiller.connectors
    shallow = (s.features["layer1"] - t.features["layer1"]).square().mean()
    deep = (part(s.features["layer2"]) - t.features["layer2"]).square().mean()
    torch.testing.assert_close(distiller.loss(s, t, batch)["widened"], shallow + deep)
    with pytest.raises(DistillError, match="parts for the layers of one teacher"):
        bind(Widened(layers=("layer2",)), student, [teacher, TinyNet(6)], batch=batch)


def test_a_distance_of_every_example_is_refused():
    """Its sum would weigh a batch of eight eight times."""
    (batch,) = tiny_batches(1)
    student, teacher = TinyNet(4), TinyNet(4)

    class Rows(Widened):
        def distance(self, student, teacher, part, batch):
            return (student - teacher).square().mean((1, 2, 3))

    distiller = Rows(layers=("layer1",))
    nets = bind(distiller, student, teacher, batch=batch)
    with pytest.raises(DistillError, match=rf"the term 0 of distance\(\) of rows .* got shape \[{batch.size}\]: mean"):
        next(distiller.turns(nets, batch))
    with pytest.raises(DistillError, match=r"LayerDistiller has no distance\(\)"):
        LayerDistiller().distance(torch.ones(1), torch.ones(1), None, batch)


def test_a_method_that_teaches_nothing_is_refused():
    """A hook of another name would leave the task loss alone, and `turns` without a yield end in Python's own words."""

    class Misnamed(Distiller):
        def losses(self, student, teacher, batch):
            return {"logits": (student.logits - teacher.logits).square().mean()}

    class Yieldless(Distiller):
        def turns(self, nets, batch):
            nets.student(batch)

    (batch,) = tiny_batches(1)
    with pytest.raises(DistillError, match=r"Misnamed has neither loss\(\) nor turns\(\): write what it teaches"):
        next((distiller := Misnamed()).turns(bind(distiller, TinyNet(), TinyNet()), batch))
    nets = bind(distiller := Yieldless(), TinyNet(), TinyNet())
    with pytest.raises(DistillError, match=r"Expected turns\(\) of yieldless to yield .*, got None: write yield"):
        distiller.turns(nets, batch)
