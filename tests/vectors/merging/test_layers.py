"""Options that differ from layer to layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_parts import MOST

from hatcl import ConfigError, VectorError
from hatcl.vectors.merging import list_merges, merge
from hatcl.vectors.merging.layers import layer_of, places, restricted, setting_at
from hatcl.vectors.merging.registry import ALIASES, merge_info
from hatcl.vectors.task_vector import TaskVector

NAMES = ["embed.weight", "h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.mlp.w", "h.2.attn.w", "h.2.mlp.w", "head.weight"]


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return [TaskVector({n: torch.randn(6, 5, generator=generator) for n in NAMES}) for _ in range(2)]


def test_where_a_tensor_stands():
    assert layer_of("model.layers.11.mlp.experts.3.w") == ("model.layers", 11) and layer_of("0.weight") == ("", 0)
    assert layer_of("lm_head.weight") is None and layer_of("conv1.weight") is None
    found = places([*NAMES, "decoder.0.w", "encoder.1.w", "encoder.0.w"])
    assert found["embed.weight"] == found["head.weight"] == found["h.0.mlp.w"] == found["encoder.0.w"] == 0
    assert found["h.1.attn.w"] == 0.5 and found["h.2.mlp.w"] == found["encoder.1.w"] == 1
    assert found["decoder.0.w"] == 1  # the only layer of its stack, as in mergekit


@pytest.mark.parametrize(
    ("setting", "at"),
    [
        (0.3, [0.3] * 5),
        ([0.0, 1.0], [0, 0.25, 0.5, 0.75, 1]),
        ([0.0, 1.0, 0.0], [0, 0.5, 1, 0.5, 0]),
        ([0.7], [0.7] * 5),
        ([True, False], [True, True, True, True, False]),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 9}], [9] * 5),
        ([{"filter": "attn", "value": [0, 1]}, {"value": 9}], [0, 0.25, 0.5, 0.75, 1]),
        ({"filter": "*", "value": 2}, [2] * 5),
        ({"filter": "mlp", "value": 2}, [None] * 5),
        ([], [None] * 5),
    ],
)
def test_settings(setting, at):
    assert [setting_at("t", setting, "h.3.attn.w", i / 4) for i in range(5)] == at


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5), st.floats(0, 1))
def test_law_a_gradient_stays_between_its_values(values, place):
    found = setting_at("t", values, "w", place)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    assert setting_at("t", values, "w", 0.0) == values[0] and setting_at("t", values, "w", 1.0) == values[-1]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ([{"filter": "mlp"}], "t: got {'filter': 'mlp'}, expected a mapping with value"),
        ([{"value": 1, "fliter": "mlp"}], "expected a mapping with value and, if wanted, filter"),
        ([1, {"value": 2}], "expected values only, or mappings with value and filter only"),
        ([[1, 2], [3]], "expected values only"),
    ],
)
def test_what_is_no_setting(setting, text):
    with pytest.raises(ConfigError) as error:
        setting_at("t", setting, "w", 0.5)
    assert text in str(error.value)


def test_a_gradient_is_each_layer_with_its_own_number(vectors):
    merged = merge(vectors, "arithmetic", scale={"layers": [0.0, 1.0]})
    for n, place in places(NAMES).items():
        assert torch.equal(merged[n], merge(vectors, "arithmetic", scale=place)[n])
    weights = [{"layers": [{"filter": "mlp", "value": 1.0}, {"value": 3.0}]}, 1.0]
    merged = merge(vectors, "mean", weights=weights)
    for n in NAMES:
        assert torch.equal(merged[n], merge(vectors, "mean", weights=[1.0 if "mlp" in n else 3.0, 1.0])[n])


def test_tensors_with_the_same_options_are_merged_together(vectors):
    merged = merge(vectors, "ties", density={"layers": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]})
    mlp = [n for n in NAMES if "mlp" in n]
    alone = merge([restricted(v, mlp) for v in vectors], "ties", density=0.5)
    assert set(alone) == set(mlp) and all(torch.equal(merged[n], alone[n]) for n in mlp)


@pytest.mark.parametrize("method", [m for m in list_merges() if not merge_info(m).needs])
def test_a_setting_of_one_value_is_that_value(method, vectors, tmp_path):
    few = [restricted(v, NAMES[:3]) for v in vectors[: MOST.get(method)]]
    option, value = next(
        ((o, d) for o, d in merge_info(method).options.items() if isinstance(d, float)), ("weights", 1.0)
    )
    if option not in merge_info(method).options:
        pytest.skip(f"{method} has no number to set")
    want = merge(few, method, **{option: value})
    got = merge(few, method, **{option: {"layers": [{"filter": "*", "value": [value, value]}]}})
    assert list(got) == list(want) and all(torch.equal(got[n], want[n]) for n in want)
    stored = [TaskVector.load(v.save(tmp_path / f"{i}.safetensors")) for i, v in enumerate(few)]
    lazy = merge(stored, method, **{option: {"layers": value}})
    assert "in files" in repr(lazy) and all(torch.equal(lazy[n], want[n]) for n in want)


def test_adapters_that_change_different_layers():
    a = TaskVector({"h.0.w": torch.ones(2)}, partial=True)
    b = TaskVector({"h.1.w": torch.ones(2)}, partial=True)
    merged = merge([a, b], "arithmetic", scale={"layers": [0.0, 1.0]})
    assert merged["h.0.w"].tolist() == [0, 0] and merged["h.1.w"].tolist() == [1, 1] and merged.partial


def test_what_layers_cannot_do(vectors):
    with pytest.raises(ConfigError, match="density: no value for embed.weight; end the list with one that has no fil"):
        merge(vectors, "ties", density={"layers": [{"filter": "mlp", "value": 0.5}]})
    with pytest.raises(ConfigError, match="layers: fisher works on the whole model; give each option one value"):
        merge(vectors, "fisher", floor={"layers": [0.1, 0.5]}, model=torch.nn.Linear(1, 1), batches=[])
    with pytest.raises(ConfigError, match="density: got 1.5, expected a number between 0 and 1"):
        merge(vectors, "ties", density={"layers": [0.5, 1.5]})
    with pytest.raises(VectorError):
        merge([vectors[0], TaskVector({"other": torch.ones(1)})], "mean", weights={"layers": [0, 1]})


def test_names_from_elsewhere(vectors):
    assert not ALIASES.keys() & set(list_merges()) and set(ALIASES.values()) <= set(list_merges())
    assert torch.equal(merge(vectors, "linear")["head.weight"], merge(vectors, "mean")["head.weight"])
    assert torch.equal(merge(vectors, "task_arithmetic")["head.weight"], merge(vectors, "arithmetic")["head.weight"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 2), min_size=2, max_size=2))
@pytest.mark.parametrize("method", [m for m in list_merges() if "weights" in merge_info(m).options and m != "fisher"])
def test_law_weights_that_are_all_equal_are_no_weights_where_their_sum_is_divided_by(method, weights):
    """And a vector of weight 0 is as if it were not there, where the method is a sum."""
    generator = torch.Generator().manual_seed(1)
    pair = [TaskVector({"w": torch.randn(4, 4, generator=generator)}) for _ in range(2)]
    given_ = {"drop": 0.0} if "drop" in merge_info(method).options else {}
    given_ |= {"density": 1.0} if "density" in merge_info(method).options else {}
    if "normalise" in merge_info(method).options:
        given_ |= {"normalise": True}
    one = merge(pair, method, **given_, weights=[weights[0]] * 2)["w"]
    assert torch.allclose(one, merge(pair, method, **given_)["w"], rtol=1e-6, atol=1e-7)  # w / w rounds
    if method in ("mean", "arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"):
        alone = merge(pair[:1], method, **given_, weights=weights[:1])["w"]
        assert torch.allclose(merge(pair, method, **given_, weights=[weights[0], 0.0])["w"], alone, rtol=1e-6)
