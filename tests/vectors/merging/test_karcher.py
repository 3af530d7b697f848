"""The Karcher mean: where the directions' distances along the sphere balance."""

from __future__ import annotations

import math

import pytest
import torch
from vector_parts import merged_rows

from hatcl.vectors.merging.karcher import karcher_centre


def test_of_two_it_is_the_middle_of_the_arc():
    assert merged_rows([[2.0, 0.0], [0.0, 4.0]], "karcher") == pytest.approx([3 * math.sqrt(0.5)] * 2)
    assert merged_rows([[2.0, 0.0]], "karcher") == [2, 0]
    assert merged_rows([[2.0, 0.0], [0.0, 0.0]], "karcher") == [1, 0]  # a vector of zeros has no direction
    assert merged_rows([[0.0, 0.0], [0.0, 0.0]], "karcher") == [0, 0]
    assert merged_rows([[1.0, 0.0], [-1.0, 0.0]], "karcher") == [1, 0]  # no middle: the first


def test_the_ways_to_all_of_them_sum_to_nothing():
    generator = torch.Generator().manual_seed(0)
    units = [x / x.norm() for x in torch.randn(4, 6, generator=generator, dtype=torch.float64)]
    mean = karcher_centre(units, 100, 1e-12)
    ways = torch.zeros_like(mean)
    for u in units:
        cosine = torch.dot(mean, u)
        angle = torch.arccos(cosine)
        ways += angle / torch.sin(angle) * (u - cosine * mean)
    assert float(mean.norm()) == pytest.approx(1) and float(ways.norm()) < 1e-9
    plain = sum(units) / len(units)
    assert not torch.allclose(mean, plain / plain.norm(), atol=1e-3)  # twin: the mean of directions is another point


def test_steps_and_tolerance():
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.9, 0.1]]
    far = merged_rows(rows, "karcher", steps=1)
    assert merged_rows(rows, "karcher", steps=50) == pytest.approx(merged_rows(rows, "karcher"), abs=1e-5)
    assert far != merged_rows(rows, "karcher", steps=2)
    assert merged_rows(rows, "karcher", tolerance=0.5) != merged_rows(rows, "karcher")
