"""QuEST: its words, against a loop written by hand, its cache, its picture, and each host."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_kit import fresh_accelerate
from distributed_kit import keep, kept, on_two_processes
from image_kit import image_classifier, image_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_plugins import Batch, DistillError, bind, create_distiller, make_optimizers, play, states
from kd_plugins import functional as KF
from kd_plugins.methods import quest as quest_method
from kd_plugins.methods.quest import QUEST
from kd_plugins.nn import codebook, vocabulary
from kd_plugins.nn.codebook import Sample, fit_codebook
from kd_plugins.nn.patches import NearestPatches, patch_side, pixels


class Net(nn.Module):
    """Two maps, `low` and half its size `high`, and a classifier."""

    def __init__(self, width: int, seed: int, stride: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.low = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1), nn.ReLU())
            self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
            self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean((2, 3)))


def batches(count: int = 3, size: int = 6, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch.of(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def start(student: nn.Module, teacher: nn.Module, *, data: list[Batch] | None = None, **options: Any) -> Any:
    """A distiller whose words are made, the networks, and the optimizers."""
    distiller = create_distiller("quest", **{"layers": ("high",), "words": 6, **options})
    torch.manual_seed(0)
    nets = bind(distiller, student, teacher, batch=batches()[0], batches=batches() if data is None else data)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return distiller, nets, make_optimizers(distiller, optimizer, nets)


def train(distiller: QUEST, nets: Any, groups: Any, steps: int = 5) -> None:
    for step in range(steps):
        for turn in distiller.turns(nets, batches()[step % 3]):
            play(turn, groups)


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), rtol=0, atol=atol) for k in a)


# Values


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1)], ids=["equal", "larger student", "larger teacher"])
def test_equals_a_loop_by_hand(strides):
    """The released code's arithmetic: cosine 1 x 1 convolution, softmax(-5 d), F.kl_div, two layers with weight 1."""
    options = {"layers": ("low", "high"), "weight": 2.0, "temperature": 5.0}
    ours, theirs, teacher = Net(4, 1, strides[0]), Net(4, 1, strides[0]), Net(5, 2, strides[1]).eval()
    train(*start(ours, teacher, **options))
    parts = start(theirs, teacher, **options)[0].vocabularies
    learned = [*theirs.parameters(), *(p for part in parts for p in (part.weight, part.scale))]
    optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(5):
        batch = batches()[step % 3]
        f_s = theirs.low(batch.inputs)
        with torch.no_grad():
            f_t = teacher.low(batch.inputs)
        loss = F.cross_entropy(theirs(batch.inputs), batch.labels)
        for part, layer in zip(parts, ("low", "high"), strict=True):
            if layer == "high":
                f_s, f_t = theirs.high(f_s), teacher.high(f_t)
            s, t = (F.avg_pool2d(f, f.shape[-1] // min(f_s.shape[-1], f_t.shape[-1])) for f in (f_s, f_t))
            d = (t.permute(0, 2, 3, 1).unsqueeze(3) - part.codebook).square().sum(-1).flatten(0, 2)
            kernel = F.normalize(part.weight, dim=1)[:, :, None, None]
            scores = F.conv2d(F.normalize(s, dim=1), part.scale * kernel).permute(0, 2, 3, 1).flatten(0, 2)
            loss = loss + 2 * F.kl_div(scores.log_softmax(1), (-5 * d).softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(ours.state_dict(), theirs.state_dict(), 1e-5)
    assert not same(ours.state_dict(), Net(4, 1, strides[0]).state_dict(), 1e-2)


def test_the_predictor_is_trained_with_the_student_and_the_words_stay():
    distiller, nets, groups = start(Net(4, 1), Net(5, 2))
    (part,) = distiller.vocabularies
    before = {name: value.clone() for name, value in part.state_dict().items()}
    assert before["scale"] == 3
    train(distiller, nets, groups)
    moved = [name for name, value in part.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["weight", "scale"]
    wide = start(Net(4, 1), Net(5, 2), words=6, layers=("low", "high"))[0]
    first = QUEST(words=100).words, wide.vocabularies[0].weight.shape, wide.vocabularies[1].codebook.shape
    assert first == (100, (6, 4), (6, 10))


def test_the_predictor_starts_as_in_the_released_code():
    distiller, _, _ = start(Net(32, 1), Net(3, 2), words=60)
    assert distiller.vocabularies[0].weight.var().item() == pytest.approx(2 / 64, rel=0.1)


# Words


def test_words_are_the_means_of_the_vectors_that_are_nearest_to_them():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(7, 3, generator=generator)
    vectors = centres.repeat_interleave(torch.arange(20, 90, 10), 0) + torch.randn(350, 3, generator=generator)
    words, counts = fit_codebook(vectors, 7, 3)
    near = torch.cdist(vectors, words).argmin(1)
    assert counts.tolist() == near.bincount(minlength=7).tolist()
    means = torch.stack([vectors[near == k].mean(0) for k in range(7)])
    torch.testing.assert_close(words, means, rtol=0, atol=1e-4)
    again, other = fit_codebook(vectors, 7, 3)[0], fit_codebook(vectors, 7, 4)[0]
    assert torch.equal(words, again)
    assert not torch.equal(words, other)


def test_equal_vectors_give_no_two_equal_words():
    """Rectifiers leave many vectors of zeros; scikit-learn alone would leave words empty here."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(10, 3, generator=generator)
    vectors = torch.cat([distinct, torch.zeros(500, 3)])
    words, counts = fit_codebook(vectors, 11, 0)
    assert sorted(counts.tolist()) == [1] * 10 + [500]
    assert torch.cdist(words, torch.cat([distinct, torch.zeros(1, 3)])).amin(0).max() < 1e-5
    for seed in range(20):
        assert (fit_codebook(vectors, 8, seed)[1] > 0).all()
    with pytest.raises(DistillError, match="12 words needs at least as many different feature vectors.*gave 11"):
        fit_codebook(vectors, 12, 0)
    with pytest.raises(DistillError, match="finite features"):
        fit_codebook(torch.full((4, 2), torch.nan), 2, 0)


def test_a_sample_is_uniform_over_a_stream_of_any_length():
    times = torch.zeros(40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        sample = Sample(6, generator)
        for part in torch.arange(40.0).unsqueeze(1).split(7):
            sample.add(part)
        assert sample.seen == 40
        found = sample.vectors().squeeze(1).long()
        assert len(found) == len(found.unique()) == 6
        times[found] += 1
    # Binomial with 2000 draws of 0.15: a standard deviation of 16.
    assert (times - 300).abs().max() < 65
    few = Sample(50, generator)
    few.add(torch.arange(40.0).unsqueeze(1))
    assert sorted(few.vectors().squeeze(1).tolist()) == list(range(40))


@pytest.mark.parametrize("limit", [10**6, 30])
def test_words_are_made_of_the_pooled_teacher(limit, monkeypatch):
    seen: list[Tensor] = []
    fit = codebook.fit_codebook
    monkeypatch.setattr(vocabulary, "fit_codebook", lambda v, *a: (seen.append(v), fit(v, *a))[1])
    student, teacher = Net(4, 1, 2), Net(5, 2)
    distiller, _, _ = start(student, teacher, max_vectors=limit)
    expected = torch.cat([F.avg_pool2d(teacher.high(teacher.low(b.inputs)), 2) for b in batches()])
    expected = expected.permute(0, 2, 3, 1).flatten(0, 2)
    (vectors,) = seen
    assert vectors.shape == (min(limit, 3 * 6 * 4), 10)
    assert torch.cdist(vectors.double(), expected.double()).amin(1).max() < 1e-5
    assert torch.equal(distiller.vocabularies[0].counts.sum(), torch.tensor(len(vectors)))


def test_words_follow_the_runs_seed_or_their_own():
    def words(run: int, **options: Any) -> Tensor:
        distiller = create_distiller("quest", layers=("high",), words=6, max_vectors=40, **options)
        distiller.host.seed(run)
        bind(distiller, Net(4, 1), Net(5, 2), batch=batches()[0], batches=batches())
        return distiller.vocabularies[0].codebook

    assert torch.equal(words(1), words(1))
    assert not torch.equal(words(1), words(2))
    assert torch.equal(words(1, seed=5), words(2, seed=5))


def test_there_are_no_more_words_than_the_vectors_bear(monkeypatch):
    """72 different vectors bear 7 words of at least 10: a vocabulary of 7, whatever room was made for more."""
    monkeypatch.setattr(quest_method, "_LEAST", 10)
    distiller, nets, _ = start(Net(4, 1, 2), Net(5, 2), words=None)
    (made,) = distiller.vocabularies
    assert made.codebook.shape == (4096, 10)
    assert (made.counts > 0).sum() == 7
    assert made.counts.sum() == 72
    maps = torch.randn(2, 8, 3, 3), torch.randn(2, 10, 3, 3)
    expected = KF.quest(*maps, made.weight[:7], made.scale, made.codebook[:7], made.temperature)
    assert torch.equal(made(*maps), expected)
    other = vocabulary.Vocabulary(4096, 8, 10, size=made.size, side=made.side)
    other(*maps)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(*maps), expected)
    assert len(made.most(8)) == 7


def test_a_word_that_stands_for_no_vector_is_a_word_after_a_resume():
    made, other = (vocabulary.Vocabulary(6, 3, 3) for _ in range(2))
    made.codebook[:4].copy_(torch.randn(4, 3))
    made.counts[:4].copy_(torch.tensor([5, 0, 3, 0]))
    other.load_state_dict(made.state_dict())
    maps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    assert torch.equal(other(*maps), KF.quest(*maps, made.weight[:4], made.scale, made.codebook[:4], 5.0))


def test_words_depend_on_their_own_layer_alone():
    def words(data: list[Batch], **options: Any) -> Tensor:
        distiller = create_distiller("quest", words=6, max_vectors=40, seed=5, **options)
        bind(distiller, Net(4, 1), Net(5, 2), batch=batches()[0], batches=data)
        return distiller.vocabularies[-1].codebook

    alone = words(batches(), layers=("high",))
    assert torch.equal(alone, words(batches(), layers=("low", "high")))
    halves = [Batch.of(part) for batch in batches() for part in batch.inputs.split(3)]
    torch.testing.assert_close(alone, words(halves, layers=("high",)))


def test_the_temperature_of_a_sharpness():
    distiller, nets, _ = start(Net(4, 1), Net(5, 2), sharpness=0.7)
    (part,) = distiller.vocabularies
    maps = torch.cat([nets.teacher(b).features["high"] for b in batches()])
    targets = KF.soft_assignment(maps.flatten(2).mT.flatten(0, 1), part.codebook, part.temperature)
    assert targets.amax(1).mean().item() == pytest.approx(0.7, abs=1e-3)
    assert part.sharpness.item() == pytest.approx(0.7, abs=1e-3)
    assert part.temperature != 5
    assert start(Net(4, 1), Net(5, 2))[0].vocabularies[0].temperature == 5


def test_options_take_effect_in_the_training():
    """The temperature too, where it is set after a sharpness has chosen one."""
    for options in ({}, {"sharpness": 0.7}):
        distiller, nets, _ = start(Net(4, 1), Net(5, 2), **options)
        batch = batches()[0]
        f_s, f_t = nets.student(batch).features["high"], nets.teacher(batch).features["high"]
        (part,) = distiller.vocabularies
        distiller.temperature, distiller.weight = 0.3, 2.0
        expected = 2 * KF.quest(f_s, f_t, part.weight, part.scale, part.codebook, 0.3)
        (turn,) = distiller.turns(nets, batch)
        torch.testing.assert_close(turn["student"]["quest"], expected, rtol=0, atol=0)


# The cache


class Stateful(Net):
    """A part of its state is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_the_cache_is_refitted_when_anything_differs(tmp_path, monkeypatch):
    fits: list[int] = []
    fit = codebook.fit_codebook
    monkeypatch.setattr(codebook, "fit_codebook", lambda *a: (fits.append(1), fit(*a))[1])

    def words(student: Net | None = None, teacher: Net | None = None, **options: Any) -> tuple[Tensor, int]:
        fits.clear()
        distiller, _, _ = start(student or Net(4, 1), teacher or Net(5, 2), **{"cache": str(tmp_path), **options})
        return distiller.vocabularies[0].codebook, len(fits)

    first, fitted = words()
    assert fitted == 1
    assert torch.equal(first, start(Net(4, 1), Net(5, 2))[0].vocabularies[0].codebook)
    other_head = Net(5, 2)
    nn.init.zeros_(other_head.head.bias)
    nn.init.ones_(other_head.head.weight)
    noisy = [b.with_inputs(b.inputs + 0.01) for b in batches()]
    different = (
        {"teacher": Net(5, 3)},
        # The features are the same, the teacher is not.
        {"teacher": other_head},
        {"student": Net(4, 1, 2)},
        {"teacher_layers": ("low",)},
        {"data": noisy},
        {"data": batches()[:2]},
        {"words": 7},
        {"seed": 3},
        {"max_vectors": 50},
        {"teacher": Stateful(5, 2)},
    )
    for changed in different:
        assert words(**changed)[1] == 1, changed
        assert words(**changed)[1] == 0, changed
    # What a student learns and how is no part of it.
    for unchanged in ({}, {"student": Net(7, 9)}, {"temperature": 2.0, "weight": 3.0}, {"sharpness": 0.5}):
        again, fitted = words(**unchanged)
        assert fitted == 0
        assert torch.equal(again, first)
    assert len(list(tmp_path.iterdir())) == 1 + len(different)
    assert not any(states.damage(entry, ["codebook.safetensors"]) for entry in tmp_path.iterdir())
    for path in tmp_path.glob("*/codebook.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    again, fitted = words()
    assert fitted == 1
    assert torch.equal(again, first)
    assert words()[1] == 0
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match="cannot be written"):
        words(cache=str(tmp_path / "file"))


# The picture


def test_patches_are_those_that_look_like_the_word():
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    images[0, :, 4:8, 8:12] = 200
    images[1, :, 12:, :4] = 255
    maps = F.avg_pool2d(images.float(), 4)
    nearest = NearestPatches(torch.tensor([[255.0] * 3, [0.0] * 3]), 2, 12)
    for i in (2, 0, 1):
        nearest.add(images[i : i + 1], maps[i : i + 1])
    assert nearest.distances[0].tolist() == [0, 3 * 55**2]
    corner, inner = nearest.images[0]
    assert torch.equal(inner, images[0, :, 0:12, 4:16])
    assert (corner[:, 4:8, 4:8] == 255).all()
    assert (corner[:, 8:] == 128).all()
    assert (corner[:, :, :4] == 128).all()
    assert nearest.distances[1].tolist() == [0, 0]
    more = NearestPatches(torch.zeros(1, 3), 5, 12)
    more.add(images, maps)
    assert more.distances.isinf().sum() == 2
    assert patch_side((16, 16), (4, 4)) == 12


def test_pixels_of_normalised_images():
    image = torch.rand(2, 3, 4, 4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    normal = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(pixels(Batch.of(normal, mean=mean, std=std)), (255 * image).round().byte())
    grey = pixels(Batch.of(3 * image[:, :1]))
    assert grey.shape == (2, 3, 4, 4)
    assert grey.flatten(1).amax(1).tolist() == [255, 255]


def test_the_report_shows_the_words():
    distiller, nets, _ = start(Net(4, 1), Net(5, 2), layers=("low", "high"))
    first, second = distiller.pictures()
    assert "low" in first.title
    assert "high" in second.title
    counts = distiller.vocabularies[1].counts
    assert list(second.rows) == [f"word {n} ({int(counts[n])})" for n in counts.argsort(descending=True, stable=True)]
    assert all(image.shape == (3, 6, 6) for images in second.rows.values() for image in images)
    # All images fit into the sample here, so a pass over them finds the same.
    for found, part in zip(distiller.visual_words(nets, batches()), distiller.vocabularies, strict=True):
        assert torch.equal(found.images, part.patches)
        assert found.distances.isfinite().all()
    assert json.dumps(first.to_json())
    (few,) = distiller.visual_words(nets, batches(), words=2, patches=3)[:1]
    assert few.images.shape == (2, 3, 3, 3, 3)


def test_images_that_cannot_be_shown_are_left_out():
    def titles(data: list[Batch]) -> list[str]:
        student, teacher = Net(4, 1), Net(5, 2)
        for net in (student, teacher):
            net.low[0] = nn.Conv2d(data[0].inputs.shape[1], net.low[0].out_channels, 3, 1, 1)
            net.forward = lambda x, flag=None, net=net: Net.forward(net, x)  # type: ignore[method-assign]
        return [picture.title for picture in start(student, teacher, data=data)[0].pictures()]

    assert titles(batches()) == ["Visual words of high"]
    # Images of several sizes: those of the first are shown; the words are of all.
    larger = Batch.of(torch.randn(4, 3, 16, 16), torch.randint(4, (4,)))
    assert titles([*batches(), larger]) == ["Visual words of high"]
    # Further inputs are not known for the images of the sample.
    assert titles([Batch(b.inputs, b.labels, kwargs={"flag": torch.ones(6)}) for b in batches()]) == []


def test_images_of_another_number_of_channels_than_their_mean():
    image = torch.rand(2, 4, 4, 4)
    assert torch.equal(pixels(Batch(image, mean=(0.5,) * 3, std=(0.2,) * 3)), pixels(Batch(image)))


def test_lists_of_images():
    class Lists(Net):
        def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack(images))

    data = [Batch(list(b.inputs), b.labels) for b in batches()]
    distiller = create_distiller("quest", layers=("high",), words=6)
    bind(distiller, Lists(4, 1), Lists(5, 2), batch=data[0], batches=data)
    assert distiller.vocabularies[0].counts.sum() == 3 * 6 * 16
    assert distiller.pictures() == []


# Networks and options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ("a", "b"), "teacher_layers": ("a",)}, "as many teacher_layers as layers"),
        ({"layers": ()}, "as many teacher_layers as layers"),
        ({"words": 1}, "words to be int from 2.*, got 1"),
        ({"temperature": -5.0}, "temperature to be float above 0"),
        ({"temperature": 5.0, "sharpness": 0.5}, "give one of them"),
        ({"weight": -1.0}, "weight to be float from 0"),
        ({"sharpness": 1.0}, "sharpness to be float above 0 below 1"),
        ({"sharpness": 0.1, "words": 5}, "sharpness between 1 / 5 and 1"),
        ({"words": 100, "max_vectors": 99}, "max_vectors=99 for 100 words"),
    ],
)
def test_options_that_do_not_work(options, words):
    with pytest.raises(DistillError, match=words):
        create_distiller("quest", **options)


def test_networks_and_data_that_do_not_fit():
    student, teacher, batch = Net(4, 1), Net(5, 2), batches()[0]
    with pytest.raises(DistillError, match="looks at the training set"):
        bind(QUEST(layers=("high",)), student, teacher, batch=batch)
    with pytest.raises(DistillError, match=r"4096 words needs at least as many.*words="):
        bind(QUEST(layers=("high",), words=4096), student, teacher, batch=batch, batches=batches())
    with pytest.raises(DistillError, match="gives no batch"):
        bind(QUEST(layers=("high",), words=5), student, teacher, batch=batch, batches=[])
    with pytest.raises(DistillError, match=r"a Batch, got tuple.*Batch\.of"):
        bind(QUEST(layers=("high",), words=5), student, teacher, batch=batch, batches=[(batch.inputs, batch.labels)])
    with pytest.raises(DistillError, match=r"got \[6, 4\] at the student's layer 'head'"):
        bind(QUEST(layers=("head",)), student, teacher, batch=batch, batches=batches())
    masked = Batch.of(batch.inputs, batch.labels, mask=torch.ones(6, 8))
    with pytest.raises(DistillError, match="padded sequences"):
        bind(QUEST(layers=("high",)), student, teacher, batch=masked, batches=batches())


# Hosts

DIGITS = [
    *"--device cpu --in-chans 1 --model lenet5_half --epochs 2 --warmup-epochs 0 -b 32 -j 0".split(),
    *"--train-split train[:320] --val-split validation[:100] -vb 100 --smoothing 0 --hflip 0 --color-jitter 0".split(),
    *"--opt adamw --lr 5e-3 --log-interval 1000".split(),
    *"--distill quest --teacher resnet8 --distill-args words=64 layers=1 teacher_layers=2 sharpness=0.5".split(),
]


def test_by_name_in_kd_timm_train_with_resume(tmp_path, monkeypatch):
    import timm

    from kd_timm.arguments import parse_args
    from kd_timm.train import Session

    torch.manual_seed(0)
    teacher = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("resnet8", in_chans=1, num_classes=10).state_dict(), teacher)

    def run(name: str, *flags: str, stop: bool = False) -> Session:
        fresh_accelerate()
        flags = "--teacher-checkpoint", str(teacher), "--teacher-kwargs", "in_chans=1", *flags
        session = Session(parse_args([*DIGITS, "--output", str(tmp_path), "--experiment", name, *flags]))
        if stop:
            epoch = session._epoch
            monkeypatch.setattr(
                session,
                "_epoch",
                lambda n, *rest: epoch(n, *rest) if n == 0 else (_ for _ in ()).throw(KeyboardInterrupt),
            )
        session.results = session.fit()
        return session

    whole = run("whole")
    assert whole.results["evaluation"]["top1"] > 25
    (part,) = whole.distillation.distiller.vocabularies
    # Of 320 digits; the student's map of 10 x 10 is the smaller.
    assert part.size == (10, 10)
    assert part.counts.sum() == 320 * 100
    assert part.sharpness.item() == pytest.approx(0.5, abs=1e-3)
    run("parts", stop=True)
    resumed = run("parts", "--resume", str(tmp_path / "parts"))
    assert resumed.results["best_metric"] == whole.results["best_metric"]
    saved = [load_file(tmp_path / n / "state" / "distiller" / "distiller.safetensors") for n in ("whole", "parts")]
    assert same(*saved)
    students = [load_file(tmp_path / n / "model_best.safetensors") for n in ("whole", "parts")]
    assert same(*students)


def vit(width: int, seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **size))


@pytest.mark.parametrize(("make", "layer"), [(image_classifier, "resnet.encoder.stages.1"), (vit, "vit.layers.1")])
def test_in_trainer(make, layer, tmp_path):
    convolutional = make is image_classifier
    student, teacher = (make([4, 8], 0), make([4, 12], 1)) if convolutional else (make(8, 0), make(12, 1))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    words = {"layers": (layer,), "words": 10}
    host = image_trainer(tmp_path, student, teacher_model=teacher, distiller="quest", distiller_args=words)
    host.train()
    assert same(before, teacher.state_dict())
    (part,) = host.distiller.vocabularies
    # Two images wide and high, or 16 patches and the class token.
    assert part.counts.sum() == 16 * (4 if convolutional else 17)
    logs = [row["distill/quest"] for row in host.state.log_history if "distill/quest" in row]
    assert logs[-1] < logs[0]
    assert len(host.distiller.pictures()) == convolutional


def accelerated(processes: int) -> dict[str, Tensor]:
    """A short training under Accelerate; with several processes, all but the first look at other data before it."""
    from accelerate import Accelerator

    from kd_accelerate import TurnPlayer

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    student = Net(4, 1)
    distiller = QUEST(layers=("high",), words=6, sharpness=0.6)
    torch.manual_seed(rank)
    nets = bind(distiller, student, Net(5, 2), batch=batches()[0], batches=batches(seed=rank))
    model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9))
    nets.student.forward = model
    player = TurnPlayer(accelerator, distiller, nets, optimizer)
    for batch in batches(4, 8, seed=9):
        rows = slice(rank, None, processes)
        player.step(Batch.of(batch.inputs[rows], batch.labels[rows]))
    return {**student.state_dict(), **distiller.state_dict()}


@pytest.mark.distributed
def test_two_processes_have_the_words_of_the_first(tmp_path):
    on_two_processes(__file__, str(tmp_path))
    alone = accelerated(1)
    first, second = kept(tmp_path)
    assert same(first, second)
    assert same(first, alone, 1e-5)
    assert not same({"w": first["high.0.weight"]}, {"w": Net(4, 1).high[0].weight.detach()}, 1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep(accelerated(2), sys.argv[1])
