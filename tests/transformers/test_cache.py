"""The teacher's logits as a column: the same training without its forward, made once, never another teacher's."""

from __future__ import annotations

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trainer_kit as kit
import transformers
from datasets import Dataset, concatenate_datasets
from datasets import Image as Picture
from image_kit import Images, image_classifier
from PIL import Image
from torch import nn
from transformers import BertTokenizer, DataCollatorWithPadding, default_data_collator

from kd_plugins import Batch, Distiller, DistillError, Needs, Reads, create_distiller
from kd_plugins.methods.kd import KD
from kd_transformers import DistillationTrainer, cache_teacher
from kd_transformers.columns import TEACHER_LOGITS, Told, as_file
from kd_transformers.recording import RecordCallback
from kd_transformers.told import Absent, temperature_of


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Tokenized rows in an Arrow file, as a user has them; what is computed of them is kept beside it."""
    texts = kit.Texts()
    Dataset.from_list([{k: v.tolist() for k, v in texts[i].items()} for i in range(len(texts))]).save_to_disk(tmp_path)
    return Dataset.load_from_disk(str(tmp_path))


def train(folder: Path, dataset: Any, teacher: Any = None, student: Any = None, **options: Any) -> DistillationTrainer:
    run = DistillationTrainer(
        kit.bert() if student is None else student,
        kit.arguments(folder),
        train_dataset=dataset,
        teacher_model=kit.teacher() if teacher is None else teacher,
        **{"distiller": "kd", **options},
    )
    run.train()
    return run


def test_it_trains_the_same_student_without_the_teachers_forward(rows, tmp_path):
    teacher = kit.teacher()
    plain = train(tmp_path / "a", rows, teacher)
    cached = cache_teacher(rows, teacher, batch_size=4)
    with kit.calls({"teacher": teacher}) as count:
        quick = train(tmp_path / "b", cached, teacher)
    assert count["teacher"] == 1, "only the comparison before the training"
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) < 1e-6


STUDENT, TEACHER, POOLED = "bert.encoder.layer.0.output", "bert.encoder.layer.1.output", ("bert.pooler",)


class Tokens(Distiller):
    """Compares the hidden states of tokens."""

    def needs(self) -> Needs:
        return Needs(Reads(features=(STUDENT,)), Reads(features=(TEACHER,)))

    def loss(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        gaps = (student.features[STUDENT] - teacher.features[TEACHER]).square().mean(-1)
        return {"gap": gaps[batch.mask.bool()].mean()}


@pytest.mark.parametrize("name", ["rkd", "tokens"])
def test_layers_are_kept_for_the_method_that_reads_them(rows, tmp_path, name):
    def distiller() -> Distiller:
        return Tokens() if name == "tokens" else create_distiller("kd+rkd", **{"rkd.layers": POOLED})

    ragged = rows.map(lambda row: {k: v[: sum(row["attention_mask"])] for k, v in row.items() if k != "labels"})
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", *map(str, range(63))])})
    teacher, collate = kit.teacher(), DataCollatorWithPadding(tokenizer)
    plain = train(tmp_path / "a", ragged, teacher, distiller=distiller(), data_collator=collate)
    cached = cache_teacher(ragged, teacher, collate, distiller=distiller(), batch_size=4)
    with kit.calls({"teacher": teacher}) as count:
        quick = train(tmp_path / "b", cached, teacher, distiller=distiller(), data_collator=collate)
        arguments: dict[str, Any] = {"train_dataset": cached, "data_collator": collate, "distiller": distiller()}
        absent = DistillationTrainer(kit.bert(), kit.arguments(tmp_path / "c"), **arguments)
        absent.train()
    assert count["teacher"] == 1, "only the comparison before the training"
    for other in (quick, absent):
        assert kit.difference(kit.weights(plain.model), kit.weights(other.model)) < 1e-6
    column = next(c for c in cached.column_names if c.startswith("teacher_layer:0:"))
    turned = cached.remove_columns(column).add_column(column, cached[column][::-1])
    with pytest.raises(DistillError, match=r"layers are not what teacher_model gives|tells of"):
        train(tmp_path / "d", turned, teacher, distiller=distiller(), data_collator=collate)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_layers_in_a_format_of_arrays(rows, kind):
    """What a layer gives may end with zeros."""
    ended = torch.eye(3)[:, :1].repeat(1, 4)
    column = Dataset.from_dict({'teacher_layer:0:"x"': [*map(as_file, ended)]}).with_format(kind)
    batch = Told(default_data_collator, tokens=False)([{**row, "labels": 0} for row in column])
    assert torch.equal(batch['teacher_layer:0:"x"'], ended)


def test_columns_that_no_teacher_reads_are_not_read(rows):
    lost = Dataset.from_dict({"image": ["/nowhere.png"] * len(rows)}).cast_column("image", Picture())
    cached = cache_teacher(concatenate_datasets([rows, lost], axis=1), kit.teacher())
    assert np.array_equal(
        cached.select_columns(TEACHER_LOGITS)[:][TEACHER_LOGITS], cache_teacher(rows, kit.teacher())[:][TEACHER_LOGITS]
    )


def test_a_cache_may_take_the_place_of_rows_that_were_looked_at(rows, tmp_path):
    teacher, distiller = kit.teacher(), create_distiller("rkd", layers=POOLED)
    run = DistillationTrainer(
        kit.bert(), kit.arguments(tmp_path, max_steps=2), train_dataset=rows, teacher_model=teacher, distiller=distiller
    )
    run.get_train_dataloader()
    run.train_dataset = cache_teacher(rows, teacher, distiller=distiller)
    with kit.calls({"teacher": teacher}) as count:
        run.train()
    assert count["teacher"] == 1, "only the comparison before the training"


def augment(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Another crop and another brightness in every look."""
    crops = []
    for pixels in rows["image"]:
        image, left = torch.tensor(pixels), int(torch.randint(5, ()))
        crops.append(image[:, left : left + 16, : image.shape[2]] * (0.5 + random.random()) + np.random.rand())  # noqa: NPY002
    return {"pixel_values": crops, "labels": rows["labels"]}


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 20, 16, generator=generator).tolist()
    Dataset.from_list([{"image": x, "labels": i % 3} for i, x in enumerate(pixels)]).save_to_disk(tmp_path / "images")
    return Dataset.load_from_disk(str(tmp_path / "images")).with_transform(augment)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_student_sees_the_views_that_the_teacher_was_asked_about(images, tmp_path, workers):
    """In every epoch, wherever the run begins, and the teacher is not asked again."""
    teacher = image_classifier((4, 8), 1).eval()
    cached = cache_teacher(images, teacher, distiller="kd+fitnet", views=2)
    column = "teacher_layer:0:-1"
    seen: list[torch.Tensor] = []

    class Seeing(DistillationTrainer):
        def _batch(self, inputs: Any) -> Batch:
            batch = super()._batch(inputs)
            with torch.no_grad():
                torch.testing.assert_close(teacher(batch.inputs).logits, batch.teacher_logits, rtol=1e-5, atol=1e-5)
            seen.append(batch.inputs)
            return batch

    def trained(folder: str, **options: Any) -> Any:
        settings: dict[str, Any] = {"num_train_epochs": 3, "dataloader_num_workers": workers}
        # Shuffled, as by default: of such a loader that goes on within an epoch the sampler alone hears of it.
        settings |= {
            "remove_unused_columns": False,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "random",
        }
        args = kit.arguments(tmp_path / folder, **settings, **options.pop("args", {}))
        method = create_distiller("kd+fitnet", **{"fitnet.weight": 1.0})
        run = Seeing(image_classifier((4, 8), 0), args, train_dataset=cached, distiller=method)
        run.train(**options)
        return run

    whole = trained("whole")
    assert column in cached.column_names
    first, steps = seen[1], (len(seen) - 1) // 3
    assert not torch.equal(first, seen[1 + steps]), "another view in the second epoch"
    with kit.calls({"teacher": teacher}) as count:
        again = cache_teacher(images, teacher, distiller="kd+fitnet", views=2)
    assert not count.get("teacher")
    assert again.answers[1][column] == cached.answers[1][column]
    trained("parts", args={"save_strategy": "steps", "save_steps": steps + 1, "max_steps": steps + 1})
    cached.set_epoch(0)  # as a process that begins finds it
    parts = trained("parts", resume_from_checkpoint=True)
    assert kit.difference(kit.weights(whole.model), kit.weights(parts.model)) == 0.0


def test_a_transform_that_cannot_be_replayed_is_refused(images):
    own = np.random.default_rng(0)

    def pixels(rows: Any) -> dict[str, Any]:
        return {"pixel_values": [own.random((3, 16, 16))] * len(rows["image"])}

    def pictures(rows: Any) -> dict[str, Any]:
        made = [Image.fromarray(own.integers(0, 255, (16, 16), dtype=np.uint8)) for _ in rows["image"]]
        return {"image": made, "pixel_values": torch.zeros(len(made), 3, 16, 16, dtype=torch.bfloat16)}

    for noisy in map(images.with_transform, (pixels, pictures)):
        with pytest.raises(DistillError, match="draws from a generator of its own"):
            cache_teacher(noisy, image_classifier((4, 8), 1), views=2)
    with pytest.raises(DistillError, match="say how many views of each are kept, views=N"):
        cache_teacher(images, image_classifier((4, 8), 1))
    with pytest.raises(DistillError, match="got one without: leave it out"):
        cache_teacher(images.with_format(None), image_classifier((4, 8), 1), views=2)


def test_a_method_is_asked_what_it_reads(rows):
    with pytest.raises(DistillError, match="dkd reads them all: leave top_k out"):
        cache_teacher(rows, kit.teacher(), distiller="dkd", top_k=2)
    with pytest.raises(DistillError, match="kd reads at temperature 4, got 2.0"):
        cache_teacher(rows, kit.teacher(), distiller="kd", top_k=2, temperature=2.0)
    assert temperature_of(cache_teacher(rows, kit.teacher(), distiller="kd", top_k=2)) == 4.0
    assert "teacher_layer" not in str(cache_teacher(rows, kit.teacher(), distiller="internal").column_names)


def test_it_is_what_the_teacher_says_and_leaves_the_teacher_as_it_was(rows):
    teacher = kit.teacher(dropout=True).train()
    teacher.bert.encoder.layer[0].eval()
    modes = [module.training for module in teacher.modules()]
    logits = torch.tensor(cache_teacher(rows, teacher)[TEACHER_LOGITS])
    assert [module.training for module in teacher.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher.eval()(**kit.Texts().batch()).logits, rtol=1e-5, atol=1e-5)


def test_the_same_teacher_is_asked_once_and_another_anew(rows):
    teacher = kit.teacher()
    first = cache_teacher(rows, teacher)
    with kit.calls({"teacher": teacher}) as count:
        again = cache_teacher(rows, teacher)
        assert not count.get("teacher")
        with torch.no_grad():
            teacher.classifier.bias += 1
        other = cache_teacher(rows, teacher)
        assert count["teacher"]
    assert again[TEACHER_LOGITS] == first[TEACHER_LOGITS]
    assert other[TEACHER_LOGITS] != first[TEACHER_LOGITS]
    assert cache_teacher(other, teacher)[TEACHER_LOGITS] == other[TEACHER_LOGITS]


def test_the_teacher_need_not_be_loaded(rows, tmp_path):
    """Its classes are noted in the data set, which may be written and read; more than its logits is refused."""
    names = {i: "cab"[i] for i in range(3)}
    teacher, student = kit.teacher(id2label=names), kit.bert(id2label={i: "abc"[i] for i in range(3)})
    cached = cache_teacher(cache_teacher(rows, kit.teacher()), teacher)
    cached.save_to_disk(tmp_path / "cached")
    again = Dataset.load_from_disk(str(tmp_path / "cached"))

    def trained(data: Any, **given: Any) -> DistillationTrainer:
        run = DistillationTrainer(copy.deepcopy(student), kit.arguments(tmp_path), train_dataset=data, **given)
        run.add_callback(RecordCallback(run))
        run.train()
        return run

    plain, quick = trained(cached, teacher_model=teacher, distiller="kd"), trained(again, distiller="kd")
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) == 0.0
    quick.create_model_card()
    assert "- teacher: BertForSequenceClassification" in (tmp_path / "README.md").read_text()
    with pytest.raises(DistillError, match="the BertForSequenceClassification that wrote them is not loaded"):
        trained(again, distiller="internal")
    student.config.id2label = {0: "a", 1: "b", 2: "d"}
    with pytest.raises(DistillError, match="name their 3 classes differently"):
        trained(again, distiller="kd")
    again.info.description = ""
    with pytest.raises(DistillError, match="does not say which teacher wrote its column"):
        trained(again, distiller="kd")
    with pytest.raises(DistillError, match="kd needs at least one teacher, got 0"):
        trained(rows, distiller="kd")
    fewer = cache_teacher(rows, kit.teacher(num_labels=2))
    with pytest.raises(DistillError, match="got 3 in the student and 2 in BertForSequenceClassification:"):
        train(tmp_path, fewer, ())


def test_a_teacher_is_loaded_where_it_has_to_be_asked(rows, caplog):
    """Known by what stands for it; whatever the logits depend on is noticed, and named."""
    teacher, loads = kit.teacher(), []

    def absent(identity: str = "a", **config: Any) -> Absent:
        return Absent(type(teacher), copy.deepcopy(teacher.config), identity, lambda: loads.append(1) or teacher)

    def collator(*words: str, multiple: int | None = None) -> DataCollatorWithPadding:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)

    def asks(*given: Any) -> str:
        caplog.clear()
        before = len(loads)
        cache_teacher(*given)
        assert len(loads) - before == bool(caplog.messages)
        return " ".join(caplog.messages).partition("these have changed: ")[2]

    plain = cache_teacher(rows, absent(), collator("a", "b"))
    assert len(loads) == 1
    assert plain[TEACHER_LOGITS][:] == cache_teacher(rows, teacher, collator("a", "b"))[TEACHER_LOGITS][:]
    assert asks(rows, absent(), collator("a", "b")) == ""
    assert asks(rows, absent("b"), collator("a", "b")) == "teacher's weights."
    assert asks(rows, absent(), collator("b", "a")) == "tokenizer."
    assert asks(rows, absent(), collator("a", "b", multiple=8)) == "collator."
    assert asks(rows, absent(), lambda items: default_data_collator(items)) == "collator, tokenizer."
    assert asks(rows.select(range(8)), absent(), collator("a", "b")) == "rows."
    half = absent()
    half.config.dtype = torch.bfloat16
    assert asks(rows, half, collator("a", "b")) == "teacher's dtype."


def test_a_teacher_is_loaded_where_a_method_reads_more(rows, tmp_path):
    teacher = kit.teacher()
    absent = Absent(type(teacher), teacher.config, "a", lambda: copy.deepcopy(teacher))
    cached = cache_teacher(rows, absent)
    for distiller in ("kd", "internal", "noisy"):
        plain, quick = (train(tmp_path, cached, t, distiller=distiller) for t in (teacher, absent))
        assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) == 0.0, distiller
        assert any(True for t in quick.teachers for _ in t.parameters()) == (distiller != "kd")


@pytest.mark.parametrize("distiller", ["dfa", "reviewkd"])
def test_a_method_of_layers_loads_the_teacher(distiller, tmp_path):
    """Also one that looks for its layers in the set-up."""
    images = Images(16)
    rows = Dataset.from_dict({"pixel_values": images.images.tolist(), "labels": images.labels.tolist()})
    teacher = image_classifier([8, 16], 1)
    cached = cache_teacher(rows.with_format("torch"), teacher)
    absent = Absent(type(teacher), teacher.config, "a", lambda: copy.deepcopy(teacher))
    options = {"distiller": distiller, "distiller_args": {"layers": [-2, -1]} if distiller == "reviewkd" else {}}
    plain, quick = (train(tmp_path, cached, t, image_classifier([4, 8], 0), **options) for t in (teacher, absent))
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) == 0.0


def test_an_interrupted_pass_goes_on_and_a_damaged_file_is_made_anew(rows, monkeypatch):
    """Blocks of rows that are there are not asked about again."""
    monkeypatch.setattr("kd_transformers.cache._BLOCK", 4)
    teacher, seen = kit.teacher(), []

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(kwargs["input_ids"]))
        if len(seen) == 4:
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(rows, teacher)
    cached = cache_teacher(rows, teacher)
    # The first rows of a pass are asked about twice.
    assert seen == [4, 4, 4, 4, *[4, 4, 4]]
    handle.remove()
    with torch.no_grad():
        expected = teacher.eval()(**kit.Texts().batch()).logits
    torch.testing.assert_close(torch.tensor(cached[TEACHER_LOGITS][:]), expected, rtol=1e-5, atol=1e-5)
    files = sorted(Path(rows.cache_files[0]["filename"]).parent.glob("teacher-*.arrow"))
    assert len(files) == 4
    del cached
    files[1].write_bytes(files[1].read_bytes()[:-8])
    files[2].with_suffix(".sha256").write_bytes(b"\xff\0")
    with kit.calls({"teacher": teacher}) as count:
        again = cache_teacher(rows, teacher)
    # Two blocks, the first with a second look.
    assert count["teacher"] == 3
    torch.testing.assert_close(torch.tensor(again[TEACHER_LOGITS][:]), expected, rtol=1e-5, atol=1e-5)
    mixed = rows.shuffle(seed=0)
    order = torch.tensor([mixed[i]["input_ids"] == rows[j]["input_ids"] for i in range(16) for j in range(16)])
    found = torch.tensor(cache_teacher(mixed, teacher)[TEACHER_LOGITS][:])
    torch.testing.assert_close(found, expected[order.view(16, 16).int().argmax(1)], rtol=1e-5, atol=1e-5)


def test_runs_that_share_a_cache_ask_once(rows):
    """Two that begin at the same time: the second waits for the answers of the first."""
    first = kit.teacher()
    teachers, both = [first, copy.deepcopy(first)], threading.Barrier(2)

    def cached(teacher: Any) -> Any:
        both.wait()
        return cache_teacher(rows, teacher)[TEACHER_LOGITS][:]

    with kit.calls({"first": teachers[0], "second": teachers[1]}) as count, ThreadPoolExecutor(2) as pool:
        told = list(pool.map(cached, teachers))
    assert told[0] == told[1]
    # The first rows of a pass are asked about twice.
    assert sorted(count.values()) == [0, 2]


def test_each_of_several_processes_asks_about_blocks_of_its_own(rows, monkeypatch):
    monkeypatch.setattr("kd_transformers.cache._BLOCK", 4)
    folder, own = Path(rows.cache_files[0]["filename"]).parent, []

    def wait() -> None:
        own.extend(sorted(int(f.stem.rpartition("-")[2]) for f in folder.glob("teacher-*.arrow")))

    processes = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=wait)
    monkeypatch.setattr("kd_transformers.cache.PartialState", lambda: processes)
    teacher = kit.teacher()
    cached = cache_teacher(rows, teacher)
    assert own == [4, 12]
    with torch.no_grad():
        expected = teacher.eval()(**kit.Texts().batch()).logits
    torch.testing.assert_close(torch.tensor(cached[TEACHER_LOGITS][:]), expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_that_draws_random_numbers_is_refused(rows):
    teacher = kit.teacher()
    teacher.classifier.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    with pytest.raises(DistillError, match="one whose two forwards differ"):
        cache_teacher(rows, teacher)


def test_a_column_of_another_teacher_is_refused(rows, tmp_path):
    cached = cache_teacher(rows, kit.teacher())
    with pytest.raises(DistillError, match="is not what teacher_model says of these rows"):
        train(tmp_path, cached, kit.bert(4, seed=7))


def test_a_column_of_other_rows_is_refused(rows, tmp_path):
    cached = cache_teacher(rows, kit.teacher())
    mixed = cached.remove_columns(TEACHER_LOGITS).add_column(TEACHER_LOGITS, cached[TEACHER_LOGITS][::-1])
    with pytest.raises(DistillError, match="is not what teacher_model says"):
        train(tmp_path, mixed)


def test_a_method_that_reads_more_runs_the_teacher(rows, tmp_path):
    teacher = kit.teacher()
    options = {"distiller": "internal", "distiller_args": {"schedule": "stacked"}}
    plain = train(tmp_path / "a", rows, teacher, **options)
    cached = cache_teacher(rows, teacher)
    with kit.calls({"teacher": teacher}) as count:
        quick = train(tmp_path / "b", cached, teacher, **options)
    steps = plain.state.max_steps
    assert 1 < count["teacher"] < steps, "the layers' phases read attention; the last reads logits, which are there"
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) < 1e-6


def test_changed_inputs_drop_what_the_teacher_said():
    batch = Batch.of(torch.zeros(2, 3), teacher_logits=torch.ones(2, 4))
    assert batch.with_inputs(batch.inputs + 1).teacher_logits is None


class Many(Distiller):
    teachers = "many"

    def loss(self, student, teacher, batch):
        return {"logits": (student.logits - teacher.logits).square().mean()}


def test_several_teachers_have_a_column_in_common(rows, tmp_path):
    teachers = [kit.teacher(), kit.bert(4, seed=7)]
    plain = train(tmp_path / "a", rows, teachers, distiller=Many())
    cached = cache_teacher(rows, teachers)
    assert torch.tensor(cached[TEACHER_LOGITS][:]).shape == (16, 2, 3)
    with kit.calls(dict(enumerate(teachers))) as count:
        quick = train(tmp_path / "b", cached, teachers, distiller=Many())
    assert count == {0: 1, 1: 1}
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) < 1e-6
    with pytest.raises(DistillError, match="is not what teacher_model says"):
        train(tmp_path, cached, teachers[::-1], distiller=Many())
    with pytest.raises(DistillError, match="holds the logits of 1 teachers, got 2"):
        train(tmp_path, cache_teacher(rows, teachers[0]), teachers, distiller=Many())


def test_a_teacher_with_columns_of_its_own(rows, tmp_path):
    teacher = kit.teacher(vocab_size=99)
    theirs = rows.add_column("teacher_input_ids", [[i + 7] * (2 + i % 5) for i in range(16)])
    plain = train(tmp_path / "a", theirs, teacher)
    quick = train(tmp_path / "b", cache_teacher(theirs, teacher), teacher)
    assert kit.difference(kit.weights(plain.model), kit.weights(quick.model)) < 1e-6


def test_rows_that_change_are_refused(rows):
    with pytest.raises(DistillError, match=r"Expected a datasets\.Dataset.*got Texts"):
        cache_teacher(kit.Texts(), kit.teacher())  # type: ignore[arg-type]
    with pytest.raises(DistillError, match="got a data set with a transform"):
        cache_teacher(rows.with_transform(lambda batch: batch), kit.teacher())


def tokens(kind: str, layers: int, seed: int) -> Any:
    """A model with scores per token."""
    torch.manual_seed(seed)
    sizes = {**kit.TINY, **kit.NO_DROPOUT, "num_hidden_layers": layers}
    if kind == "causal":
        sizes = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": layers, "n_positions": 24}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dict.fromkeys(_DROPOUTS, 0.0)))
    cls = transformers.BertForTokenClassification if kind == "token" else transformers.BertForMaskedLM
    return cls(transformers.BertConfig(**sizes))


_DROPOUTS = "resid_pdrop", "embd_pdrop", "attn_pdrop"


@pytest.fixture(params=["token", "masked", "causal"])
def task(request, tmp_path) -> tuple[str, Dataset, Any]:
    """Rows of different lengths and a collator that pads them, of a task with scores per token."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(59))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    items = []
    for i in range(16):
        ids = kit.Texts()[i]["input_ids"][: 5 + i % 6].tolist()
        item = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        items.append({**item, "labels": [-100, *(x % 3 for x in ids[1:])]} if request.param != "causal" else item)
    Dataset.from_list(items).save_to_disk(tmp_path / "rows")
    collate: Any = transformers.DataCollatorForTokenClassification(tokenizer)
    if request.param == "causal":
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=8)
    return request.param, Dataset.load_from_disk(str(tmp_path / "rows")), collate


def test_scores_of_tokens_and_the_highest_of_them(task, tmp_path):
    """The student of the teacher's forwards; all the classes are the whole, and fewer with the rest as one another."""
    kind, data, collate = task
    teacher = tokens(kind, 3, 5)
    classes = teacher.config.num_labels if kind == "token" else 64
    options = {"distiller_args": {"temperature": 2.0}, "data_collator": collate}

    def trained(rows: Any, of: Any = teacher) -> Any:
        run = train(tmp_path, rows, of, student=tokens(kind, 1, 0), **options)
        return kit.weights(run.model)

    def cached(top_k: int | None) -> Any:
        return cache_teacher(data, teacher, collate, top_k=top_k, temperature=2.0, batch_size=4)

    plain, whole, same, few = (trained(rows) for rows in (data, *map(cached, (None, classes, 1))))
    assert kit.difference(plain, whole) < 1e-5
    assert kit.difference(plain, same) < 1e-5
    assert kit.difference(plain, few) > 1e-4
    lengths = [len(row) for row in data["input_ids"]]
    assert [torch.tensor(x).shape for x in cached(1)[TEACHER_LOGITS][:]] == [(n, 2) for n in lengths]
    with pytest.raises(DistillError, match="at temperature 2, and the loss has [14]"):
        train(tmp_path, cached(1), teacher, student=tokens(kind, 1, 0), data_collator=collate)


def test_several_teachers_of_tokens(task, tmp_path):
    kind, data, collate = task
    teachers = [tokens(kind, 2, 5), tokens(kind, 1, 6)]
    for top_k in (None, 2):
        plain = cache_teacher(data, teachers[1], collate, top_k=top_k)
        both = cache_teacher(data, teachers, collate, top_k=top_k)
        assert [torch.tensor(x)[:, 1].tolist() for x in both[TEACHER_LOGITS][:]] == plain[TEACHER_LOGITS][:]
        train(
            tmp_path,
            both,
            teachers,
            student=tokens(kind, 1, 0),
            distiller_args={"temperature": 1.0},
            data_collator=collate,
        )


def test_language_models_need_no_teacher_beside_the_column(task, tmp_path):
    """What the column is of is noted with it: the size of a vocabulary is no number of labels."""
    kind, data, collate = task
    for top_k in (None, 2):
        cached = cache_teacher(data, tokens(kind, 2, 5), collate, distiller="kd", top_k=top_k)
        DistillationTrainer(
            tokens(kind, 1, 0), kit.arguments(tmp_path), train_dataset=cached, distiller="kd", data_collator=collate
        )


def left_padded() -> Dataset:
    """Rows of one length, padded on the left."""
    rows = []
    for i in range(8):
        ids, gap = kit.Texts()[i]["input_ids"][: 5 + i % 6].tolist(), 5 - i % 6
        row = {"input_ids": [0] * gap + ids, "attention_mask": [0] * gap + [1] * len(ids)}
        rows.append({**row, "labels": [-100] * gap + ids})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("top_k", [None, 64])
def test_a_token_that_follows_padding_is_not_compared(tmp_path, top_k):
    data, teacher = left_padded(), tokens("causal", 2, 5)
    cached = cache_teacher(data, teacher, distiller="kd", top_k=top_k)
    plain, quick = (kit.weights(train(tmp_path, d, teacher, tokens("causal", 1, 0)).model) for d in (data, cached))
    assert kit.difference(plain, quick) < 1e-5


def test_a_teacher_whose_answers_follow_the_padding_is_refused():
    """GPT-2 counts positions from the padding on the left, which another batch has more or less of."""
    teacher = tokens("causal", 2, 5)
    teacher.transformer.wpe.weight.data.mul_(30)
    rows = [{k: v[r["attention_mask"].index(1) :] for k, v in r.items() if k != "labels"} for r in left_padded()]
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[MASK]": 2}, padding_side="left")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(DistillError, match="pad on the right"):
        cache_teacher(Dataset.from_list(rows), teacher, collate)


def test_texts_as_long_as_there_are_teachers(tmp_path):
    """Two vectors of two teachers are no scores of two tokens."""
    row = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "labels": 1}
    data, teachers = Dataset.from_list([row] * 4), [kit.teacher(), kit.bert(3, seed=4)]
    plain, quick = (kit.weights(train(tmp_path, d, teachers).model) for d in (data, cache_teacher(data, teachers)))
    assert kit.difference(plain, quick) < 1e-5


def test_columns_that_do_not_fit_are_told(task):
    kind, data, collate = task
    first, second = (cache_teacher(data, tokens(kind, 1, 5), collate, top_k=2, temperature=t) for t in (2.0, 4.0))
    with pytest.raises(DistillError, match="of other teachers or temperatures"):
        temperature_of(concatenate_datasets([first, second]))
    told = Told(lambda items: {"input_ids": torch.zeros(len(items), 10)}, tokens=True)
    with pytest.raises(DistillError, match="no attention_mask with as many"):
        told([first[0], first[1]])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 0}, "top_k: expected a whole number, at least 1, got 0"),
        ({"top_k": 1, "temperature": 0.0}, "temperature: expected a number above 0"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"batch_size": "8"}, "batch_size: expected a whole number, at least 1, got '8'"),
        ({"top_k": "8"}, "top_k: expected a whole number, at least 1, got '8'"),
        ({"distiller": {"temperature": 2.0}}, "Expected a distiller or the name of one, got {'temperature'"),
        ({"distiller": KD}, "Expected a distiller or the name of one, got <class"),
        ({"data_collator": "pad"}, "Expected a data_collator, which makes a batch of rows, got 'pad'"),
        ({"device": "gpu"}, "device='gpu' is no device of torch .*: give one"),
    ],
)
def test_what_makes_no_column(rows, options, match):
    with pytest.raises(DistillError, match=match):
        cache_teacher(rows, kit.teacher(), **options)


def test_rows_without_inputs_are_refused(rows):
    texts = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    shown = texts.with_transform(lambda batch: dict(batch))
    for data, options in ((texts, {}), (shown, {"views": 1})):
        with pytest.raises(DistillError, match=r"of the teacher \(BertFor\w+\), got the columns sentence, label"):
            cache_teacher(data, kit.teacher(), **options)


def test_positions_of_answers_and_tokens_of_decoders_are_refused(rows):
    sizes = {**kit.TINY, "num_hidden_layers": 1, "num_labels": 2}
    answers = transformers.BertForQuestionAnswering(transformers.BertConfig(**sizes))
    bart: dict[str, Any] = {f"{n}_{what}": 1 for n in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    bart |= {"vocab_size": 64, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    decoder = transformers.BartForConditionalGeneration(transformers.BartConfig(**bart))
    for model, kind in ((answers, "question answering"), (decoder, "sequence to sequence")):
        with pytest.raises(DistillError, match=f"got one for {kind}"):
            cache_teacher(rows, model)


def test_a_collator_that_draws_random_numbers_is_refused(task):
    kind, data, collate = task
    collate = transformers.DataCollatorForLanguageModeling(collate.tokenizer, mlm_probability=0.5)
    with pytest.raises(DistillError, match="Expected a data_collator that makes the same batch of the same rows"):
        cache_teacher(data, tokens(kind, 1, 0), collate)


def test_only_one_vector_for_each_row_or_token(rows):
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Embedding(64, 3)

        def forward(self, input_ids: Any, **_: Any) -> Any:
            from transformers.modeling_outputs import TokenClassifierOutput

            return TokenClassifierOutput(logits=self.head(input_ids))

    with pytest.raises(DistillError, match=r"Expected a teacher with logits \[B, K\], .* got \[\d+, \d+, 3\]"):
        cache_teacher(rows, Tagger())
