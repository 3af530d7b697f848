from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vector_parts import merged_rows

from hatcl import ConfigError, TaskVector
from hatcl.vectors.merging import merge


def test_by_hand():
    rows = [[0.5, -0.5, 0.01, 0.0, 3.0]]
    # float32 products of float64 quotients, rounded once
    assert merged_rows(rows, "nearswap", t=0.25) == pytest.approx([0.25, -0.25, 0.01, 0.0, 0.25], rel=1e-7)
    assert merged_rows([[1e-7]], "nearswap", t=5e-7, floor=1e-6) == pytest.approx([5e-8], rel=1e-6)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), st.floats(0, 5))
def test_it_is_a_clamp(row, t):
    tau = torch.tensor(row)
    got = merge([TaskVector({"w": tau})], "nearswap", t=t)["w"]
    assert torch.allclose(got.double(), tau.double().clamp(-t, t), rtol=2e-7, atol=1e-44)


def test_one_vector():
    with pytest.raises(ConfigError, match="nearswap: got 2 vectors, expected 1; merge the others first"):
        merged_rows([[1.0], [2.0]], "nearswap")
