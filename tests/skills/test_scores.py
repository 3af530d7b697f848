"""Scores, their memory over tasks, and skills, against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hatcl.errors import ConfigError, IntegrityError, SkillError
from hatcl.map.grains import make_grain
from hatcl.skills import scores as module
from hatcl.skills.scores import (
    SKILL_GRAINS,
    Skill,
    SkillScores,
    accumulate_scores,
    check_same_groups,
    localize,
    skill_overlap,
)

PAIRS = {
    "m.q.lora_A.weight": (2, 3),
    "m.q.lora_B.weight": (4, 2),
    "m.v.lora_A.weight": (3, 3),
    "m.v.lora_B.weight": (4, 3),
}
SIZES = {"lora_pair": 5, "matrix": 4, "block": 4}


def blocks(*values: float, dtype=torch.float32) -> SkillScores:
    return SkillScores("block", {f"p{i}": (2,) for i in range(len(values))}, torch.tensor(values, dtype=dtype))


def skill(*on: bool) -> Skill:
    return Skill("block", {f"p{i}": (2,) for i in range(len(on))}, torch.tensor(on))


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", SKILL_GRAINS)
def test_labels_and_shapes_are_those_of_the_map(grain):
    values = torch.arange(float(SIZES[grain]))
    scores = SkillScores(grain, {**PAIRS, **({"norm.bias": (3,)} if grain != "block" else {})}, values)
    assert scores.labels == make_grain(grain, PAIRS).labels and scores.shapes == PAIRS
    assert scores.to_rows()[1] == {"label": scores.labels[1], "score": 1.0}
    assert len(scores.to_rows()) == SIZES[grain]


def test_values_are_float32_unless_they_were_measured_in_float64():
    for given_, kept in ((torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert blocks(1.0, 2.0, dtype=given_).values.dtype == kept
    assert SkillScores("block", {"p": (1,)}, torch.tensor([3])).values.dtype == torch.float32


def test_normalised_by_hand():
    assert blocks(2.0, 4.0, 3.0).normalised().values.tolist() == [0.0, 1.0, 0.5]
    assert blocks(7.0, 7.0).normalised().values.tolist() == [0.0, 0.0]
    assert blocks(5.0).normalised().values.tolist() == [0.0]
    tiny = blocks(1e-60, 3e-60, 5e-60, dtype=torch.float64).normalised().values
    assert tiny.tolist() == [0.0, 0.5, 1.0] and tiny.dtype == torch.float32


FINITE = st.lists(st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), min_size=1, max_size=12)


@given(FINITE)
def test_normalising_keeps_the_order_and_is_done_once(values):
    scores = blocks(*values)
    once = scores.normalised()
    assert torch.equal(once.values, once.normalised().values)
    assert float(once.values.min()) == 0 and float(once.values.max()) in (0.0, 1.0)
    order = scores.values.argsort(stable=True)
    assert bool((once.values[order].diff() >= 0).all())


# ---- the memory over tasks -------------------------------------------------------------------------------------------


def test_two_tasks_by_hand():
    first = accumulate_scores(blocks(1.0, 3.0, 5.0), None)
    assert first.values.tolist() == [0.0, 0.5, 1.0]
    # .3 * (1, .25, 0) + .7 * (0, .5, 1) = (.3, .425, .7); less .3, over .4: (0, .3125, 1)
    second = accumulate_scores(blocks(8.0, 2.0, 0.0), first)
    assert second.values.tolist() == [0.0, 0.3125, 1.0]
    # only the current: (1, .25, 0); only the previous: (0, .5, 1); half and half: (.5, .375, .5)
    assert accumulate_scores(blocks(8.0, 2.0, 0.0), first, (1.0, 0.0)).values.tolist() == [1.0, 0.25, 0.0]
    assert accumulate_scores(blocks(8.0, 2.0, 0.0), first, (0.0, 1.0)).values.tolist() == [0.0, 0.5, 1.0]
    assert accumulate_scores(blocks(8.0, 2.0, 0.0), first, (1.0, 1.0)).values.tolist() == [1.0, 0.0, 1.0]


@given(FINITE, st.integers(0, 30))
def test_the_memory_does_not_see_the_size_of_scores(values, exponent):
    """N takes it away, so that a task with larger losses counts no more."""
    one, other = (
        accumulate_scores(blocks(*values), None),
        accumulate_scores(blocks(*(v * 2.0**exponent for v in values)), None),
    )
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("weights", [(-0.1, 1.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0,)])
def test_weights_outside_their_range(weights):
    with pytest.raises(ConfigError, match="weights: got .*, expected two numbers of at least 0, not both 0"):
        accumulate_scores(blocks(1.0, 2.0), None, weights)


# ---- skills ----------------------------------------------------------------------------------------------------------


def test_the_top_share():
    scores = blocks(0.1, 0.9, 0.5, 0.7, 0.3, 0.2, 0.6, 0.8, 0.4, 0.0)
    assert localize(scores).on.nonzero().flatten().tolist() == [1, 7]
    assert localize(scores, 0.3).on.nonzero().flatten().tolist() == [1, 3, 7]
    for share, count in ((0.01, 1), (0.11, 1), (0.14, 2), (0.25, 3), (0.35, 4), (0.95, 9), (1.0, 10)):
        assert int(localize(scores, share).on.sum()) == count


@pytest.mark.parametrize("percent", [5, 10, 20, 25, 50, 55, 90])
def test_as_many_as_tasls_code_has(percent):
    """It takes what is strictly above numpy's percentile."""
    for groups in range(2, 200):
        values = np.random.default_rng(groups).permutation(groups).astype(float)
        theirs = torch.from_numpy(values > np.percentile(values, 100 - percent))
        if theirs.any():  # hatcl has at least one
            assert torch.equal(localize(blocks(*values.tolist()), percent / 100).on, theirs), groups


def test_equal_scores_give_the_first_ones():
    assert localize(blocks(1.0, 2.0, 2.0, 2.0, 0.0), 0.4).on.tolist() == [False, True, True, False, False]
    assert localize(blocks(*[3.0] * 10)).on.tolist() == [True] * 2 + [False] * 8


@given(FINITE, st.floats(0.01, 1))
def test_a_share_is_exact_and_nothing_left_out_is_above_it(values, share):
    scores = blocks(*values)
    on = localize(scores, share).on
    expected = len(values) if share == 1 else max(1, math.ceil(round(share * (len(values) - 1), 9)))
    assert int(on.sum()) == expected
    if not bool(on.all()):
        assert float(scores.values[on].min()) >= float(scores.values[~on].max())


def test_a_threshold_is_of_normalised_scores_and_strict():
    scores = blocks(10.0, 20.0, 15.0, 14.9)
    assert localize(scores, threshold=0.5).on.tolist() == [False, True, False, False]
    assert localize(scores, threshold=0.0).on.tolist() == [False, True, True, True]
    assert not bool(localize(scores, threshold=1.0).on.any())
    assert localize(scores, 1.0, threshold=0.5).on.sum() == 1  # in the place of the share
    assert not bool(localize(blocks(2.0, 2.0), threshold=0.0).on.any())


@pytest.mark.parametrize("share", [0.0, -0.2, 1.1, math.nan])
def test_a_share_outside_its_range(share):
    with pytest.raises(ConfigError, match="share: got .*, expected a share of the groups above 0 and at most 1"):
        localize(blocks(1.0), share)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_its_range(threshold):
    with pytest.raises(ConfigError, match="threshold: got .*, expected a normalised score between 0 and 1"):
        localize(blocks(1.0), threshold=threshold)


def test_expanded_over_the_tensors():
    found = localize(SkillScores("lora_pair", PAIRS, torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0])), 0.4)
    assert found.names == ("m.q[1]", "m.v[2]")
    masks = {n: m.expand(PAIRS[n]) for n, m in found.expand().items()}
    assert list(masks) == list(PAIRS) and all(m.dtype == torch.bool for m in masks.values())
    for name, rows in (("m.q", [False, True]), ("m.v", [False, False, True])):
        assert masks[f"{name}.lora_A.weight"].tolist() == [[on] * 3 for on in rows]
        assert masks[f"{name}.lora_B.weight"].tolist() == [rows] * 4


def test_overlap_by_hand():
    a, b = skill(True, True, True, False), skill(True, False, False, True)
    assert skill_overlap(a, b) == 1 / 2 and skill_overlap(b, a) == 1 / 3
    assert skill_overlap(a, a) == 1.0 and skill_overlap(skill(True, False), skill(False, True)) == 0.0
    assert skill_overlap(skill(False, False), skill(True, True)) == 0.0
    with pytest.raises(SkillError, match="the second skill has no group.*lower its threshold"):
        skill_overlap(a, skill(False, False, False, False))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", SKILL_GRAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_bit_for_bit(grain, dtype, tmp_path):
    scores = SkillScores(grain, PAIRS, torch.rand(SIZES[grain], dtype=dtype) * 1e-30)
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(str(path))
    again = SkillScores.load(str(path))
    assert (again.grain, again.shapes, again.labels) == (grain, PAIRS, scores.labels)
    assert again.values.dtype == dtype and torch.equal(again.values, scores.values)
    with open(path.with_suffix(".csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["label"], float(r["score"])) for r in rows] == [(r["label"], r["score"]) for r in scores.to_rows()]
    assert sorted(p.name for p in path.parent.iterdir()) == ["scores.csv", "scores.safetensors"]
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("how", ["the disk is full", "interrupted"])
def test_a_write_that_fails_leaves_what_was_there(how, tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    blocks(1.0, 2.0).save(path)
    before = path.read_bytes()
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        if how == "the disk is full":
            patched.setattr(module.os, "fsync", full)
            with pytest.raises(IntegrityError, match="could not be written.*No space left.*is the disk full"):
                blocks(3.0, 4.0).save(path)
        else:
            patched.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                blocks(3.0, 4.0).save(path)
    assert path.read_bytes() == before and "p0,1.0" in path.with_suffix(".csv").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.csv", "scores.safetensors"]


def test_twin_writing_in_place_leaves_a_torn_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    blocks(1.0, 2.0).save(path)
    before = path.read_bytes()

    def in_place(files):
        for target, content in files.items():
            target.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_files", in_place)
    with pytest.raises(OSError):
        blocks(3.0, 4.0).save(path)
    assert path.read_bytes() != before
    with pytest.raises(IntegrityError):
        SkillScores.load(path)


def test_files_that_are_not_scores(tmp_path):
    with pytest.raises(SkillError, match=r"scores.pt: got .pt, expected a file that ends in .safetensors"):
        blocks(1.0).save(tmp_path / "scores.pt")
    with pytest.raises(IntegrityError, match="nothing.safetensors"):
        SkillScores.load(tmp_path / "nothing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(2)}, other)
    with pytest.raises(SkillError, match="other.safetensors holds w, expected scores written by SkillScores.save"):
        SkillScores.load(other)
    about = {"hatcl.skills": json.dumps({"grain": "block", "shapes": {"p": [2]}})}
    save_file({"scores": torch.ones(3)}, other, about)
    with pytest.raises(SkillError, match=r"other.safetensors: got \[3\] values for the 1 groups of block"):
        SkillScores.load(other)
    for text, error in (
        ("[" * 50_000, "other.safetensors cannot be read as JSON .it is nested too deeply"),
        ("[]", "other.safetensors holds a JSON list, expected dict"),
        ("{}", r"other.safetensors: its metadata cannot be read .KeyError.'shapes'..; save it again"),
        ('{"grain": "block", "shapes": [2]}', "its metadata cannot be read .AttributeError"),
    ):
        save_file({"scores": torch.ones(3)}, other, {"hatcl.skills": text})
        with pytest.raises(IntegrityError, match=error):
            SkillScores.load(other)
    good = tmp_path / "good.safetensors"
    blocks(1.0, 2.0).save(good)
    good.write_bytes(good.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="good.safetensors"):
        SkillScores.load(good)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named(bad):
    with pytest.raises(SkillError, match=rf"the score of m.q\[1\] is {bad}, expected finite .*2 of 5 are not.*again"):
        SkillScores("lora_pair", PAIRS, torch.tensor([0.0, bad, 1.0, bad, 0.0]))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: SkillScores("unit", PAIRS, torch.ones(4)),
            ConfigError,
            "grain: got 'unit', expected one of lora_pair",
        ),
        (lambda: Skill("lora_pairs", PAIRS, torch.ones(4)), ConfigError, "did you mean 'lora_pair'"),
        (lambda: SkillScores("block", PAIRS, torch.ones(3)), SkillError, r"got \[3\] values for the 4 groups of block"),
        (lambda: SkillScores("block", PAIRS, torch.ones(4, 1)), SkillError, r"got \[4, 1\] values for the 4 groups"),
        (lambda: Skill("block", PAIRS, torch.ones(5, dtype=torch.bool)), SkillError, r"got \[5\] values for the 4"),
        (lambda: Skill("block", PAIRS, torch.ones(4)), SkillError, "on: got float32, expected bool"),
        (lambda: SkillScores("lora_pair", {"w": (2, 2)}, torch.ones(1)), ConfigError, "finds no groups"),
    ],
)
def test_values_that_do_not_fit_their_shapes(make, error, text):
    with pytest.raises(error, match=text):
        make()


WIDER = {**PAIRS, "m.v.lora_A.weight": (5, 3), "m.v.lora_B.weight": (4, 5)}
LESS = {n: s for n, s in PAIRS.items() if ".q." in n}
TURNED = dict(reversed(PAIRS.items()))


@pytest.mark.parametrize(
    ("grain", "shapes", "text"),
    [
        ("matrix", PAIRS, "the grain block,.*have matrix; score both with the same grain"),
        (
            "block",
            WIDER,
            r"m.v.lora_A.weight is \[3, 3\] in .*, \[5, 3\] in .*; score adapters of the same rank and tar",
        ),
        ("block", LESS, r"m.v.lora_A.weight is \[3, 3\] in .*, lacking in "),
        ("block", TURNED, "the same tensors in another order, first m.q.lora_A.weight and m.v.lora_B.weight"),
    ],
)
def test_scores_and_skills_of_other_adapters(grain, shapes, text):
    here = SkillScores("block", PAIRS, torch.rand(4))
    there = SkillScores(grain, shapes, torch.rand(len(shapes)))
    with pytest.raises(SkillError, match=text):
        accumulate_scores(here, there)
    with pytest.raises(SkillError, match=text):
        skill_overlap(localize(here), localize(there))
    check_same_groups(here, SkillScores("block", PAIRS, torch.rand(4)), ("one", "the other"))
    if shapes is LESS:  # also where the second has what the first lacks
        with pytest.raises(SkillError, match=r"m.v.lora_A.weight is lacking in .*, \[3, 3\] in "):
            accumulate_scores(there, here)
