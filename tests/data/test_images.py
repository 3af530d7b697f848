from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hatcl.data import images as stream
from hatcl.data.images import ImageData, Images, Preparation, rotated
from hatcl.errors import ConfigError, IntegrityError

DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def task_of(x: np.ndarray, y: np.ndarray, classes: int = 2) -> ImageData:
    return ImageData("t", x, y, x, y, classes)


# --- tasks ---


def test_digits_are_five_tasks_of_two_classes():
    pytest.importorskip("sklearn")
    tasks = stream.digits_tasks()
    assert [task.name for task in tasks] == [f"digits {first}-{first + 1}" for first in range(0, 10, 2)]
    assert all(task.num_classes == 2 and set(task.y_train) == {0, 1} == set(task.y_test) for task in tasks)
    assert sum(len(task.x_train) + len(task.x_test) for task in tasks) == 1797
    assert tasks[0].x_train.dtype == np.uint8 and tasks[0].x_train.max() == 255
    assert tasks[0].digest() == stream.digits_tasks()[0].digest() != tasks[1].digest()


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'hatcl\[data\]'"):
        stream.digits_tasks()


def test_npz_is_named_after_its_file_and_relabelled(tmp_path):
    x = np.zeros((4, 8, 8, 3), np.uint8)
    y = np.array([3, 7, 3, 7])
    for path, name in ((tmp_path / "birds.npz", "birds"), (tmp_path / "fish" / "data.npz", "fish")):
        path.parent.mkdir(exist_ok=True)
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        task = stream.npz_task(path)
        assert (task.name, task.num_classes, task.y_test.tolist()) == (name, 2, [0, 1, 0, 1])


def test_split_cuts_classes_and_remaps_labels():
    x = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    whole = task_of(x, np.arange(7), classes=7)
    parts = stream.split_classes(whole, 3)
    assert [part.num_classes for part in parts] == [3, 2, 2]
    assert [part.y_train.tolist() for part in parts] == [[0, 1, 2], [0, 1], [0, 1]]
    assert [int(part.x_train[0, 0, 0]) for part in parts] == [0, 3, 5]
    assert [part.name for part in parts] == ["t 0-2", "t 3-4", "t 5-6"]
    with pytest.raises(ConfigError, match="7 classes, too few for 4 tasks"):
        stream.split_classes(whole, 4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_train": np.zeros((4, 3, 8, 8), np.uint8)}, r"x_train is uint8\[4, 3, 8, 8\].*channels last"),
        ({"x_train": np.array([["a"]] * 4)}, "expected images as numbers"),
        ({"y_train": np.zeros(3, np.int64)}, r"y_train is int64\[3\], expected 4 for a classification: whole numbers"),
        ({"y_train": np.zeros(4, np.float32)}, r"y_train is float32\[4\]"),
        ({"y_test": np.full(4, 2)}, "labels from 2 to 2, expected 0 to 1"),
        ({"x_test": np.zeros((4, 9, 9), np.uint8)}, r"training images are \[8, 8\], the test images \[9, 9\]"),
    ],
)
def test_arrays_that_make_no_task(change, text):
    arrays = {"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.array([0, 1, 0, 1])}
    arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
    with pytest.raises(ConfigError, match=text):
        ImageData("t", num_classes=2, **(arrays | change))


def test_files_that_cannot_be_read(tmp_path):
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    with pytest.raises(ConfigError, match="is not a file; expected an .npz file with the arrays x_train"):
        stream.npz_task(tmp_path / "none.npz")
    np.savez(tmp_path / "part.npz", x_train=x, y_train=y)
    with pytest.raises(ConfigError, match="lacks x_test, y_test; it holds x_train, y_train"):
        stream.npz_task(tmp_path / "part.npz")
    np.save(tmp_path / "one.npy", x)
    with pytest.raises(ConfigError, match="a single array of numpy .* by its content, expected an .npz"):
        stream.npz_task(tmp_path / "one.npy")
    np.savez(tmp_path / "pickle.npz", x_train=np.array([{}], dtype=object), y_train=y, x_test=x, y_test=y)
    with pytest.raises(IntegrityError, match="without pickled objects"):
        stream.npz_task(tmp_path / "pickle.npz")
    np.savez(tmp_path / "whole.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="cannot be read as plain arrays"):
        stream.npz_task(tmp_path / "cut.npz")
    np.savez(tmp_path / "new.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    with pytest.raises(ConfigError, match=r"labels never seen in y_train: \[2\]"):
        stream.npz_task(tmp_path / "new.npz")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_data(name):
    path = DATA / name / "data.npz"
    if not path.exists():
        pytest.skip(f"no {name}/data.npz under HATCL_DATA")
    task = stream.npz_task(path)
    assert (task.name, task.num_classes) == (name, 10)
    x = Preparation.of(task, size=32, fit="pad")(task.x_train[:64])
    assert x.shape == (64, 3, 32, 32)


# --- batches ---


def test_preparation_normalises_and_repeats_grey():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (200, 8, 8), dtype=np.uint8)
    y = np.arange(200) % 2
    x = Preparation.of(task_of(grey, y))(grey)
    assert x.shape == (200, 3, 8, 8) and x.dtype == torch.float32 and x.is_contiguous()
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-3
    assert torch.equal(x[:, 0], x[:, 2])
    colour = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8) // np.array([1, 2, 4], np.uint8)
    x = Preparation.of(task_of(colour, y))(colour)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert torch.isfinite(Preparation.of(task_of(np.zeros_like(grey), y))(grey)).all()


def test_preparation_fits_a_size():
    images = np.full((4, 8, 6), 200, np.uint8)
    images[:, 0, 0] = 0
    task = task_of(images, np.array([0, 1, 0, 1]))
    padded = Preparation.of(task, size=32, fit="pad")(images)
    assert padded.shape == (4, 3, 32, 32)
    assert torch.equal(padded[0, 0, 12:20, 13:19], Preparation.of(task)(images)[0, 0])
    assert padded[0, 0, 0, 0] == padded[0, 0, 12, 13] == padded.min()  # the border is black
    assert Preparation.of(task, size=32)(images).shape == (4, 3, 32, 32)
    assert Preparation.of(task, size=4, fit="pad")(images).shape == (4, 3, 4, 4)
    with pytest.raises(ConfigError, match="got 'crop', expected one of resize, pad"):
        Preparation.of(task, fit="crop")


def test_shifted_images_are_windows_of_wider_ones():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    same = stream.shifted(x, torch.tensor([[2, 2], [2, 2]]), 2)
    assert torch.equal(same, x)
    moved = stream.shifted(x, torch.tensor([[0, 2], [2, 3]]), 2)
    assert torch.equal(moved[0, :, 2:], x[0, :, :2]) and torch.equal(moved[0, :, 0], x[0, :, 0])
    assert torch.equal(moved[1, :, :, :3], x[1, :, :, 1:]) and torch.equal(moved[1, :, :, 3], x[1, :, :, 3])


# --- one part of a task ---

X = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
Y = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
IMAGES = Images(X, Y, Preparation((10.0,), (2.0,)))


def test_batches_hold_every_image_once_prepared():
    assert len(IMAGES) == 10 and len(IMAGES.batches(4)) == 3
    parts = list(IMAGES.batches(4))
    assert [len(y) for _, y in parts] == [4, 3, 3]  # nearly equal
    x = torch.cat([x for x, _ in parts])
    assert x.shape == (10, 3, 4, 4) and x[2, 0, 0, 1] == (33 - 10) / 2
    assert torch.cat([y for _, y in parts]).tolist() == Y.tolist()
    one, label = IMAGES[2]
    assert torch.equal(one, x[2]) and label == 0


def test_a_shuffled_pass_follows_torchs_generator():
    batches = IMAGES.batches(4, shuffle=True)
    torch.manual_seed(3)
    first, second = (torch.cat([x for x, _ in batches]) for _ in range(2))
    torch.manual_seed(3)
    again = torch.cat([x for x, _ in batches])
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_none_and_bad_sizes():
    none = IMAGES.at(torch.zeros(0, dtype=torch.long))
    assert len(none) == 0 and list(none.batches(4)) == []
    with pytest.raises(ConfigError, match="batch size: got 0, expected at least 1"):
        IMAGES.batches(0)


def test_options_are_chosen_on_images_that_are_held_out(three_tasks):
    task = three_tasks[1]
    chosen = task.on_validation(0.25, seed=1)
    assert (len(chosen.x_train), len(chosen.x_test)) == (18, 6)
    assert np.bincount(chosen.y_test).tolist() == [2, 2, 2]
    rows = {x.tobytes() for x in task.x_train}
    assert {x.tobytes() for x in chosen.x_train} | {x.tobytes() for x in chosen.x_test} == rows
    assert not {x.tobytes() for x in chosen.x_test} & {x.tobytes() for x in task.x_test}
    with pytest.raises(ConfigError, match="task 'blobs1': a share of 0.01 holds out no image of 24"):
        task.on_validation(0.01)
    with pytest.raises(ConfigError, match="validation: got 1.0, expected a share"):
        task.on_validation(1.0)


def test_rotated_images_are_square():
    x, y = rotated(torch.arange(8.0).view(2, 1, 2, 2), torch.tensor([0, 1]), 3)
    assert x.shape == (8, 1, 2, 2) and y.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert x[2].flatten().tolist() == [1, 3, 0, 2] and torch.equal(x[6].rot90(1, (1, 2)), x[0])
    with pytest.raises(ConfigError, match=r"rotate: got images of \[2, 3\], whose size a quarter turn changes"):
        rotated(torch.zeros(1, 1, 2, 3), torch.tensor([0]), 2)
    for label in (-1, 2):
        with pytest.raises(ConfigError, match=f"rotate: got labels from {min(label, 0)} to .* expected classes 0 to 1"):
            rotated(torch.zeros(2, 1, 2, 2), torch.tensor([0, label]), 2)
    assert [len(part) for part in rotated(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.long), 2)] == [0, 0]
