"""Grains: reduce and expand against loops over elements."""

from __future__ import annotations

import copy
import pickle

import parts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.map.grains import GRAINS, make_grain

NAMES = ["element", "unit", "row", "matrix", "qkv", "block", "partition:1", "partition:7", "global"]


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


def test_rows():
    grain = make_grain("row", {"w": (2, 3), "b": (2,), "scale": (), "one": (1, 4), "none": (0, 2), "flat": (2, 0)})
    assert grain.labels == ("w[0]", "w[1]", "b[0]", "b[1]", "scale", "one", "flat[0]", "flat[1]") and grain.size == 8
    ids = grain.expand(torch.arange(8))
    assert ids["w"].tolist() == [[0], [1]] and ids["b"].tolist() == [2, 3]
    assert (ids["scale"].shape, int(ids["scale"]), int(ids["one"])) == ((), 4, 5)
    assert ids["none"].shape == (0, 1) and ids["flat"].tolist() == [[6], [7]]
    w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
    rest = {"b": torch.tensor([7.0, 8.0]), "scale": torch.tensor(2.5), "one": torch.ones(1, 4)}
    tensors = {"w": w, **rest, "none": torch.zeros(0, 2), "flat": torch.zeros(2, 0)}
    assert grain.reduce(tensors).tolist() == [2.0, 6.0, 7.0, 8.0, 2.5, 1.0, 0.0, 0.0]


def test_global_is_one_number_for_all():
    grain = make_grain("global", {"w": (2, 3), "scale": ()})
    assert grain.size == 1 and grain.labels == ("all",)
    tensors = {"w": torch.arange(6.0).view(2, 3), "scale": torch.tensor(20.0)}
    assert grain.reduce(tensors, "sum").tolist() == [35.0] and grain.reduce(tensors).tolist() == [5.0]
    assert {n: x.shape for n, x in grain.expand(torch.ones(1)).items()} == {"w": (), "scale": ()}


def test_fused_queries_keys_and_values_are_three_groups():
    shapes = {
        "blocks.0.attn.qkv.weight": (6, 4), "blocks.0.attn.qkv.bias": (6,), "m.in_proj_weight": (9, 3),
        "m.in_proj_bias": (9,), "layer.Wqkv.weight": (3, 1),
    }  # fmt: skip
    whole = {
        "blocks.0.attn.proj.weight": (6, 4), "h.query_key_value.weight": (6, 4), "mamba.in_proj.weight": (9, 3),
        "odd.qkv.weight": (7, 4), "qkv": (), "in_proj_weight.0": (3, 3), "empty": (0, 3),
    }  # fmt: skip
    grain = make_grain("qkv", {**shapes, **whole})
    assert grain.size == 3 * len(shapes) + len(whole)
    assert grain.labels[:3] == tuple(f"blocks.0.attn.qkv.weight[{part}]" for part in "qkv")
    assert all(n in grain.labels for n in whole)
    ids = grain.expand(torch.arange(grain.size))
    assert ids["blocks.0.attn.qkv.weight"].view(-1).tolist() == [0, 0, 1, 1, 2, 2]
    assert ids["m.in_proj_bias"].tolist() == [9, 9, 9, 10, 10, 10, 11, 11, 11]
    assert all(ids[n].shape == () for n in whole)


def test_the_thirds_are_what_timm_and_torch_take_for_queries_keys_and_values():
    """Moving one third of the weight moves that output alone."""
    torch.manual_seed(0)
    attention, x = torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
    block, y = parts.vit().blocks[0].attn, torch.randn(1, 3, 32)
    for module, name, passed in ((attention, "in_proj_weight", (x, x, x)), (block, "qkv.weight", (y,))):
        weight = module.get_parameter(name)
        grain = make_grain("qkv", {name: weight.shape})
        with torch.no_grad():
            for bias in (n for n, _ in module.named_parameters() if n.endswith("bias")):
                module.get_parameter(bias).zero_()
            q, k, v = (float(g == "v") for g in "qkv")
            weight.mul_(grain.expand(torch.tensor([q, k, v]))[name])
            # without queries and keys all positions attend alike: every output is the same mean of the values
            out = module(*passed)
            out = out[0] if isinstance(out, tuple) else out
            assert torch.allclose(out, out[:, :1].expand_as(out), atol=1e-6) and out.abs().max() > 1e-3
            weight.mul_(grain.expand(torch.tensor([1.0, 1.0, 0.0]))[name])
            out = module(*passed)
            assert not (out[0] if isinstance(out, tuple) else out).any()


def test_every_grain_can_be_pickled():
    shapes = {"m.lora_A.x.weight": (2, 3), "m.lora_B.x.weight": (4, 2), "qkv.weight": (6, 2), "b": (3,)}
    found, tensors = model_of("mlp")
    for name in GRAINS:
        sized = {n: x.shape for n, x in tensors.items()} if name == "unit" else shapes
        grain = make_grain(name.replace("K", "3"), sized, found, seed=2)
        for again in (pickle.loads(pickle.dumps(grain)), copy.deepcopy(grain)):
            assert (again.name, again.size, again.labels, again.shapes) == (
                grain.name, grain.size, grain.labels, grain.shapes)  # fmt: skip
            ours, theirs = (g.expand(torch.arange(g.size)) for g in (grain, again))
            assert all(torch.equal(ours[n], theirs[n]) for n in grain.shapes)


def test_a_map_of_another_model():
    found, tensors = model_of("mlp")
    with pytest.raises(hatcl.ConfigError, match=r"1.weight is \[32, 48\] in the map, \[32, 9\] here; pass the map of"):
        make_grain("unit", {"1.weight": (32, 9)}, found)


@pytest.mark.parametrize(
    "kind, shapes, text",
    [
        ("blok", {"a": (2,)}, "got 'blok', expected one of .*; did you mean 'block'"),
        ("block:3", {"a": (2,)}, "got 'block:3', expected one of .*; did you mean 'block'"),
        ("", {"a": (2,)}, "got '', expected one of"),
        ("row", {}, "row finds no groups"),
        ("partition", {"a": (2,)}, "got 'partition', expected partition:K"),
        ("partition:\u00b2", {"a": (2,)}, "expected partition:K with K of at least 1"),
        ("partition:0", {"a": (2,)}, "expected partition:K with K of at least 1"),
        ("unit", {"a": (2,)}, "unit needs the map"),
        ("matrix", {"a": (2,)}, "finds no groups"),
        ("lora_pair", {"q.lora_A.one.weight": (3, 8)}, "has no partner q.lora_B.one.weight"),
        ("lora_pair", {"q.weight": (3, 8)}, "finds no groups"),
        ("lora_pair", {"q.lora_A.one.weight": (3, 8), "q.lora_B.one.weight": (8, 2)}, "has rank 3, .* has rank 2"),
    ],
)
def test_grains_that_cannot_be(kind, shapes, text):
    with pytest.raises(hatcl.ConfigError, match=text):
        make_grain(kind, shapes)


def test_tensors_that_do_not_fit():
    grain = make_grain("block", {"a": (2,), "b": (3,)})
    with pytest.raises(hatcl.VectorError, match="b: missing; the grain block covers 2 tensors"):
        grain.reduce({"a": torch.zeros(2)})
    with pytest.raises(hatcl.VectorError, match=r"a: got shape \[3\], expected \[2\]"):
        grain.reduce({"a": torch.zeros(3), "b": torch.zeros(3)})
    with pytest.raises(hatcl.VectorError, match=r"got shape \[3\], the grain block has 2 groups"):
        grain.expand(torch.zeros(3))
    with pytest.raises(hatcl.ConfigError, match="how: got 'median'"):
        grain.reduce({}, "median")
