"""Tables of images with a class, several labels, or numbers."""

from __future__ import annotations

import numpy as np
import pytest
from data_parts import picture, write_table

from hatcl.data.image_tables import images_of
from hatcl.data.kinds import read_file
from hatcl.data.places import DataOptions, TaskPlace
from hatcl.data.records import Records
from hatcl.errors import ConfigError, IntegrityError

N = 12


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        picture(tmp_path / "pics" / f"{i}.png", i % 2 == 0, seed=i)
    return tmp_path


def rows(*labels, parts=("train", "test"), **columns):
    """A row for each label; of each part the whole list."""
    return [
        {"path": f"pics/{i % N}.png", "label": label, "split": part, **{n: v[i] for n, v in columns.items()}}
        for part in parts
        for i, label in enumerate(labels)
    ]


def made(path, problem="auto"):
    return images_of(read_file(path), "it", problem)


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".json"])
def test_classes_are_the_same_in_every_format(folder, end):
    task = made(write_table(folder / f"a{end}", rows("cat", "dog", "cat")))
    assert (task.problem, task.classes, task.y_train.tolist()) == ("classification", ("cat", "dog"), [0, 1, 0])
    assert [image.size for image in task.x_test] == [(16, 16), (17, 16), (18, 16)]
    assert task.y_validation is None and task.photos
    numbers = made(write_table(folder / f"b{end}", rows(10, 9, 10)))
    assert numbers.classes == ("9", "10") and numbers.y_test.tolist() == [1, 0, 1]  # by size, not by the alphabet


def test_validation_comes_from_the_table_or_from_training(folder):
    three = made(write_table(folder / "a.csv", rows("a", "b", "a", "b", parts=("train", "val", "test"))))
    own = three.on_validation()
    assert len(own.x_train) == 4 and own.x_test is three.x_validation and own.y_test.tolist() == [0, 1, 0, 1]
    two = made(write_table(folder / "b.csv", rows(*"ab" * 6)))
    taken = two.on_validation(0.34, seed=1)
    assert (len(taken.x_train), len(taken.x_test)) == (8, 4) and np.bincount(taken.y_test).tolist() == [2, 2]
    assert {*map(str, taken.x_test.paths)} <= {*map(str, two.x_train.paths)}


@pytest.mark.parametrize(
    ("end", "labels", "problem"),
    [
        (".csv", ("red|round", "round", "red"), "auto"),
        (".csv", ("red|round", "round", "red"), "multilabel"),
        (".jsonl", (["red", "round"], ["round"], ["red"]), "auto"),
    ],
)
def test_several_labels(folder, end, labels, problem):
    task = made(write_table(folder / f"a{end}", rows(*labels)), problem)
    assert (task.problem, task.classes) == ("multilabel", ("red", "round"))
    assert task.y_train.tolist() == task.y_test.tolist() == [[1, 1], [0, 1], [1, 0]]


def test_numbers_and_columns_of_them(folder):
    task = made(write_table(folder / "a.csv", rows(1.5, 2, -3)))
    assert (task.problem, task.num_classes, task.y_train.tolist()) == ("regression", 1, [[1.5], [2.0], [-3.0]])
    assert made(write_table(folder / "b.csv", rows(1, 2, 3)), "regression").y_test.tolist() == [[1], [2], [3]]
    path = write_table(folder / "c.csv", rows("x", "x", "x", a=[0, 1, 1] * 2, b=[1, 1, 0] * 2, c=[0.5, 2, 1] * 2))
    for columns, problem, first in (("a,b", "multilabel", [0, 1]), ("a,c", "regression", [0, 0.5])):
        (task,) = TaskPlace.parsed(str(path)).read(DataOptions(column={"label": columns})).values()
        assert (task.problem, task.classes) == (problem, tuple(columns.split(",")))
        assert task.y_train[0].tolist() == first


def test_images_inside_of_a_data_set(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    content = [(folder / "pics" / f"{i}.png").read_bytes() for i in range(10)]
    stored = {"img": [{"bytes": raw, "path": None} for raw in content], "fine_label": [i % 2 for i in range(10)]}
    whole = datasets.Dataset.from_dict(stored, features=features)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(folder / "saved")
    whole.to_parquet(str(folder / "a.parquet"))
    for place in ("saved", "a.parquet"):
        (task,) = TaskPlace.parsed(str(folder / place)).read(DataOptions()).values()
        assert task.classes == ("cat", "dog") and task.problem == "classification"
        assert np.array_equal(np.asarray(next(iter(task.x_train))).shape[0], 16)
    assert len(task.x_train) == 6 and len(task.x_test) == len(task.x_validation) == 2  # in one piece, of each class
    x = task.x_train.arrays(8, pad=False)
    assert x.shape == (6, 8, 8, 3) and x.dtype == np.uint8
    before = task.digest()
    other = datasets.Dataset.from_dict({**stored, "img": stored["img"][::-1]}, features=features)
    other.to_parquet(str(folder / "a.parquet"))
    assert TaskPlace.parsed(str(folder / "a.parquet")).read(DataOptions())["a"].digest() != before


@pytest.mark.parametrize(
    ("table", "problem", "words"),
    [
        (rows("cat", "cat"), "auto", r"task 'it' has one class \(cat\); expected at least 2 classes"),
        (
            [*rows("cat", "dog"), *rows("cow", parts=["test"])],
            "auto",
            "test has 'cow' in the column 'label', which tra",
        ),
        ([*rows("a|b", "b"), *rows("a|c", parts=["test"])], "auto", "test has 'c' in the column 'label', which train"),
        (rows("a", "b"), "regression", "the column 'label' holds something other than numbers"),
        (rows(1.5, "nan"), "regression", "expected 2 for a regression: finite numbers"),
        (
            [{"path": "none.png", "label": "a", "split": "train"}, *rows("a", "b")],
            "auto",
            "there is no file .*none.png",
        ),
        (
            [{"path": "pics/0.png", "kind": "a", "split": "train"}] * 2,
            "auto",
            r"has no column for the label; it has pat",
        ),
        (
            [{"kind": "a", "label": 1}] * 2,
            "auto",
            r"has no column for the image; .*name another \(--column image=NAME\)",
        ),
    ],
)
def test_tables_that_make_no_task(folder, table, problem, words):
    with pytest.raises(ConfigError, match=words):
        made(write_table(folder / "a.csv", table), problem)


def test_an_image_that_is_none_is_named(folder):
    (folder / "pics" / "1.png").write_bytes(b"nothing")
    task = made(write_table(folder / "a.csv", rows("a", "b")))
    with pytest.raises(IntegrityError, match="pics/1.png cannot be read as an image .*; copy it again"):
        task.x_train.arrays(8, pad=False)
    content = (folder / "pics" / "0.png").read_bytes()
    for value, words in ((b"nothing", "image 0 cannot be read as an image"), (content[:60], "image 0 cannot be read")):
        parts = {p: [{"image": value, "label": c} for c in "ab"] for p in ("train", "test")}
        task = images_of(Records(folder / "a", parts), "it")
        with pytest.raises(IntegrityError, match=words):
            list(task.x_train)
    with pytest.raises(ConfigError, match="'3' in the column 'image' is not an image; expected the path of a file"):
        images_of(Records(folder / "a", {p: [{"image": 3, "label": c} for c in "ab"] for p in ("train", "test")}), "it")
