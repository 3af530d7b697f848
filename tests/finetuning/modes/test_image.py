"""Images: a timm model with batch norm, a class of one's own, and what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetuning_parts import image_file  # noqa: E402

from hatcl.data.images import (
    Images,
    npz_task,  # noqa: E402
    preparation_for,
)
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import FinetuneOptions, finetune_, image_task, trained_names  # noqa: E402


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def data(tmp_path):
    return npz_task(image_file(tmp_path))


def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet")


def test_a_timm_model_gets_a_head_for_the_classes(data):
    model = network()
    task = image_task(data, model)
    assert model.fc.out_features == 1000 and task.model.fc.out_features == 3
    assert task.head == task.fresh == ("fc.weight", "fc.bias") and not task.fixed_head
    assert task.name == "bars" and task.labels == ("0", "1", "2")
    # a tenth of six rounds down to none
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 0, 18)
    assert len(image_task(data, model, validation=0.5).validation) == 9
    x, y = task.batch("train", [0, 17])
    assert x.shape == (2, 3, 16, 16) and y.tolist() == [0, 2]
    with torch.no_grad():
        assert task.logits(task.model, (x, y))[0].shape == (2, 3)


def test_k_shot(data):
    task = image_task(data, network(), k=2)
    assert (len(task.train), len(task.validation)) == (6, 6)
    with pytest.raises(ConfigError, match="class 0 has 6 different examples for train, expected 7"):
        image_task(data, network(), k=7)


def test_a_fitted_head_on_a_class_of_ones_own(data):
    torch.manual_seed(1)
    task = image_task(data, Small(), classifier="linear", head="fitted")
    assert task.fixed_head and task.accuracy(task.model, "train") > 0.6
    names = trained_names(task)
    assert names == ["conv.weight", "conv.bias", "bn.weight", "bn.bias"]


def test_it_learns(data):
    task = image_task(data, Small(), classifier="linear", k=3)
    history = finetune_(task.model, task, FinetuneOptions("adamw", 0.05, epochs=25, batch_size=9, evaluate_every=25))
    assert history[-1]["validation"] == 1.0 and task.accuracy(task.model) > 0.9


def test_other_examples(data):
    task = image_task(data, Small(), classifier="linear")
    others = Images(data.x_test[:4], data.y_test[:4], task.test.prepare)
    assert [len(y) for _, y in task.batches(others, 3)] == [2, 2] or [len(y) for _, y in task.batches(others, 3)] == [
        3,
        1,
    ]


def test_errors(data):
    with pytest.raises(ConfigError, match="timm names None for Small, expected one linear layer; name it"):
        image_task(data, Small())
    with pytest.raises(ConfigError, match="classifier: 'bn' of Small is BatchNorm2d, expected the nn.Linear"):
        image_task(data, Small(), classifier="bn")
    with pytest.raises(ConfigError, match="classifier: 'no' of Small is NoneType"):
        image_task(data, Small(), classifier="no")
    vit = timm.create_model("test_vit", dynamic_img_size=False)
    with pytest.raises(ConfigError, match=r"does not accept images of \[3, 16, 16\].*--size"):
        image_task(data, vit)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"Sequential returns \[2, 2\], expected \[2, 3\]; name its last layer"):
        image_task(data, nn.Sequential(nn.Flatten(), Ends()), classifier="1.first")
    assert image_task(data, inner, classifier="2").model[2].out_features == 3


class Ends(nn.Module):
    """Its first layer's width does not reach the output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(768, 4)

    def forward(self, x):
        return self.first(x)[:, :1].repeat(1, 2)


def test_how_a_model_takes_images(data):
    cfg = {"input_size": (3, 160, 160), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    assert preparation_for(data, cfg).size == 160
    assert preparation_for(data, cfg, image_size=64).size == preparation_for(data, cfg, image_size=(64, 64)).size == 64
    assert preparation_for(data, cfg, size=0).size is None and preparation_for(data, {}).size == 224
    by_model = preparation_for(data, cfg, size=0, normalise="model")
    assert by_model.mean == (127.5, 102.0, 76.5) and by_model.std == (51.0, 51.0, 25.5)
    x = by_model(np.full((1, 2, 2, 3), 255, dtype=np.uint8))
    assert torch.allclose(
        x[0, :, 0, 0], torch.tensor([2.5, 3.0, 7.0]), atol=1e-6
    )  # float32 of numbers like 178.5 / 25.5
