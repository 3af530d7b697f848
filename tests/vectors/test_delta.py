"""A difference gives the fine-tuned tensor back bit for bit, whatever the two numbers are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.errors import VectorError
from hatcl.vectors.delta import Delta, combine, delta_between, restore

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# half of the largest magnitude, so that the difference of any two is a float32; see `test_what_overflows`
WIDTH = {
    torch.float64: (64, 2.0**1022), torch.float32: (32, 2.0**126), torch.float16: (16, 65504.0),
    torch.bfloat16: (32, 2.0**126),
}  # fmt: skip


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also the signs of zeros, which `torch.equal` does not see."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype])
    )  # fmt: skip


@st.composite
def pairs(draw):
    """A base and an unrelated tensor: subnormals, zeros of both signs, magnitudes from the smallest to the largest."""
    dtype = draw(st.sampled_from(list(BITS)))
    width, most = WIDTH[dtype]
    floats = st.floats(-most, most, width=width, allow_nan=False, allow_infinity=False)
    small = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.2e-38, 6e-8, 1 + 2**-7, 3e4])
    numbers = st.lists(st.tuples(floats | small, floats | small), min_size=1, max_size=12)
    base, finetuned = zip(*draw(numbers), strict=True)
    return torch.tensor(base, dtype=torch.float64).to(dtype), torch.tensor(finetuned, dtype=torch.float64).to(dtype)


@given(pairs())
@settings(max_examples=400, deadline=None)
def test_one_gives_the_fine_tuned_back_and_zero_the_base(pair):
    base, finetuned = pair
    delta = delta_between(base, finetuned)
    assert same_bits(restore(base, delta), finetuned)
    assert same_bits(restore(base, combine([(1, delta), (0.0, delta)])), finetuned)
    assert same_bits(restore(base, combine([(0.0, delta), (1, delta)])), finetuned)
    assert same_bits(restore(base, combine([(0, delta)])), base)
    assert same_bits(restore(base, combine([(1, delta), (-1, delta)])), base)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_two_dtypes_give_the_value_of_the_wider(pair):
    base, finetuned = pair
    if base.dtype is torch.float64:
        return
    wide, narrow = base.float(), finetuned.bfloat16()
    assert same_bits(restore(wide, delta_between(wide, narrow)), narrow.float())
    assert same_bits(restore(narrow, delta_between(narrow, wide), dtype=torch.float32), wide)


@pytest.mark.parametrize("dtype", BITS)
def test_twin_without_remainders_the_fine_tuned_is_not_given_back(dtype):
    """Unrelated values of the size of a weight, as two models from different seeds have them."""
    torch.manual_seed(0)
    base, finetuned = (torch.randn(20_000).to(dtype) * 10 ** torch.randint(-6, 3, (20_000,)) for _ in range(2))
    base, finetuned = base.to(dtype), finetuned.to(dtype)
    finetuned[:10] = -0.0
    delta = delta_between(base, finetuned)
    assert same_bits(restore(base, delta), finetuned)
    assert not same_bits(restore(base, Delta(delta.value)), finetuned)


def test_a_remainder_by_hand():
    base, finetuned = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([2.0**-30, -0.0, 0.75])
    delta = delta_between(base, finetuned)
    # 2^-30 - 1 needs 30 bits, a float32 has 24: the difference rounds to -1, and 2^-30 is left
    assert delta.value.tolist() == [-1.0, -1.0, 0.25]
    assert delta.at.tolist() == [0, 1] and delta.rest.tolist() == [2.0**-30, 0.0] and delta.rest[1].signbit()
    assert delta_between(base, base + 0.25).at is None


def test_a_small_change_has_no_remainders():
    torch.manual_seed(0)
    base = torch.randn(10_000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start = base.to(dtype)
        # a change below half of each weight: the difference is exact (Sterbenz)
        assert delta_between(start, (base * (1 + 0.4 * torch.rand(10_000))).to(dtype)).at is None


def test_what_overflows_has_no_number():
    delta = delta_between(torch.tensor([3e38]), torch.tensor([-3e38]))
    assert not torch.isfinite(delta.value).all()  # TaskVector refuses it, see test_task_vector


def test_a_sum_is_rounded_once():
    base = torch.tensor([1.0])
    deltas = [Delta(torch.tensor([2.0**-24])) for _ in range(3)]
    # in float32 each addition of half an ulp would round back to 1; their sum is 1.5 ulp
    assert restore(base, combine([(1, d) for d in deltas])).item() == 1 + 2 * 2.0**-23
    assert (base + deltas[0].value + deltas[1].value + deltas[2].value).item() == 1.0


def test_coefficients_may_be_tensors_that_broadcast():
    torch.manual_seed(0)
    base, finetuned = torch.randn(3, 4) * 1e4, torch.randn(3, 4) * 1e-4
    delta = delta_between(base, finetuned)
    assert delta.at is not None
    c = torch.tensor([[1.0], [0.0], [1.0]])
    got = restore(base, combine([(c, delta)]))
    assert torch.equal(got[::2], finetuned[::2]) and torch.equal(got[1], base[1])


def test_tensors_of_any_layout():
    torch.manual_seed(0)
    base = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    finetuned = torch.randn(6, 4, 5, 5).transpose(0, 1) * 1e-9
    delta = delta_between(base, finetuned)
    assert delta.at is not None and torch.equal(restore(base, delta), finetuned)
    assert torch.equal(restore(base.contiguous(), delta), finetuned)


def test_scalars_and_empty_tensors():
    assert restore(torch.tensor(2.0), delta_between(torch.tensor(2.0), torch.tensor(3.0))).item() == 3.0
    assert restore(torch.zeros(0), delta_between(torch.zeros(0), torch.zeros(0))).shape == (0,)


def test_where_keeps_the_remainders_of_what_it_keeps():
    base, finetuned = torch.ones(4), torch.full((4,), 2.0**-30)
    delta = delta_between(base, finetuned).where(torch.tensor([True, False, False, True]))
    assert torch.equal(restore(base, delta), torch.tensor([2.0**-30, 1, 1, 2.0**-30]))


def test_deltas_are_asked_for_one_by_one():
    alive = []

    def terms():
        for i in range(3):
            alive.append(i)
            yield float(i), Delta(torch.full((2,), float(i)))

    assert combine(terms()).value.tolist() == [5.0, 5.0]
    assert alive == [0, 1, 2]


@given(pairs(), pairs())
@settings(max_examples=100, deadline=None)
def test_of_two_vectors_each_element_that_one_of_them_changes_is_that_ones(first, second):
    """Also where it needs a remainder: an adapter and a fine-tuned model, or two tasks that changed other elements."""
    base, finetuned = first
    n = min(len(base), len(second[1]))
    base, finetuned, other = base[:n], finetuned[:n], second[1][:n].to(base.dtype)
    theirs = torch.arange(n) % 2 == 0
    a, b = torch.where(theirs, base, finetuned), torch.where(theirs, other, base)
    if not (other.double() - base.double()).float().isfinite().all():
        return
    got = restore(base, combine([(1, delta_between(base, a)), (1, delta_between(base, b))]))
    assert same_bits(got, torch.where(theirs, other, finetuned))


def test_a_sum_keeps_the_signs_of_zeros_where_nothing_changes():
    base = torch.tensor([-0.0, 0.0, -0.0, -0.0])
    delta = Delta(torch.tensor([0.0, 0.0, -0.0, 1.0]))
    assert same_bits(restore(base, delta), torch.tensor([-0.0, 0.0, -0.0, 1.0]))
    # the twin: plain addition makes them positive
    assert not same_bits(base + delta.value, torch.tensor([-0.0, 0.0, -0.0, 1.0]))


def test_no_terms_have_no_sum():
    with pytest.raises(VectorError, match="combine: got no terms, expected at least one"):
        combine([])
