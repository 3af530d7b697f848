"""What the merging methods share, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vector_parts import of_rows

from hatcl import ConfigError, TaskVector
from hatcl.vectors.delta import Delta
from hatcl.vectors.merging.blocks import aligned, as_matrix, average, blockwise, own_logits, per_vector, weighted


def test_sums_are_exact_in_any_order():
    taus = [torch.tensor([2.0**30, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-(2.0**30), 3.0])]
    assert weighted(taus, [1.0] * 3).tolist() == weighted(taus[::-1], [1.0] * 3).tolist() == [1.0, 6.0]
    assert weighted(taus, [1.0] * 3).dtype == torch.float64
    assert average(taus[1:]).tolist() == [(1 - 2.0**30) / 2, 2.5]
    assert weighted(taus[:2], [torch.tensor([0.0, 1.0]), 2.0]).tolist() == [2.0, 5.0]


def test_block_by_block_in_the_vectors_own_dtype():
    a, b = of_rows([1.0, 2.0], [3.0, 4.0])
    out = blockwise([a, b.to(torch.bfloat16)], lambda name, taus: taus[0].double() + taus[1])
    assert out["w"].dtype == torch.float32 and out["w"].tolist() == [4.0, 6.0]


def test_one_of_the_vectors_keeps_its_remainders():
    rest = Delta(torch.tensor([1.0, 2.0]), torch.tensor([1], dtype=torch.int32), torch.tensor([1e-9]))
    vector = TaskVector({"w": rest})
    assert blockwise([vector], lambda name, taus: taus[0].clone()).delta("w").rest is not None
    assert blockwise([vector], lambda name, taus: taus[0] * 2).delta("w").rest is None  # the twin: another value


def test_an_option_per_vector():
    two = of_rows([1.0], [2.0])
    assert per_vector("weights", (1, 2), two, "weight") == [1, 2]
    for got, text in (([1], "got 1"), (3, "got a int"), (None, "got a NoneType")):
        with pytest.raises(ConfigError, match=f"weights: {text}, expected a list of 2: one weight per vector"):
            per_vector("weights", got, two, "weight")


def test_weights_as_matrices():
    assert as_matrix(torch.zeros(2, 3), False).shape == (2, 3)
    assert as_matrix(torch.zeros(2, 3, 2, 2), True).shape == (2, 12) and as_matrix(torch.zeros(2, 3, 2), False) is None
    assert as_matrix(torch.zeros(3), True) is None and as_matrix(torch.zeros(0, 3), True) is None
    filters = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(as_matrix(filters, True), filters.flatten(1))


def test_an_odd_address_is_left():
    x = torch.arange(9.0)
    assert aligned(x[1:]).data_ptr() % 64 == 0 and torch.equal(aligned(x[1:]), x[1:])
    whole = aligned(x.clone())
    assert aligned(whole) is whole


def test_the_models_own_logits_whatever_the_inputs_are_packed_in():
    x = torch.eye(2)
    for inputs in (x, (x,), {"input": x}):
        assert torch.equal(own_logits(nn.Identity(), inputs, 1), x)
