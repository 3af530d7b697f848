"""Grains: reduce and expand against loops over elements."""

from __future__ import annotations

import parts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.gates import gates_of
from hatcl.map.grains import make_grain

NAMES = ["element", "unit", "matrix", "block", "partition:1", "partition:7"]


def model_of(name):
    model = parts.converted(name, 1)
    found = gates_of(model)[0].unit_map
    return found, {
        n: torch.randn(e.shape, generator=torch.Generator().manual_seed(i))
        for i, (n, e) in enumerate(found.entries.items())
    }


@pytest.mark.parametrize("name", parts.MODELS)
@pytest.mark.parametrize("kind", NAMES)
def test_reduce_and_expand_are_those_of_loops(kind, name):
    found, tensors = model_of(name)
    grain = make_grain(kind, {n: x.shape for n, x in tensors.items()}, found)
    index = {n: ids.expand(tensors[n].shape).reshape(-1) for n, ids in grain.expand(torch.arange(grain.size)).items()}
    groups = torch.cat([index[n] for n in grain.shapes])
    values = torch.cat([tensors[n].reshape(-1) for n in grain.shapes]).double()
    total = torch.zeros(grain.size, dtype=torch.float64).index_add(0, groups, values)
    count = torch.bincount(groups, minlength=grain.size)
    # sums of up to 20,000 float32 numbers in another order
    assert torch.allclose(grain.reduce(tensors, "sum").double(), total, atol=1e-3)
    assert torch.allclose(grain.reduce(tensors).double(), total / count.clamp(min=1), atol=1e-4)
    top = torch.full((grain.size,), -torch.inf, dtype=torch.float64).scatter_reduce(0, groups, values, "amax")
    assert torch.equal(grain.reduce(tensors, "max").double(), top)
    assert groups.min() >= 0 and groups.max() < grain.size
    if kind != "unit" and not kind.startswith("partition"):  # a tensor may have fewer elements than parts
        assert bool((count > 0).all())


@pytest.mark.parametrize("kind", NAMES)
@given(seed=st.integers(0, 100))
def test_expanding_and_reducing_again_gives_the_vector(kind, seed):
    found, tensors = model_of("mlp")
    grain = make_grain(kind, {n: x.shape for n, x in tensors.items()}, found)
    vector = torch.randn(grain.size, generator=torch.Generator().manual_seed(seed))
    wide = {n: x.expand(tensors[n].shape) for n, x in grain.expand(vector).items()}
    seen = torch.cat([ids.reshape(-1) for ids in grain.expand(torch.arange(grain.size)).values()]).unique()
    # the mean of up to 1,536 equal float32 numbers: measured 6e-5
    assert torch.allclose(grain.reduce(wide)[seen], vector[seen], atol=1e-3)
    assert torch.equal(grain.reduce(wide, "max")[seen], vector[seen])


def test_a_unit_is_what_it_owns():
    found, tensors = model_of("mlp")
    grain = make_grain("unit", {n: x.shape for n, x in tensors.items()}, found)
    on = torch.zeros(grain.size)
    on[3] = 1
    wide = {n: x.expand(tensors[n].shape) for n, x in grain.expand(on).items()}
    assert int(wide["1.weight"].sum()) == 48 and bool((wide["1.weight"][2] == 1).all())
    assert int(wide["1.bias"].sum()) == 1 and int(wide["4.weight"].sum()) == 0


def test_partitions_are_even_and_follow_the_seed_alone():
    shapes = {"a": (100, 100), "b": (50,)}
    grain, again, other = (make_grain("partition:4", shapes, seed=s) for s in (1, 1, 2))
    first = grain.expand(torch.arange(8))
    assert torch.equal(first["a"], again.expand(torch.arange(8))["a"])
    assert not torch.equal(first["a"], other.expand(torch.arange(8))["a"])
    sizes = torch.bincount(first["a"].reshape(-1), minlength=8)
    assert sizes[4:].sum() == 0 and bool(((sizes[:4] - 2500).abs() < 200).all())  # 4 standard deviations are 173


def test_lora_pairs_are_matched_by_path_segment():
    shapes = {"m.q.lora_A.one.weight": (3, 8), "m.q.lora_B.one.weight": (6, 3), "m.lora_Appendix.weight": (2, 2)}
    grain = make_grain("lora_pair", shapes)
    assert grain.size == 3 and set(grain.shapes) == set(list(shapes)[:2]) and grain.labels[0] == "m.q[0]"
    wide = grain.expand(torch.arange(3.0))
    assert torch.equal(wide["m.q.lora_A.one.weight"].expand(3, 8)[:, 0], torch.arange(3.0))
    assert torch.equal(wide["m.q.lora_B.one.weight"].expand(6, 3)[0], torch.arange(3.0))


@pytest.mark.parametrize(
    "kind, shapes, text",
    [
        ("blok", {"a": (2,)}, "got 'blok', expected one of .*; did you mean 'block'"),
        ("partition:0", {"a": (2,)}, "expected partition:K with K of at least 1"),
        ("unit", {"a": (2,)}, "unit needs the map"),
        ("matrix", {"a": (2,)}, "finds nothing to speak of"),
        ("lora_pair", {"q.lora_A.one.weight": (3, 8)}, "has no partner q.lora_B.one.weight"),
        ("lora_pair", {"q.weight": (3, 8)}, "finds nothing to speak of"),
        ("lora_pair", {"q.lora_A.one.weight": (3, 8), "q.lora_B.one.weight": (8, 2)}, "has rank 3, .* has rank 2"),
    ],
)
def test_grains_that_cannot_be(kind, shapes, text):
    with pytest.raises(hatcl.ConfigError, match=text):
        make_grain(kind, shapes)


def test_tensors_that_do_not_fit():
    grain = make_grain("block", {"a": (2,), "b": (3,)})
    with pytest.raises(KeyError, match="b: missing; the grain block covers 2 tensors"):
        grain.reduce({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"a: got shape \[3\], expected \[2\]"):
        grain.reduce({"a": torch.zeros(3), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"got shape \[3\], the grain block has 2 groups"):
        grain.expand(torch.zeros(3))
    with pytest.raises(ValueError, match="how: got 'median'"):
        grain.reduce({}, "median")
