"""Reading recipes of mergekit, and which tensors make which."""

from __future__ import annotations

import pytest
import torch

from hatcl import ConfigError, VectorError
from hatcl.vectors.recipe import BEFORE, read_recipe, tensors_to_make
from hatcl.vectors.tensors import Kind


def kinds(layers, *more):
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{w}" for i in range(layers) for w in ("q", "mlp.experts.0.w")),
    ]
    return {n: Kind((2,), torch.float32) for n in [*names, "model.norm.weight", "lm_head.weight", *more]}


def source(model, *span, **parameters):
    return {"model": model, **({"layer_range": list(span)} if span else {}), "parameters": parameters}


T = "ties"
ONE = {"merge_method": T, "models": [source("a")]}


def test_models_are_one_slice_and_the_base_comes_along():
    recipe = read_recipe({"merge_method": T, "models": [source("a", weight="1e-1")], "base_model": "b"})
    assert [s.model for s in recipe.slices[0].sources] == ["a", "b"] == sorted(recipe.models)
    assert recipe.donor == "b" and recipe.slices[0].sources[0].parameters == {"weight": 0.1}  # of YAML
    named = {"merge_method": "ties", "models": [source("b"), source("a")], "base_model": "b"}
    assert [s.model for s in read_recipe(named).slices[0].sources] == ["b", "a"]
    assert read_recipe({"merge_method": "linear", "models": [source("a")]}).donor == "a"


def test_numbers_in_gradients_and_filters_are_read_and_filters_are_not():
    given = {"t": [{"filter": "1e3", "value": ["1e-3", 1]}, {"value": 0.5}]}
    recipe = read_recipe({"merge_method": "slerp", "models": [source("a")], "parameters": given})
    assert recipe.parameters == {"t": [{"filter": "1e3", "value": [0.001, 1]}, {"value": 0.5}]}


def test_whole_models():
    recipe = read_recipe({"merge_method": "linear", "models": [source("a"), source("b")]})
    made = {m.name: m for m in tensors_to_make(recipe, {"a": kinds(3), "b": kinds(3)})}
    assert list(made) == list(kinds(3))
    assert made["model.layers.1.q"].inputs == {"a": "model.layers.1.q", "b": "model.layers.1.q"}
    assert [made[f"model.layers.{i}.q"].place for i in range(3)] == [0, 0.5, 1]
    assert made["lm_head.weight"].place == made["model.embed_tokens.weight"].place == 0
    single = {m.name: m for m in tensors_to_make(recipe, {"a": kinds(1), "b": kinds(1)})}
    assert single["model.layers.0.q"].place == 1


def test_slices():
    slices = [
        {"sources": [source("a", 0, 2)]},
        {"sources": [source("b", 1, 3)], "parameters": {"scale": 2}, "base_model": "c"},
        {"sources": [source("a", 2, 3)]},
    ]
    recipe = read_recipe({"merge_method": "passthrough", "slices": slices})
    assert set(recipe.models) == {"a", "b", "c"}
    made = {m.name: m for m in tensors_to_make(recipe, {m: kinds(3) for m in "abc"})}
    got = [next(iter(made[f"model.layers.{i}.mlp.experts.0.w"].inputs.items())) for i in range(5)]
    assert got == [(m, f"model.layers.{i}.mlp.experts.0.w") for m, i in zip("aabba", (0, 1, 1, 2, 2), strict=True)]
    assert [made[f"model.layers.{i}.q"].place for i in range(5)] == [0, 1, 0, 1, 1]
    assert made["model.embed_tokens.weight"].part is recipe.slices[0]
    assert made["model.norm.weight"].part is made["lm_head.weight"].part is recipe.slices[2]
    assert made["model.layers.2.q"].base == "c" and made["model.layers.2.q"].part.parameters == {"scale": 2}
    assert "model.layers.5.q" not in made


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("model.embed_tokens.weight", True), ("transformer.wte.weight", True), ("wpe.weight", True),
        ("bert.embeddings.LayerNorm.weight", True), ("gpt_neox.embed_in.weight", True), ("embed_out.weight", False),
        ("model.norm.weight", False), ("lm_head.weight", False), ("score.weight", False), ("shared.weight", True),
    ],
)  # fmt: skip
def test_what_stands_before_the_layers(name, before):
    """As mergekit's own tables of architectures have it; see docs/merging.md for the few that differ."""
    assert bool(BEFORE.search(name)) == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"models": [source("a")]}, "merge_method: got None, expected the name of a method"),
        ({"merge_method": "ties"}, "recipe: expected either models or slices"),
        ({**ONE, "slices": []}, "recipe: expected either models or slices"),
        ({"merge_method": T, "models": []}, r"models: got \[\], expected a list that is not empty"),
        ({"merge_method": T, "models": ["a"]}, "models: got 'a', expected a mapping"),
        ({"merge_method": T, "models": [{"modle": "a"}]}, "has no option 'modle'; did you mean 'model'"),
        ({"merge_method": T, "models": [{"model": 3}]}, "models: got the model 3, expected a path"),
        ({"merge_method": T, "models": [source("a", 0, 1)]}, "layer_range is for slices; list the models under"),
        (
            {"merge_method": "ties", "models": [source("a")] * 2},
            "sources: a twice in one slice, expected each model once",
        ),
        (
            {**ONE, "paramters": {}},
            "recipe: no key 'paramters'; did you mean 'par",
        ),
        (
            {**ONE, "parameters": [1]},
            r"parameters: got \[1\], expected a map",
        ),
        ({**ONE, "dtype": 16}, "dtype: got 16, expected a text"),
        ({"merge_method": T, "modules": {"vision": {}, "text": {}}}, "modules: got vision, text: recipes with several"),
        ({**ONE, "modules": {"default": {}}}, "models: given together with modules; leave one of them out"),
        (
            {"merge_method": T, "modules": {"default": {"model": []}}},
            "modules.default: no key 'model'; it has",
        ),
        ({"merge_method": T, "modules": {"default": {}}}, "recipe: expected either models or slices"),
        ({**ONE, "chat_template": 3}, "chat_template: got 3, expected a text"),
        ({"merge_method": T, "slices": [{"sources": [source("a")]}]}, r"layer_range: got None, expected \[FIRST"),
        (
            {"merge_method": T, "slices": [{"sources": [source("a", 2, 2)]}]},
            r"layer_range: got \[2, 2\], expected",
        ),
        ({"merge_method": T, "slices": [{"sources": []}]}, r"sources: got \[\], expected a list"),
        ({"merge_method": T, "slices": [{"source": []}]}, "has no option 'source'; did you mean 'sources'"),
        (
            {"merge_method": T, "slices": [{"sources": [source("a", 0, 2), source("b", 0, 3)]}]},
            r"slices: sources of \[2, 3\] layers, expected as many layers of each",
        ),
        (
            {"merge_method": T, "slices": [{"sources": [source("a", 0, 2)], "residual_weight": 0.5}]},
            "residual_weight: mergekit itself does not use it",
        ),
        (
            {**ONE, "tokenizer": {}, "tokenizer_source": "base"},
            "tokenizer: given together with tokenizer_source; leave one of them out",
        ),
        (
            {**ONE, "tokenizer": {"tokens": {"<a>": {}}}},
            "tokenizer.tokens.<a>: got {}, expected force, and a source: a model, {kind: zero}, or {kind: model_token",
        ),
        (
            {**ONE, "tokenizer": {"from": "base"}},
            "tokenizer: got from, expected source, tokens and pad_to_multiple_of",
        ),
    ],
)
def test_what_cannot_be_read(content, text):
    with pytest.raises(ConfigError, match=text):
        read_recipe(content)


def test_a_tokenizer_block():
    content = {"merge_method": "ties", "models": [source("a")]}
    assert read_recipe({**content, "tokenizer": {"pad_to_multiple_of": 8}}).tokenizer_source == "union"
    recipe = read_recipe({**content, "tokenizer": {"source": "base", "pad_to_multiple_of": 8}})
    assert (recipe.tokenizer_source, recipe.pad_to_multiple_of) == ("base", 8)


def test_layers_that_are_not_there():
    sliced = {"merge_method": "passthrough", "slices": [{"sources": [source("a", 2, 4)]}]}
    with pytest.raises(VectorError, match=r"a has no layer 3, which layer_range \[2, 4\] names"):
        tensors_to_make(read_recipe(sliced), {"a": kinds(3)})
    with pytest.raises(ConfigError, match=r"slices: a has 2 stacks of layers \(decoder, model.layers\), expected one"):
        tensors_to_make(read_recipe(sliced), {"a": kinds(4, "decoder.0.w")})


@pytest.mark.parametrize("multiple", [-8, "8", 1.5, True])
def test_a_multiple_is_a_count(multiple):
    with pytest.raises(ConfigError, match=r"tokenizer.pad_to_multiple_of: got .*, expected an integer of at least 0"):
        read_recipe({**ONE, "tokenizer": {"source": "base", "pad_to_multiple_of": multiple}})
