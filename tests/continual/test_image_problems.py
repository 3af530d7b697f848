"""Photos of any size, and tasks of several labels or of numbers."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import timm
import torch
from data_parts import class_folders

from hatcl.continual import ImageLearning, image_tasks, learn_sequence
from hatcl.data.datasets import read_images
from hatcl.data.images import ImageData
from hatcl.errors import ConfigError, IntegrityError

OPTIONS = ImageLearning(epochs=10, batch_size=8)


@pytest.fixture
def photos(tmp_path):
    return read_images(class_folders(tmp_path / "pets", ["cat", "dog"], 6, ("train", "test")))


@pytest.fixture
def arrays():
    """Images whose left half is bright by the first label, and whose lower half by the second."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (32, 2))
    x = rng.integers(0, 60, (32, 16, 16, 3))
    x[:, :, :8] += 100 * y[:, 0, None, None, None]
    x[:, 8:] += 90 * y[:, 1, None, None, None]
    return x.astype(np.uint8), y


@pytest.mark.parametrize("fit", ["resize", "pad", "crop"])
def test_photos_of_any_size_are_learned(photos, fit):
    (task,) = image_tasks([photos], {"fit": fit, "size": 32, "flip": True})
    x, y = task.collate([0, 5, 11])
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.float32 and y.tolist() == photos.y_train[[0, 5, 11]].tolist()
    torch.manual_seed(0)
    model = timm.create_model("hat_test_resnet", num_tasks=1, num_classes=[2])
    result = learn_sequence(model, [task], "hat", dataclasses.replace(OPTIONS, epochs=2))
    assert result.details["exact"] and result.facts[0]["bit_equal"]
    assert torch.equal(task.outputs(model), task.outputs(model))  # nothing is drawn for a test image


def test_a_photo_is_stretched_or_padded_within_its_proportions(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for name, colour in (("a", 255), ("b", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 20), (colour,) * 3).save(tmp_path / part / name / "0.png")
    data = read_images(tmp_path)
    stretched, padded = (data.x_train.arrays(20, pad=pad)[0, :, :, 0] for pad in (False, True))
    assert (stretched == 255).all() and padded[5:15].min() == 255 and padded[:5].max() == padded[15:].max() == 0
    (task,) = image_tasks([data], {"size": 20})
    want = (1 - 0.485) / 0.229  # white, normalised as ImageNet's red is
    assert task.collate([0])[0][0, 0].mean().item() == pytest.approx(want, abs=1e-5)  # of float32
    with pytest.raises(ConfigError, match="--size: the images of .* differ in size; give the size to resize them to"):
        image_tasks([data], {"size": 0})


def test_random_crops_follow_the_seed_however_many_threads_decode(photos, monkeypatch):
    options = {"fit": "crop", "size": 24, "flip": True, "augment": "rand-m9-mstd0.5"}

    def drawn(threads, seed=0):
        monkeypatch.setattr("hatcl.data.photos.THREADS", threads)
        (task,) = image_tasks([photos], options)
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        return task.collate(list(range(12)))[0]

    assert torch.equal(drawn(1), drawn(8)) and not torch.equal(drawn(1), drawn(1, seed=1))


def test_a_photo_that_is_none_is_named_while_learning(photos):
    path = photos.x_train.paths[3]
    path.write_bytes(b"nothing")
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(IntegrityError, match=f"{path} cannot be read as an image"):
        learn_sequence(model, image_tasks([photos]), "sequential", dataclasses.replace(OPTIONS, epochs=1))


@pytest.mark.parametrize(
    ("problem", "measure", "method"),
    [
        ("multilabel", None, "hat"),
        ("multilabel", "micro_f1", "sequential"),
        ("regression", None, "hat"),
        ("regression", "pearson", "sequential"),
    ],
)
def test_labels_and_numbers_are_learned(arrays, problem, measure, method):
    x, y = arrays
    targets = y if problem == "multilabel" else 1e5 * (y[:, :1] + 0.5 * y[:, 1:]) + 3e6  # of no network's scale
    data = ImageData("it", x[:24], targets[:24], x[24:], targets[24:], targets.shape[1], problem=problem)
    tasks = image_tasks([data], {"measured_by": measure}, one_head=method != "hat")
    torch.manual_seed(0)
    if method == "hat":
        model = timm.create_model("hat_test_resnet", num_tasks=1, num_classes=[data.num_classes])
    else:
        model = timm.create_model("test_resnet", num_classes=data.num_classes)
    result = learn_sequence(model, tasks, method, OPTIONS)
    assert result.losses[0][1] < 0.7 * result.losses[0][0]
    assert result.matrix[0, 0] > 0.6  # chance has .5 of the labels, and 0 of the numbers
    assert method != "hat" or result.details["exact"]
    assert np.isnan(result.commonest).all()  # no answer is the commonest of several labels or of numbers


def test_one_number_is_learned(arrays):
    x, y = arrays
    (task,) = image_tasks([ImageData("ages", x, y[:, :1] * 1.5, x, y[:, :1] * 1.5, 1, problem="regression")])
    assert not task.answers and task.collate([0, 1])[1].shape == (2, 1)


def test_a_measure_of_another_problem_and_an_unknown_policy(arrays):
    x, y = arrays
    data = ImageData("it", x, y, x, y, 2, problem="multilabel")
    with pytest.raises(ConfigError, match="measured_by, of a multilabel: got 'r2', expected one of mean_average"):
        image_tasks([data], {"measured_by": "r2"})
    for changes, words in (
        ({"measured_by": "acuracy"}, "measured_by: got 'acuracy'.*did you mean 'accuracy'"),
        ({"fit": "crop", "augment": "nonsense-m9"}, "augment: timm makes no policy of 'nonsense-m9'"),
        ({"augment": "rand-m9"}, "augment: got 'rand-m9', which has no effect with fit=resize; take fit=crop"),
        ({"fit": "crop", "crop": 2}, "crop: got 2, which has no effect with fit=crop; take another fit"),
        ({"fit": "crop", "size": 0}, r"size: got 0 \(keep their own\) with fit=crop, which resizes images to one size"),
    ):
        with pytest.raises(ConfigError, match=words):
            image_tasks([data], changes)


def test_validation_of_numbers_is_held_out(arrays):
    x, y = arrays
    data = ImageData("it", x, y.astype(float), x[:4], y[:4].astype(float), 2, problem="regression")
    held = data.on_validation(0.25)
    assert len(held.x_train) == 24 and len(held.x_test) == 8
    (task,) = image_tasks([data], validated=True)
    assert task.validate is not None and len(task.train) == 26
