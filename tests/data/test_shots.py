"""The same random few: counts, no example in two parts, seeds, classes with too few."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.continual import TextData, read_texts
from hatcl.data.images import Images, Preparation
from hatcl.data.shots import held_out, same_few, sample_shots
from hatcl.data.texts import Turn
from hatcl.errors import ConfigError
from hatcl.finetuning import k_shot, k_shot_images

SHARED = Path(__file__).parents[3] / "shared" / "data" / "text_fewshot16"


def pairs(start, each, labels="ab"):
    return [(f"x{i}{y}", y) for i in range(start, start + each) for y in labels]


def test_k_of_each_class_and_as_many_to_validate_on():
    data = TextData(pairs(0, 20), pairs(20, 9), pairs(50, 5))
    few = k_shot(data, 4, seed=3)
    assert Counter(y for _, y in few.train) == Counter(y for _, y in few.validation) == {"a": 4, "b": 4}
    assert set(few.train) <= set(data.train) and set(few.validation) <= set(data.validation)
    assert few.test == data.test


def test_seeds():
    data = TextData(pairs(0, 30), pairs(30, 30), [])
    again = [k_shot(data, 5, seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0].train != again[2].train and again[0].validation != again[2].validation


def test_validation_comes_from_training_where_the_data_has_too_little_of_its_own():
    few = k_shot(TextData(pairs(0, 8), [], []), 4)
    assert len(few.train) == len(few.validation) == 8 and not set(few.train) & set(few.validation)
    few = k_shot(TextData(pairs(0, 8), pairs(20, 1), []), 4)
    assert len(few.validation) == 8 and not set(few.train) & set(few.validation)


def test_validation_that_equals_training_is_not_validated_on():
    """As in the published choice for Subj."""
    train = pairs(0, 8)
    few = k_shot(TextData(train, list(train), []), 4)
    assert not set(few.train) & set(few.validation)
    with pytest.raises(ConfigError, match="class 'a' has no different examples for validation besides those drawn for"):
        k_shot(TextData(train, list(train), []), 8)


def test_what_comes_twice_is_drawn_once_and_leaves_the_test():
    train = [("same", "a")] * 5 + [("one", "a"), ("two", "b"), ("three", "b")]
    data = TextData(train, [], [("same", "a"), ("one", "a"), ("new", "b")], [Turn(f"d{i}", "0", "s") for i in range(3)])
    few = k_shot(data, 1)
    drawn = [x for x, _ in few.train + few.validation]
    assert sorted(drawn) == ["one", "same", "three", "two"]
    assert few.test == [("new", "b")] and few.turns == [Turn("d2", "0", "s")]
    with pytest.raises(ConfigError, match="class 'a' has 2 different examples for train, expected 3"):
        k_shot(data, 3)


@pytest.mark.parametrize(
    "data, k, labels, words",
    [
        (TextData(pairs(0, 3, "a"), [], pairs(9, 1)), 1, None, "class 'b' has no different examples for train"),
        (TextData(pairs(0, 3), [], []), 1, ["a", "b", "c"], "class 'c' has no different examples for train"),
        (TextData(pairs(0, 3), [], []), 4, None, "class 'a' has 3 different examples for train, expected 4"),
        (TextData(pairs(0, 3), [], []), 2, None, "class 'a' has 1 different examples for validation besides those"),
        (TextData(pairs(0, 3), [], []), 0, None, "k: got 0, expected an integer of at least 1"),
        (TextData(pairs(0, 3), [], []), True, None, "k: got True"),
    ],
)
def test_a_class_with_too_few(data, k, labels, words):
    with pytest.raises(ConfigError, match=words):
        k_shot(data, k, labels=labels)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 4),
    extra=st.lists(st.integers(0, 11), max_size=8),
    validation=st.integers(0, 6),
)
def test_laws(seed, k, extra, validation):
    """Whatever comes twice, and in whichever part."""
    base = pairs(0, 8)
    data = TextData(base + [base[i] for i in extra], pairs(6, validation), pairs(0, 2) + pairs(90, 2))
    few = k_shot(data, k, seed)
    texts = [[x for x, _ in part] for part in (few.train, few.validation, few.test)]
    assert len(texts[0]) == len(set(texts[0])) == len(texts[1]) == len(set(texts[1])) == 2 * k
    assert not set(texts[0]) & set(texts[1]) and not set(texts[0] + texts[1]) & set(texts[2])
    assert Counter(y for _, y in few.validation) == {"a": k, "b": k}


def images(each=6):
    y = np.repeat(np.arange(3), each)
    x = np.arange(len(y), dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return Images(x, y, Preparation((0.0,), (1.0,)))


def test_images():
    train, held = k_shot_images(images(), 2, seed=1)
    assert Counter(train.y.tolist()) == Counter(held.y.tolist()) == {0: 2, 1: 2, 2: 2}
    assert not set(train.x[:, 0, 0].tolist()) & set(held.x[:, 0, 0].tolist())
    again, _ = k_shot_images(images(), 2, seed=1)
    assert np.array_equal(train.x, again.x)
    with pytest.raises(ConfigError, match="class 0 has 2 different examples for validation besides .* expected 4"):
        k_shot_images(images(), 4)
    twice = images()
    twice.x[:5] = 0  # the same image five times
    with pytest.raises(ConfigError, match="class 0 has 2 different examples for train, expected 3"):
        k_shot_images(twice, 3)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    k_shot(TextData(pairs(0, 8), [], []), 2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/text_fewshot16")
def test_the_published_choices():
    for name, seed in (("sst-2", 13), ("cr", 13), ("agnews", 100)):
        data = read_texts(SHARED / f"{name}.json.gz", shots_seed=seed)
        few = k_shot(data, 16)
        assert sorted(few.train) == sorted(data.train) and sorted(few.validation) == sorted(data.validation)
        leaked = {x for x, _ in data.train} & {x for x, _ in data.test}
        assert len(leaked) == (1 if name == "cr" else 0)  # as the data's own notes say
        assert len(few.test) == len(data.test) - len(leaked)
    subj = read_texts(SHARED / "subj.json.gz")
    with pytest.raises(ConfigError, match="for validation besides those drawn for train, expected 16"):
        k_shot(subj, 16)
    assert len(k_shot(subj, 8).validation) == 16


# --- as indices ---


def test_the_same_few_of_all():
    assert same_few(3, None) == same_few(3, 3) == same_few(3, 9) == [0, 1, 2]
    few = same_few(100, 10)
    assert len(set(few)) == 10 and few == sorted(few) == same_few(100, 10) != same_few(100, 10, seed=1)


@given(st.lists(st.integers(0, 4), min_size=30, max_size=80), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_k_of_each_class(labels, k, seed):
    labels = labels + [0, 1, 2, 3, 4] * 2
    ids = sample_shots(labels, k, seed=seed)
    assert torch.bincount(torch.tensor(labels)[ids], minlength=5).tolist() == [k] * 5
    assert len(set(ids.tolist())) == len(ids) and torch.equal(ids, sample_shots(labels, k, seed=seed))
    assert set(ids.tolist()) <= set(sample_shots(labels, k + 1, seed=seed, at_most=True).tolist())


def test_another_seed_takes_others_and_global_random_numbers_are_left_alone():
    labels = torch.arange(5).repeat(40)
    state = torch.get_rng_state()
    assert not torch.equal(sample_shots(labels, 4, seed=0), sample_shots(labels, 4, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fraction_of_all():
    ids = sample_shots(torch.zeros(200), 0.35)
    assert len(ids) == 70 == len(set(ids.tolist()))


def test_what_cannot_be_sampled_is_named():
    labels = [0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(ConfigError, match="class 1 has no examples"):
        sample_shots(labels, 1)
    with pytest.raises(ConfigError, match="class 3 has no examples"):
        sample_shots([0, 1, 2], 1, num_classes=4)
    with pytest.raises(
        ConfigError, match="class 0 has 2 examples, expected 3 shots; ask for fewer, or pass at_most=True"
    ):
        sample_shots([0, 0, 1, 1, 1], 3)
    assert len(sample_shots([0, 0, 1, 1, 1], 3, at_most=True)) == 5
    for shots in (0, -1, True, "4"):
        with pytest.raises(ConfigError, match="expected an integer of at least 1 or a fraction"):
            sample_shots(labels, shots)
    for fraction in (0.0, 1.5, 0.01):
        with pytest.raises(ConfigError, match="expected one that gives any"):
            sample_shots(labels, fraction)
    with pytest.raises(ConfigError, match=r"labels: got shape \[2, 1\], expected one label per example"):
        sample_shots(torch.zeros(2, 1), 1)


LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])


def test_held_out_is_a_share_of_each_class_and_seeded():
    keep, held = held_out(LABELS, 0.5, seed=0)
    assert sorted([*keep.tolist(), *held.tolist()]) == list(range(10))
    assert LABELS[held.numpy()].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(held, held_out(LABELS, 0.5, seed=0)[1])
    assert any(not torch.equal(held, held_out(LABELS, 0.5, seed=s)[1]) for s in (1, 2, 3))
    assert len(held_out(LABELS, 0.0, seed=0)[1]) == 0 and len(held_out(LABELS, 0.24, seed=0)[1]) == 1  # rounded down
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="expected a share of at least 0 and below 1"):
            held_out(LABELS, share, seed=0)
