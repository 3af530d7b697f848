"""Units of a layer: their gates for a task, and what is kept of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.hat.binding import Units
from hatcl.hat.gates import Gates


def gates(units=50, **options):
    return Gates(units, hatcl.HATConfig(**{"num_tasks": 3, **options}))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_units_pick_their_gates_and_zero_is_always_on(numbers):
    g = gates(12)
    g.seal(0)
    g.task = 0
    units = Units(g, np.array(numbers))
    want = torch.tensor([1.0 if n == 0 else float(g.masks[0][n - 1]) for n in numbers])
    assert torch.equal(units.gate(), want) and torch.equal(units.hard(0), want.bool())
    assert units.share(g.task) == pytest.approx(max(float(want.mean()), 1e-4))
    g.task = None
    assert units.gate() is None


def test_what_is_kept_of_a_task_follows_every_change():
    """Nothing is remembered too long: sealing, forgetting, loading, casting, another task."""
    g = gates()
    units = Units(g, np.arange(1, 51))
    for t in (0, 1):
        g.seal(t)
    seen = []
    for t in (0, 1, 0):
        g.task = t
        seen.append(units.gate().clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    other = gates()
    other.seal(0)
    g.load_state_dict(other.state_dict())
    assert torch.equal(units.gate(), other.masks[0].float())
    g.double()
    assert units.gate().dtype == torch.float64
    g.unseal(0)
    assert not g.hard(0).equal(other.masks[0])
