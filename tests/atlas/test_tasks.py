"""A task to compose for."""

from __future__ import annotations

from hatcl.atlas import AtlasTask


def test_validation_defaults_to_the_batches():
    assert AtlasTask("a", [1]).chosen_by == [1]
    assert AtlasTask("a", [1], [2]).chosen_by == [2]
