from __future__ import annotations

import pytest
from vector_parts import merged_rows

from hatcl import ConfigError


def test_one_vector_as_it_is():
    assert merged_rows([[1.0, -2.0]], "passthrough") == [1, -2]
    assert merged_rows([[1.0, -2.0]], "passthrough", scale=0.5) == [0.5, -1]
    with pytest.raises(ConfigError, match="passthrough: got 2 vectors, expected 1; for more take mean"):
        merged_rows([[1.0], [2.0]], "passthrough")
