"""Contractions: learned queries, experts."""

from __future__ import annotations

import parts
import pytest
import torch
from map_parts import units
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of
from hatcl.map.coupling import Coupling
from hatcl.map.rules import TRACE_RULES

# ---- learned queries ------------------------------------------------------------------------------


class Queries(nn.Module):
    """Attention from learned queries to what comes in: the queries meet a weight, or a norm and then a weight."""

    def __init__(self, norm):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 12))
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.first, self.q, self.k, self.v = nn.Linear(5, 10), nn.Linear(12, 8), nn.Linear(10, 8), nn.Linear(10, 8)
        self.out, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        q = self.norm(self.queries.expand(len(x), -1, -1))
        h = tf.scaled_dot_product_attention(self.q(q), self.k(x), self.v(x))
        return self.head(self.out(h).mean(1))


TOKENS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [False, True], ids=["weight", "norm and weight"])
def test_learned_queries_have_units_of_their_own(norm):
    """They are data that a parameter writes: twelve units, which the query's weight reads, and no copy per task."""
    torch.manual_seed(0)
    source = Queries(norm).eval()
    found = map_of(source, TOKENS)
    mine = units(found, "queries", True)
    assert len(set(mine)) == 12 and 0 not in mine and units(found, "q.weight", False) == mine
    assert not found.entries["queries"].copied and found.entries["q.weight"].known == 1
    assert not norm or (units(found, "norm.weight", True) == mine and found.entries["norm.weight"].why == "norm")
    model = parts.pretend(hatcl.convert(source, 3, TOKENS))
    assert "queries" not in hatcl.describe(model).copies
    assert [parts.leaks(model, TOKENS, t) for t in range(3)] == [None] * 3


@pytest.mark.parametrize("norm", [False, True], ids=["weight", "norm and weight"])
def test_twin_queries_that_are_no_data_are_copied(norm, monkeypatch):
    monkeypatch.setattr(Coupling, "as_activation", lambda self, slots, dims: [])
    found = map_of(Queries(norm).eval(), TOKENS)
    assert units(found, "queries", True) is None and found.entries["queries"].copied


# ---- experts --------------------------------------------------------------------------------------

grouped_mm = getattr(tf, "grouped_mm", getattr(torch, "_grouped_mm", None))


class Experts(nn.Module):
    """Every row goes through the matrices of one of three experts."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(0.3 * torch.randn(3, 16, 24)), nn.Parameter(0.3 * torch.randn(3, 24, 16))

    def forward(self, x):
        x = torch.relu(self.first(x))
        ends = torch.tensor([2, 5, 8], dtype=torch.int32)
        return self.head(x + grouped_mm(tf.silu(grouped_mm(x, self.up, offs=ends)), self.down, offs=ends))


ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(grouped_mm is None, reason="this torch has no grouped_mm")
def test_experts_keep_both_ends():
    torch.manual_seed(0)
    source = Experts().eval()
    found = map_of(source, ROWS)
    stream = units(found, "first.weight", True)
    assert units(found, "up", False) == stream == units(found, "down", True) == units(found, "head.weight", False)
    hidden = units(found, "up", True)
    assert hidden == units(found, "down", False) and len(set(hidden)) == 24 and not set(hidden) & {0, *stream}
    assert found.entries["up"].known == found.entries["down"].known == 1 and found.notes == {}
    model = parts.pretend(hatcl.convert(source, 3, ROWS))
    assert not {"up", "down"} & set(hatcl.describe(model).copies)
    assert [parts.leaks(model, ROWS, t) for t in range(3)] == [None] * 3
    assert torch.equal(parts.logits(model, None, ROWS), source(ROWS))


@pytest.mark.skipif(grouped_mm is None, reason="this torch has no grouped_mm")
def test_twin_experts_by_an_operation_that_is_not_known_are_copied(monkeypatch):
    for name in ("_grouped_mm", "grouped_mm_fallback"):
        monkeypatch.delitem(TRACE_RULES, name)
    found = map_of(Experts().eval(), ROWS)
    assert found.entries["up"].copied and found.entries["down"].copied
    assert any("_grouped_mm is not known to the trace" in note for note in found.notes.values())
