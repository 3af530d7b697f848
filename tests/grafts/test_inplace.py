"""Values written into a module's own tensors and taken out again, every bit."""

from __future__ import annotations

import copy
import math

import graft_parts as parts
import pytest
import torch
from graft_parts import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hatcl.errors import GraftError
from hatcl.functional import bits_of
from hatcl.grafts import Graft, inplace

KINDS = sorted(parts.MODELS)
RAW = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SPECIAL = [-0.0, 0.0, math.inf, -math.inf, math.nan]


def raw(dtype, seed, strange):
    """A model of random bits: NaN of every payload, subnormal numbers, zeros of both signs."""
    model = parts.Turned().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    size = 8 * dtype.itemsize - 1
    with torch.no_grad():
        for p in model.parameters():
            ints = torch.randint(-(2**size), 2**size - 1, p.shape, generator=generator).to(RAW[dtype])
            if strange:  # exponents of ones: infinity, and NaN quiet and signalling
                ints |= torch.tensor(math.inf, dtype=dtype).view(RAW[dtype])
            values = torch.tensor(SPECIAL, dtype=dtype).view(RAW[dtype])[torch.randint(5, p.shape, generator=generator)]
            where = torch.rand(p.shape, generator=generator) < 0.2
            p.detach().view(RAW[dtype]).copy_(torch.where(where, values, ints))
    return model


@given(st.integers(0, 9), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.sampled_from(list(RAW)), st.booleans())
@settings(deadline=None, max_examples=60)
def test_apply_then_remove_gives_back_every_bit(seed, shares, dtype, strange):
    pre = raw(dtype, seed, strange)
    before = parts.bits(pre)
    grafts, seen = [], []
    for i, share in enumerate(shares):
        grafts.append(parts.graft(pre, raw(dtype, seed + 20 + i, strange), share, seed=i))
        seen.append(parts.bits(pre))
        grafts[-1].apply_(pre)
        for n, p in pre.named_parameters():
            at = grafts[-1].indices.get(n, torch.zeros(0)).long()
            assert torch.equal(parts.as_ints(p).reshape(-1)[at], bits_of(grafts[-1].values[n]) if len(at) else at)
    for g, was in zip(reversed(grafts), reversed(seen), strict=True):
        g.remove_(pre)
        assert parts.same(parts.bits(pre), was)
    assert parts.same(parts.bits(pre), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_twin_values_that_pass_through_float32_lose_payloads(monkeypatch, dtype):
    plain = inplace.take
    monkeypatch.setattr(inplace, "take", lambda t, at: plain(t, at).float().to(t.dtype))
    pre = raw(dtype, 0, True)
    before = parts.bits(pre)
    g = Graft.from_masks(parts.masks(pre, 0.9), raw(dtype, 1, True))
    g.apply_(pre)
    g.remove_(pre, check=False)
    assert not parts.same(parts.bits(pre), before)


def test_twin_taking_the_difference_away_again_loses_bits(monkeypatch):
    pre, ft = parts.pair("bert")
    before, g = parts.bits(pre), parts.graft(pre, ft, 0.5)
    g.apply_(pre)

    def subtracted(t, place):
        inplace.put(t, place.at, inplace.take(t, place.at) - (place.new - place.old))

    monkeypatch.setattr(inplace, "_put_back", subtracted)
    g.remove_(pre)
    assert not parts.same(parts.bits(pre), before)


@pytest.mark.parametrize("kind", ["convolutional", "tied"])
def test_of_grafts_that_overlap_the_last_comes_out_first(kind):
    pre, ft = parts.pair(kind)
    before = parts.bits(pre)
    a, b = parts.graft(pre, ft, 0.5, 1), parts.graft(pre, ft, 0.5, 2)
    a.apply_(pre)
    b.apply_(pre)
    both = parts.bits(pre)
    refused(
        GraftError,
        lambda: a.remove_(pre),
        "elements of this graft are also in a graft that was applied later; remove that f",
    )
    assert parts.same(parts.bits(pre), both)
    b.remove_(pre)
    a.remove_(pre)
    assert parts.same(parts.bits(pre), before)
    # grafts that do not overlap come out in any order
    c = b - a
    a.apply_(pre)
    c.apply_(pre)
    a.remove_(pre)
    c.remove_(pre)
    assert parts.same(parts.bits(pre), before)


def test_the_same_graft_twice():
    pre, ft = parts.pair("linear")
    before, g = parts.bits(pre), parts.graft(pre, ft)
    with g.applied(pre), g.applied(pre):
        assert not parts.same(parts.bits(pre), before)
    assert parts.same(parts.bits(pre), before)


def test_what_was_not_applied_cannot_be_removed():
    pre, ft = parts.pair("linear")
    g = parts.graft(pre, ft)
    refused(
        GraftError, lambda: g.remove_(pre), "this graft is not applied to this Sequential", "has nothing to restore"
    )
    g.apply_(pre)
    refused(GraftError, lambda: g.remove_(copy.deepcopy(pre)), "not applied to this")
    g.remove_(pre)
    refused(GraftError, lambda: g.remove_(pre), "not applied to this")


@pytest.mark.parametrize("how", ["trained", "cast"])
def test_elements_that_changed_since(how):
    pre, ft = parts.pair("linear")
    before, g = parts.bits(pre), parts.graft(pre, ft)
    g.apply_(pre)
    if how == "trained":
        with torch.no_grad():
            pre[0].weight.mul_(2)
    else:
        pre.double()
    changed = parts.bits(pre)
    refused(GraftError, lambda: g.remove_(pre), "0.weight: elements of this graft changed since", "pass check=False")
    assert parts.same(parts.bits(pre), changed)
    g.remove_(pre, check=False)
    on = g.masks()["0.weight"]
    assert torch.equal(parts.as_ints(pre[0].weight.float())[on], before["0.weight"][on])


def test_elements_outside_may_be_trained():
    pre, ft = parts.pair("linear")
    g = parts.graft(pre, ft)
    start, on = {n: p.detach().clone() for n, p in pre.named_parameters()}, g.masks()
    with g.applied(pre), torch.no_grad():
        for n, p in pre.named_parameters():
            p.add_((~on[n]).float())
    for n, p in pre.named_parameters():
        assert torch.equal(p, torch.where(on[n], start[n], start[n] + 1))


def test_after_an_exception_every_bit_is_back():
    pre, ft = parts.pair("bert")
    before, g = parts.bits(pre), parts.graft(pre, ft)
    with pytest.raises(KeyError), g.applied(pre):
        raise KeyError
    assert parts.same(parts.bits(pre), before)


def test_after_an_exception_every_bit_is_back_also_of_elements_that_changed():
    pre, ft = parts.pair("linear")
    before, g = parts.bits(pre), parts.graft(pre, ft, 2)
    with pytest.raises(KeyError, match="mine"), g.applied(pre), torch.no_grad():
        pre[0].weight.mul_(2)
        raise KeyError("mine")
    assert parts.same(parts.bits(pre), before)
    with pytest.raises(GraftError, match="changed since it was applied"), g.applied(pre), torch.no_grad():
        pre[0].weight.mul_(2)  # without one it is told
    g.remove_(pre, check=False)
    assert parts.same(parts.bits(pre), before)


def test_a_tensor_that_is_gone():
    pre, ft = parts.pair("linear")
    g, last = parts.graft(pre, ft, 2), pre[2]
    before = parts.bits(pre)
    g.apply_(pre)
    pre[2] = nn.Identity()
    refused(
        GraftError,
        lambda: g.remove_(pre),
        "2.weight: this Sequential no longer has it; undo the replacement or renaming of the module",
    )
    pre[2] = last
    g.remove_(pre)
    assert parts.same(parts.bits(pre), before)
