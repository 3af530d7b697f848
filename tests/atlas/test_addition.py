"""Addition: the best mean normalised accuracy, nested from the pretrained model to the finest grain."""

from __future__ import annotations

import dataclasses
import functools

import atlas_parts as parts
import pytest
import torch

import hatcl
from hatcl import ConfigError
from hatcl.atlas import accuracy, add, linearised, refine

FAST = {"epochs": 3, "lr": 2e-2}


def tasks(**more):
    return [parts.task(n, **more) for n in parts.VIEWS]


@functools.cache
def chain():
    """Mean normalised validation accuracies: pretrained, search, isotropic, anisotropic, 4 parts per block."""
    isotropic = parts.composer("global")
    first = add(isotropic, tasks(), warm_start="search", options=FAST)
    block = parts.composer()
    second = add(block, tasks(), warm_start=first.coefficients, options=FAST)
    finer = parts.composer("partition:4")
    start = refine(second.coefficients, block.grain, finer.grain)
    third = add(finer, tasks(), warm_start=start, options=FAST)
    return [first.pretrained["score"], first.start["score"], first.score, second.score, third.score], first, second


def test_each_is_at_least_as_good_as_the_one_it_starts_from():
    scores, first, second = chain()
    assert scores == sorted(scores)
    assert second.start["score"] == first.score  # the same model, bit for bit
    # a learned composition of real digits in three views: .46, .60, .61, .65, .68 when written
    assert scores[3] > scores[1] + 0.02 > scores[0] + 0.1


def test_the_score_is_the_mean_share_of_the_fine_tuned_models_accuracy():
    _, first, _ = chain()
    base, vectors = parts.world()
    shares = []
    for v, t in zip(vectors, tasks(), strict=True):
        share = first.pretrained[t.name] / accuracy(v.apply_to(base), t.chosen_by)
        assert first.pretrained[f"{t.name}/normalised"] == share
        assert first.pretrained[t.name] == accuracy(base, t.chosen_by)
        shares.append(share)
    assert first.pretrained["score"] == sum(shares) / 3


def test_fine_tuned_accuracies_can_be_given():
    composer = parts.composer("global")
    given = [dataclasses.replace(t, finetuned=0.5) for t in tasks()][:2]  # two tasks for three vectors
    fitted = add(composer, given, options={"epochs": 1})
    assert fitted.pretrained["score"] == pytest.approx((fitted.pretrained["plain"] + fitted.pretrained["turned"]) / 1)


def test_heads_of_tasks_are_used_and_not_learned():
    composer = parts.composer("global")
    turn = torch.nn.Linear(10, 10)
    before = turn.weight.detach().clone()
    with_heads = [dataclasses.replace(t, head=turn, finetuned=1.0) for t in tasks()]
    fitted = add(composer, with_heads, options={"epochs": 1})
    assert torch.equal(turn.weight, before)
    assert fitted.pretrained["plain"] == accuracy(parts.world()[0], with_heads[0].chosen_by, turn)


def test_the_loss_is_the_sum_over_tasks():
    composer = parts.composer("global")
    one = [dataclasses.replace(t, finetuned=1.0) for t in tasks(size=400)]
    alone = [add(parts.composer("global"), [t], options={"epochs": 1}).history[0]["loss"] for t in one]
    assert add(composer, one, options={"epochs": 1}).history[0]["loss"] == pytest.approx(sum(alone), rel=1e-6)


def test_it_takes_the_linearised_form():
    fitted = add(linearised(parts.composer("global")), tasks(), options={"epochs": 1})
    assert fitted.score >= fitted.pretrained["score"]


def test_validation_decides_not_the_batches():
    """With labels of validation that no model can be right about, nothing beats the pretrained model."""
    x, y = parts.view("plain", "val")
    wrong = [dataclasses.replace(t, validation=[(x, y * 0 + 9)], finetuned=1.0) for t in tasks()]
    base, _ = parts.world()
    fitted = add(parts.composer(), wrong, options=FAST)
    assert fitted.pretrained["plain"] == accuracy(base, [(x, y * 0 + 9)])


def test_what_is_missing_is_named():
    composer = parts.composer()
    with pytest.raises(ConfigError, match=r"tasks: got \[\], expected at least one"):
        add(composer, [])
    with pytest.raises(ConfigError, match="each with its own"):
        add(composer, [tasks()[0]] * 3)
    with pytest.raises(ConfigError, match="task plain: no fine-tuned accuracy, and 2 tasks are not the 3 vectors' own"):
        add(composer, tasks()[:2])
    with pytest.raises(ConfigError, match="task plain: fine-tuned accuracy is 0.0, expected one above 0"):
        add(composer, [dataclasses.replace(t, finetuned=0.0) for t in tasks()])
    with pytest.raises(ConfigError, match="warm_start: got 'serch', expected coefficients, None or 'search'"):
        add(composer, tasks(), warm_start="serch")
    with pytest.raises(ConfigError, match="task plain: got list_iterator"):
        add(composer, [dataclasses.replace(tasks()[0], batches=iter([]))])
    with pytest.raises(ConfigError, match="task plain, validation: got list_iterator"):
        add(composer, [dataclasses.replace(tasks()[0], validation=iter([]))])
    assert not composer.coefficients.any()


def test_the_search_inside_leaves_the_checkpoint_to_the_fit(tmp_path):
    composer = parts.composer("global")
    path = tmp_path / "a.pt"
    want = add(composer, tasks(), warm_start="search", options={"epochs": 2}, checkpoint=path)
    again = add(parts.composer("global"), tasks(), warm_start="search", options={"epochs": 2}, checkpoint=path)
    assert torch.equal(want.coefficients, again.coefficients) and want.history == again.history


def test_the_merged_model_is_what_was_measured():
    composer = parts.composer("global")
    fitted = add(composer, tasks(), warm_start="search", options={"epochs": 1})
    merged = composer.merge()
    shares = fitted.start if fitted.epoch == 0 else fitted.history[-1]
    for t in tasks():
        assert accuracy(merged, t.chosen_by) == shares[t.name]
    assert isinstance(composer, hatcl.Composer)
