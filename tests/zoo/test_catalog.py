"""Names, what is behind them, and that the lists reach every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry

import hatcl
from hatcl.zoo import catalog, proof

ROOT = Path(__file__).parents[2]
LIST = ROOT / "benchmarks" / "zoo_timm.txt"
NEEDS_TRANSFORMERS = "needs the extra: pip install 'hatcl[hf]'"


def missing(names, registry):
    """Names that the registry does not have, and its modules of which there is no name."""
    there = registry._model_to_module
    return [n for n in names if n not in there], sorted(set(there.values()) - {there.get(n) for n in names})


# ---- names ------------------------------------------------------------------------------------------


def test_the_catalog_knows_every_name_it_lists():
    names = catalog.names()
    assert len(names) == len(set(names)) and set(timm.list_models()) <= set(names)
    assert {"torchvision/resnet18", "torchvision/vit_b_16", "hf/bert", "hf/llama"} <= set(names)
    assert not any("raft" in n or "fasterrcnn" in n or "quantized" in n for n in names)  # they classify
    assert all(catalog.known(n).name == n for n in (*catalog.find("hf/*"), "resnet18", "torchvision/resnet18"))


def test_names_are_found_by_pattern_and_family():
    assert catalog.find("test_res*") == ["test_resnet"] and catalog.find("nothing*") == []
    assert catalog.find("hf/*") == [f"hf/{n}" for n in catalog.HF]
    assert catalog.find("*squeezenet*") == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    assert catalog.find("hf/bert*", "hf/bert") == ["hf/bert"] and catalog.find("hf/*", "resnet") == []
    family = catalog.find("*18", "resnet")
    assert "resnet18" in family and "torchvision/resnet18" not in family
    assert set(family) < set(catalog.find("*18"))


@pytest.mark.parametrize(
    ("name", "family", "recipe"),
    [
        ("resnet18", "resnet", {"kind": "timm", "name": "resnet18", "options": {}}),
        ("test_vit", "vision_transformer", {"kind": "timm", "name": "test_vit", "options": {}}),
        ("torchvision/squeezenet1_1", "torchvision/squeezenet", None),
        ("hf/bert", "hf/bert", None),
    ],
)
def test_what_is_behind_a_name(name, family, recipe):
    known = catalog.known(name)
    assert (known.name, known.family, known.recipe) == (name, family, recipe)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("test_resnt", "test_resnet"),
        ("hf/lama", "hf/llama"),
        ("torchvision/mobilenet_v3_smal", "torchvision/mobilenet_v3_small"),
        ("hf/test_resnet", "test_resnet"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("hf/", "hf/"),
        ("", ""),
    ],
)
def test_a_wrong_name_names_the_nearest(name, near):
    with pytest.raises(hatcl.ConfigError, match=f"no model is called '{name}'; did you mean '{near}"):
        catalog.known(name)


# ---- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_1", "hf/bert", "hf/wav2vec2"])
def test_the_same_model_and_inputs_each_time(name):
    if name.startswith("hf/"):
        pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    (model, x), _, (again, y) = (catalog.known(name).make(), torch.manual_seed(7), catalog.known(name).make())
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    x, y = (list(z.values()) if isinstance(z, dict) else [z] for z in (x, y))
    assert len(x) == len(y) and all(map(torch.equal, x, y))


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_1", "hf/bert"])
def test_parameters_are_counted_without_the_weights(name, monkeypatch):
    if name.startswith("hf/"):
        pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    model, _ = catalog.known(name).make()
    real = torch.nn.Module.register_parameter
    met = []

    def register(self, key, p):
        met.append(p is None or p.is_meta)
        real(self, key, p)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", register)
    assert catalog.parameters(name) == sum(p.numel() for p in model.parameters())
    assert met and all(met)


def test_a_name_carries_options():
    model = catalog.known("test_vit:depth=1,embed_dim=32")
    source, x = model.make()
    assert len(source.blocks) == 1 and source.embed_dim == 32 and model.family == "vision_transformer"
    assert model.recipe == {"kind": "timm", "name": "test_vit", "options": {"depth": 1, "embed_dim": 32}}
    assert catalog.parameters(model.name) == sum(p.numel() for p in source.parameters())
    assert "test_vit2:depth=1" in catalog.find("test_vit*:depth=1")
    with pytest.raises(hatcl.ConfigError, match="'depth' is no option; expected key=integer, such as test_vit:depth=2"):
        catalog.known("test_vit:depth")


def test_every_class_of_transformers_exists():
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    gone = [spec.cls for spec in catalog.HF.values() if not hasattr(transformers, spec.cls)]
    assert gone == []
    assert not hasattr(transformers, "BertForEverything")  # it does not answer to any name


@pytest.mark.parametrize("kind", ["text", "seq2seq", "eos", "image text", "mel"])
def test_padding_is_among_what_text_models_are_given(kind):
    """With every mask there are sentences with and without padding; the proof leaves all masks out once more."""
    pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    _, x = catalog.known(next(f"hf/{n}" for n, spec in catalog.HF.items() if spec.inputs == kind)).make()
    masks = {n: m for n, m in x.items() if n.endswith("attention_mask")}
    assert len(masks) == sum(n.endswith("input_ids") for n in x) >= 1
    assert all({0, 1} == set(m.flatten().tolist()) and m[0].all() for m in masks.values())
    (bare,) = proof._without_masks(x)
    assert bare.keys() == x.keys() - masks.keys()


def test_heads_of_keys_are_fewer_than_heads_of_queries_and_more_than_one():
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    assert 1 < catalog.GROUPED["num_key_value_heads"] < catalog.GROUPED["num_attention_heads"]
    plain = [  # of which the class could have groups, and the options ask for none: latent attention has no groups
        name for name, spec in catalog.HF.items()
        if hasattr(getattr(transformers, spec.cls).config_class(), "num_key_value_heads")
        and spec.inputs == "text" and spec.options.get("num_key_value_heads") != 2
    ]  # fmt: skip
    assert plain == ["deepseek_v2", "deepseek_v3"]


# ---- timm's families --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed():
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip(f"the list was made for timm 1.0.31; here is {timm.__version__}")
    return [name.partition(":")[0] for name in LIST.read_text().split()]


def test_the_list_reaches_every_family_of_timm(listed):
    assert missing(listed, _registry) == ([], [])
    assert len(listed) == len(set(listed)) and set(listed) <= set(catalog.names())
    assert len(set(_registry._model_to_module.values())) >= 98


def test_twin_a_name_that_is_gone_and_a_family_without_a_name_are_seen(listed):
    without = [n for n in listed if _registry._model_to_module[n] != "xcit"]
    assert len(without) < len(listed)
    assert missing([*without, "resnet81"], _registry) == (["resnet81"], ["xcit"])
