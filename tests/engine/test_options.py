"""Options of all loops: nonsense is refused when they are made, with the nearest match."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from hatcl.atlas import AtlasOptions
from hatcl.continual import ImageLearning, LearnOptions
from hatcl.engine.options import LoopOptions
from hatcl.errors import ConfigError
from hatcl.finetuning import FinetuneOptions

KINDS = [LoopOptions, ImageLearning, LearnOptions, FinetuneOptions, AtlasOptions]
WRONG = [
    (
        {"optimizer": "adamv"},
        "optimizer: got 'adamv', expected a name of timm.optim.list_optimizers(); did you mean 'a",
    ),
    ({"optimizer": None}, "optimizer: got None"),
    ({"lr": 0.0}, "lr: got 0.0, expected a number above 0"),
    ({"lr": float("nan")}, "lr: got nan"),
    ({"lr": "0.1"}, "lr: got '0.1', expected a number above 0"),
    ({"momentum": 1.0, "optimizer": "sgd"}, "momentum: got 1.0, expected a share"),
    ({"momentum": 0.9, "optimizer": "adamw"}, "momentum: got 0.9 for adamw, which has none; leave it out, or take sgd"),
    ({"momentum": 0.9, "optimizer": "lamb"}, "momentum: got 0.9 for lamb"),
    ({"weight_decay": -1.0}, "weight_decay: got -1.0, expected a number of at least 0"),
    ({"epochs": 2.5}, "epochs: got 2.5, expected an integer of at least 1"),
    ({"epochs": True}, "epochs: got True"),
    ({"max_steps": 0}, "max_steps: got 0"),
    ({"schedule": "cosin"}, "schedule: got 'cosin'"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"warmup": 1.0}, "warmup: got 1.0, expected a share of at least 0 and below 1"),
    ({"accumulate": 0}, "accumulate: got 0"),
    ({"clip": float("inf")}, "clip: got inf"),
    ({"amp": "bf"}, "did you mean 'bf16'"),
    ({"compile": "no"}, "compile: got 'no', expected True or False"),
    ({"seed": -1}, "seed: got -1, expected an integer of at least 0"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "says"), WRONG, ids=lambda x: str(x)[:24])
def test_a_wrong_value_is_named(kind, options, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        kind(**options)
    with pytest.raises(ConfigError, match=re.escape(says)):
        kind().changed(options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked(kind):
    """No field takes an object that nobody expects."""
    for field in dataclasses.fields(kind):
        with pytest.raises(ConfigError, match=field.name):
            kind(**{field.name: object()})


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_name_gets_the_nearest_and_options_survive_json(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no option 'weigth_decay'; did you mean 'weight_decay'"):
        kind().changed({"weigth_decay": 0.1})
    options = kind(lr=0.5, seed=3)
    assert kind(**json.loads(json.dumps(dataclasses.asdict(options)))) == options


def test_steps():
    assert LoopOptions(epochs=3).steps_of(5) == 15
    assert LoopOptions(epochs=3, accumulate=2).steps_of(5) == 9  # the last step of an epoch takes what is left
    assert LoopOptions(epochs=3, max_steps=4).steps_of(5) == 4
    assert LoopOptions().steps_of(5) is None
