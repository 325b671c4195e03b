"""--cache-teacher: each view of each image is asked about once, and shown again."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kd_plugins import DistillError
from kd_timm import cache, distillation
from kd_timm.arguments import parse_args
from kd_timm.checkpoint import forked_random_state
from kd_timm.distillation import DistillStep

AUGMENTED = "--hflip 0.5 --color-jitter 0.4 --aa rand-m9-n2 --distill kd"
KWARGS = "--teacher resnet10t --teacher-kwargs channels=(8,8,16,16) stem_width=8".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    """A teacher of the digits, as flags."""
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(model.state_dict(), path)
    return [*KWARGS, "--teacher-checkpoint", str(path)]


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The teachers that were loaded."""
    seen, create = [], distillation.create_teacher
    monkeypatch.setattr(
        distillation, "create_teacher", lambda name, *a, **k: seen.append(name) or create(name, *a, **k)
    )
    return seen


@pytest.mark.parametrize("extra", ["", "--no-prefetcher --reprob 0.5 --workers 2"])
def test_it_trains_the_student_of_the_same_images_asked_online(run, teacher, loads, tmp_path, monkeypatch, extra):
    """To the last bit: the targets are those of the very images that the student sees, in every epoch."""
    words = [*AUGMENTED.split(), *teacher, *extra.split(), "--cache-teacher", str(tmp_path / "cache")]
    cold = run(*words, name="cold")
    assert len(loads) == 1
    warm = run(*words, name="warm")
    assert len(loads) == 1, "a warm cache needs no teacher"
    kept, loss = {}, DistillStep.loss

    def asked(self, inputs, targets, accumulate):
        with forked_random_state(), torch.no_grad():
            assert torch.equal(self.run.distillation.cache.make()[0].module(inputs), targets.told[0][:, 0])
        kept.setdefault("images", []).append(inputs.clone())
        return loss(self, inputs, targets, accumulate)

    monkeypatch.setattr(DistillStep, "loss", asked)
    again = run(*words, name="again")
    weights = [load_file(s.folder / "last.safetensors") for s in (cold, warm, again)]
    assert all(torch.equal(weights[0][k], w[k]) for w in weights for k in w)
    assert (cold.folder / "summary.csv").read_text() == (warm.folder / "summary.csv").read_text()
    assert cold.results["evaluation"] == warm.results["evaluation"]
    assert cold.results["uncertainty"] == warm.results["uncertainty"]
    assert len(kept["images"]) == 8
    assert not torch.equal(kept["images"][0], kept["images"][4])


def test_an_interrupted_pass_goes_on_and_a_damaged_file_is_made_anew(run, teacher, tmp_path, monkeypatch, caplog):
    """Another number of views asks about the new ones alone, and no run changes what lies there."""
    monkeypatch.setattr(cache, "_BLOCK", 100)
    words, asked, scores = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache")], [], cache._scores

    def counted(run, nets, images, size=0):
        asked.append(len(images))
        if sum(asked) > 350:
            raise KeyboardInterrupt
        return scores(run, nets, images, size)

    monkeypatch.setattr(cache, "_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*words, "--cache-views", "2")
    files = lambda: sorted(tmp_path.glob("cache/*/view-*.safetensors"))  # noqa: E731
    assert [f.stem for f in files()] == ["view-0-0", "view-0-100", "view-0-200"]
    monkeypatch.setattr(cache, "_scores", scores)
    run(*words, "--cache-views", "2")
    assert len(files()) == 6
    whole = {f: f.read_bytes() for f in files()}
    files()[1].write_bytes(files()[1].read_bytes()[:-8])
    run(*words, "--cache-views", "2")
    assert {f: f.read_bytes() for f in files()} == whole
    assert "view-0-100.safetensors is damaged or unfinished" in caplog.text
    run(*words, "--cache-views", "3", "--seed", "7")
    assert {f: f.read_bytes() for f in files() if f in whole} == whole
    assert len(files()) == 9


def test_resume_is_exact(run, teacher, tmp_path, monkeypatch):
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache"), "--epochs", "4"]
    words += ["--cache-views", "3", "--drop", "0.2"]
    whole = run(*words, name="whole")
    run(*words, "--stop-epoch", "2", name="parts")
    parts = run(*words, "--resume", str(whole.folder.parent / "parts"), name="parts")
    one, two = (load_file(s.folder / "last.safetensors") for s in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_what_differs_is_named(run, teacher, tmp_path, caplog, monkeypatch):
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache")]
    run(*words)

    def changed(*extra: str) -> str:
        caplog.clear()
        run(*words, *extra)
        return caplog.text.partition("these have changed: ")[2].partition(".")[0]

    assert changed("--lr", "0.1", "-b", "32", "--seed", "3") == ""
    assert changed("--hflip", "0.2") == "augmentation"
    assert changed("--train-split", "train[:200]") == "data"
    assert changed("--amp", "--amp-dtype", "bfloat16") == "precision"
    other = {k: v + 1 for k, v in load_file(words[words.index("--teacher-checkpoint") + 1]).items()}
    save_file(other, tmp_path / "model.safetensors")
    words[words.index("--teacher-checkpoint") + 1] = str(tmp_path / "model.safetensors")
    assert changed() == "teachers"
    digits = cache.Replayed.item
    monkeypatch.setattr(cache.Replayed, "item", lambda self, row, view: digits(self, row, view + 1))
    with pytest.raises(DistillError, match="The images are not those that the teachers"):
        run(*words)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("--mixup 0.2", "mixes the images of a batch"),
        ("--aug-repeats 3", "a row several times in an epoch"),
        ("--reprob 0.2", "add --no-prefetcher"),
        ("--use-multi-epochs-loader", "read ahead"),
    ],
)
def test_augmentation_that_cannot_be_replayed_is_refused(extra, reason, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--distill", "kd", "--teacher", "resnet10t", "--cache-teacher", "x", *extra.split()])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("distill", "reason"),
    [
        ("nst", "nst reads their layers"),
        ("noisy --distill-args fickle=true", "leave its cached logits out"),
    ],
)
def test_a_method_that_asks_more_is_refused(run, teacher, tmp_path, distill, reason):
    with pytest.raises(DistillError, match=reason):
        run("--distill", *distill.split(), *teacher, "--cache-teacher", str(tmp_path / "cache"))


def test_a_teacher_that_draws_random_numbers_is_refused(run, teacher, tmp_path, monkeypatch):
    create = distillation.create_teacher

    def noisy(*args, **kwargs):
        made = create(*args, **kwargs)
        made.module.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
        return made

    monkeypatch.setattr(distillation, "create_teacher", noisy)
    with pytest.raises(DistillError, match="two forwards differ"):
        run("--distill", "kd", *teacher, "--cache-teacher", str(tmp_path / "cache"))


def test_several_teachers(run, teacher, loads, tmp_path):
    words = ["--distill", "endd", *teacher, *teacher, "--cache-teacher", str(tmp_path / "cache")]
    cold, warm = run(*words), run(*words)
    assert len(loads) == 2
    assert cold.results["evaluation"] == warm.results["evaluation"]
    (file,) = tmp_path.glob("cache/*/view-0-0.safetensors")
    assert load_file(file)["logits"].shape == (256, 2, 10)


def test_the_highest_scores_stand_for_all(run, teacher, tmp_path):
    """With the rest as one class: all of them are the whole, and fewer another training."""
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache")]
    runs = [
        run(*words, *extra, name="top" + "".join(extra[1:]))
        for extra in ((), ("--cache-top-k", "10"), ("--cache-top-k", "3"))
    ]
    whole, same, few = (load_file(s.folder / "last.safetensors") for s in runs)
    assert all(torch.equal(whole[k], same[k]) for k in whole)
    assert not all(torch.equal(whole[k], few[k]) for k in whole)
    kept = [load_file(f) for f in sorted(tmp_path.glob("cache/*/view-0-0.safetensors"), key=lambda f: f.stat().st_size)]
    assert [{k: list(v.shape) for k, v in x.items()} for x in kept] == [
        {"logits": [256, 1, 4], "classes": [256, 1, 3]},
        {"logits": [256, 1, 10]},
    ]
    with pytest.raises(DistillError, match="the 3 highest of the teacher's scores"):
        run(*words, "--distill", "dkd", "--distill-args", "temperature=4", "--cache-top-k", "3")
