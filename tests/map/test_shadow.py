"""Shadows: what is kept with stride 0 is what the whole tensor would be."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from hatcl.map.shadow import Shadow, Shadows, Slot, apply_as_is, placed, reshape, settle, small, varying, vector


@st.composite
def shadows(draw):
    """Labels of some shape that are constant (stride 0) along some dimensions."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    live = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    core = [n if keep else 1 for n, keep in zip(shape, live, strict=True)]
    values = draw(st.lists(st.integers(0, 3), min_size=math.prod(core), max_size=math.prod(core)))
    return torch.tensor(values).view(core).expand(shape)


@st.composite
def reshapings(draw):
    ids = draw(shadows())
    rest, new = ids.numel(), []
    while rest > 1 and len(new) < 5:
        n = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        new.append(n)
        rest //= n
    new.append(rest)
    if draw(st.booleans()):
        new[draw(st.integers(0, len(new) - 1))] = -1
    return ids, new


@given(reshapings())
def test_reshape_is_that_of_the_materialised_tensor(case):
    ids, shape = case
    got = reshape(ids, shape)
    want = ids.contiguous().reshape(shape)
    assert got.shape == want.shape and torch.equal(got, want)


@given(shadows())
def test_merging_constant_dimensions_keeps_them_constant(ids):
    wide = ids.unsqueeze(-1).unsqueeze(-1).expand(*ids.shape, 50, 60)
    merged = reshape(wide, [*ids.shape, 3000])
    assert torch.equal(merged, ids.unsqueeze(-1).expand(*ids.shape, 3000))
    assert merged.stride(-1) == 0


@given(shadows())
def test_small_and_settle_say_the_same_in_less(ids):
    assert torch.equal(small(ids).expand(ids.shape), ids)
    assert all(small(ids).size(d) == 1 for d in range(ids.dim()) if d not in varying(ids))
    settled = settle(ids.contiguous())
    assert torch.equal(settled, ids)
    for d in range(ids.dim()):
        constant = bool((ids == ids.narrow(d, 0, 1)).all())
        assert (d in varying(settled)) == (not constant)


@given(shadows())
def test_operations_that_know_no_integers_run_in_float64(ids):
    x = ids.unsqueeze(0).expand(1, *ids.shape) if ids.dim() < 3 else ids
    while x.dim() < 4:
        x = x.unsqueeze(0)
    big = x[:1] if x.dim() == 4 else x.flatten(0, x.dim() - 4)[:1]
    big = big + 2**40  # more than float32 holds
    padded = apply_as_is(torch.ops.aten.reflection_pad2d.default, (big, [0, 0, 0, 0]), {}, [big])
    assert padded.dtype == torch.long and torch.equal(padded, big)


def test_a_vector_is_placed_where_it_came_from():
    labels = torch.arange(1, 5)
    for dim in range(3):
        shape = [4 if d == dim else 3 for d in range(3)]
        ids = placed(labels, dim, shape)
        assert list(ids.shape) == shape and varying(ids) == (dim,) and torch.equal(vector(ids, dim), labels)


def carrying(shadows, x):
    """The labels of a tensor's only slot."""
    (slot,) = shadows.get(x).slots
    return slot.ids.tolist()


def test_views_of_one_storage_share_what_is_written():
    shadows = Shadows()
    base = torch.zeros(2, 3)
    row, column, turned = base[1], base[:, 0], base.t()
    shadows[base] = Shadow()
    for view in (row, column, turned):
        shadows[view] = Shadow()
    shadows.write(row, Shadow((Slot(torch.tensor([4, 5, 6])),), pending=frozenset({("here", ("w", 0))})))
    assert carrying(shadows, base) == [[0, 0, 0], [4, 5, 6]] and carrying(shadows, row) == [4, 5, 6]
    assert carrying(shadows, column) == [0, 4] and carrying(shadows, turned) == [[0, 4], [0, 5], [0, 6]]
    assert shadows.get(base).pending == shadows.get(turned).pending == {("here", ("w", 0))}
    shadows.write(column, Shadow((Slot(torch.tensor([7, 8]), clean=False),)))
    assert carrying(shadows, row) == [8, 5, 6] and not shadows.get(row).slots[0].clean


def test_what_nothing_was_given_has_no_shadow():
    shadows = Shadows()
    x = torch.zeros(2)
    assert shadows.get(x) is None and shadows.get("no tensor") is None and x not in shadows
    shadows[x] = Shadow()
    assert x in shadows and len(shadows.alive()) == 1
    del x
    assert not shadows.alive()
