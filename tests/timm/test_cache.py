"""--cache-teacher: each view of each image is asked about once, and shown again."""

from __future__ import annotations

import io
import tarfile
import threading
from argparse import Namespace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kd_accelerate.cached import making, note_facts, whole
from kd_accelerate.randomness import undisturbed
from kd_plugins import Batch, DistillError, Net, Reads, create_distiller
from kd_plugins.states import write_json
from kd_timm import cache, data, distillation
from kd_timm import rows as training_rows
from kd_timm.arguments import parse_args
from kd_timm.distillation import DistillStep
from kd_timm.network import TimmNetwork

AUGMENTED = "--hflip 0.5 --color-jitter 0.4 --aa rand-m9-n2 --distill kd"
KWARGS = "--teacher resnet10t --teacher-kwargs channels=(8,8,16,16) stem_width=8".split()


@pytest.fixture
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


@pytest.mark.parametrize(
    "extra",
    [
        "--distill kd+fitnet --distill-args fitnet.layers=1,layer3 fitnet.weight=1 --channels-last",
        "--distill crd --distill-args negatives=8 dim=4",
        pytest.param("--no-prefetcher --reprob 0.5 --workers 2", marks=pytest.mark.slow),
    ],
)
def test_it_trains_the_student_of_the_same_images_asked_online(run, teacher, loads, tmp_path, monkeypatch, extra):
    """To the last bit: the targets are those of the very images that the student sees, in every epoch."""
    words = [*AUGMENTED.split(), *teacher, *extra.split(), "--cache-teacher", str(tmp_path / "cache")]
    images, loss = [], DistillStep.loss

    def asked(self, inputs, targets, accumulate):
        distillation = self.run.distillation
        with undisturbed(), torch.no_grad():
            asked = Net(TimmNetwork(distillation.cache.make()[0].module), Reads, frozen=True)
            view = asked(Batch.of(inputs), reads=Reads(features=distillation.cache.layers[0]))
        told = distillation.batch(inputs, targets)
        assert torch.equal(view.logits, told.teacher_logits[0])
        assert told.teacher_features[0].keys() == view.features.keys()
        assert all(torch.equal(x, view.features[name]) for name, x in told.teacher_features[0].items())
        images.append(inputs.clone())
        return loss(self, inputs, targets, accumulate)

    with monkeypatch.context() as patched:
        patched.setattr(DistillStep, "loss", asked)
        cold = run(*words, name="cold")
    assert len(images) == 8
    assert not torch.equal(images[0], images[4])
    loads.clear()
    warm = run(*words, name="warm")
    assert not loads, "a warm cache needs no teacher"
    one, two = (load_file(s.folder / "last.safetensors") for s in (cold, warm))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (cold.folder / "summary.csv").read_text() == (warm.folder / "summary.csv").read_text()
    assert [cold.results[k] == warm.results[k] for k in ("evaluation", "uncertainty")] == [True, True]


def test_an_interrupted_pass_goes_on_and_a_damaged_file_is_made_anew(run, teacher, tmp_path, monkeypatch, caplog):
    """Another number of views asks about the new ones alone, and no run changes what lies there."""
    monkeypatch.setattr(cache, "_BLOCK", 25)
    words, asked, views = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache")], [], cache._views

    def counted(run, nets, images, *rest):
        asked.append(len(images))
        if sum(asked) > 87:
            raise KeyboardInterrupt
        return views(run, nets, images, *rest)

    monkeypatch.setattr(cache, "_views", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*words, "--cache-views", "2")
    files = lambda: sorted(tmp_path.glob("cache/*/view-*.safetensors"))  # noqa: E731
    assert [f.stem for f in files()] == ["view-0-0", "view-0-25", "view-0-50"]
    monkeypatch.setattr(cache, "_views", views)
    run(*words, "--cache-views", "2")
    assert len(files()) == 6
    whole = {f: f.read_bytes() for f in files()}
    files()[1].write_bytes(files()[1].read_bytes()[:-8])
    run(*words, "--cache-views", "3", "--seed", "7")
    assert "view-0-25.safetensors is damaged or unfinished" in caplog.text
    assert {f: f.read_bytes() for f in files() if f in whole} == whole
    assert len(files()) == 9


def test_resume_is_exact(run, stopped, teacher, tmp_path):
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache"), "--epochs", "4"]
    words += ["--cache-views", "3", "--drop", "0.2"]
    whole = run(*words, name="whole")
    stopped(10, *words, name="parts")
    parts = run(*words, "--resume", str(whole.folder.parent / "parts"), name="parts")
    one, two = (load_file(s.folder / "last.safetensors") for s in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_what_the_answers_depend_on(teacher, few_digits, tiny, tmp_path):
    def facts(*extra: str) -> dict[str, str]:
        words = [*tiny, *AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path), *extra]
        args = parse_args(words)
        args.dataset = "digits"
        data.apply_data_defaults(args)
        rows = data.create_datasets(args, 3)
        made = cache.TeacherCache(args, {"mean": (0.5,)}, rows, distillation.make_distiller(args))
        return made.facts

    plain = facts()

    def changed(*extra: str) -> list[str]:
        found = facts(*extra)
        return [name for name in found if plain.get(name) != found[name]]

    assert changed("--lr", "0.1", "-b", "32", "--seed", "3", "--epochs", "9", "--cache-views", "2") == []
    assert changed("--hflip", "0.2") == ["augmentation"]
    assert changed("--train-split", "train[:200]") == ["data"]
    assert changed("--amp", "--amp-dtype", "bfloat16") == ["precision"]
    assert changed("--cache-top-k", "3") == ["top k"]
    assert changed("--cache-top-k", "10") == []
    assert changed("--distill", "at") == ["layers"]
    save_file({k: v + 1 for k, v in load_file(teacher[-1]).items()}, tmp_path / "model.safetensors")
    teacher[-1] = str(tmp_path / "model.safetensors")
    assert changed() == ["teachers"]


def test_members_of_a_tar_and_images_of_the_evaluation_are_told_apart(tmp_path):
    def rows(shade: int):
        path = tmp_path / f"{shade}.tar"
        with tarfile.open(path, "w") as tar:
            for name in ("a/0.png", "b/0.png"):
                stream = io.BytesIO()
                Image.new("RGB", (4 + shade, 4)).save(stream, "PNG")
                member = tarfile.TarInfo(name)
                member.size = stream.tell()
                stream.seek(0)
                tar.addfile(member, stream)
        return timm.data.create_dataset("", str(path))

    one, two = rows(0), rows(60)
    assert cache._rows_id(one) == cache._rows_id(rows(0)) != cache._rows_id(two)
    where = SimpleNamespace(process_index=0, num_processes=1)
    ids = [
        cache._evaluation_id(
            SimpleNamespace(
                args=parse_args([]),
                accelerator=where,
                data=SimpleNamespace(evaluation=torch.utils.data.DataLoader(rows), other=None),
            )
        )
        for rows in (one, two)
    ]
    assert ids[0] != ids[1]


def test_a_teacher_is_known_by_its_weights_wherever_they_lie(tmp_path, monkeypatch):
    def id_of(name: str) -> str:
        return cache._teachers_id(Namespace(teacher=[name], teacher_checkpoint=[], teacher_kwargs=[]))

    found = set()
    for name in ("model.pth", "model.safetensors"):
        for content in ("1", "2"):
            (tmp_path / name).write_text(content)
            found.add(id_of(f"local-dir:{tmp_path}"))
    assert len(found) == 4

    # The hub's cache marks a file that a repository does not have, and has none before the first load.
    loaded, there = [], {}
    monkeypatch.setattr(cache, "published", lambda name, kwargs: loaded.append(name) or there.update(w="blobs/one"))
    kept = lambda repo, file, revision: there.get("w") if file.endswith(".bin") else object()  # noqa: E731
    monkeypatch.setattr(cache, "try_to_load_from_cache", kept)
    first = id_of("hf-hub:me/mine")
    assert first == id_of("hf-hub:me/mine")
    assert loaded == ["hf-hub:me/mine"]
    there["w"] = "blobs/two"
    assert first != id_of("hf-hub:me/mine")


def test_a_process_without_a_block_of_its_own_fills_nothing(teacher, few_digits, tiny, tmp_path):
    args = parse_args([*tiny, *AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path)])
    args.dataset = "digits"
    data.apply_data_defaults(args)
    rows = data.create_datasets(args, 3)
    made = cache.TeacherCache(args, {"mean": (0.5,)}, rows, distillation.make_distiller(args))
    made.folder.mkdir()
    block = made.answers.file((0, 0, 64))
    with making(block):
        save_file({"logits": torch.zeros(64, 1, 10)}, block)
    said = []
    run = SimpleNamespace(
        args=args,
        data=SimpleNamespace(replayed=training_rows.Replayed(rows.train), evaluation=None, other=None),
        accelerator=SimpleNamespace(
            process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=lambda: None
        ),
        reporter=SimpleNamespace(line=said.append),
    )
    made.fill(run, [], epochs=1)
    # Ten numbers, and a share of the file's header.
    assert "1 views of each image, 41 bytes each" in said[0]


def test_a_file_that_another_run_makes_is_waited_for(tmp_path):
    """A file is not taken for damaged, and removed, while the run that makes it has yet to seal it."""
    file, began, made = tmp_path / "block", threading.Event(), []

    def other() -> None:
        began.wait()
        with making(file) as missing:
            made.append(missing)

    thread = threading.Thread(target=other)
    thread.start()
    with making(file) as missing:
        file.write_text("answers")
        began.set()
        thread.join(0.2)
        assert missing
    thread.join()
    assert made == [False]
    assert whole(file)
    assert file.read_text() == "answers"


def test_a_fact_that_has_gone_is_told(tmp_path, caplog):
    write_json(tmp_path / "a.json", {"data": "x", "top k": "3"})
    note_facts(tmp_path / "b.json", {"data": "x"}, [tmp_path / "a.json"])
    assert "have changed: top k." in caplog.text


def test_a_method_with_a_pass_of_its_own_is_refused(monkeypatch):
    distiller = create_distiller("kd")
    monkeypatch.setattr(type(distiller), "prepare", lambda self, nets, batches: None)
    with pytest.raises(DistillError, match="kd looks at the images before it"):
        cache._layers(distiller, 1)


def test_other_classes_are_refused_before_a_teacher_is_asked(run, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_views", lambda *a: pytest.fail("asked"))
    with pytest.raises(DistillError, match="tells 10 classes apart and the student tells 12"):
        run("--distill", "kd", *teacher, "--num-classes", "12", "--cache-teacher", str(tmp_path / "cache"))


def test_images_that_have_changed_are_refused(run, teacher, tmp_path, monkeypatch):
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache"), "--epochs", "1"]
    run(*words)
    item = training_rows.Replayed.item
    monkeypatch.setattr(training_rows.Replayed, "item", lambda self, row, view: item(self, row, view + 1))
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
        ("quest", "quest looks at the images before it"),
        ("kd+at --distill-args at.layers=layer*", "all layers or a glob: leave it out"),
        ("nst", "has one position"),
        ("afd --distill-args layer=2", "and this method asks for more"),
        ("noisy --distill-args fickle=true", "leave its cached logits out"),
    ],
)
def test_a_method_that_asks_more_is_refused(run, teacher, tmp_path, monkeypatch, distill, reason):
    monkeypatch.setattr(cache, "_views", lambda *a: pytest.fail("asked"))
    words = [*teacher, "--cache-teacher", str(tmp_path / "cache")]
    words.insert(words.index("stem_width=8"), "drop_rate=0.4")
    with pytest.raises(DistillError, match=reason):
        run("--distill", *distill.split(), *words)


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
    assert load_file(file)["logits"].shape == (64, 2, 10)


def test_the_highest_scores_stand_for_all(run, teacher, tmp_path, monkeypatch):
    words = [*AUGMENTED.split(), *teacher, "--cache-teacher", str(tmp_path / "cache"), "--epochs", "1"]
    run(*words, "--cache-top-k", "3")
    (file,) = tmp_path.glob("cache/*/view-0-0.safetensors")
    assert {k: list(v.shape) for k, v in load_file(file).items()} == {"logits": [64, 1, 4], "classes": [64, 1, 3]}
    monkeypatch.setattr(cache, "_views", lambda *a: pytest.fail("asked"))
    for method, *options in (["dkd"], ["kd+dist"], ["kd", "standardize=true"], ["noisy", "logit_sigma=1"]):
        with pytest.raises(DistillError, match="reads them all: leave --cache-top-k out"):
            run(*words, "--distill", method, "--distill-args", *options, "--cache-top-k", "2")


def test_what_a_disk_does_not_hold_is_refused_before_it_is_asked(run, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DistillError, match="128 answers of 40 bytes are 0.0 GiB, and the disk"):
        run("--distill", "kd", *teacher, "--cache-teacher", str(tmp_path / "cache"))
