"""Data and models by options; whole runs from files are in test_run.py."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from hatcl.errors import ConfigError, VectorError
from hatcl.finetuning import TaskOptions, load_model, make_task, read_data


@pytest.fixture
def images(tmp_path):
    y = np.repeat(np.arange(3), 8)
    x = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "squares.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return TaskOptions("image", "test_resnet", str(tmp_path / "squares.npz"), size=0)


def test_at_most_so_many_test_images_always_the_same_of_all_classes(images):
    few = read_data(images.changed({"test": 12}))
    assert len(few.y_test) == 12 and set(few.y_test.tolist()) == {0, 1, 2}
    assert np.array_equal(few.x_test, read_data(images.changed({"test": 12})).x_test)
    assert len(read_data(images).y_test) == len(read_data(images.changed({"test": 99})).y_test) == 24


def test_weights_come_with_their_old_classifier(images, tmp_path):
    torch.manual_seed(0)
    stored = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / "seven.safetensors"
    save_file({n: t.contiguous() for n, t in stored.state_dict().items()}, path)
    model, tokenizer = load_model(images.changed({"weights": str(path)}))
    assert tokenizer is None and model.num_classes == 7
    assert all(torch.equal(p, stored.get_parameter(n)) for n, p in model.named_parameters())
    task = make_task(images.changed({"weights": str(path)}))
    assert task.labels == ("0", "1", "2") and task.model.num_classes == 7 and task.model.fc.out_features == 3


def test_a_model_in_place_of_the_one_that_is_named(images):
    model = timm.create_model("test_resnet")
    task = make_task(images.changed({"model": "not asked for"}), model=model)
    name, p = next(model.named_parameters())
    assert torch.equal(task.model.get_parameter(name), p) and task.model is not model


def test_what_cannot_be_loaded(images, tmp_path):
    with pytest.raises(ConfigError, match="model: timm has no 'test_resnett'; did you mean 'test_resnet'"):
        load_model(images.changed({"model": "test_resnett"}))
    with pytest.raises(ConfigError, match="timm cannot make test_resnet with {'depth': 3}"):
        load_model(images.changed({"model_kwargs": {"depth": 3}}))
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(VectorError, match="differ in .* tensors: .*Give those of the same model"):
        load_model(images.changed({"weights": str(tmp_path / "other.safetensors")}))
    with pytest.raises(ConfigError, match="mode: got 'imgae'.*did you mean 'image'"):
        make_task(images.changed({"mode": "imgae"}))


def test_a_model_without_weights_follows_the_seed(images):
    state = torch.get_rng_state()
    first, again, other = (make_task(images, seed).model for seed in (3, 3, 4))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in first.named_parameters())
    assert not torch.equal(*(next(iter(model.parameters())) for model in (first, other))) and torch.equal(
        torch.get_rng_state(), state
    )
