"""What lies beside the weights of a merge."""

from __future__ import annotations

import json

import pytest
import torch

from hatcl import ConfigError, IntegrityError
from hatcl.vectors.checkpoint import (
    card,
    complete_folder,
    dtype_named,
    refuse_others,
    result_config,
    tokenizer_folder,
    transformers_config,
)
from hatcl.vectors.recipe import read_recipe


@pytest.fixture
def folders(tmp_path):
    for name, count in (("base", 4), ("part", 4)):
        (tmp_path / name).mkdir()
        config = {
            "num_hidden_layers": count,
            "layer_types": [f"{name}{i}" for i in range(count)],
            "torch_dtype": "float32",
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 2, 3, 4]}))
        (tmp_path / name / "tokenizer.json").write_text(name)
        (tmp_path / name / "chat_template.jinja").write_text(name)
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    (tmp_path / "base" / "modeling_own.py").write_text("# of the model")
    (tmp_path / "bare").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def test_config_tokenizer_and_card_come_from_the_base(folders):
    config = transformers_config(folders / "base")
    complete_folder(
        folders / "out", folders / "base", config, dtype=torch.bfloat16, models=["base", "part"], recipe="a + b"
    )
    config = json.loads((folders / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config and config["num_hidden_layers"] == 4
    names = {f.name for f in (folders / "out").iterdir()}
    assert names == {
        "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_own.py",
        "README.md",
    }  # fmt: skip
    text = (folders / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "- `part`" in text and "a + b" in text
    assert text == card("out", ["base", "part"], "a + b")


def test_another_parts_tokenizer(folders):
    which = tokenizer_folder(str(folders / "part"), folders / "base", [folders / "part"])
    complete_folder(folders / "out", folders / "base", transformers_config(folders / "base"), tokenizer=which)
    assert (folders / "out" / "tokenizer.json").read_text() == "part"
    assert (folders / "out" / "chat_template.jinja").read_text() == "part"
    assert tokenizer_folder("base", folders / "base", []) == folders / "base"
    with pytest.raises(ConfigError, match="tokenizer: got 'prat', expected base or one of the parts; did you mean"):
        tokenizer_folder("prat", folders / "base", [folders / "part"])
    with pytest.raises(IntegrityError, match="bare holds no tokenizer; use another part's, or leave --tokenizer out"):
        tokenizer_folder(str(folders / "bare"), folders / "base", [folders / "bare"])


@pytest.mark.parametrize(
    "left", ["added_tokens.json", "tokenizer.model", "chat_template.json", "processor_config.json"]
)
def test_another_models_tokenizer_is_not_left_beside_the_result(folders, left):
    config, out = transformers_config(folders / "base"), folders / "out"
    complete_folder(out, folders / "base", config)
    (out / "own.py").write_text("")  # code that nothing in the config refers to
    refuse_others(out, folders / "base", config)  # what it wrote itself
    (out / left).write_text("of another")
    with pytest.raises(ConfigError, match=f"out: .*out holds {left} of another model, .* remove that, or name another"):
        refuse_others(out, folders / "base", config)
    refuse_others(out, folders / "base" / "model.safetensors", {})  # nothing of it is written then
    (folders / "part" / left).write_text("of the part")
    if left in ("added_tokens.json", "tokenizer.model", "chat_template.json"):
        refuse_others(out, folders / "base", config, tokenizer=folders / "part")
        complete_folder(out, folders / "base", config, tokenizer=folders / "part")
        assert (out / left).read_text() == "of the part"


def test_a_base_that_is_no_folder_of_transformers_brings_nothing(folders):
    for base in (folders / "base" / "model.safetensors", folders / "bare"):
        assert transformers_config(base) == {}
        complete_folder(folders / "out", base, transformers_config(base))
    assert not list((folders / "out").iterdir())


def test_layers_that_are_put_together_are_described_by_where_they_come_from(folders):
    slices = [
        {"sources": [{"model": "base", "layer_range": [0, 3]}]},
        {"sources": [{"model": "part", "layer_range": [2, 4]}]},
    ]
    recipe = read_recipe({"merge_method": "passthrough", "slices": slices})
    configs = {m: transformers_config(folders / m) for m in ("base", "part")}
    made = {"num_hidden_layers": 5, "layer_types": ["base0", "base1", "base2", "part2", "part3"]}
    assert result_config(recipe, configs) == {**configs["base"], **made}
    assert result_config(recipe, {"base": {}, "part": {}}) == {}
    with pytest.raises(ConfigError, match="config.json has none of num_hidden_layers, n_layer, .*so the number of"):
        result_config(recipe, {"base": {"a": 1}, "part": {}})
    whole = read_recipe({"merge_method": "linear", "models": [{"model": "base"}]})
    assert result_config(whole, configs) == configs["base"]


def test_types():
    assert dtype_named("torch.bfloat16") is torch.bfloat16 and dtype_named("float32") is torch.float32
    assert dtype_named(None) is None
    with pytest.raises(ConfigError, match="dtype: got 'int8', expected one of bfloat16, float16, float32, float64"):
        dtype_named("int8")
