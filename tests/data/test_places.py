"""Where data is: files, folders, data sets by name, and what is learned of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_parts import SAID, class_folders, picture, write_table

from hatcl.data.places import DataOptions, TaskPlace, split_task
from hatcl.errors import ConfigError


def read(text, **options):
    return TaskPlace.parsed(str(text)).read(DataOptions(**options))


def test_a_folder_of_classes_in_parts_and_in_one_piece(tmp_path):
    class_folders(tmp_path / "three", ["cat", "dog"], 4, ("train", "val", "test"))
    (task,) = read(tmp_path / "three").values()
    assert (task.name, task.classes, len(task.y_train), len(task.y_test), len(task.y_validation)) == (
        "three", ("cat", "dog"), 8, 8, 8,
    )  # fmt: skip
    class_folders(tmp_path / "piece", "abcd", 10)
    (one,) = read(f"mine={tmp_path / 'piece'}").values()
    assert (one.name, len(one.y_train), sorted(one.y_test.tolist())) == ("mine", 36, [0, 1, 2, 3])
    assert one.digest() == read(tmp_path / "piece")["piece"].digest()
    train, test = ({x.paths[i] for i in x.ids} for x in (one.x_train, one.x_test))
    assert not train & test and len(train | test) == 40
    class_folders(tmp_path / "other", ["cat"], 2, ("train", "test", "val"))
    picture(tmp_path / "other" / "val" / "dog" / "0.png")
    with pytest.raises(ConfigError, match="train/ and val/ differ in the folders of classes"):
        read(tmp_path / "other")
    class_folders(tmp_path / "one", ["cat"], 4)
    with pytest.raises(ConfigError, match=r"has one class \(cat\); expected at least 2 classes"):
        read(tmp_path / "one")


def test_a_whole_is_split_into_tasks_of_its_classes(tmp_path):
    class_folders(tmp_path / "all", "abcde", 4)
    whole = read(tmp_path / "all")["all"]
    assert [task.classes for task in split_task(whole, "2")] == [("a", "b", "c"), ("d", "e")]
    two = split_task(whole, "2x2")
    assert [(t.name, t.classes) for t in two] == [("all 0-1", ("a", "b")), ("all 2-3", ("c", "d"))]
    assert [str(two[1].x_train.paths[i].parent.name) for i in two[1].x_train.ids] == list("cccddd")
    assert two[1].y_train.tolist() == [0, 0, 0, 1, 1, 1]
    for how, words in (
        ("3", "have|has 5 classes, too few for 3 tasks of at least two"),
        ("3x2", "few for 3 tasks of 2 classes; expected a number from 1 to 2"),
        ("5x1", "few for 5 tasks of at least two classes"),
        ("x", "--split: got 'x', expected a number of tasks"),
        ("2xa", "--split: got '2xa', expected a number of tasks"),
    ):
        with pytest.raises(ConfigError, match=words):
            split_task(whole, how)
    with pytest.raises(ConfigError, match="cuts the classes of images; give each task of texts separately"):
        split_task(next(iter(read(write_table(tmp_path / "a.csv", SAID)).values())), "2")


def test_some_of_the_classes_in_their_order(tmp_path):
    class_folders(tmp_path / "all", "abc", 4)
    place = {"data": str(tmp_path / "all"), "name": "two", "classes": ["c", "a"]}
    (task,) = read(json.dumps(place)).values()
    assert (task.name, task.classes) == ("two", ("c", "a"))
    assert {task.x_train.paths[i].parent.name for i in task.x_train.ids[task.y_train == 0]} == {"c"}
    with pytest.raises(ConfigError, match="classes of two: got 'd', expected one of a, b, c"):
        read(json.dumps({**place, "classes": ["d"]}))
    with pytest.raises(ConfigError, match=r"has one class \(a\); expected at least 2 classes"):
        read(json.dumps({**place, "classes": ["a"]}))
    x, y = np.zeros((6, 8, 8), np.uint8), np.arange(6) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (task,) = read(json.dumps({"data": str(tmp_path / "a.npz"), "classes": [2, 0]})).values()
    assert task.y_train.tolist() == [1, 0, 1, 0]
    path = write_table(tmp_path / "t.csv", [*SAID, *({"text": "w", "label": "dry"} for _ in range(5))])
    (texts,) = read(json.dumps({"data": str(path), "classes": ["dry", "warm"]})).values()
    assert texts.labels == ["dry", "warm"]
    with pytest.raises(ConfigError, match="classes: got 'wet', expected one of cold, dry, warm"):
        read(json.dumps({"data": str(path), "classes": ["wet"]}))
    with pytest.raises(ConfigError, match="is a regression, which has no classes to choose from"):
        np.savez(tmp_path / "b.npz", x_train=x, y_train=y / 2, x_test=x, y_test=y / 2)
        read(json.dumps({"data": str(tmp_path / "b.npz"), "classes": ["0"]}))


def test_arrays_of_other_problems(tmp_path):
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([[0, 1], [1, 1], [1, 0], [0, 0]])
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "x_validation": x[:2], "y_validation": y[:2]}
    np.savez(tmp_path / "a.npz", **arrays)
    task = read(tmp_path / "a.npz")["a"]
    assert (task.problem, task.num_classes) == ("multilabel", 2) and task.on_validation().y_test.tolist() == y[
        :2
    ].tolist()
    assert read(tmp_path / "a.npz", problem="regression")["a"].problem == "regression"
    with pytest.raises(ConfigError, match="y_train is int64.*for a classification.*a multilabel has such"):
        read(tmp_path / "a.npz", problem="classification")
    np.savez(tmp_path / "b.npz", **{n: v for n, v in arrays.items() if n != "y_validation"})
    with pytest.raises(ConfigError, match="b.npz holds only x_validation, expected x_validation and y_validation"):
        read(tmp_path / "b.npz")


def test_the_text_of_a_place_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, written in (
        ("a.csv", f"a={tmp_path}/a.csv"), ("b/data.npz", f"b={tmp_path}/b/data.npz"),
        ("x=a.csv", f"x={tmp_path}/a.csv"),
        ("DTD@d", f"dtd=DTD@{tmp_path}/d"), ("digits", "digits=digits"), ("hf:a/b", "b=hf:a/b"),
        ('{"data": "a.csv", "classes": ["b"]}', f'{{"data": "{tmp_path}/a.csv", "name": "a", "classes": ["b"]}}'),
    ):  # fmt: skip
        made = TaskPlace.parsed(text).absolute()
        assert made.written() == written and TaskPlace.parsed(written) == made
    for text, words in (
        ("=a.csv", "--task: got '=a.csv', expected NAME=FILE"),
        ("{", "cannot be read as JSON"),
        ('{"name": "a"}', "has no data; expected a file, a folder, NAME@FOLDER or hf:NAME"),
        ('{"data": "a", "clases": ["b"]}', "TaskPlace has no option 'clases'; did you mean 'classes'"),
        ('{"data": "a", "problem": "x"}', "problem: got 'x'"),
        ('{"data": "a", "column": {"labl": "y"}}', "column: got 'labl', expected one of text"),
        ('{"data": "a", "column": "label=y"}', "column: got 'label=y', expected a mapping from roles to names"),
        ('{"data": "a", "classes": "cat"}', "classes of a: got 'cat', expected a list of names"),
    ):
        with pytest.raises(ConfigError, match=words):
            TaskPlace.parsed(text)
    with pytest.raises(
        ConfigError, match="none does not exist; expected a file, a folder, NAME@FOLDER of torchvision, or"
    ):
        read("none")
    with pytest.raises(ConfigError, match="torchvision.datasets has no 'CIFAR1000'; did you mean 'CIFAR100'"):
        read("CIFAR1000@d")


def test_texts_are_no_regression(tmp_path):
    with pytest.raises(ConfigError, match="--problem: got 'regression' for the texts of a"):
        read(write_table(tmp_path / "a.csv", SAID), problem="regression")


def test_a_text_beside_a_picture_is_a_picture_and_a_text_with_a_path_a_text(tmp_path):
    picture(tmp_path / "a.png")
    both = [
        {"image": "a.png", "text": "w1", "label": "xy"[i % 2], "split": p} for p in ("train", "test") for i in (0, 1)
    ]
    assert read(write_table(tmp_path / "a.csv", both))["a"].num_classes == 2
    said = [{"path": "somewhere", **row} for row in SAID]
    assert read(write_table(tmp_path / "b.csv", said))["b"].labels == ["cold", "warm"]


def test_the_digits(monkeypatch):
    pytest.importorskip("sklearn")
    assert read("digits")["digits"].num_classes == 10
