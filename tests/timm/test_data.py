"""What is said of a data set before the training: columns, labels."""

import datasets
import pytest
from PIL import Image

from kd_plugins import DistillError
from kd_timm import data
from kd_timm.arguments import parse_args


def test_columns_that_are_not_there_are_named(tmp_path):
    image = Image.new("L", (8, 8))
    datasets.Dataset.from_dict({"img": [image], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    words = ["--dataset", f"hfds/{tmp_path}", "--val-split", ""]
    for flags, match in (
        ([], "'image', but img, label: .* --input-key"),
        (["--input-key", "img", "--target-key", "y"], "'y', .* --target-key"),
    ):
        with pytest.raises(DistillError, match=match):
            data.create_datasets(parse_args([*words, *flags]), 1)
    assert data.create_datasets(parse_args([*words, "--input-key", "img"]), 1)[0][0][1] == 0
    with pytest.raises(DistillError, match="is read from a folder, .* none is named: add --data-dir DIR"):
        data.create_datasets(parse_args(["--dataset", "torch/cifar10"]), 3)


def test_labels_that_are_none_of_the_classes_are_refused(tmp_path):
    """Also where the data set has no names of its classes; on a GPU such a label would end the process."""

    def written(name: str, *labels: int | None) -> list[str]:
        rows = {"image": [Image.new("L", (8, 8))] * len(labels), "label": list(labels)}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name / "train.parquet")
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name / "test.parquet")
        return ["--dataset", f"hfds/{tmp_path / name}", "--val-split", "test"]

    def check(*flags: str) -> None:
        args = parse_args(list(flags))
        data.check_labels(args, data.create_datasets(args, 1))

    beyond = written("beyond", 0, 7)
    with pytest.raises(DistillError, match="--train-split train has labels up to 7, .* 5 classes.* --num-classes 8"):
        check(*beyond, "--num-classes", "5")
    with pytest.raises(DistillError, match=r"--train-split train\[1:\] has labels up to 7"):
        check(*beyond, "--num-classes", "1", "--train-split", "train[1:]")
    check(*beyond, "--num-classes", "8")
    check(*beyond, "--num-classes", "5", "--train-split", "train[:1]", "--val-split", "")
    with pytest.raises(DistillError, match="--val-split test has the label -1, .* --target-key"):
        check(*written("without", 0, None), "--num-classes", "5", "--train-split", "train[:1]")
