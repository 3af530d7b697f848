"""The options of an experiment; what it does is tested through the commands, in tests/commands/test_atlas.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from hatcl.atlas.experiment import Writing
from hatcl.atlas.loading import Reading
from hatcl.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"head": "train"},
            "head: got 'train', expected one of trained, prototypes, text, FILE.safetensors; did you mean",
        ),
        ({"fit": "crops"}, "fit: got 'crops'"),
        ({"normalise": "modle"}, "did you mean 'model'"),
        ({"vector_dtype": "float"}, "vector_dtype: got 'float'"),
        ({"validation": 1.0}, "validation: got 1.0, expected a share of at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"size": -1}, "size: got -1"),
    ],
)
def test_what_is_read(changes, text):
    with pytest.raises(ConfigError, match=text):
        Reading(Path("base.safetensors"), "test_vit", **changes)
    assert Reading(Path("base.safetensors"), "test_vit", head="own.safetensors", size=0).head == "own.safetensors"


def test_what_is_written():
    with pytest.raises(ConfigError, match="--merge: a linearised composition has no weights of its own"):
        Writing(linearised=True, merge=True)
