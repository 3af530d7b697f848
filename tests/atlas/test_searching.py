"""Searching a scale, and coefficients from a coarser grain to a finer one."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch

import hatcl
from hatcl import ConfigError, VectorError
from hatcl.atlas import refine, search
from hatcl.map.grains import make_grain


def test_the_first_of_the_best_scales_is_kept():
    _, _, composer = parts.tiny()
    scores = {0.0: 1.0, 0.5: 3.0, 1.0: 3.0, -1.0: -float("inf")}
    found = search(composer, lambda: {"score": scores[float(composer.coefficients[0, 0].detach())]}, list(scores))
    assert found.score == 3 and bool((composer.coefficients == 0.5).all())
    assert [h["scale"] for h in found.history] == list(scores) and composer.coefficients.requires_grad


def test_an_error_puts_the_coefficients_back():
    _, _, composer = parts.tiny()
    composer.coefficients.data.fill_(0.125)
    with pytest.raises(ConfigError, match="scales: none"):
        search(composer, lambda: {"score": 0.0}, [])
    with pytest.raises(ConfigError, match="none of the 2 scales may be kept; add 0, the pretrained model"):
        search(composer, lambda: {"score": -float("inf")}, [0.5, 1.0])
    assert bool((composer.coefficients == 0.125).all())


CHAIN = ["global", "block", "row", "element"]


@pytest.mark.parametrize(("coarse", "fine"), [(a, b) for i, a in enumerate(CHAIN) for b in CHAIN[i:]])
def test_a_refined_composition_is_the_same_model(coarse, fine):
    base, vectors, first = parts.tiny(grain=coarse)
    first.coefficients.data.normal_()
    second = hatcl.compose(base, vectors, fine)
    second.coefficients.data = refine(first.coefficients, first.grain, second.grain)
    for a, b in zip(first.merge().parameters(), second.merge().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("k", "more"), [(1, 5), (5, 20), (2, 6)])
def test_a_partition_is_refined_by_its_multiples(k, more):
    base, vectors, first = parts.tiny(grain=f"partition:{k}")
    first.coefficients.data.normal_()
    second = hatcl.compose(base, vectors, f"partition:{more}")
    second.coefficients.data = refine(first.coefficients, first.grain, second.grain)
    for a, b in zip(first.merge().parameters(), second.merge().parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_refinement_is_refused():
    shapes = {"a": (4, 3), "b": (4,)}
    block, whole, parts5 = (make_grain(g, shapes) for g in ("block", "global", "partition:5"))
    with pytest.raises(VectorError, match="groups of block reach over several of partition:5; it is not a refinement"):
        refine(torch.zeros(1, 10), parts5, block)
    with pytest.raises(VectorError, match="groups of global reach over several of block"):
        refine(torch.zeros(1, 2), block, whole)
    with pytest.raises(VectorError, match=r"coefficients of shape \[1, 3\]; expected \[vectors, 2\] of block"):
        refine(torch.zeros(1, 3), block, block)
    with pytest.raises(VectorError, match="b: the grain block covers it, matrix does not"):
        refine(torch.zeros(1, 1), make_grain("matrix", shapes), block)
