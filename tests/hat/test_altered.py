"""Tensors overwritten in place are put back bit for bit, whatever is in them and wherever that is interrupted."""

from __future__ import annotations

import inspect
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hatcl.functional import same_bits
from hatcl.hat import altered
from hatcl.hat.altered import FIELDS, Altered, is_large

TOP = {torch.float16: 1e2, torch.bfloat16: 1e3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tensors of some hundred elements are large here, and altered in several blocks."""
    monkeypatch.setattr(altered, "LARGE", 64)
    monkeypatch.setattr(altered, "BLOCK", 64)


def odd(dtype):
    """Normal numbers with zeros of both signs, and numbers below all normal ones."""
    x = (0.02 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[3], x[:, 7], x[5, 5], x[6, 6] = 0.0, -0.0, torch.finfo(dtype).tiny / 4, -torch.finfo(dtype).tiny / 8
    return x


def half(x):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("dtype", FIELDS)
def test_stirring_moves_every_element_and_is_undone(dtype):
    x = odd(dtype)
    was, changes = x.clone(), Altered(3)
    changes.turned_over(x, lambda like: torch.full_like(like, 0.5))
    zero = was.abs() < torch.finfo(dtype).tiny
    factor = (x / was)[~zero].double()
    assert bool((x != was).all()) and bool((x[zero] == 0.5).all())
    assert bool(((factor >= 0.5) & (factor <= 2)).all())
    changes.undo()
    assert same_bits(x, was) and not len(changes)


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_attack_overwrites_what_is_asked_and_nothing_else(dtype, layout):
    x = odd(dtype) if layout == "rows" else odd(dtype).t()
    was, on, changes = x.clone(), half(x), Altered()
    assert changes.overwrite(x, lambda: on, lambda: 1 / 0, TOP.get(dtype, 1e4)) == int(on.sum())
    assert same_bits(x[~on], was[~on]) and float((x[on] != was[on]).float().mean()) > 0.98
    large = TOP.get(dtype, 1e4)
    assert bool(torch.isfinite(x).all()) and 0.4 * large < float(x[on].abs().max()) < 2 * large
    assert bool((x[on & (was == 0)].abs() > 0.4 * large).all())  # zeros become the largest
    changes.undo()
    assert same_bits(x, was)


def kept_as_copies():
    x = odd(torch.float32)
    x[0, 0] = torch.inf
    few, wide = torch.randn(5), odd(torch.float32)
    wide[0, 0], wide[1, 1] = 1e-30, 1e30  # shifted until the largest is 1e4, the smallest would be no normal number
    return {"infinite": x, "small": few, "numbers": torch.arange(600), "spread": wide, "complex": torch.randn(600) * 1j}


@pytest.mark.parametrize("name", kept_as_copies())
def test_what_cannot_be_shifted_is_kept_as_a_copy(name):
    x = kept_as_copies()[name]
    was, on, changes = x.clone(), half(x), Altered()
    changes.overwrite(x, lambda: on, lambda: torch.full_like(x, 7), 1e4)
    assert same_bits(x, torch.where(on, torch.full_like(x, 7), was))
    changes.undo()
    assert same_bits(x, was)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(0, 9))
def test_changes_on_top_of_each_other_are_undone_in_reverse(kinds, seed):
    x, changes = odd(torch.float32), Altered(seed)
    stages = [x.clone()]
    for stir in kinds:
        if stir:
            changes.turned_over(x, torch.ones_like)
        else:
            changes.overwrite(x, lambda: half(x), lambda: torch.ones_like(x), 1e4)
        stages.append(x.clone())
    for i in reversed(range(len(kinds))):
        changes.undo(i)
        assert same_bits(x, stages[i])


def test_two_parameters_of_one_memory_are_put_back():
    x = odd(torch.float32)
    was, twin, changes = x.clone(), nn.Parameter(x.detach()), Altered()
    changes.replace(x, torch.ones_like(x))
    changes.replace(twin, torch.zeros_like(x))
    changes.overwrite(twin, lambda: half(x), lambda: 1 / 0, 1e4)
    changes.undo()
    assert same_bits(x, was)


@pytest.mark.parametrize("after", range(0, 24, 3))
def test_an_interruption_loses_nothing(after, monkeypatch):
    """Interrupted at any block of the change, and once more while that is undone."""
    x, plain, calls = odd(torch.float32), Altered._key, [0]
    was, changes = x.clone(), Altered()

    def key(self, block, i, turn):
        calls[0] += 1
        if calls[0] in (after + 1, after + 5):
            raise KeyboardInterrupt
        return plain(self, block, i, turn)

    monkeypatch.setattr(Altered, "_key", key)
    with pytest.raises(KeyboardInterrupt):
        try:
            changes.turned_over(x, torch.ones_like)
            changes.overwrite(x, lambda: half(x), lambda: 1 / 0, 1e4)
        finally:
            changes.undo()
    assert same_bits(x, was) and calls[0] > after


def undone_but_for_an_interruption(line):
    """What a tensor is after its change was undone with an interruption at the so many-th line that this runs, what it
    was, and whether there are so many."""
    x, changes, ran = odd(torch.float32), Altered(), [0]
    was = x.clone()
    changes.turned_over(x, torch.ones_like)

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith("altered.py"):
            return None
        ran[0] += event == "line"
        if event == "line" and ran[0] == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        changes.undo()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # inside of torch's own __exit__, an interruption leaves gradients off
        changes.undo()  # as a conversion does
    return x, was, ran[0] >= line


def test_undoing_may_be_interrupted_at_every_line():
    line, more = 1, True
    while more:
        x, was, more = undone_but_for_an_interruption(line)
        assert same_bits(x, was), line
        line += 1
    assert line > 50


def test_twin_where_undoing_keeps_its_own_count_a_block_is_put_back_twice(monkeypatch):
    def undo(self):
        for i in reversed(range(self.written)):
            self.blocks[i].copy_(self.back(i, self.blocks[i]))
            self.written = i

    source = inspect.getsource(undo)  # compiled as if it stood there, so that its lines are interrupted as well
    exec(compile(textwrap.dedent(source), "altered.py", "exec"), found := {})
    monkeypatch.setattr(altered._Altered, "undo", found["undo"])
    assert not all(same_bits(*undone_but_for_an_interruption(line)[:2]) for line in range(1, 60))


def test_twin_without_counting_what_was_written_an_interruption_loses_weights(monkeypatch):
    x, plain = odd(torch.float32), Altered._key
    was, changes = x.clone(), Altered()
    monkeypatch.setattr(Altered, "_key", lambda self, b, i, turn: plain(self, b, i, turn) if i < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        changes.turned_over(x, torch.ones_like)
    monkeypatch.setattr(Altered, "_key", plain)
    changes._done[-1].written = len(changes._done[-1].blocks)  # as if all had been
    changes.undo()
    assert not same_bits(x, was)


def test_only_dense_numbers_are_altered_by_their_bits():
    class Own(torch.Tensor):
        """A type that may hold something else than it shows."""

    assert is_large(torch.zeros(64)) and is_large(nn.Parameter(torch.zeros(64)))
    assert not is_large(torch.zeros(63)) and not is_large(torch.zeros(64).as_subclass(Own))
    assert not is_large(torch.zeros(64, dtype=torch.int64)) and not is_large(torch.zeros(64, dtype=torch.complex64))
