"""The memory: a uniform sample of the whole stream, whatever is drawn from it, and resumable."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.errors import ConfigError, SkillError
from hatcl.skills.reservoir import Reservoir


def filled(count: int, size: int = 4, seed: int = 0) -> Reservoir:
    r = Reservoir(size, seed)
    for i in range(count):
        r.add(i)
    return r


def shares(count: int, size: int, runs: int) -> list[float]:
    """How often each of `count` examples was kept."""
    kept = [0] * count
    for seed in range(runs):
        for i in filled(count, size, seed).examples:
            kept[i] += 1
    return [k / runs for k in kept]


def test_the_first_ones_are_kept_as_they_come():
    assert filled(3).examples == [0, 1, 2] and len(filled(3)) == 3
    assert filled(4).examples == [0, 1, 2, 3]


def test_every_example_is_kept_equally_often():
    # 2000 runs of 4 of 12: a share has a standard deviation of sqrt(1/3 * 2/3 / 2000) = 0.0105; five of them
    assert all(abs(share - 4 / 12) < 0.053 for share in shares(12, 4, 2000))


def test_a_memory_that_always_replaces_is_found_out(monkeypatch):
    class Last(Reservoir):
        def add(self, example):
            self.seen = min(self.seen, self.size)  # as if only the last ones had been seen
            super().add(example)

    monkeypatch.setitem(globals(), "Reservoir", Last)
    assert any(abs(share - 4 / 12) >= 0.053 for share in shares(12, 4, 300))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 5), st.lists(st.integers(0, 59)))
def test_what_is_kept_depends_on_the_stream_and_the_seed_alone(count, size, seed, drawn_at):
    a, b = Reservoir(size, seed), Reservoir(size, seed)
    for i in range(count):
        a.add(i)
        b.add(i)
        if i in drawn_at:
            b.sample(2)
    assert a.examples == b.examples and a.seen == count and len(a) == min(count, size)
    assert len(set(a.examples)) == len(a)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30))
def test_a_sample_has_no_example_twice(count, n):
    r = filled(count, 10)
    got = r.sample(n)
    assert len(got) == min(n, len(r)) == len(set(got)) and set(got) <= set(r.examples)


def test_samples_differ_and_seeds_too():
    r = filled(100, 50)
    assert r.sample(10) != r.sample(10)
    assert filled(100, 50, 1).examples != filled(100, 50, 2).examples


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    filled(50).sample(3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_resumed_memory_goes_on_as_if_nothing_had_been(tmp_path):
    whole, first = filled(30), filled(20)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = Reservoir(4, seed=9)
    again.load_state_dict(torch.load(file, weights_only=True))
    for i in range(20, 30):
        again.add(i)
    assert again.examples == whole.examples and again.seen == 30
    assert again.sample(3) == whole.sample(3)
    r = filled(2)
    kept = r.state_dict()
    r.add(5)
    assert kept["examples"] == [0, 1]  # a copy


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_a_size_below_one(size):
    with pytest.raises(ConfigError, match=r"size: got .*, expected an integer of at least 1"):
        Reservoir(size)


def test_an_empty_memory_and_nothing_to_draw():
    with pytest.raises(SkillError, match=r"the memory is empty \(0 of 4 examples\); add examples of a learned task"):
        Reservoir(4).sample(2)
    with pytest.raises(ConfigError, match="n: got 0, expected at least 1"):
        filled(2).sample(0)


def test_a_state_that_does_not_fit_changes_nothing():
    r = filled(3)
    with pytest.raises(
        SkillError, match="the state belongs to a memory of 5 examples, this one has 4; make it with that"
    ):
        r.load_state_dict(filled(9, 5).state_dict())
    with pytest.raises(SkillError, match="the state lacks 'seen', expected the result of Reservoir.state_dict"):
        r.load_state_dict({"size": 4})
    assert r.examples == [0, 1, 2]
