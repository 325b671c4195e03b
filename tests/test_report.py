"""Records of runs, what is analysed of the networks, and the pages made of them."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate_kit import fresh_accelerate
from safetensors.torch import load_file, save_file
from torch import nn

import kd_report
from kd_accelerate import TurnPlayer
from kd_plugins import Batch, Distiller, DistillError, Net, Nets, Reads, bind, create_distiller
from kd_plugins.catalog.cli import main as kd_plugins_main
from kd_plugins.compose import Composite
from kd_plugins.evaluation import Answers, calibration
from kd_plugins.picture import Bars, Heatmap, Images, Points
from kd_plugins.reading.view import View
from kd_report import charts, load_run, main, page_hint, render
from kd_report.analysis import analyse, as_nets, predict
from kd_report.measures import cka, decisions, difference, hsic, predictions, project_channels
from kd_report.record import RunRecord, rows_to_analyse, rows_to_ask, sizes, some_rows
from kd_report.runs import find_runs
from kd_timm.network import TimmNetwork

STATS = (0.5, 0.5, 0.5)
BAR = re.compile(r'<path d="M ([0-9.]+) [^"]*?L ([0-9.]+) [^"]*" [^>]*style="fill: var\(--c0\)"/>')
VISION = ["run", "results", "calibration", "curves", "similarity", "features", "channels", "confusion", "cost"]
TEXT = ["run", "results", "calibration", "curves", "similarity", "attention", "confusion", "cost"]


class Page(HTMLParser):
    """What a page holds; balanced tags, and nothing that is fetched."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        assert html.startswith("<!DOCTYPE html>")
        assert "http:" not in html
        assert "https:" not in html
        assert "nan" not in html.split("<main>")[1].replace("nano", "").lower().split()
        self.feed(html)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        self.words = " ".join(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href"):
            value = given.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), value
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "rect", "use", "image"), f"<{tag}/> closes nothing in HTML"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def cnn(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "resnet10t", num_classes=4, channels=(width, width, 2 * width, 2 * width), stem_width=width
    )


def images(n: int = 48) -> Batch:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 4
    x = torch.randn(n, 3, 32, 32, generator=generator) * 0.3
    x[torch.arange(n), 0, labels * 8] += 2
    return Batch.of(x, labels, mean=STATS, std=STATS)


def halves(batch: Batch):
    for rows in torch.arange(batch.size).split(24):
        yield Batch.of(batch.inputs[rows], batch.labels[rows], mean=STATS, std=STATS)


def train(folder: Path | None, method: str = "kd", *, seed: int = 0, steps: int = 6, resume: int | None = None):
    """A short distillation; with a folder it is recorded."""
    fresh_accelerate()
    teacher, student = cnn(8, 1), cnn(4, seed)
    batch = images()
    distiller = create_distiller(method, **({"layers": (1,)} if "nst" in method else {}))
    nets = bind(distiller, student, teacher, batch=batch, total_steps=steps)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.05))
    player = TurnPlayer(accelerator, distiller, nets, optimizer)
    record = None
    if folder is not None:
        record = RunRecord(
            folder,
            host="bare loop",
            nets=nets,
            distiller=distiller,
            command=["train.py", "--distill", method, "--name", "<b>&"],
            names={"student": "small", "teachers": ["large"]},
            data="stripes",
            metric="eval_top1",
            classes=["north", "east", "south", "west"],
            settings={"lr": 0.05, "seed": seed},
            resume=resume,
        )
        if resume is None:
            record.analyse("before", nets, halves(batch))
        record.time_steps(player)
    student.train()
    for step in range(resume or 0, steps):
        with accelerator.accumulate(model):
            loss = player.step(batch)
        if record is not None:
            row = {"step": step + 1, "epoch": step + 1.0, "train_loss": float(loss), **player.logs()}
            record.log(row | {"eval_top1": 25.0 + step + seed, "eval_loss": 1.0, "lr": 0.05})
    if record is not None:
        record.analyse("after", nets, halves(batch))
        record.predict(nets, halves(batch))
        record.finish({"top1": 30.0, "evaluation": {"loss": 1.0}}, seconds_per_step=0.01)
    return student, player, record


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The record of a training, which several tests look at."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, "kd+nst")
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def rewrite(folder: Path, **entries):
    """Changes what a record says."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class Shows(Distiller):
    """Shows one picture of every kind."""

    def pictures(self):
        red = torch.tensor([255, 0, 0]).view(3, 1, 1).expand(3, 4, 4)
        return [
            Bars("Lengths <b>", [("first", 0.31), ("second", 0.33)], mark=0.32, caption="How long & why."),
            Bars("Widths", [("first", 1.0)], caption="How long & why."),
            Heatmap("Mix", [[0.25, -0.75]], ["row"], ["a", "b"], row_label="from", column_label="to", signed=True),
            Images("Words", {"word 7": [red, red]}),
            Points("Plane", {"student": [(0.0, 1.0), (2.0, 3.0)], "teacher": [(1.0, 1.0)]}),
        ]


def test_methods_show_their_pictures(tmp_path):
    distiller = Composite({"kd": create_distiller("kd"), "shows": Shows()})
    assert [picture.kind for picture in distiller.pictures()] == ["bars", "bars", "heatmap", "images", "points"]
    record = RunRecord(tmp_path, host="bare loop", nets=nn.Linear(4, 2), distiller=distiller, command=["train.py"])
    record.log({"step": 1, "loss": 0.5})
    record.finish({}, status="interrupted")
    run = load_run(tmp_path)
    assert [picture["title"] for picture in run.info["pictures"]] == ["Lengths <b>", "Widths", "Mix", "Words", "Plane"]
    html = render([tmp_path])
    page = Page(html)
    assert "method" in page.ids
    for words in ("Lengths <b>", "0.31", "0.33", "Mix", "−0.75", "from", "word 7", "student", "teacher"):
        assert words in page.words, words
    # Neighbours share their words.
    assert page.words.count("How long & why.") == 1
    assert page.tags.count("img") == 2
    # Bars begin at 0: these two are almost as long as each other.
    lengths = [b - a for a, b in [map(float, found) for found in BAR.findall(html)[:2]]]
    assert lengths[0] / lengths[1] == pytest.approx(0.31 / 0.33, rel=1e-2)


def test_pictures_of_another_version_are_left_out_and_bad_ones_do_not_stop_a_run(tmp_path):
    class Broken(Distiller):
        def pictures(self):
            raise RuntimeError("no codebook")

    def recorded(distiller):
        return RunRecord(tmp_path, host="loop", nets=nn.Linear(4, 2), distiller=distiller, command=["train.py"])

    recorded(Shows()).finish({})
    rewrite(tmp_path, pictures=[{"kind": "hologram", "title": "later"}])
    assert 'id="method"' not in render([tmp_path])
    record = recorded(Broken())
    with pytest.warns(UserWarning, match="No pictures of the method: RuntimeError: no codebook"):
        record.finish({"top1": 1.0})
    assert load_run(tmp_path).info["status"] == "finished"
    assert "no codebook" in render([tmp_path])


def test_what_a_run_says_is_shown_and_never_run(tmp_path):
    word = '"><script>alert(1)</script>$x_1$'
    RunRecord(tmp_path, host=word, nets=nn.Linear(4, 2), distiller=Shows(), data=word, command=[word]).finish(
        {word: word}
    )
    pictures = load_run(tmp_path).info["pictures"]
    good = pictures[3]["rows"]["word 7"][0]
    bad = [
        "javascript:alert(1)",
        "https://example.org/a.png",
        f'{good}" onerror="alert(1)',
        "data:image/svg+xml;base64,AA==",
    ]
    pictures[3]["rows"] = {word: [good, *bad, 7]}
    pictures[0]["title"] = pictures[2]["rows"][0] = pictures[0]["values"][0][0] = word
    pictures[4]["groups"] = {word: [[0.0, 1.0]]}
    rewrite(tmp_path, pictures=pictures)
    html = render([tmp_path])
    page = Page(html)
    assert (page.tags.count("script"), page.tags.count("img")) == (0, 1)
    assert page.words.count("alert(1)") >= 10
    assert "onerror" not in html
    assert html == render([tmp_path])


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    RunRecord(tmp_path, host="loop", nets=nn.Linear(4, 2), command=["x"]).finish({})
    monkeypatch.setattr(kd_report, "find_spec", lambda name: None if name == "matplotlib" else name)
    for command in (["report", str(tmp_path)], ["demo"]):
        assert kd_plugins_main(command) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert 'matplotlib, not installed here: pip install "kd-plugins[report]"' in said
    assert page_hint("out") == 'Report: pip install "kd-plugins[report]", then kd-plugins report out'


# Analysis


def test_similarity_is_the_unbiased_estimate_and_ignores_rotation_and_scale():
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.randn(20, 5)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    similarity = cka(hsic([x, 3 * x @ rotation + 1, y]))

    def unbiased(a, b):
        n = len(a)
        k, m = (z @ z.T for z in (a.double(), b.double()))
        k.fill_diagonal_(0)
        m.fill_diagonal_(0)
        ones = torch.ones(n, 1, dtype=torch.float64)
        trace = (k @ m).trace() + (ones.T @ k @ ones) * (ones.T @ m @ ones) / ((n - 1) * (n - 2))
        return float((trace - 2 / (n - 2) * (ones.T @ k @ m @ ones)) / (n * (n - 3)))

    expected = unbiased(x, y) / math.sqrt(unbiased(x, x) * unbiased(y, y))
    assert similarity[:2, :2] == pytest.approx(torch.ones(2, 2), abs=1e-5)
    assert similarity[:2, 2].tolist() == pytest.approx([expected, expected], abs=1e-5)


def test_calibration_by_hand():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator)
    correct = torch.rand(500, generator=generator) < confidence**2
    error, diagram = calibration(confidence, correct, bins=10)
    expected = 0.0
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        expected += float((confidence[inside].mean() - correct[inside].float().mean()).abs()) * int(inside.sum()) / 500
    assert error == pytest.approx(expected, abs=1e-5)
    assert diagram[:, 0].sum() == 500


def test_decisions_of_every_task():
    def asked(scores, labels, task):
        return decisions(View(scores), Batch(labels=torch.tensor(labels), size=1, task=task))

    assert asked(torch.zeros(1, 3, 2), [[1, -100, 0]], "token").labels.tolist() == [1, 0]
    assert asked(torch.eye(3)[None], [[1, 0, 1]], "causal-lm").labels.tolist() == [0, 1]
    many = asked(torch.tensor([[2.0, -1.0]]), [[1.0, 0.0]], "multilabel")
    assert many.logits.argmax(1).tolist() == many.labels.tolist() == [1, 0]
    one = asked(torch.tensor([[2.0], [-1.0]]), [1, 1], "classification")
    assert (one.logits.argmax(1).tolist(), one.labels.tolist()) == ([1, 0], [1, 1])
    pixels = asked(torch.zeros(1, 2, 2, 2), [[[0, 1], [255, 1]]], "segmentation")
    assert sorted(pixels.labels.tolist()) == [0, 1, 1]
    assert asked(torch.zeros(2, 1), [0.0, 0.0], "regression") is None


@pytest.mark.parametrize("axis", [True, False], ids=["an axis of their own", "none"])
@pytest.mark.parametrize("ignored", [255, -100])
def test_ignored_pixels_are_no_decisions_of_one_score(ignored, axis):
    labels = torch.tensor([[[1, ignored], [0, 1]]])
    scores = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    batch = Batch(labels=labels[:, None] if axis else labels, size=1, task="segmentation", ignore_index=ignored)
    found = decisions(View(scores), batch)
    assert (found.logits[:, 1].tolist(), found.labels.tolist()) == ([1, 3, 4], [1, 0, 1])


def test_what_does_not_count_is_no_decision_though_its_label_is_a_class():
    scores = torch.arange(12.0).view(1, 4, 3)
    given = {"labels": torch.tensor([[2, 0, 1, 1]]), "size": 1, "task": "token"}
    padded = decisions(View(scores), Batch(**given, mask=torch.tensor([[1, 1, 1, 0]])))
    assert (padded.logits[:, 0].tolist(), padded.labels.tolist()) == ([0, 3, 6], [2, 0, 1])
    assert decisions(View(scores), Batch(**given, ignore_index=0)).labels.tolist() == [2, 1, 1]


def test_labels_of_multi_label_maps_are_those_of_their_scores():
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).view(1, 2, 1, 3)
    found = decisions(View(labels - 0.5), Batch(labels=labels, size=1, task="multilabel"))
    assert found.logits.argmax(1).tolist() == found.labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_analysis_leaves_no_trace():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
    student, teacher = (timm.create_model("vit_tiny_patch16_224", depth=d, **sizes) for d in (2, 3))
    nets = bind(create_distiller("kd"), student, teacher, batch=images(8))
    student.train()
    student.blocks[0].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    modes = [m.training for m in student.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for net in nets for m in net.module.modules()]
    state = torch.get_rng_state()
    others = numpy.random.get_state()[1].tolist(), random.getstate()

    def batches():
        torch.rand(3)  # As a loader with shuffling workers, which draws when it is iterated.
        numpy.random.rand()
        random.random()
        yield images(16)

    found = analyse(nets, batches())
    assert others == (numpy.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in student.modules()] == modes
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for net in nets for m in net.module.modules()]
    assert after == hooks
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    assert found.arrays["cka"].shape == (2, 3)
    assert found.arrays["teacher/attention"].shape == (3, 4, 4, 4)
    assert found.arrays["teacher/attention"].float().sum((-2, -1)).max() <= 1.01
    assert found.summary["labels"] == [0, 1, 2, 3]


def test_the_teacher_agrees_with_itself():
    teacher = cnn(8, 1)
    nets = bind(create_distiller("kd"), cnn(8, 1), teacher, batch=images(8))
    answers = predict(nets, halves(images()))
    summary, arrays = predictions(answers.found(), answers.classes)
    assert summary["student"]["agreement"] == 1
    assert summary["student"]["kl"] == pytest.approx(0, abs=1e-5)
    assert torch.equal(arrays["student/confusion"], arrays["teacher/confusion"])
    assert arrays["student/confusion"].sum() == summary["student"]["examples"] == 48
    cka = analyse(nets, [images()]).arrays["cka"]
    assert cka.diagonal().tolist() == pytest.approx([1.0] * len(cka), abs=1e-3)


def test_predictions_by_hand():
    """Two teachers count by the mean of their probabilities; peers are compared with the student one by one."""
    torch.manual_seed(0)
    student, one, two, peer = torch.randn(4, 300, 5)
    labels, answers = torch.randint(5, (300,)), Answers()
    for rows in torch.arange(300).split(70):
        answers.add("student", student[rows], labels[rows])
        answers.ensemble([one[rows], two[rows]], labels[rows], student[rows])
        answers.add("peer1", peer[rows], labels[rows], student=student[rows])
    summary, arrays = predictions(answers.found(), answers.classes)
    ours, theirs = student.softmax(1), (one.softmax(1) + two.softmax(1)) / 2
    kl, agree = (theirs * (theirs / ours).log()).sum(1).mean(), ours.argmax(1) == theirs.argmax(1)
    same = ours.argmax(1) == peer.argmax(1)
    assert summary["student"] == {
        "nll": pytest.approx(float(nn.functional.cross_entropy(student, labels))),
        "examples": 300,
        "confidence": pytest.approx(float(ours.max(1).values.mean())),
        "accuracy": pytest.approx(float((ours.argmax(1) == labels).float().mean())),
        "ece": pytest.approx(calibration(ours.max(1).values, ours.argmax(1) == labels)[0]),
        "agreement": pytest.approx(float(agree.float().mean())),
        "kl": pytest.approx(float(kl)),
        "peers": pytest.approx(float(same.float().mean())),
    }
    assert summary["teacher"]["accuracy"] == pytest.approx(float((theirs.argmax(1) == labels).float().mean()))
    assert arrays["student/confusion"][2, 3] == int(((labels == 2) & (ours.argmax(1) == 3)).sum())
    # What is no number is not alike; what the teacher gives no probability counts as nothing.
    odd = Answers()
    odd.ensemble([one[:1].index_fill(1, torch.tensor(2), -torch.inf)], labels[:1], student[:1])
    odd.ensemble([one[:1]], labels[:1], student[:1] * torch.nan)
    assert odd.found()["teacher"]["kl"].isfinite().tolist() == [True, False]


def test_a_teacher_of_other_classes_is_left_out_of_predictions():
    torch.manual_seed(0)
    student, other, same = (
        as_nets(net).student for net in (cnn(4, 0), nn.Sequential(cnn(8, 1), nn.Linear(4, 7)), cnn(8, 2))
    )
    one, both, none = (predict(Nets(student, teachers), [images()]) for teachers in ([same], [other, same], [other]))
    assert predictions(both.found(), 4)[0] == predictions(one.found(), 4)[0]
    assert set(none.found()) == {"student"}


def test_where_every_label_is_left_out_nothing_is_known_of_predictions():
    answers = Answers()
    answers.add("student", torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    summary, arrays = predictions(answers.found(), answers.classes)
    assert (summary["student"]["examples"], math.isnan(summary["student"]["accuracy"])) == (0, True)
    assert arrays["student/confusion"].sum() == 0


def test_a_difference_to_a_run_that_diverged_is_not_known():
    assert difference({0: math.nan, 1: 90.0}, {0: 80.0, 1: 80.0}) == difference({0: 1.0}, {1: 1.0}) == "–"


def test_rows_are_drawn_from_the_whole_set():
    rows = [int(row) for row in some_rows(torch.arange(5000), 100)]
    assert len(set(rows)) == 100
    assert max(rows) > 4900
    whole = [int(row) for row in some_rows(torch.arange(5000))]
    assert whole[:100] == rows
    assert sorted(whole) == list(range(5000))


def test_few_rows_are_analysed_in_a_short_training():
    assert [rows_to_analyse(trained) for trained in (480, 2000, 5000, 10**9)] == [0, 8, 32, 256]


def test_as_many_rows_are_asked_on_every_machine():
    assert [rows_to_ask(n) for n in (48, 1_000, 30_000)] == [8, 10, 300]


def test_how_many_rows_there_are_in_words():
    assert sizes([1] * 1200, [1] * 3) == "1,200 training rows and 3 evaluation rows"
    assert sizes(iter([1]), None) == ""


def test_channels_are_seen_in_the_teachers_main_plane():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4)
    ours, theirs = project_channels(student, teacher)
    assert ours.shape == (3, 5, 2)
    assert theirs.shape == (3, 7, 2)
    for i in range(3):
        channels = teacher[i].flatten(1) / teacher[i].flatten(1).norm(dim=1, keepdim=True)
        variances = torch.linalg.eigvalsh(channels.T.cov(correction=0)).flip(0)[:2]
        assert torch.allclose(theirs[i].var(0, correction=0), variances, atol=1e-6)
    scaled = project_channels(2 * student.flip(1), 3 * teacher)
    assert torch.allclose(scaled[0], ours.flip(1), atol=1e-5)
    assert torch.allclose(scaled[1], theirs, atol=1e-5)
    assert project_channels(torch.randn(1, 600, 2, 2), torch.randn(1, 1, 2, 2))[0].shape == (1, 200, 2)


def test_channels_before_and_after_share_the_teachers_points(trained):
    run = load_run(trained)
    before, after = (run.array(phase, "teacher/channels") for phase in ("before", "after"))
    assert torch.equal(before, after)
    assert not torch.equal(run.array("before", "student/channels"), run.array("after", "student/channels"))

    teacher = cnn(8, 1)
    nets = bind(create_distiller("kd"), cnn(8, 1), teacher, batch=images(8))
    nets.student.module.load_state_dict(teacher.state_dict())
    found = analyse(nets, [images()])
    shown = found.summary["channels"]
    # The last map has one position.
    assert shown["student"] == shown["teacher"] == found.summary["student"]["layers"][-2]
    assert found.summary["channels"]["mmd"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(found.arrays["student/channels"], found.arrays["teacher/channels"])


@pytest.mark.parametrize(("token", "register"), [(True, 1), (False, 1), (False, 0)])
def test_whose_attention_is_drawn(token, register):
    """The class token's; without one, the mean of the patches, and never a register's."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=16, depth=1, num_heads=1, num_classes=2, img_size=32, reg_tokens=register)
    pool = "token" if token else "avg"
    vit = timm.create_model("vit_tiny_patch16_224", class_token=token, global_pool=pool, **sizes).eval()
    vit.blocks[0].attn.qkv.weight.data.mul_(30)
    x = torch.randn(4, 3, 32, 32)
    found = analyse(Nets(Net(TimmNetwork(vit), Reads)), [Batch.of(x)]).arrays["student/attention"][0].float()
    with torch.no_grad():
        tokens = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(x)))
        q, k, _ = vit.blocks[0].attn.qkv(tokens).chunk(3, -1)
        probs, first = (q @ k.mT / 4).softmax(-1), token + register
        expected = probs[:, 0, first:] if token else probs[:, first:, first:].mean(1)
    assert torch.allclose(found.flatten(1), expected, atol=2e-3)


def test_sentences_padded_on_the_left_are_shown_without_their_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    net = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=1, **sizes)).eval()
    ids, mask = torch.randint(5, 30, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch = Batch.of({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1]))
    found = analyse(net, [batch])
    assert found.summary["tokens"] == [[str(t) for t in ids[0, 2:].tolist()], [str(t) for t in ids[1].tolist()]]
    shown = found.arrays["student/attention"][0].float()
    assert shown[0, :4, :4].sum(-1).tolist() == pytest.approx([1.0] * 4, abs=2e-3)
    assert shown[0, :4, 4:].max() < 1e-3


def test_maps_with_as_many_channels_as_rows_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16 * 24, 2))
    found = analyse(net, [Batch.of(torch.randn(4, 3, 16, 24))])
    assert found.arrays["student/map/0"].shape == (4, 16, 24)


def test_layers_of_a_network_without_a_library():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    found = analyse(as_nets(net), [images(12)])
    assert found.summary["student"]["layers"] == ["0.0", "0.2", "3"]
    assert found.arrays["cka"].shape == (3, 3)


# Records


def test_recording_changes_no_number(tmp_path):
    recorded, player, record = train(tmp_path / "run")
    plain, *_ = train(None)
    assert all(torch.equal(a, b) for a, b in zip(recorded.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(recorded.buffers(), plain.buffers(), strict=True))
    assert len(record.timer.rows) == 1 + 6
    assert not any(name in vars(player) for name in ("forward", "after_backward", "after_update"))


def test_record_holds_what_was_run(trained):
    info = json.loads((trained / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["method"]["name"] == "kd+nst"
    assert info["method"]["parts"][0]["paper"]["arxiv"] == "1503.02531"
    assert info["teachers"][0]["name"] == "large"
    assert info["versions"]["torch"] == str(torch.__version__)
    parts = info["cost"]["parts"]
    assert {"student forward", "teacher forward", "backward", "optimizer"} <= set(parts)
    assert all(seconds >= 0 for seconds in parts.values())
    assert len((trained / "history.jsonl").read_text().splitlines()) == 6
    arrays = load_file(trained / "analysis.safetensors")
    assert {"before/cka", "after/cka", "after/images", "after/student/map/0"} <= set(arrays)
    assert not torch.equal(arrays["before/cka"], arrays["after/cka"])


def test_nothing_of_the_record_stops_a_training(copied, caplog):
    (copied / "run.json").write_text('{"sec')
    with (copied / "history.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": null}\n[1]\n{"st')
    train(copied, resume=4)
    run = load_run(copied)
    assert run.info["status"] == "finished"
    assert [row["step"] for row in run.history if "step" in row] == [1, 2, 3, 4, 5, 6]
    assert "cannot be read" in run.info["notes"][0]
    (copied / "history.jsonl").unlink()
    (copied / "history.jsonl").mkdir()
    train(copied, resume=5)
    assert "is incomplete: IsADirectoryError" in caplog.text


def test_a_resumed_run_keeps_its_rows(copied):
    before = load_run(copied).info["before"]
    train(copied, resume=4)
    steps = [json.loads(line)["step"] for line in (copied / "history.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    info = load_run(copied).info
    assert (info["resumed"], info["before"]) == (1, before)


def test_what_cannot_be_analysed_is_a_note(tmp_path):
    record = RunRecord(tmp_path, host="bare loop", nets=nn.Linear(4, 2), command=["x"])
    with pytest.warns(UserWarning, match="No analysis before"):
        record.analyse("before", nn.Linear(4, 2), [Batch.of(torch.zeros(3, 5))])
    record.finish({})
    assert "could not be analysed" in render([tmp_path])


def test_what_json_does_not_have_is_written_in_words(tmp_path):
    odd = {"per class": {numpy.int64(3): math.inf, (1, 2): torch.tensor([0.5, math.nan])}, "kinds": {"a"}}
    classes = numpy.array(["cat", "dog"])
    record = RunRecord(tmp_path, host="loop", nets=nn.Linear(4, 2), command=["x"], classes=classes, settings=odd)
    record.log({"step": 1, **odd})
    known = {"per class": {"3": None, "(1, 2)": [0.5, None]}, "kinds": ["a"]}
    assert (record.run["classes"], load_run(tmp_path).info["settings"]) == (["cat", "dog"], known)
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"step": 1, **known}


def test_other_processes_write_nothing(tmp_path):
    record = RunRecord(tmp_path / "none", host="bare loop", nets=nn.Linear(4, 2), enabled=False)
    record.log({"step": 1})
    record.analyse("before", nn.Linear(4, 2), [])
    record.finish({})
    assert not (tmp_path / "none").exists()


# Pages


def test_page_of_a_vision_run(trained):
    html = render([trained])
    page = Page(html)
    assert [key for key in VISION if key in page.ids] == VISION
    assert "attention" not in page.ids
    of_the_run = ("train.py", "<b>&", "Hinton", "arXiv:1707.01219", "small", "large", "nst", "stripes", "torch")
    for words in (*of_the_run, "north", "48 examples"):
        assert words in page.words, words
    assert "--name '<b>" not in html
    assert page.tags.count("img") == 4 * (1 + 4 + 4 + 4)
    assert "light-dark(" in html


def test_page_of_a_text_run_with_stages(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    configs = [transformers.BertConfig(num_hidden_layers=n, **sizes) for n in (2, 4)]
    student, teacher = map(transformers.BertForSequenceClassification, configs)
    ids = torch.randint(5, 30, (36, 9))
    mask = (torch.arange(9) < torch.arange(36)[:, None] % 5 + 5).long()
    batch = Batch.of({"input_ids": ids, "attention_mask": mask}, torch.arange(36) % 2)
    distiller = create_distiller("internal", schedule="progressive")
    nets = bind(distiller, student, teacher, batch=batch, total_steps=9)
    tokens = {"decode": lambda row: [f"t{i}" for i in row]}
    record = RunRecord(tmp_path, host="bare loop", nets=nets, distiller=distiller, command=["x"], **tokens)
    record.analyse("before", nets, [batch])
    for step in range(1, 10):
        record.log({"step": step, "loss": 1 / step, "distill/kl_attention": 0.5 / step})
    record.analyse("after", nets, [batch])
    record.predict(nets, [batch])
    record.finish({"eval_accuracy": 0.5})
    html = render([tmp_path])
    page = Page(html)
    assert [key for key in TEXT if key in page.ids] == TEXT
    assert "features" not in page.ids
    assert f"t{int(ids[0, 0])}" in page.words
    assert "kl_attention" in page.words
    assert (
        page.tags.count("image") == 3 * (2 + 2 + 2) + 3
    )  # Layers that learn from each other; two similarities, one confusion.
    # Every other stage has a band, in both of the two charts.
    assert html.count('style="fill: var(--soft)"') == 2 * -(-len(distiller.stages()) // 2)
    arrays = load_file(tmp_path / "analysis.safetensors")
    rows = arrays["after/teacher/attention"].float().sum(-1)
    assert rows[:, 0, :5].tolist() == [pytest.approx([1.0] * 5, abs=2e-3)] * 2


def test_page_of_a_written_record(tmp_path):
    """A record made by hand: many classes, a peer, no history; numbers are those that were written."""
    k = 30
    confusion = torch.eye(k).int() * 10
    other = confusion.clone()
    other[3, 3], other[3, 7] = 4, 6
    arrays = {"student/confusion": other, "peer1/confusion": confusion, "cka": torch.tensor([[0.25, 1.0]])}
    diagram = torch.tensor([[10.0, 0.75, 0.5], [0.0, 0.0, 0.0]])
    arrays |= {"student/reliability": diagram, "peer1/reliability": diagram.clone()}
    save_file({f"after/{name}": x for name, x in arrays.items()}, tmp_path / "analysis.safetensors")
    own = {"accuracy": 0.98, "ece": 0.0123, "nll": 0.5, "confidence": 0.9, "peers": 0.875, "examples": 300}
    after = {"compared": "peer1", "examples": 300, "predictions": {"classes": k, "student": own, "peer1": own}}
    after |= {"student": {"layers": ["a"]}, "peer1": {"layers": ["b", "c"]}}
    info = {"format": 2, "command": ["x"], "peers": [{"name": "twin"}], "after": after}
    (tmp_path / "run.json").write_text(json.dumps(info))
    page = Page(render([tmp_path]))
    for words in ("98.00 %", "87.5 %", "1.2 %", "peer1: twin", "3 taken for 7", "+6", "0.25"):
        assert words in page.words, words
    assert "curves" not in page.ids
    rewrite(tmp_path, format=1)
    with pytest.raises(DistillError, match="format 1"):
        render([tmp_path])


def test_comparison_sums_up_seeds(tmp_path):
    for method, seed in (("kd", 0), ("kd", 1), ("nst", 0)):
        train(tmp_path / f"{method}-{seed}", method, seed=seed, steps=3)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    page = Page(render(folders))
    assert {"results", "curves", "calibration", "rejection", "similarity", "cost", "runs"} <= set(page.ids)
    assert "27.50" in page.words
    assert "± 0.71" in page.words
    assert page.text.count("kd-0") == 1
    assert page.text.count("kd") >= 3
    assert "2 experiments" in page.words


def test_comparison_has_the_baseline_first_and_the_teacher_once(tmp_path):
    def write(name, method, student, teachers=()):
        folder = tmp_path / name
        folder.mkdir()
        info = {"student": {"name": student, "parameters": len(student)}, "status": "finished", "metric": "eval_top1"}
        info |= {"teachers": [{"name": t, "parameters": len(t)} for t in teachers]}
        info |= {"method": {"name": method} if method else None}
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "history.jsonl").write_text('{"step": 1, "eval_top1": 91.25}\n{"step": 2, "eval_top1": 91.5}\n')
        if teachers:
            own = {"accuracy": 0.9, "ece": 0.01, "nll": 0.5, "confidence": 0.9, "examples": 200}
            predictions = {"student": own | {"agreement": 0.875}, "teacher": own | {"accuracy": 0.96}}
            rewrite(folder, after={"compared": "teacher", "predictions": predictions})
        return folder

    def rows(folders):
        table = render(folders).split("<tbody>")[1].split("</tbody>")[0]
        return [re.findall(r"<td[^>]*>([^<]*)", row) for row in table.split("<tr>")[1:]]

    big = write("big", "", "large")
    rewrite(big, after={"predictions": {"student": {"accuracy": 0.96, "examples": 200}}})
    runs = [big, write("kd", "kd", "small.", ["large"]), write("plain", "", "small.")]
    assert [(row[0], row[2]) for row in rows(runs)] == [("plain", "91.50"), ("kd", "91.50"), ("big (teacher)", "91.50")]
    again = write("nst", "nst", "small.", ["large"])
    found = rows([runs[1], again, runs[2]])
    assert [row[0] for row in found] == ["plain", "kd", "nst", "teacher: large"]
    # Name, runs, result, against alone, accuracy, examples, agreement, ECE, NLL.
    assert found[3] == ["teacher: large", "1", "–", "–", "96.00 %", "200", "–", "1.0 %", "0.500"]
    assert found[1][1:7] == ["1", "91.50", "+0.00", "90.00 %", "200", "87.5 %"]
    # A network that teaches its own kind: its training alone is the baseline.
    twin = write("twin", "kd", "large", ["large"])
    assert [row[0] for row in rows([twin, runs[0]])] == ["big", "twin", "teacher: large"]


def written(
    folder, result, *, method="", teacher="", accuracy=0.9, student="small", data="d", results=None, size=5, **settings
):
    """A record of one evaluation, with a teacher of the name large that has this accuracy."""
    folder.mkdir(parents=True)
    info = {"student": {"name": student, "parameters": size}, "data": data, "settings": settings, "status": "finished"}
    info |= {"method": {"name": method} if method else None, "metric": "eval_top1", "results": results or {}}
    predictions = {"student": {"accuracy": accuracy, "examples": 200}}
    if teacher:
        info["teachers"] = [{"name": "large", "parameters": 9}]
        predictions["teacher"] = {"accuracy": teacher, "examples": 200}
    (folder / "run.json").write_text(json.dumps(info | {"after": {"predictions": predictions}}))
    (folder / "history.jsonl").write_text(json.dumps({"step": 1, "eval_top1": result}))
    return folder


def results(*folders):
    """The first cells of the table of results, and all words of its section."""
    section = render(folders).split('id="results"')[1].split("</section>")[0]
    rows = section.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    return [re.findall(r"<td[^>]*>([^<]*)", row) for row in rows], re.sub(r"<[^>]*>", " ", section)


def test_a_baseline_has_the_same_data_and_settings(tmp_path):
    kd = written(tmp_path / "kd", 90.0, method="kd", lr=0.1, epochs=100, distill="kd")
    other = written(tmp_path / "other", 60.0, data="others", lr=0.1, epochs=100)
    short = written(tmp_path / "short", 70.0, lr=0.2, epochs=1)
    same = written(tmp_path / "same", 80.0, lr=0.2, epochs=100)
    rows, words = results(kd, other, short)
    assert "+" not in rows[2][3]
    assert "kd is not compared with the student alone, which differs in epochs." in words
    rows, words = results(kd, other, short, same)
    assert rows[3][:4] == ["kd", "1", "90.00", "+10.00"]
    assert "differs in" not in words


def test_a_resumed_seed_is_of_the_same_experiment(tmp_path):
    one = written(tmp_path / "kd-0", 90.0, method="kd", lr=0.1)
    other = {"resume_from_checkpoint": "true", "config": "of-1.yaml", "save_strategy": "no", "workers": 2}
    two = written(tmp_path / "kd-1", 92.0, method="kd", lr=0.1, **other)
    rows, words = results(one, two)
    assert [row[:3] for row in rows] == [["kd", "2", "91.00 ± 1.41"]]
    assert "Not at their end" not in words


def test_settings_that_change_no_number_still_say_that_seeds_are_of_one_experiment(tmp_path):
    kept = [written(tmp_path / f"kd-{i}", 90.0, method="kd", seed=i, save_strategy="no") for i in range(2)]
    assert [row[1] for row in results(*kept)[0]] == ["2"]
    bare = [written(tmp_path / f"bare-{i}", 90.0, method="kd", seed=i) for i in range(2)]
    assert [row[1] for row in results(*bare)[0]] == ["1", "1"]


def test_seeds_of_one_experiment_have_one_network_and_one_job(tmp_path):
    """As a DistillationTrainer names them, by their class: networks of two sizes, tasks of two kinds."""
    kept = [written(tmp_path / f"a-{i}", 90.0 + i, lr=0.1, seed=i) for i in range(2)]
    rewrite(written(tmp_path / "big", 50.0, lr=0.1, seed=2), student={"name": "small", "parameters": 7})
    rewrite(written(tmp_path / "numbers", 50.0, lr=0.1, seed=3), task="regression")
    written(tmp_path / "taught", 60.0, method="kd", teacher=0.9, lr=0.1, seed=0)
    rewrite(written(tmp_path / "more", 60.0, method="kd", teacher=0.9, lr=0.1, seed=1), teachers=[{"name": "large"}])
    rows, _ = results(*kept, *(tmp_path / name for name in ("big", "numbers", "taught", "more")))
    assert [row[:3] for row in rows[:3]] == [
        ["a", "2", "90.50 ± 0.71"],
        ["big", "1", "50.00"],
        ["numbers", "1", "50.00"],
    ]
    assert [row[:4] for row in rows[3:5]] == [["taught", "1", "60.00", "−30.00"], ["more", "1", "60.00", "−31.00"]]


def test_runs_of_one_seed_are_no_seeds_of_one_experiment(tmp_path):
    few = [written(tmp_path / f"few-{i}", 60.0 + i, lr=0.1, seed=i) for i in range(2)]
    many = [written(tmp_path / f"many-{i}", 90.0 + i, lr=0.1, seed=i) for i in range(2)]
    rows, _ = results(*few, *many)
    assert [row[:3] for row in rows] == [["few", "2", "60.50 ± 0.71"], ["many", "2", "90.50 ± 0.71"]]
    again = written(tmp_path / "many-2", 80.0, lr=0.1, seed=1)
    assert [row[:3] for row in results(*many, again)[0]] == [
        ["many-0", "1", "90.00"],
        ["many-1", "1", "91.00"],
        ["many-2", "1", "80.00"],
    ]


def test_a_page_says_what_counts_as_an_example(tmp_path):
    run = written(tmp_path / "a", 90.0, teacher=0.9, method="kd")
    words = "An example is here one pixel, of which at most 2,048 of a batch count."
    assert words not in results(run)[1]
    rewrite(run, task="segmentation")
    assert words in results(run)[1]
    both = written(tmp_path / "b", 90.0, accuracy=0.5)
    assert words.replace("pixel", "pixel or input") in results(run, both)[1]


def test_layers_of_several_teachers_are_those_of_the_first(copied):
    first = "Of several teachers it is the first."
    assert first not in render([copied])
    rewrite(copied, teachers=[{"name": "one"}, {"name": "two"}])
    page = render([copied])
    assert page.count(first) == len({"similarity", "features", "channels"})
    assert "of several teachers with their mean probability" in page


def test_what_has_not_come_to_its_end_is_named_beside_the_mean(tmp_path):
    runs = [written(tmp_path / f"kd-{i}", 90.0 - 60 * i, method="kd", lr=0.1) for i in range(2)]
    rewrite(runs[1], status="interrupted")
    rows, words = results(*runs)
    assert rows[0][1] == "2"
    assert "Not at their end, and counted by their last evaluation: kd-1." in words


def test_networks_of_one_name_are_told_apart(tmp_path):
    good = written(tmp_path / "good", 99.0, student="large", accuracy=0.99, size=9)
    other = written(tmp_path / "other", 98.0, student="large", accuracy=0.99, size=8)
    one = written(tmp_path / "one", 60.0, method="kd", teacher=0.58, n=1)
    two = written(tmp_path / "two", 90.0, method="kd", teacher=0.99, n=2)
    names = [(row[0], row[3]) for row in results(good, other, one, two)[0]]
    assert names == [
        ("other", "99.00 %"),
        ("one", "90.00 %"),
        ("two", "90.00 %"),
        ("good (teacher)", "99.00 %"),
        ("teacher: large", "58.00 %"),
    ]
    names = [row[0] for row in results(one, two)[0]]
    assert names == ["one", "two", "teacher: large", "teacher: large"]


def test_the_result_is_that_of_the_exported_student(tmp_path):
    best = written(tmp_path / "best", 60.0, accuracy=0.7, results={"evaluation": {"top1": 70.0}}, lr=1)
    broken = written(tmp_path / "broken", None, lr=2)
    rows, _ = results(best, broken)
    assert rows[0][:3] == ["best", "1", "70.00"]
    assert rows[1][:3] == ["broken", "1", "NaN"]


def test_folders_named_twice_or_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("kd_0", "kd_1", "kd")):
        written(tmp_path / name, 50.0, method="kd", seed=i, lr=i // 2)
    assert find_runs(["kd_0", tmp_path / "kd_0"]) == [Path("kd_0")]
    assert len(results("kd_0", "kd_1", "kd")[0]) == 2


def test_similarity_of_few_examples_is_not_drawn(copied):
    info = json.loads((copied / "run.json").read_text())
    rewrite(copied, **{phase: info[phase] | {"examples": 8} for phase in ("before", "after")})
    assert 'id="similarity"' not in render([copied])


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: of 1, 2 and 6 the mean is 3, the standard deviation 2.646, and t of two degrees of freedom 4.303."""
    alone, kd = {0: 90.0, 1: 92.0, 2: 91.0}, {0: 91.0, 1: 94.0, 2: 97.0, 7: 50.0}
    for method, results in (("", alone), ("kd", kd)):
        for seed, value in results.items():
            folder = tmp_path / "deep" / f"{method or 'alone'}-{seed}"
            folder.mkdir(parents=True)
            info = {"student": {"name": "small"}, "settings": {"seed": seed, "lr": 1}, "status": "finished"}
            (folder / "run.json").write_text(json.dumps(info | {"method": {"name": method} if method else None}))
            (folder / "history.jsonl").write_text(json.dumps({"step": 1, "eval_top1": value}))
    page = Page(render([tmp_path]))
    assert "+3.00 [−3.57, +9.57]" in page.words  # 3 ± 4.303 * 2.646 / 3 ** 0.5
    assert page.text.count("kd-7") == 1


def test_a_diverged_run_has_a_page(copied):
    """What was NaN stands in the record as null: in pictures, in distances, in predictions of no example."""
    info = json.loads((copied / "run.json").read_text())
    info["after"]["channels"]["mmd"] = None
    info["after"]["predictions"]["student"] |= {"accuracy": None, "examples": 0, "ece": None, "nll": None}
    bars = {"kind": "bars", "title": "Lengths", "values": [["first", None], ["second", 0.5]]}
    heatmap = {"kind": "heatmap", "title": "Mix", "values": [[None, 0.25]], "rows": ["row"], "columns": ["a", "b"]}
    points = {"kind": "points", "title": "Plane", "groups": {"student": [[None, 1.0], [2.0, 3.0]], "none": []}}
    rewrite(copied, after=info["after"], pictures=[bars, heatmap, points])
    page = Page(render([copied]))
    for words in ("Lengths", "0.50", "0.25", "Plane"):
        assert words in page.words, words


def test_stages_lie_on_an_axis_of_steps(tmp_path):
    """Of a run that was interrupted nobody knows at which epoch a stage would have begun."""
    stages = {"names": ["first", "second"], "starts": [0, 50], "total": 100}
    info = {"format": 2, "status": "interrupted", "stages": stages}
    (tmp_path / "run.json").write_text(json.dumps(info))
    rows = [{"epoch": n, "step": 10 * n, "loss": 1.0} for n in (1, 2, 3)]
    for unknown in ("", "step"):
        (tmp_path / "history.jsonl").write_text(
            "".join(json.dumps({k: x for k, x in row.items() if k != unknown}) + "\n" for row in rows)
        )
        html = render([tmp_path])
        assert "first: steps 0 to 50" in Page(html).words
        assert ('style="fill: var(--soft)"' in html) == (unknown == "")


def test_a_folder_above_stands_for_its_runs(tmp_path, capsys):
    for name in ("a/one", "b", "a/two"):
        RunRecord(tmp_path / "all" / name, host="loop", nets=nn.Linear(4, 2), command=["x"]).finish({})
    assert main([str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "all" / "comparison.html")
    assert [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path])] == ["all/a/one", "all/a/two", "all/b"]
    # One that is named twice stands where it was named first, and the page above it.
    one, other = tmp_path / "all" / "a" / "one", tmp_path / "all" / "a" / "two"
    assert find_runs([one, other, one]) == [one, other]
    assert main([str(one), str(other), str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "all" / "a" / "comparison.html")


def test_command(tmp_path, capsys):
    run = written(tmp_path / "a", 90.0)
    assert kd_plugins_main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    Page((run / "report.html").read_text(encoding="utf-8"))
    assert main([str(run), str(run), "-o", str(tmp_path / "out" / "both.html")]) == 0
    assert (tmp_path / "out" / "both.html").is_file()
    assert kd_plugins_main(["report", str(tmp_path / "missing")]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match=r"run\.json or history\.jsonl"):
        load_run(tmp_path / "empty")


def test_half_a_surrogate_is_written_as_a_question_mark(tmp_path):
    """As Python reads a command line, or the name of a folder, that is no UTF-8."""
    RunRecord(tmp_path, host="loop", nets=nn.Linear(4, 2), command=["x"], data="a\udcffb").finish({})
    assert load_run(tmp_path).info["data"] == "a?b"
    rewrite(tmp_path, data="c\udcffd")
    assert main([str(tmp_path)]) == 0
    assert "c?d" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_without_an_end_has_a_page(tmp_path):
    record = RunRecord(tmp_path, host="bare loop", nets=nn.Linear(4, 2), command=["x"])
    record.log({"step": 1, "loss": float("nan")})
    record.log({"step": 2, "loss": 0.5})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = Page(render([tmp_path]))
    assert re.search(r"\(unfinished, last written [0-9-]{10} [0-9:]{5} UTC\)", page.words)
    assert "curves" in page.ids


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [-3.0, 5e6], [1e-9, 2e-9], [math.nan]])
def test_curves_of_any_range(values):
    chart = charts.lines({"x": [list(enumerate(values))]}, ["x"], title="t").lower()
    assert "nan" not in chart
    assert "inf" not in chart


def test_ticks_of_a_constant_differ() -> None:
    with charts.style():
        drawn = charts.lines({"": [[(1, 5e-4), (2, 5e-4), (3, 5e-4)]]}, [""], title="learning rate")
    ticks = re.findall(r">(0\.0[0-9]+)<", drawn)
    assert len(ticks) >= 3
    assert len(set(ticks)) == len(ticks)
