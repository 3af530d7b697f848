"""One composed tensor and its derivative, by hand; in models test_compose.py has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.vectors import block as module
from hatcl.vectors.block import Block
from hatcl.vectors.delta import Delta

THETA, ONE, TWO = (
    torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    torch.full((2, 2), 2.0),
)
LAYOUTS = {
    "one group": (None, 1, [0.5, 0.25], [[2.0, 2.5], [3.5, 5.0]]),
    "rows": (torch.tensor([[0], [1]]), 2, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [[2.0, 2.0], [5.0, 6.0]]),
    "elements": (
        torch.tensor([[0, 1], [1, 0]]), 2, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [[2.0, 4.0], [5.0, 5.0]],
    ),
}  # fmt: skip


def block(local, groups):
    target = nn.Parameter(torch.zeros(2, 2))
    return Block("w", THETA, [Delta(ONE), Delta(TWO)], [0, 1], target, torch.arange(groups), local, [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", [1, 1 << 19])
def test_a_tensor_is_written_in_pieces_of_any_size(layout, pieces, monkeypatch):
    monkeypatch.setattr(module, "FOLDED_AT_ONCE", pieces)
    local, groups, lam, want = LAYOUTS[layout]
    b = block(local, groups)
    b.fold_(lam)
    assert b.target.tolist() == want
    b.fold_([0.0, 0.0] if local is None else torch.zeros(2, 2))
    assert torch.equal(b.target.data, THETA)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", [1, 1 << 19])
def test_the_derivative_is_the_product_with_each_vector(layout, pieces, monkeypatch):
    monkeypatch.setattr(module, "FOLDED_AT_ONCE", pieces)
    local, groups, _, _ = LAYOUTS[layout]
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    index = torch.zeros(2, 2, dtype=torch.long) if local is None else local.expand(2, 2)
    want = [[float((grad * tau)[index == g].sum()) for g in range(groups)] for tau in (ONE, TWO)]
    assert block(local, groups).products(grad).tolist() == want


def test_a_vector_that_lacks_the_tensor_adds_nothing():
    b = block(None, 1)
    b.changing = [1]
    b.fold_([100.0, 1.0])
    assert torch.equal(b.target.data, THETA + 2)
    assert b.products(torch.ones(2, 2)).tolist() == [[0.0], [8.0]]


def test_all_lies_as_the_target_does():
    target = nn.Parameter(torch.zeros(1, 2, 2, 2).to(memory_format=torch.channels_last))
    tau = torch.arange(8.0).view(1, 2, 2, 2)
    b = Block("w", torch.zeros(1, 2, 2, 2), [Delta(tau)], [0], target, torch.arange(1), None, [])
    assert b.deltas[0].value.stride() == target.stride()
    b.fold_([2.0])
    assert torch.equal(b.target.data, 2 * tau)
