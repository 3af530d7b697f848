"""Grafts by scores that are known without training, against the paper's rule written out."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from graft_parts import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vector_parts import Tied, moved, save

import hatcl
from hatcl.errors import ConfigError, GraftError
from hatcl.functional import digest_of
from hatcl.grafts import selection
from hatcl.grafts.scores import GraftScores
from hatcl.grafts.selection import candidates, drawn, select_graft

PRE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
# |delta| in order: b2 .9, a3 .8, a1 .7, b0 .5, a5 .4, a0 .3, b3 .2, a2 .1, a4 0, b1 0
FT = {"a": torch.tensor([[0.3, -0.7, 0.1], [-0.8, 0.0, 0.4]]), "b": torch.tensor([0.5, 0.0, -0.9, 0.2])}


def at(graft):
    return {n: i.tolist() for n, i in graft.indices.items()}


# --- the rules, by hand ---


def test_the_largest_moves_over_all_tensors():
    graft = select_graft(PRE, FT, 0.4)
    assert at(graft) == {"a": [1, 3], "b": [0, 2]}
    assert graft.values["a"].tolist() == FT["a"].view(-1)[[1, 3]].tolist()
    assert graft.values["b"].tolist() == FT["b"][[0, 2]].tolist()
    assert (graft.size, graft.numel, graft.shapes) == (4, 10, {"a": (2, 3), "b": (4,)})
    assert graft.base == {n: digest_of(t) for n, t in PRE.items()}
    assert at(select_graft(PRE, FT, 0.1)) == {"b": [2]}
    assert at(select_graft(PRE, FT, 0.29)) == {"a": [3], "b": [2]}  # int(2.9)


def test_the_largest_moves_of_each_layer():
    graft = select_graft(PRE, FT, 0.5, per_layer=True)  # 3 of 6, 2 of 4
    assert at(graft) == {"a": [1, 3, 5], "b": [0, 2]}
    assert at(select_graft(PRE, FT, 0.2, per_layer=True)) == {"a": [3]}  # int(0.8) of b is none


def test_scores_of_ones_own_count_with_their_signs():
    scores = {"a": torch.tensor([[-9.0], [2.0]]), "b": torch.tensor([3.0, -1.0, -2.0, 1.0])}
    assert at(select_graft(PRE, FT, 0.4, scores)) == {"a": [3, 4, 5], "b": [0]}
    # fewer positive ones than k: the negative ones nearest to zero follow
    assert at(select_graft(PRE, FT, 0.6, scores)) == {"a": [3, 4, 5], "b": [0, 1, 3]}


def test_scores_as_they_are_saved():
    values = {"a": torch.tensor([[-9.0, -8.0, -7.0], [2.0, 1.5, 2.5]]), "b": torch.tensor([3.0, -1.0, -2.0, 1.0])}
    graft = select_graft(PRE, FT, 0.4, GraftScores(values))
    assert at(graft) == at(select_graft(PRE, FT, 0.4, values)) == {"a": [3, 4, 5], "b": [0]}
    assert graft.values["b"].tolist() == [0.5]
    few = GraftScores({"a": values["a"]})
    refused(GraftError, lambda: select_graft(PRE, FT, 0.4, few), "by: no scores for b (1 such tensors)")


def test_of_equal_scores_the_first():
    scores = {"a": torch.zeros(()), "b": torch.zeros(())}
    assert at(select_graft(PRE, FT, 0.4, scores)) == {"a": [0, 1, 2, 3]}


def test_rows_as_wholes():
    # means of |delta|: a's rows 1.1/3 and 1.2/3, b's .5, 0, .9, .2
    assert at(select_graft(PRE, FT, 0.2, grain="row")) == {"b": [0, 2]}
    assert at(select_graft(PRE, FT, 0.5, grain="row")) == {"a": [3, 4, 5], "b": [0, 2]}
    # 2 of the 4 are b2 and b0; the two rows of a (3 each) do not fit in what is left, b3 and b1 do
    assert at(select_graft(PRE, FT, 0.4, grain="row")) == {"b": [0, 1, 2, 3]}
    # TaSL's kind of score: one per matrix
    assert at(select_graft(PRE, FT, 0.7, {"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, grain="row")) == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0],
    }


def test_units_of_a_map_without_what_is_always_on():
    torch.manual_seed(0)
    pre = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    ft = moved(pre)
    unit_map = hatcl.convert(pre, 2, torch.randn(2, 3)).hat_gates.unit_map
    graft = select_graft(pre, ft, 0.5, grain="unit", unit_map=unit_map)  # int(13) of 26: a hidden unit has 4 or more
    masks = graft.masks()
    rows = masks["0.weight"].all(1)
    assert torch.equal(masks["0.weight"], rows[:, None].expand(4, 3)) and torch.equal(masks["0.bias"], rows)
    assert 0 < graft.size <= 13 and not masks["2.bias"].any()
    grain = hatcl.map.grains.make_grain("unit", graft.shapes, unit_map)
    always = {n: i == 0 for n, i in grain.expand(torch.arange(grain.size)).items()}
    assert not any(bool((m & always[n]).any()) for n, m in masks.items())


@given(st.integers(0, 1000), st.floats(0.02, 0.98))
@settings(max_examples=30, deadline=None)
def test_chance_takes_exactly_k_and_by_its_seed(seed, sparsity):
    sizes = {"a": (7, 5), "b": (1,), "c": (20,)}
    pre = {n: torch.zeros(s) for n, s in sizes.items()}
    ft = {n: torch.ones(s) for n, s in sizes.items()}
    graft = select_graft(pre, ft, sparsity, "random", seed=seed)
    assert graft.size == int(sparsity * 56)
    assert at(graft) == at(select_graft(pre, ft, sparsity, "random", seed=seed))


def test_chance_is_even_over_tensors_and_differs_by_seed():
    pre, ft = {"a": torch.zeros(10000), "b": torch.zeros(30000)}, {"a": torch.ones(10000), "b": torch.ones(30000)}
    one, two = (select_graft(pre, ft, 0.1, "random", seed=s) for s in (0, 1))
    # 1000 of 4000 expected in a, standard deviation sqrt(4000 * .25 * .75 * .9) = 26
    assert abs(len(one.indices["a"]) - 1000) < 130
    assert abs((one & two).size - 400) < 100  # hypergeometric, standard deviation 18


def test_any_seed_and_a_tensors_draw_does_not_depend_on_the_others():
    sizes = {"a": 3000, "b": 3000}
    pre, ft = ({n: torch.full((s,), v) for n, s in sizes.items()} for v in (0.0, 1.0))
    grafts = [select_graft(pre, ft, 0.1, "random", seed=s) for s in (0, 4096, 2**32, 2**45, 2**200)]
    for i, one in enumerate(grafts):
        assert one.size == 600
        # hypergeometric, 60 expected, standard deviation 7
        assert all(abs((one & two).size - 60) < 35 for two in grafts[i + 1 :])
    a, b = drawn((9,), "random", 0, "a"), drawn((9,), "random", 0, "b")
    assert torch.equal(a, drawn((9,), "random", 0, "a")) and not torch.equal(a, b)
    assert not torch.equal(a, drawn((9,), "start", 0, "a"))


# --- what takes part ---


def test_patterns():
    pre = Tied()
    ft = moved(pre)
    assert list(candidates(pre, ft)) == ["embed.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]
    assert list(candidates(pre, ft, only="fc.*")) == ["fc.weight", "fc.bias"]
    assert list(candidates(pre, ft, only=["fc.*", "norm.*"], skip="*.bias")) == ["norm.weight", "fc.weight"]
    assert "embed.weight" not in candidates(pre, ft, skip="head.*")  # its other name
    refused(ConfigError, lambda: candidates(pre, ft, only="fcc.*"), "only: 'fcc.*' matches none of 5", "'fc.")
    refused(ConfigError, lambda: candidates(pre, ft, skip=["fc.*", "emb"]), "skip: 'emb' matches none")
    refused(ConfigError, lambda: candidates(pre, ft, skip="*"), "leave none of 5 tensors")


def test_shares_are_of_what_takes_part():
    graft = select_graft(PRE, FT, 0.5, only="b")
    assert (graft.size, graft.numel) == (2, 4)


def test_models_state_dicts_and_files_alike(tmp_path):
    pre = Tied()
    ft = moved(pre)
    want = select_graft(pre, ft, 0.3)
    files = save(pre, tmp_path / "pre.safetensors"), save(ft, tmp_path / "ft.safetensors")
    for a, b in ((pre.state_dict(), ft.state_dict()), files, (pre, files[1]), (files[0], ft)):
        # files and state dicts do not tell buffers from parameters: one more tensor takes part
        skip = [] if isinstance(a, nn.Module) or isinstance(b, nn.Module) else ["rate"]
        got = select_graft(a, b, 0.3, skip=skip)
        assert at(got) == at(want) and got.base == want.base
        assert all(torch.equal(got.values[n], want.values[n]) for n in want.values)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_with_real_models_it_applies(name):
    torch.manual_seed(0)
    pre = timm.create_model(name, num_classes=3)
    ft = moved(pre)
    x = torch.randn(2, 3, 32, 32) if name == "test_resnet" else torch.randn(2, 3, 160, 160)
    for options in ({}, {"per_layer": True}, {"by": "random"}, {"grain": "row"}):
        graft = select_graft(pre, ft, 0.01, **options)
        with graft.applied(pre), torch.no_grad():
            assert pre.eval()(x).isfinite().all()
        masks, deltas = graft.masks(), {n: (dict(ft.named_parameters())[n] - p) for n, p in pre.named_parameters()}
        assert graft.size <= int(0.01 * graft.numel)
        if not options:
            assert graft.size == int(0.01 * graft.numel)
            inside = min(float(deltas[n][m].detach().abs().min()) for n, m in masks.items() if m.any())
            outside = max(float(deltas[n][~m].detach().abs().max()) for n, m in masks.items() if (~m).any())
            assert inside >= outside


def test_half_precision():
    pre = {n: t.bfloat16() for n, t in PRE.items()}
    ft = {n: t.bfloat16() for n, t in FT.items()}
    graft = select_graft(pre, ft, 0.4)
    assert at(graft) == {"a": [1, 3], "b": [0, 2]} and graft.values["a"].dtype == torch.bfloat16


# --- bad input ---


def test_what_is_refused():
    refused(GraftError, lambda: select_graft(PRE, PRE, 0.5), "equal in all 2 participating tensors", "nothing to graft")
    refused(
        GraftError,
        lambda: select_graft(PRE, {**FT, "b": PRE["b"]}, 0.5, only="b"),
        "equal in all 1 participating tensors",
    )
    for bad in (math.nan, math.inf):
        broken = {**FT, "b": torch.tensor([0.5, bad, 0.1, bad])}
        refused(GraftError, lambda b=broken: select_graft(PRE, b, 0.5), "b: the difference of 2 of 4", "diverge")
    refused(GraftError, lambda: select_graft(PRE, FT, 0.09), "selects none", "0.09")
    refused(GraftError, lambda: select_graft(PRE, FT, 1.0), "selects all")
    refused(GraftError, lambda: select_graft(PRE, FT, 1.0, per_layer=True), "selects all")
    refused(GraftError, lambda: select_graft(PRE, FT, 0.15, per_layer=True), "selects no element of any tensor", "6")
    refused(GraftError, lambda: select_graft(PRE, {"a": FT["a"]}, 0.5), "b only in the pretrained model")
    refused(GraftError, lambda: select_graft(PRE, {**FT, "b": torch.ones(5)}, 0.5), "b is [4] in the pre", "[5] in the")
    refused(GraftError, lambda: select_graft({"n": torch.ones(3).int()}, {"n": torch.zeros(3).int()}, 0.5), "integers")
    whole = {"n": torch.ones(3).int()}
    refused(GraftError, lambda: candidates(whole, whole), "the pretrained model has no floating-point parameters, only")
    refused(ConfigError, lambda: select_graft(PRE, FT, 0.5, "magnitud"), "did you mean 'magnitude'")
    refused(ConfigError, lambda: select_graft(PRE, FT, 0.5, grain="rows"), "did you mean 'row'")
    refused(ConfigError, lambda: select_graft(PRE, FT, 0.5, grain="row", per_layer=True), "per_layer", "'row'")
    refused(ConfigError, lambda: select_graft(PRE, FT, 0.5, "random", seed=-1), "seed: got -1")
    refused(
        GraftError,
        lambda: select_graft(PRE, FT, 0.3, grain="block"),
        "3 elements are fewer than the 4 of the smallest of 2 groups of the grain block;",
    )


def test_scores_that_do_not_fit_are_refused():
    a, b = torch.ones(2, 3), torch.ones(4)
    refused(GraftError, lambda: select_graft(PRE, FT, 0.5, {"a": a}), "no scores for b", "only=")
    refused(GraftError, lambda: select_graft(PRE, FT, 0.5, {"a": a, "b": b, "c": b}), "scores for c", "takes no part")
    refused(GraftError, lambda: select_graft(PRE, FT, 0.5, {"a": b, "b": b}), "a: scores of shape [4]", "[2, 3]")
    nan = torch.tensor([1.0, math.nan, 1.0, 1.0])
    refused(GraftError, lambda: select_graft(PRE, FT, 0.5, {"a": a, "b": nan}), "b: 1 of 4 scores are NaN")


def test_the_models_stay_as_they_are():
    pre, ft = Tied(), moved(Tied())
    before = [copy.deepcopy(m.state_dict()) for m in (pre, ft)]
    select_graft(pre, ft, 0.1)
    for m, was in zip((pre, ft), before, strict=True):
        assert all(torch.equal(t, was[n]) for n, t in m.state_dict().items())


def test_without_the_group_of_what_is_always_on_it_would_be_taken(monkeypatch):
    """The twin of the test of units: the group is among the best here, and only its number keeps it out."""
    torch.manual_seed(0)
    pre = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    ft = copy.deepcopy(pre)
    with torch.no_grad():
        ft[2].bias += 5.0
        ft[0].weight[1] += 1.0
    unit_map = hatcl.convert(pre, 2, torch.randn(2, 3)).hat_gates.unit_map
    graft = select_graft(pre, ft, 0.5, grain="unit", unit_map=unit_map)
    assert "2.bias" not in graft.indices
    monkeypatch.setattr(selection, "ALWAYS_ON", -1)
    assert "2.bias" in select_graft(pre, ft, 0.5, grain="unit", unit_map=unit_map).indices
