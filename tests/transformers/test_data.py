"""The script's data: docstrings split by file, tokenizers that do not change, labels and columns, metrics offline."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from sklearn import metrics as sklearn_metrics
from transformers import AutoTokenizer, EvalPrediction

from kd_plugins import DistillError
from kd_transformers import data as data_module
from kd_transformers.arguments import DataArguments
from kd_transformers.data import fingerprint, load_text, read_labels
from kd_transformers.docstrings import load_docstrings, read_docstrings, split_by_file
from kd_transformers.metrics import agreement, build_metrics, decide, default_metrics, ensemble, local_metrics
from kd_transformers.students import train_tokenizer

TEXTS = [f"the {a} loop {b} every {c}" for a in "abcdef" for b in ("reads", "writes") for c in ("socket", "buffer")]


@pytest.fixture(scope="module")
def docstrings() -> DatasetDict:
    return load_docstrings()


def write(root: Path, file: str, *paragraphs: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n\n    ".join(paragraphs)
    path.write_text(f'import nonexistent_module\nclass A:\n    r"""{body}"""\n', encoding="utf-8")


def library(root: Path) -> Path:
    for package in ("alpha", "beta"):
        for i in range(5):
            name = ("apple", "banana", "cherry", "damson", "elder")[i]
            text = (f"paragraph {word} of the file {name} speaks about {package} alone" for word in ("one", "two"))
            write(root, f"{package}/sub/m{i}.py", *text)
    return root


def test_no_file_and_no_paragraph_is_in_both_splits(docstrings):
    train, validation = docstrings["train"], docstrings["validation"]
    assert not set(train["file"]) & set(validation["file"])
    texts = [" ".join(t.lower().split()) for split in (train, validation) for t in split["text"]]
    assert len(texts) == len(set(texts))


def test_every_class_is_in_both_splits_and_no_class_rules(docstrings):
    train, validation = docstrings["train"], docstrings["validation"]
    names = train.features["label"].names
    assert len(names) == 12
    assert names == sorted(names)
    counts = np.stack([np.bincount(split["label"], minlength=12) for split in (train, validation)])
    assert counts.min() >= 10
    assert 0.1 < counts[1].sum() / counts.sum() < 0.3
    assert counts[0].max() < 0.25 * counts[0].sum()
    assert counts.sum() > 3000


def test_labels_are_the_packages_of_the_files(docstrings):
    split = docstrings["validation"]
    names = split.features["label"].names
    assert all(names[label] == file.split("/")[0] for label, file in zip(split["label"], split["file"], strict=True))
    # A prefix of the rows holds many classes: --max_train_samples takes the first ones.
    assert len(set(split["label"][:100])) > 8


def test_docstrings_are_the_same_every_time(tmp_path):
    first = load_docstrings(root=library(tmp_path / "one"))
    again = load_docstrings(root=library(tmp_path / "two"))
    for split in ("train", "validation"):
        assert first[split].to_dict() == again[split].to_dict()
        assert len(first[split]) > 0


def test_docstrings_in_a_cache_of_anothers_can_be_mapped(tmp_path, monkeypatch):
    """Which may be read and not be written to: root may write anywhere, so the answer is given here."""
    monkeypatch.setattr("kd_transformers.docstrings.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("kd_transformers.docstrings.read_docstrings", lambda root: read_docstrings(library(root)))
    monkeypatch.setattr("kd_transformers.docstrings.sysconfig.get_path", lambda name: str(tmp_path / "library"))
    assert load_docstrings()["train"].cache_files
    monkeypatch.setattr("kd_transformers.docstrings.os.access", lambda path, mode: mode != os.W_OK)
    rows = load_docstrings()["train"]
    assert not rows.map(lambda row: {"words": len(row["text"].split())}).cache_files
    assert [path.name[:11] for path in tmp_path.iterdir() if path.name != "library"] == ["docstrings-"]


@pytest.mark.parametrize("writable", [True, False])
def test_docstrings_are_read_once_where_the_cache_can_keep_them(tmp_path, monkeypatch, writable):
    cache, root = tmp_path / "cache", library(tmp_path / "library")
    if not writable:
        cache.write_text("a file, below which nothing can be written", encoding="utf-8")
    monkeypatch.setattr("kd_transformers.docstrings.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("kd_transformers.docstrings.sysconfig.get_path", lambda name: str(root))
    first, expected = load_docstrings(), load_docstrings(root=root)
    if writable:
        assert [path.name[:11] for path in cache.iterdir()] == ["docstrings-"]
        monkeypatch.setattr("kd_transformers.docstrings.read_docstrings", lambda root: pytest.fail("read again"))
        first = load_docstrings()
    for split in ("train", "validation"):
        assert len(expected[split]) > 0
        assert first[split].features == expected[split].features
        assert first[split].to_dict() == expected[split].to_dict()


def test_docstrings_leave_out_tests_doctests_and_what_two_packages_share(tmp_path):
    root = library(tmp_path)
    kept = "what only this one package ever says here"
    shared = "this very sentence stands in two packages alike"
    write(root, "alpha/a.py", kept, shared, ">>> some doctest with many words in it", "too few words")
    write(root, "beta/b.py", shared)
    write(root, "alpha/tests/t.py", "a test file has paragraphs that are test data")
    write(root, "test/t.py", "a test package has paragraphs that are test data")
    (root / "alpha" / "broken.py").write_text("def (", encoding="utf-8")
    texts = {p.text for p in read_docstrings(root)}
    assert kept in texts
    assert not any("sentence" in t or "doctest" in t or "test data" in t or "few" in t for t in texts)


def test_no_source_of_the_library_is_an_error(tmp_path):
    with pytest.raises(DistillError, match="--train_file"):
        load_docstrings(root=tmp_path)


def test_split_by_file_comes_near_the_share_and_does_not_follow_the_order():
    sizes = {f"file{i}.py": 1 + i % 7 for i in range(60)}
    chosen = split_by_file(sizes, 0.2)
    share = sum(sizes[file] for file in chosen) / sum(sizes.values())
    assert 0.18 < share < 0.26
    assert chosen == split_by_file(dict(reversed(sizes.items())), 0.2)
    assert split_by_file({"large.py": 90, "small.py": 10}, 0.05) == {"small.py"}


def test_a_tokenizer_is_the_same_every_time(docstrings, tmp_path):
    texts = list(docstrings["train"]["text"])[:800]
    first = train_tokenizer(texts, 600)
    for _ in range(3):
        assert train_tokenizer(texts, 600).get_vocab() == first.get_vocab()
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[:20])["input_ids"] == first(texts[:20])["input_ids"]


def test_a_tokenizer_has_berts_template_and_knows_its_words():
    tokenizer = train_tokenizer(TEXTS, 200)
    ids = tokenizer("The LOOP reads", "every socket")["input_ids"]
    words = ["[CLS]", "the", "loop", "reads", "[SEP]", "every", "socket", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer("Ж")["input_ids"][1] == tokenizer.unk_token_id


def labelled(values, feature) -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}))


@pytest.mark.parametrize(
    ("values", "feature", "problem", "names", "count", "value", "encoded"),
    [
        ([1, 0], ClassLabel(names=["no", "yes"]), "single", ("no", "yes"), 2, 1, 1),
        (["b", "a", "b"], Value("string"), "single", ("a", "b"), 2, "b", 1),
        ([0, 2, 1], Value("int64"), "single", None, 3, 2, 2),
        ([1, 5, 5], Value("int64"), "single", ("1", "5"), 2, 5, 1),
        ([True, False], Value("bool"), "single", None, 2, True, 1),
        ([0.5, 3.0], Value("float32"), "regression", None, 1, 3, 3.0),
        ([["x"], ["z", "y"]], Sequence(Value("string")), "multi", ("x", "y", "z"), 3, ["z", "x"], [1.0, 0.0, 1.0]),
        ([[1, 0, 1], [0, 0, 0]], Sequence(Value("int64")), "multi", None, 3, [0, 1, 1], [0.0, 1.0, 1.0]),
        ([[2], [0, 1], []], Sequence(Value("int64")), "multi", ("0", "1", "2"), 3, [2], [0.0, 0.0, 1.0]),
        ([[0], [1]], Sequence(ClassLabel(names=["p", "q"])), "multi", ("p", "q"), 2, [], [0.0, 0.0]),
    ],
)
def test_labels_by_type_and_values(values, feature, problem, names, count, value, encoded):
    labels = read_labels(labelled(values, feature), "label")
    assert labels.problem.startswith(problem)
    assert (labels.names, labels.count) == (names, count)
    assert labels.encode(value) == encoded
    assert labels.config["num_labels"] == count


def test_labels_that_cannot_be():
    with pytest.raises(DistillError, match="two classes"):
        read_labels(labelled(["a", "a"], Value("string")), "label")
    with pytest.raises(DistillError, match="empty"):
        read_labels(labelled(["a", None], Value("string")), "label")
    with pytest.raises(DistillError, match="'c'"):
        read_labels(labelled(["a", "b"], Value("string")), "label").encode("c")


def csv(path: Path, **columns) -> str:
    Dataset.from_dict(columns).to_csv(path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"sentence": ["a"] * 4, "idx": [1, 2, 3, 4]}, ("sentence",)),
        ({"sentence1": ["a"] * 4, "sentence2": ["b"] * 4}, ("sentence1", "sentence2")),
        ({"question": ["a"] * 4, "sentence": ["b"] * 4}, ("question", "sentence")),
        ({"body": ["a"] * 4, "number": [1, 2, 3, 4]}, ("body",)),
    ],
)
def test_text_columns_are_found(tmp_path, columns, expected):
    file = csv(tmp_path / "t.csv", **columns, label=["x", "y", "x", "y"])
    data = load_text(DataArguments(train_file=file, validation_file=file), cache_dir=str(tmp_path))
    assert data.columns == expected
    assert data.labels.names == ("x", "y")


def test_columns_can_be_named_and_ambiguity_is_an_error(tmp_path):
    columns = {"head": ["a", "b"], "body": ["c", "d"], "kind": ["x", "y"]}
    file = csv(tmp_path / "t.csv", **columns)
    options = {"train_file": file, "validation_file": file}
    with pytest.raises(DistillError, match="--text_column"):
        load_text(DataArguments(**options), cache_dir=str(tmp_path))
    with pytest.raises(DistillError, match="--label_column"):
        load_text(DataArguments(**options, text_column="head"), cache_dir=str(tmp_path))
    with pytest.raises(DistillError, match="Did you mean kind"):
        load_text(DataArguments(**options, text_column="head", label_column="kin"), cache_dir=str(tmp_path))
    named = DataArguments(**options, text_column="head", text_pair_column="body", label_column="kind")
    data = load_text(named, cache_dir=str(tmp_path))
    tokenizer = train_tokenizer(data.texts(), 60)
    train, evaluation = data.tokenize(tokenizer, 16)
    assert train.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert tokenizer.decode(train[0]["input_ids"]) == "[CLS] a [SEP] c [SEP]"
    assert evaluation["labels"] == [0, 1]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tsv"])
def test_file_formats(tmp_path, kind):
    rows = Dataset.from_dict({"text": ["one\ttwo" if kind != "tsv" else "one", "three"], "label": ["a", "b"]})
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "tsv":
        rows.to_csv(path, sep="\t")
    else:
        rows.to_json(path)
    data = load_text(DataArguments(train_file=str(path), validation_file=str(path)), cache_dir=str(tmp_path))
    assert list(data.train["text"]) == list(rows["text"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DistillError, match="no file"):
        load_text(DataArguments(train_file=str(tmp_path / "absent.csv")))
    (tmp_path / "t.xls").write_text("x")
    with pytest.raises(DistillError, match="ending in"):
        load_text(DataArguments(train_file=str(tmp_path / "t.xls")))
    file = csv(tmp_path / "t.csv", text=["a", "b"], label=["x", "y"])
    with pytest.raises(DistillError, match="--validation_file"):
        load_text(DataArguments(train_file=file), cache_dir=str(tmp_path))
    other = csv(tmp_path / "o.csv", text=["a", "b"], label=["x", "new"])
    with pytest.raises(DistillError, match="row 1.*'new'"):
        load_text(DataArguments(train_file=file, validation_file=other), cache_dir=str(tmp_path))
    holes = csv(tmp_path / "h.csv", text=["a", None], label=["x", "y"])
    with pytest.raises(DistillError, match="expected text in text, got None in row 1"):
        load_text(DataArguments(train_file=holes), evaluate=False, cache_dir=str(tmp_path))


def test_glue_tasks_are_read_by_name_and_scored_as_glue_does(monkeypatch):
    rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1.0, 2.5], "idx": [0, 1]})
    asked = []

    def load(name, config, **options):
        asked.append((name, config))
        return DatasetDict(train=rows, validation=rows, validation_matched=rows)

    monkeypatch.setattr(data_module.datasets, "load_dataset", load)
    data = load_text(DataArguments(task_name="stsb"))
    assert asked == [("nyu-mll/glue", "stsb")]
    assert data.columns == ("sentence1", "sentence2")
    assert data.labels.problem == "regression"
    assert default_metrics(data.labels.problem, "stsb") == ["pearsonr", "spearmanr"]
    assert default_metrics("single_label_classification", "mrpc") == ["accuracy", "f1"]
    with pytest.raises(DistillError, match="train, validation, validation_matched"):
        load_text(DataArguments(task_name="stsb", validation_split="dev"))


def test_slices_of_splits(tmp_path: Path) -> None:
    rows = {"sentence": TEXTS, "label": [i % 2 for i in range(len(TEXTS))]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = load_text(
        DataArguments(dataset_name=str(tmp_path), train_split="train[:4]+train[5:6]", validation_split="train[50%:]")
    )
    assert data.train["sentence"] == [*TEXTS[:4], TEXTS[5]]
    assert data.evaluation is not None
    assert data.evaluation["sentence"] == TEXTS[len(TEXTS) // 2 :]
    for wrong in ("train[:4", "test[:4]"):
        with pytest.raises(DistillError, match=r"Expected a split .*, got a data set with train\. Name one"):
            load_text(DataArguments(dataset_name=str(tmp_path), train_split=wrong))


def test_a_data_set_that_cannot_be_had_is_one_error(monkeypatch):
    def load(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(data_module.datasets, "load_dataset", load)
    with pytest.raises(DistillError, match="no network.*--train_file"):
        load_text(DataArguments(dataset_name="someone/something"))


def test_fingerprint_follows_texts_and_labels(tmp_path):
    def of(texts, labels):
        file = csv(tmp_path / f"{len(list(tmp_path.iterdir()))}.csv", text=texts, label=labels)
        return fingerprint(load_text(DataArguments(train_file=file), evaluate=False, cache_dir=str(tmp_path / "cache")))

    first = of(["a", "b"], ["x", "y"])
    assert of(["a", "b"], ["x", "y"]) == first
    assert of(["a", "c"], ["x", "y"]) != first
    assert of(["a", "b"], ["y", "x"]) != first


# Metrics


@pytest.fixture
def offline(monkeypatch):
    """Any look-up on the network fails at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_shipped_metrics_need_no_network_and_equal_scikit_learn(offline):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    names = ["accuracy", "f1", "matthews_correlation"]
    scores = build_metrics(names, "single_label_classification", 4)(EvalPrediction(logits, labels))
    guess = logits.argmax(-1)
    assert scores == pytest.approx(
        {
            "accuracy": (guess == labels).mean(),
            "f1": sklearn_metrics.f1_score(labels, guess, average="macro"),
            "matthews_correlation": sklearn_metrics.matthews_corrcoef(labels, guess),
        }
    )
    two = build_metrics(["f1"], "single_label_classification", 2)(EvalPrediction(logits[:, :2], labels % 2))
    assert two["f1"] == pytest.approx(sklearn_metrics.f1_score(labels % 2, logits[:, :2].argmax(-1)))
    assert set(local_metrics()) == {"accuracy", "f1", "matthews_correlation", "pearsonr", "spearmanr"}


def test_metrics_of_multi_label_and_regression_problems(offline):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(30, 3)), (rng.random((30, 3)) > 0.5).astype(np.float32)
    problem = "multi_label_classification"
    scores = build_metrics(default_metrics(problem), problem, 3)(EvalPrediction((logits, None), labels))
    assert scores["accuracy"] == pytest.approx(((logits > 0) == labels).all(-1).mean())
    assert scores["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, logits > 0, average="micro"))
    numbers, truth = rng.normal(size=(30, 1)), rng.normal(size=30).astype(np.float32)
    scores = build_metrics(default_metrics("regression"), "regression", 1)(EvalPrediction(numbers, truth))
    assert scores["pearsonr"] == pytest.approx(np.corrcoef(numbers[:, 0], truth)[0, 1], abs=1e-5)
    ranks = np.corrcoef(numbers[:, 0].argsort().argsort(), truth.argsort().argsort())[0, 1]
    assert scores["spearmanr"] == pytest.approx(ranks, abs=1e-5)


@pytest.mark.parametrize(
    ("problem", "name"),
    [("regression", "accuracy"), ("multi_label_classification", "pearsonr")],
)
def test_a_metric_that_does_not_score_the_problem_is_refused(problem, name):
    with pytest.raises(DistillError, match=f"--metric {name} does not score a {problem.split('_')[0]}"):
        build_metrics([name], problem, 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_correlation_that_is_not_defined_counts_as_0_and_is_told(rows, offline, caplog):
    numbers, truth = np.full((rows, 1), 0.5), np.arange(rows, dtype=np.float32)
    with caplog.at_level("WARNING"):
        scores = build_metrics(["pearsonr", "spearmanr"], "regression", 1)(EvalPrediction(numbers, truth))
    assert scores == {"pearsonr": 0.0, "spearmanr": 0.0}
    assert f"All {rows}" in caplog.text
    assert "predictions are equal" in caplog.text
    assert agreement(truth[:, None], numbers, "regression") == 0.0
    assert "teacher's predictions" in caplog.text


def test_one_row_is_scored():
    compute = build_metrics(["accuracy"], "single_label_classification", 2)
    assert compute(EvalPrediction(np.eye(2)[:1], np.array([0]))) == {"accuracy": 1.0}


def test_agreement_counts_equal_decisions():
    ours, theirs = np.array([[1.0, 0], [0, 1], [2, 0], [0, 3]]), np.array([[5.0, 1], [3, 1], [2, 0], [0, 3]])
    assert agreement(ours, theirs, "single_label_classification") == 0.75
    assert agreement(ours - 0.5, theirs - 2.5, "multi_label_classification") == 0.625
    assert agreement(ours[:, :1], -ours[:, :1], "regression") == pytest.approx(-1)
    assert decide(ours[:, :1], "regression").shape == (4,)


def test_teachers_count_by_their_mean_probability():
    told = [np.array([[9.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]]), np.array([[0.0, 2.0, -9.0]])]
    probabilities = np.mean([np.exp(x) / np.exp(x).sum() for x in told], 0)
    assert np.exp(ensemble(told, "single_label_classification")) / 3 == pytest.approx(probabilities)
    assert probabilities.argmax() == 1 != np.mean(told, axis=0).argmax()
    sure = [np.array([[9.0]]), np.array([[-1.0]]), np.array([[-1.0]])]
    single = 1 / (1 + np.exp([-9.0, 1.0, 1.0]))
    assert ensemble(sure, "multi_label_classification") == pytest.approx(np.log(single.mean() / (1 - single.mean())))
    assert ensemble(sure, "regression") == pytest.approx(7 / 3)


def test_an_unknown_metric_is_an_error(monkeypatch):
    def load(*args, **options):
        raise FileNotFoundError("nowhere")

    monkeypatch.setattr("evaluate.load", load)
    with pytest.raises(DistillError, match="Did you mean accuracy"):
        build_metrics(["acuracy"], "single_label_classification", 2)
