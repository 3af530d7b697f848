"""SLERP, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from vector_parts import merged_rows, of_rows

from hatcl import ConfigError
from hatcl.vectors.merging import merge


def close(got, want):
    # the angle's functions round in float64: one float32 rounding of numbers below 8
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=0, atol=5e-7), (got, want)


def test_slerp():
    half = math.sqrt(0.5)
    close(merged_rows([[1.0, 0.0], [0.0, 1.0]], "slerp"), [half, half])
    close(merged_rows([[1.0, 0.0], [0.0, 1.0]], "slerp", t=1 / 3), [math.sqrt(0.75), 0.5])
    close(merged_rows([[2.0, 0.0], [0.0, 4.0]], "slerp"), [2 * half, 4 * half])
    s = math.sin(math.pi / 3)
    close(merged_rows([[1.0, 0.0], [0.5, s]], "slerp"), [math.cos(math.pi / 6), 0.5])  # 60 degrees: the middle is at 30


def test_slerp_is_linear_where_there_is_no_angle():
    assert merged_rows([[1.0, 0.0], [3.0, 0.0]], "slerp", t=0.25) == [1.5, 0.0]
    assert merged_rows([[1.0, 0.0], [-3.0, 0.0]], "slerp", t=0.25) == [0.0, 0.0]
    half = math.sin(math.pi / 4)  # a vector of zeros has no angle; a right one is taken, as in mergekit
    close(merged_rows([[0.0, 0.0], [-3.0, 1.0]], "slerp"), [-3 * half, half])
    nearly = [math.cos(0.01), math.sin(0.01)]
    close(merged_rows([[1.0, 0.0], nearly], "slerp"), [(1 + nearly[0]) / 2, nearly[1] / 2])


def test_slerp_ends_and_exchange():
    a, b = torch.randn(5).tolist(), torch.randn(5).tolist()
    assert merged_rows([a, b], "slerp", t=0.0) == a and merged_rows([a, b], "slerp", t=1.0) == b
    assert merged_rows([a, b], "slerp", t=0.25) == merged_rows([b, a], "slerp", t=0.75)


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two(count):
    with pytest.raises(ConfigError, match=f"slerp: got {count} vectors, expected 2"):
        merge(of_rows(*[[1.0]] * count), "slerp")
