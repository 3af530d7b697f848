"""Options say at once what is wrong with them."""

from __future__ import annotations

import re

import pytest

from hatcl import ConfigError
from hatcl.atlas import AtlasOptions

WRONG = [
    ({"lr": 0.0}, "lr: got 0.0, expected a number above 0"),
    ({"lr": float("nan")}, "lr: got nan"),
    ({"weight_decay": -1.0}, "weight_decay: got -1.0, expected a number of at least 0"),
    ({"clip": float("inf")}, "clip: got inf"),
    ({"regulariser": -0.5}, "regulariser: got -0.5"),
    ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
    ({"accumulate": 1.5}, "accumulate: got 1.5"),
    ({"epochs": True}, "epochs: got True"),
    ({"p": 3}, "p: got 3, expected 1 or 2"),
    ({"p": 2}, "p: got 2, which has no effect with regulariser=0; give regulariser (the paper's is 0.5), or leave it"),
    ({"schedule": "cosin"}, "expected one of constant, linear, cosine, tanh, step, poly; did you mean 'cosine'"),
    ({"amp": "bf"}, "did you mean 'bf16'"),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=lambda x: str(x)[:20])
def test_a_wrong_value_is_named(options, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        AtlasOptions(**options)


def test_a_mapping_changes_some_and_an_unknown_name_gets_the_nearest():
    base = AtlasOptions(lr=0.5)
    assert base.changed(None) is base
    assert base.changed({"epochs": 3}) == AtlasOptions(lr=0.5, epochs=3)
    assert base.changed(AtlasOptions()) == AtlasOptions()
    with pytest.raises(ConfigError, match="AtlasOptions has no option 'epoch'; did you mean 'epochs'"):
        base.changed({"epoch": 3})
