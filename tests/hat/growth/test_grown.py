"""What a growth does to axes, tensors and maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.hat.growth.grown import Growth, _grown_places, grown_axes, key_of

COUNTS = st.lists(st.integers(1, 3), min_size=2, max_size=6)


def growth(counts, widths=None):
    return Growth(np.array(counts), np.array(widths or [1] * len(counts)))


@given(COUNTS, st.data())
def test_an_axis_keeps_its_order_and_every_unit_gets_as_many_as_it_should(counts, data):
    units = np.array(data.draw(st.lists(st.integers(0, len(counts)), min_size=1, max_size=12)))
    g = growth(counts)
    new = g.along(units)
    assert np.array_equal(new.units[new.places], g.number[units]) and (np.diff(new.places) > 0).all()
    assert np.array_equal(new.parents[new.places], np.arange(len(units)))
    assert len(new.units) == sum(counts[u - 1] if u else 1 for u in units)
    assert set(new.units.tolist()) <= set(range(sum(counts) + 1))
    assert (g.number[1:] == 1 + np.cumsum(counts) - counts).all()


@given(COUNTS, COUNTS, st.integers(1, 3))
def test_what_was_there_before_is_found_again_after_two_growths(rows, more, columns):
    """A weight [units, columns], then what it became grows again."""
    first = growth(rows)
    units = np.arange(1, len(rows) + 1)
    one = grown_axes(first, (len(rows), columns), (len(rows), columns), [(units, (len(rows), 1), True)])
    second = growth([more[i % len(more)] for i in range(one.shape[0])])
    two = grown_axes(second, one.shape, one.view, [(one.axes[0][0], one.axes[0][1], True)])
    x = torch.randn(len(rows), columns)
    middle = one.spread.grown(x, torch.randn(one.shape)) if one.spread.places else x
    last = two.spread.grown(middle, torch.randn(two.shape)) if two.spread.places else middle
    if one.spread.places and two.spread.places:
        both = one.spread.then(two.spread)
        assert torch.equal(both.of_before(last), x)
        assert torch.equal(last.reshape(-1)[both.flat(last)], x.reshape(-1))
        assert torch.equal(both.of_before(both.grown(x)), x) and both.grown(x).shape == last.shape


def test_a_head_is_followed_as_a_whole():
    g = growth([2, 2, 1, 1], [2, 2, 1, 1])
    assert g.number.tolist() == [0, 1, 2, 5, 6]
    assert g.along(np.array([1, 2, 1, 2, 3, 0])).units.tolist() == [1, 2, 1, 2, 3, 4, 3, 4, 5, 0]
    with pytest.raises(hatcl.ConversionError, match="another one after it in places where it is not whole"):
        g.along(np.array([1, 3]))


def test_groups_that_would_grow_in_different_ways():
    units = np.arange(1, 5)
    with pytest.raises(hatcl.ConversionError, match="the groups of a weight would grow in different ways"):
        grown_axes(growth([2, 1, 1, 1]), (4, 2), (2, 2, 2), [(units, (2, 2, 1), True)])
    even = grown_axes(growth([2, 1, 2, 1]), (4, 2), (2, 2, 2), [(units, (2, 2, 1), True)])
    assert even.shape == (6, 2) and even.view == (2, 3, 2)
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(even.spread.of_before(even.spread.grown(x, torch.zeros(6, 2))), x)


def test_the_memory_format_stays():
    x = torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last)
    new = grown_axes(growth([2, 1]), x.shape, x.shape, [(np.array([1, 2]), (2, 1, 1, 1), True)])
    made = new.spread.grown(x, torch.randn(new.shape))
    before = new.spread.of_before(made)
    assert torch.equal(before, x) and before.stride() == x.stride()
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_it_is_json_and_another_one_has_another_key():
    g = Growth(np.array([1, 2]), np.array([1, 1]), {"fc": {"out_features": 3}}, {"fc.table": (0, np.array([1, 2]))})
    again = Growth.from_json(json.loads(json.dumps(g.to_json())))
    assert again.to_json() == g.to_json() and torch.equal(key_of([again]), key_of([g]))
    assert not torch.equal(key_of([g]), key_of([growth([2, 1])]))


@given(COUNTS)
def test_new_units_are_where_those_are_that_they_follow(counts):
    places = np.arange(len(counts)) % 2
    assert np.array_equal(_grown_places(places, growth(counts)), np.repeat(places, counts))


def test_whole_new_heads_are_places_of_their_own():
    new = _grown_places(np.array([0, 0, 1, 1, 0]), growth([2, 2, 1, 1, 3], [2, 2, 2, 2, 1]))
    heads, rest = new[:6].reshape(3, 2), new[6:]
    assert (heads[:, 0] == heads[:, 1]).all() and len({*heads[:, 0].tolist()}) == 3 and len({*rest.tolist()}) == 1
