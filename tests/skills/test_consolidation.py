"""Consolidation: the four cases cell by cell, the adaptive and the coarse form, means of factors against products."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hatcl.errors import ConfigError, SkillError
from hatcl.map.grains import make_grain
from hatcl.skills import consolidation as module
from hatcl.skills.consolidation import AVERAGES, MODES, ConsolidateOptions, consolidate, group_weights
from hatcl.skills.scores import SKILL_GRAINS, SkillScores
from hatcl.skills.tensors import skill_tensors

A, B = "q.lora_A.weight", "q.lora_B.weight"
PAIR = {A: (4, 3), B: (5, 4)}
FULL = {"fc.weight": (3, 2), "fc.bias": (3,), "out.weight": (2, 3), "norm.weight": (3,)}
# previous important: 0 and 1; current important: 0 and 2
PREVIOUS, CURRENT, HALF = [4.0, 3, 2, 1], [4.0, 1, 3, 2], {"share": 0.5}


def scores(grain: str, shapes: dict, values: list) -> SkillScores:
    return SkillScores(grain, shapes, torch.tensor(values))


def full(shapes: dict, value: float) -> dict[str, Tensor]:
    return {n: torch.full(s, value) for n, s in shapes.items()}


def drawn(shapes: dict, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def product(adapter: dict[str, Tensor], a: str = A, b: str = B) -> Tensor:
    return adapter[b].double().flatten(1) @ adapter[a].double().flatten(1)


def truncated(dense: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def refused(error, call, *texts: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


# --- the four cases, by hand: 10 is the previous adapter, 20 the current one ---


@pytest.mark.parametrize(
    "of_previous, of_current, want",
    [(True, True, 13.0), (True, False, 10.0), (False, True, 20.0), (False, False, 15.0)],
    ids=["both", "only previous", "only current", "neither"],
)
def test_each_case_by_itself(of_previous, of_current, want):
    """Two matrices, of which the first is in the case and the second in its opposite."""
    shapes = {"one": (1, 1), "two": (1, 1)}
    before, now = (scores("matrix", shapes, [2.0, 1.0] if on else [1.0, 2.0]) for on in (of_previous, of_current))
    opposite = {13.0: 15.0, 10.0: 20.0, 20.0: 10.0, 15.0: 13.0}
    out = consolidate(full(shapes, 10.0), full(shapes, 20.0), before, now, HALF)
    assert (out["one"].item(), out["two"].item()) == (want, opposite[want])


def test_the_cases_in_pairs():
    """Row r of A with column r of B."""
    out = consolidate(
        full(PAIR, 10.0), full(PAIR, 20.0), scores("lora_pair", PAIR, PREVIOUS), scores("lora_pair", PAIR, CURRENT),
        HALF,
    )  # fmt: skip
    assert out[A].tolist() == [[13.0] * 3, [10.0] * 3, [20.0] * 3, [15.0] * 3]
    assert out[B].tolist() == [[13.0, 10.0, 20.0, 15.0]] * 5


def test_the_cases_in_matrices_leave_a_and_b_their_own():
    shapes = {A: (4, 3), B: (5, 4), "k.lora_A.weight": (4, 3), "k.lora_B.weight": (5, 4)}
    out = consolidate(
        full(shapes, 10.0), full(shapes, 20.0), scores("matrix", shapes, PREVIOUS), scores("matrix", shapes, CURRENT),
        HALF,
    )  # fmt: skip
    assert [x.unique().tolist() for x in out.values()] == [[13.0], [10.0], [20.0], [15.0]]


def test_the_cases_in_full_fine_tuning():
    """`block` speaks of all four tensors, `matrix` of two; the bias and the norm are then important to neither."""
    args = full(FULL, 10.0), full(FULL, 20.0)
    out = consolidate(*args, scores("block", FULL, PREVIOUS), scores("block", FULL, CURRENT), HALF)
    assert [x.unique().tolist() for x in out.values()] == [[13.0], [10.0], [20.0], [15.0]]
    one, two = scores("matrix", FULL, [1.0, 2]), scores("matrix", FULL, [2.0, 1])
    out = consolidate(*args, one, two, {**HALF, "neither": (0.25, 0.75)})
    assert [x.unique().tolist() for x in out.values()] == [[20.0], [17.5], [10.0], [17.5]]


def test_all_weights_can_be_changed():
    options = {
        **HALF, "both": (0.25, 0.75), "previous_only": (0.75, 0.25), "current_only": (0.5, 0.5), "neither": (1, 0)
    }  # fmt: skip
    before, now = (scores("lora_pair", PAIR, s) for s in (PREVIOUS, CURRENT))
    out = consolidate(full(PAIR, 10.0), full(PAIR, 20.0), before, now, options)
    assert out[A][:, 0].tolist() == [17.5, 12.5, 15.0, 10.0]
    assert group_weights(before, now, options).tolist() == [[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]


def test_scores_the_wrong_way_round_are_found(monkeypatch):
    """The twin of the four cases."""
    args = (
        full(PAIR, 10.0), full(PAIR, 20.0), scores("lora_pair", PAIR, PREVIOUS), scores("lora_pair", PAIR, CURRENT)
    )  # fmt: skip
    real = module.group_weights
    monkeypatch.setattr(module, "group_weights", lambda p, c, o: real(c, p, o))
    assert consolidate(*args, HALF)[A][:, 0].tolist() == [13.0, 20.0, 10.0, 15.0]


def test_the_share_and_the_threshold():
    before, now = (scores("lora_pair", PAIR, s) for s in (PREVIOUS, CURRENT))
    # the default share of 20 % is one pair of four: the first, to both
    assert group_weights(before, now).tolist() == [[0.7, 0.3]] + [[0.5, 0.5]] * 3
    # scaled to 0..1, PREVIOUS is [1, 2/3, 1/3, 0] and CURRENT [1, 0, 2/3, 1/3]
    assert group_weights(before, now, {"threshold": 0.9}).tolist() == [[0.7, 0.3]] + [[0.5, 0.5]] * 3
    assert group_weights(before, now, {"threshold": 0.3}).tolist() == [[0.7, 0.3], [1, 0], [0.7, 0.3], [0, 1]]


# --- adaptive and coarse ---


def test_adaptive_by_hand():
    """At a temperature of 0.25 and scores of 1 and 0: 1 / (1 + e^4) = 0.0179862 of the current one."""
    shapes = {n: (1, 1) for n in "abc"}
    before, now = scores("matrix", shapes, [5.0, 1, 3]), scores("matrix", shapes, [0.0, 4, 2])
    out = consolidate(full(shapes, 10.0), full(shapes, 20.0), before, now, {"mode": "adaptive"})
    assert [x.item() for x in out.values()] == pytest.approx([10.179862, 19.820138, 15.0])
    hot = {"mode": "adaptive", "temperature": 1e9}
    assert group_weights(before, now, hot)[:, 0].tolist() == pytest.approx([0.5] * 3)


def test_adaptive_without_scaling_would_see_no_difference(monkeypatch):
    """The twin: scores as small as they are, 1e-10, have equal weights."""
    before, now = scores("lora_pair", PAIR, [1e-10, 0, 0, 0]), scores("lora_pair", PAIR, [0, 1e-10, 0, 0])
    adaptive = {"mode": "adaptive"}
    assert group_weights(before, now, adaptive)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-4)))
    monkeypatch.setattr(SkillScores, "normalised", lambda self: self)
    assert group_weights(before, now, adaptive)[0, 0].item() == pytest.approx(0.5)


def test_coarse_needs_no_scores():
    coarse = {"mode": "coarse", "coarse": (0.25, 0.75)}
    out = consolidate(full(PAIR, 10.0), full(PAIR, 20.0), None, None, coarse)
    assert [x.unique().tolist() for x in out.values()] == [[17.5], [17.5]]
    before = scores("lora_pair", PAIR, PREVIOUS)
    assert group_weights(before, before, coarse).tolist() == [[0.25, 0.75]] * 4
    assert consolidate(full(PAIR, 10.0), full(PAIR, 20.0), None, None, {"mode": "coarse"})[A][0, 0] == 15


# --- factors against products ---

SMALL = {A: (1, 2), B: (2, 1)}
ONE = {A: torch.tensor([[1.0, 0]]), B: torch.tensor([[1.0], [0]])}
TWO = {A: torch.tensor([[0, 1.0]]), B: torch.tensor([[0], [1.0]])}


def test_factors_against_products_by_hand():
    """0.7 e1 e1^T + 0.3 e2 e2^T. The means of the factors are (0.7, 0.3) twice, with cross terms of 0.21 and 0.42 from
    the sum; the best of rank one is 0.3 from it."""
    dense = torch.tensor([[0.7, 0], [0, 0.3]], dtype=torch.float64)
    options = {"mode": "coarse", "coarse": (0.7, 0.3)}
    factors = product(consolidate(ONE, TWO, None, None, options))
    assert factors.flatten().tolist() == pytest.approx([0.49, 0.21, 0.21, 0.09])
    best = product(consolidate(ONE, TWO, None, None, {**options, "average": "product"}))
    assert best.flatten().tolist() == pytest.approx([0.7, 0, 0, 0], abs=1e-7)  # float32
    assert float((factors - dense).norm()) == pytest.approx(0.42)
    assert float((best - dense).norm()) == pytest.approx(0.3)


def test_the_same_product_with_other_signs():
    """B A = (-B)(-A): the means of the factors are zero, the mean of the products is what it was."""
    other = {n: -x for n, x in ONE.items()}
    coarse = {"mode": "coarse"}
    assert not product(consolidate(ONE, other, None, None, coarse)).any()
    best = product(consolidate(ONE, other, None, None, {**coarse, "average": "product"}))
    assert best.flatten().tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_a_product_of_pairs_with_weights_of_their_own():
    """B_p diag(0.7, 1, 0, 0.5) A_p + B_c diag(0.3, 0, 1, 0.5) A_c, against a dense SVD."""
    one, two = drawn(PAIR, 1), drawn(PAIR, 2)
    before, now = (scores("lora_pair", PAIR, s) for s in (PREVIOUS, CURRENT))
    out = consolidate(one, two, before, now, {**HALF, "average": "product"})
    w = torch.tensor([0.7, 1, 0, 0.5], dtype=torch.float64)
    shapes = {A: (2, 3), B: (5, 2)}
    dense = one[B].double() * w @ one[A].double() + two[B].double() * (1 - w) @ two[A].double()
    # the sum has rank 3 = the shorter side, so that rank 4 holds it: float32, measured 6e-8
    assert float((product(out) - dense).abs().max()) < 5e-7
    one, two = ({n: x[:2] if n == A else x[:, :2] for n, x in adapter.items()} for adapter in (one, two))
    before, now = scores("lora_pair", shapes, [1.0, 2]), scores("lora_pair", shapes, [2.0, 1])
    options = {**HALF, "average": "product", "previous_only": (0.6, 0.4), "current_only": (0.2, 0.8)}
    out = consolidate(one, two, before, now, options)
    w = torch.tensor([0.2, 0.6], dtype=torch.float64)
    dense = one[B].double() * w @ one[A].double() + two[B].double() * (1 - w) @ two[A].double()
    assert float((product(out) - truncated(dense, 2)).abs().max()) < 5e-7
    assert float((product(out) - dense).norm()) > 0.05  # there was something to leave out


def test_a_product_of_matrices_has_the_mean_of_the_two_weights():
    """A important only to the previous adapter, B only to the current one: (1 + 0) / 2 of each product."""
    before, now = scores("matrix", SMALL, [2.0, 1]), scores("matrix", SMALL, [1.0, 2])
    four = {A: torch.tensor([[4.0, 0]]), B: torch.tensor([[1.0], [0]])}
    out = consolidate(four, TWO, before, now, {**HALF, "average": "product"})
    assert product(out).flatten().tolist() == pytest.approx([2, 0, 0, 0], abs=1e-6)
    factors = consolidate(four, TWO, before, now, HALF)
    assert product(factors).flatten().tolist() == [0, 0, 4, 0]


def test_pairs_taken_whole_stay_bit_for_bit(monkeypatch):
    one, two = drawn(PAIR, 1), drawn(PAIR, 2)
    before, now = (scores("lora_pair", PAIR, s) for s in (PREVIOUS, CURRENT))
    whole = {**HALF, "average": "product", "both": (1, 0), "neither": (0, 1)}
    out = consolidate(one, two, before, now, whole)
    for r, source in enumerate((one, one, two, two)):
        assert torch.equal(out[A][r], source[A][r]) and torch.equal(out[B][:, r], source[B][:, r])
    # the twin: refactored, they are not
    real = module.best_factors
    monkeypatch.setattr(module, "best_factors", lambda *args, **kw: pytest.fail("refactored"))
    consolidate(one, two, before, now, whole)
    monkeypatch.setattr(module, "best_factors", real)
    out = consolidate(one, two, before, now, {**whole, "both": (1 - 1e-12, 1e-12)})
    assert not torch.equal(out[A][1], one[A][1])


def test_a_product_keeps_each_pair_in_its_place(monkeypatch):
    """The scores of earlier tasks speak of pair r: after a small step it is still the pair most like itself."""
    shapes = {A: (4, 8), B: (9, 4)}
    one = drawn(shapes, 1)
    two = {n: x + 0.01 * y for (n, x), y in zip(one.items(), drawn(shapes, 2).values(), strict=True)}

    def kept() -> bool:
        out = consolidate(one, two, None, None, {"mode": "coarse", "average": "product"})
        alike = (out[A], one[A]), (out[B].T, one[B].T)
        cosines = torch.cat([nn.functional.cosine_similarity(x, y) for x, y in alike])
        return bool((cosines > 0.9).all())

    assert kept()
    real = module.best_factors
    monkeypatch.setattr(module, "best_factors", lambda pairs, rank, like: real(pairs, rank))
    assert not kept()  # the twin: by singular values, in falling order


def test_without_factors_both_averages_are_the_same():
    args = drawn(FULL, 1), drawn(FULL, 2), scores("block", FULL, PREVIOUS), scores("block", FULL, CURRENT)
    out = [consolidate(*args, {**HALF, "average": average}) for average in AVERAGES]
    assert all(torch.equal(out[0][n], out[1][n]) for n in FULL)


# --- laws ---


def random_scores(grain: str, shapes: dict, seed: int) -> SkillScores:
    generator = torch.Generator().manual_seed(seed)
    return SkillScores(grain, shapes, torch.rand(make_grain(grain, shapes).size, generator=generator))


shares = st.floats(0, 1, width=32).map(lambda w: (w, 1 - w))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(MODES), st.sampled_from(SKILL_GRAINS), shares, shares, shares, shares,
    shares, st.floats(0.01, 1),
)  # fmt: skip
def test_two_equal_adapters_stay_bit_for_bit(seed, mode, grain, both, previous, current, neither, coarse, share):
    x = drawn(PAIR, seed)
    of_mode = {
        "cases": {
            "both": both, "previous_only": previous, "current_only": current, "neither": neither, "share": share,
        },
        "coarse": {"coarse": coarse},
    }  # fmt: skip
    options = ConsolidateOptions(mode, **of_mode.get(mode, {}))
    out = consolidate(x, x, random_scores(grain, PAIR, seed + 1), random_scores(grain, PAIR, seed + 2), options)
    assert all(torch.equal(out[n], x[n]) and out[n] is not x[n] for n in PAIR)


def test_a_weighted_sum_would_not_keep_equal_adapters(monkeypatch):
    """The twin: 0.7 x + 0.3 x is not x in floating-point numbers."""
    x = drawn({A: (4, 200), B: (5, 4)}, 0)
    monkeypatch.setattr(module.torch, "lerp", lambda p, c, w: (1 - w) * p + w * c)
    out = consolidate(x, x, None, None, {"mode": "coarse", "coarse": (0.7, 0.3)})
    assert not torch.equal(out[A], x[A])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)), st.sampled_from(["cases", "adaptive"]))
def test_the_order_of_the_pairs_does_not_matter_to_a_product(seed, order, mode):
    one, two = drawn(PAIR, seed), drawn(PAIR, seed + 1)
    before, now = random_scores("lora_pair", PAIR, seed + 2), random_scores("lora_pair", PAIR, seed + 3)
    options = {**(HALF if mode == "cases" else {}), "mode": mode, "average": "product"}
    want = consolidate(one, two, before, now, options)
    one, two = ({A: x[A][order], B: x[B][:, order]} for x in (one, two))
    before, now = (SkillScores("lora_pair", PAIR, s.values[order]) for s in (before, now))
    out = consolidate(one, two, before, now, options)
    # the sum has rank 3, so that it is held whatever its singular values; float32, measured 7.7e-7 over 3,000
    assert torch.allclose(product(out), product(want), atol=5e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["cases", "adaptive"]), st.sampled_from(AVERAGES))
def test_the_two_adapters_can_change_places(seed, mode, average):
    """With the weights mirrored, previous and current are names."""
    one, two = drawn(PAIR, seed), drawn(PAIR, seed + 1)
    before, now = random_scores("lora_pair", PAIR, seed + 2), random_scores("lora_pair", PAIR, seed + 3)
    of_cases = HALF if mode == "cases" else {}
    options = {**of_cases, "mode": mode, "average": average}
    want = consolidate(one, two, before, now, options)
    out = consolidate(two, one, now, before, {**options, **({"both": (0.3, 0.7)} if of_cases else {})})
    assert torch.allclose(product(out), product(want), atol=5e-6)  # as above


# --- how tensors are held ---


def test_what_is_given_stays_and_what_comes_is_new():
    one, two = ({n: x.requires_grad_() for n, x in drawn(PAIR, i).items()} for i in (1, 2))
    copies = [{n: x.detach().clone() for n, x in adapter.items()} for adapter in (one, two)]
    before, now = (scores("lora_pair", PAIR, s) for s in (PREVIOUS, CURRENT))
    for average in AVERAGES:
        out = consolidate(one, two, before, now, {**HALF, "average": average})
        for x in out.values():
            assert not x.requires_grad
            x.fill_(7.0)
    assert all(torch.equal(x[n], y[n]) for x, y in zip((one, two), copies, strict=True) for n in PAIR)


def test_the_order_of_the_tensors_does_not_matter():
    """A file has its tensors in the alphabet's order, a model in that of its layers."""
    shapes = {"z.lora_A.weight": (4, 3), "z.lora_B.weight": (5, 4), **PAIR}
    one, two, values = drawn(shapes, 1), drawn(shapes, 2), torch.rand(2, 8)
    before, now = (SkillScores("lora_pair", shapes, v) for v in values)
    for average in AVERAGES:
        options = {**HALF, "average": average}
        want = consolidate(one, two, before, now, options)
        out = consolidate(dict(sorted(one.items())), dict(sorted(two.items())), before, now, options)
        assert list(want) == list(two) and list(out) == sorted(two)
        assert all(torch.equal(out[n], want[n]) for n in shapes)


@pytest.mark.parametrize("average", AVERAGES)
def test_dtypes_are_those_of_the_current_adapter(average):
    one, two = drawn(PAIR, 1), {n: x.bfloat16() for n, x in drawn(PAIR, 2).items()}
    coarse = {"mode": "coarse", "coarse": (0.9, 0.1), "average": average}
    assert {x.dtype for x in consolidate(two, one, None, None, coarse).values()} == {torch.float32}
    out = consolidate(one, two, None, None, coarse)
    assert {x.dtype for x in out.values()} == {torch.bfloat16}
    want = consolidate(one, {n: x.float() for n, x in two.items()}, None, None, coarse)
    if average == "factors":
        assert all(torch.equal(out[n], want[n].bfloat16()) for n in PAIR)
    # bfloat16 keeps 8 bits, two factors: measured 2.6e-3
    assert float((product(out) - product(want)).norm()) < 1e-2 * float(product(want).norm())


# --- peft ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.conv = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Conv2d(3, 6, 3)


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["words", "fc", "conv"]}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**options))
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(**options))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("grain", SKILL_GRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_products_in_a_model_are_the_best_of_their_rank(adapted, grain, mode):
    """What peft adds afterwards, its scaling of 3 / 2 included, against the sum of what it added before."""
    one, two, into = (
        {n: p.detach() for n, p in skill_tensors(adapted, name).items()} for name in ("default", "second", "third")
    )
    shapes = {n: tuple(x.shape) for n, x in one.items()}
    before, now = random_scores(grain, shapes, 1), random_scores(grain, shapes, 2)
    options = {"mode": mode, "average": "product", **({"share": 0.5} if mode == "cases" else {})}
    weights = make_grain(grain, shapes).expand(group_weights(before, now, options)[:, 1])
    out = consolidate(one, two, before, now, options)
    with torch.no_grad():
        for n, p in into.items():
            p.copy_(out[n])
    for layer, a, b in [
        (adapted.base_model.model.words, "lora_embedding_A", "lora_embedding_B"),
        (adapted.base_model.model.fc, "lora_A.weight", "lora_B.weight"),
        (adapted.base_model.model.conv, "lora_A.weight", "lora_B.weight"),
    ]:
        a, b = (next(n for n in shapes if n.endswith(f"{_name(adapted, layer)}.{x}")) for x in (a, b))
        w = (weights[a].flatten() + weights[b].flatten()) / 2
        want = 1.5 * sum(x[b].double().flatten(1) * v @ x[a].double().flatten(1) for x, v in ((one, 1 - w), (two, w)))
        got = layer.get_delta_weight("third").detach()
        got = (got.T if "embedding" in a else got.flatten(1)).double()
        # float32 against float64, of numbers up to 8: measured 9.9e-7
        assert float((got - truncated(want, 2)).abs().max()) < 5e-6


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(n for n, m in model.named_modules() if m is layer)


def test_a_convolution_with_groups_has_no_product():
    shapes = {"conv.lora_A.weight": (4, 6, 3, 3), "conv.lora_B.weight": (6, 2, 1, 1)}
    adapters, coarse = (drawn(shapes, 1), drawn(shapes, 2)), {"mode": "coarse"}
    refused(
        SkillError, lambda: consolidate(*adapters, None, None, {**coarse, "average": "product"}),
        "conv.lora_A.weight: A [4, 6, 3, 3] has rank 4, B [6, 2, 1, 1] has rank 2", "use average='factors'",
    )  # fmt: skip
    assert set(consolidate(*adapters, None, None, coarse)) == set(shapes)


def test_a_bias_beside_b_is_averaged_as_it_is():
    shapes = {**SMALL, "q.lora_B.bias": (2,)}
    out = consolidate(full(shapes, 1.0), full(shapes, 3.0), None, None, {"mode": "coarse", "average": "product"})
    assert out["q.lora_B.bias"].tolist() == [2.0, 2.0]
    assert product(out).flatten().tolist() == pytest.approx([5.0] * 4)  # (1 + 9) / 2; of the means 4


# --- what does not fit ---


def test_adapters_of_other_targets_or_ranks():
    def call(one: dict, two: dict) -> None:
        consolidate(drawn(one, 1), drawn(two, 2), None, None, {"mode": "coarse"})

    more = {**PAIR, "k.lora_A.weight": (4, 3), "k.lora_B.weight": (5, 4)}
    remedy = "both need the same target_modules and rank: one LoraConfig for all tasks of a sequence"
    refused(
        SkillError, lambda: call(PAIR, more),
        "k.lora_A.weight [4, 3] is in the current adapter but not in the previous adapter (2 such)", remedy,
    )  # fmt: skip
    refused(
        SkillError, lambda: call(more, PAIR), "k.lora_A.weight [4, 3] is in the previous adapter but not in the cur"
    )
    refused(
        SkillError, lambda: call({A: (4, 3), B: (5, 4)}, {A: (2, 3), B: (5, 2)}),
        f"{A} is [4, 3] in the previous adapter, [2, 3] in the current adapter; {remedy}",
    )  # fmt: skip
    refused(SkillError, lambda: call({}, PAIR), "the previous adapter has no tensors; use skill_tensors(")
    refused(SkillError, lambda: call(PAIR, {}), "the current adapter has no tensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite(bad):
    """Also where the weight of what is not finite is zero: 0 x NaN would be NaN."""
    one, two = drawn(PAIR, 1), drawn(PAIR, 2)
    two[B][0, :2] = bad
    for args, which in (((one, two), "current"), ((two, one), "previous")):
        refused(
            SkillError, lambda args=args: consolidate(*args, None, None, {"mode": "coarse", "coarse": (1, 0)}),
            f"{B}: 2 of 20 elements of the {which} adapter are NaN or infinite; its training diverged",
        )  # fmt: skip


def test_integers():
    whole = {n: x.long() for n, x in full(PAIR, 1.0).items()}
    refused(
        SkillError, lambda: consolidate(whole, full(PAIR, 1.0), None, None, {"mode": "coarse"}),
        f"{A}: torch.int64 in the previous adapter, expected a floating-point tensor",
    )  # fmt: skip


def test_scores_that_do_not_fit():
    adapters = drawn(PAIR, 1), drawn(PAIR, 2)
    pairs = scores("lora_pair", PAIR, PREVIOUS)
    refused(
        SkillError, lambda: consolidate(*adapters, pairs, scores("matrix", PAIR, [1.0, 2])),
        "the previous scores have the grain lora_pair, the current scores have matrix",
    )  # fmt: skip
    other = {A: (4, 3), B: (6, 4)}
    refused(
        SkillError, lambda: consolidate(*adapters, pairs, scores("lora_pair", other, PREVIOUS)),
        f"{B} is [5, 4] in the previous scores, [6, 4] in the current scores",
    )  # fmt: skip
    refused(
        SkillError, lambda: consolidate(*adapters, *[scores("lora_pair", other, PREVIOUS)] * 2),
        f"{B} is [6, 4] in the scores, [5, 4] in the adapters; both need the same target_modules and rank",
    )  # fmt: skip
    renamed = {n.replace("q.", "k."): s for n, s in PAIR.items()}
    refused(
        SkillError, lambda: consolidate(*adapters, *[scores("lora_pair", renamed, PREVIOUS)] * 2),
        "k.lora_A.weight [4, 3] is in the scores but not in the adapters (2 such)",
    )  # fmt: skip
    refused(
        SkillError, lambda: consolidate(drawn(FULL, 1), drawn(FULL, 2), pairs, pairs),
        f"{A} [4, 3] is in the scores but not in the adapters (2 such)",
    )  # fmt: skip
    more = {**PAIR, **renamed}
    refused(
        SkillError, lambda: consolidate(drawn(more, 1), drawn(more, 2), pairs, pairs),
        "k.lora_A.weight [4, 3] is in the adapters but not in the scores (2 such)",
    )  # fmt: skip


def test_missing_scores():
    adapters, pairs = (drawn(PAIR, 1), drawn(PAIR, 2)), scores("lora_pair", PAIR, PREVIOUS)
    for given_, which, mode in ((None, pairs), "previous", "cases"), ((pairs, None), "current", "adaptive"):
        refused(
            SkillError, lambda given_=given_, mode=mode: consolidate(*adapters, *given_, {"mode": mode}),
            f"mode '{mode}' needs the {which} scores, got None; only 'coarse' does without",
        )  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_never_come_so_far(bad):
    refused(
        SkillError, lambda: scores("lora_pair", PAIR, [1.0, 2, bad, 3]), f"the score of q[2] is {bad}, expected finite"
    )


# --- options ---


def test_options_are_json_and_come_back():
    options = ConsolidateOptions(both=(0.6, 0.4), threshold=0.5)
    assert ConsolidateOptions().changed(json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert options.changed(None) is options and options.changed(ConsolidateOptions()) == ConsolidateOptions()


OTHERS = {  # a value of each option that is not its default
    "both": (0.6, 0.4), "previous_only": (0.9, 0.1), "current_only": (0.1, 0.9), "neither": (0.4, 0.6),
    "temperature": 0.5, "coarse": (0.4, 0.6), "share": 0.75, "threshold": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_an_option_acts_in_its_mode_and_is_refused_in_others(name, mode):
    """The twin is that each acts where it is taken: another weight for some group."""
    options = {"mode": mode, name: OTHERS[name]}
    if name in module.READ_BY[mode]:
        grid = [(random_scores("lora_pair", PAIR, i), random_scores("lora_pair", PAIR, i + 50)) for i in range(20)]
        assert any(not torch.equal(group_weights(a, b, options), group_weights(a, b, {"mode": mode})) for a, b in grid)
        return
    with pytest.raises(ConfigError) as caught:
        ConsolidateOptions(**options)
    text = str(caught.value)
    assert f"{name}: got" in text and f"has no effect with mode={mode!r}; pass mode=" in text and "leave it out" in text


def test_every_option_belongs_to_a_mode():
    of_all = [f.name for f in dataclasses.fields(ConsolidateOptions)]
    assert sorted([*OTHERS, "mode", "average"]) == sorted(of_all)
    assert sorted(n for names in module.READ_BY.values() for n in names) == sorted(OTHERS)


def test_a_share_beside_a_threshold_is_refused():
    with pytest.raises(
        ConfigError, match="share: got 0.3, which has no effect with threshold=0.5; remove the threshold"
    ):
        ConsolidateOptions(share=0.3, threshold=0.5)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("mode", "case", "mode: got 'case', expected one of cases, adaptive, coarse; did you mean 'cases'?"),
        ("average", "products", "expected one of factors, product; did you mean 'product'?"),
        ("temperature", 0.0, "temperature: got 0.0, expected a number above 0"),
        ("temperature", math.nan, "temperature: got nan, expected a number above 0"),
        ("share", 0.0, "share: got 0.0, expected a share of the groups above 0 and at most 1"),
        ("share", 1.5, "share: got 1.5"),
        ("threshold", 1.5, "threshold: got 1.5, expected a normalised score between 0 and 1"),
        ("temperature", "hot", "temperature: got 'hot', expected a number above 0"),
        ("both", ("a", "b"), "expected two weights, of the previous and of the current adapter"),
        ("bothe", (1, 0), "ConsolidateOptions has no option 'bothe'; did you mean 'both'?"),
    ],
)
def test_options_out_of_range(name, value, text):
    refused(ConfigError, lambda: ConsolidateOptions().changed({name: value}), text)


def test_options_that_are_none():
    refused(
        ConfigError, lambda: ConsolidateOptions().changed("adaptive"), "got 'adaptive', expected ConsolidateOptions or"
    )


@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for name in ["both", "previous_only", "current_only", "neither", "coarse"]
        for value in [(0.7, 0.7), (0.3, 0.3), (1.5, -0.5), (1.0,), (math.nan, 0.5), (math.inf, -math.inf), 0.7]
    ],
)
def test_weights_that_are_no_mean(name, value):
    text = (
        f"{name}: got {value!r}, expected two weights, of the previous and of the current adapter, that are at least 0"
    )
    refused(ConfigError, lambda: ConsolidateOptions(**{name: value}), text, "and sum to 1")
