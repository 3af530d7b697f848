"""One vocabulary of several, on made tokenizers."""

from __future__ import annotations

import json

import pytest
import torch

from hatcl import ConfigError, IntegrityError
from hatcl.vectors.recipe import read_recipe
from hatcl.vectors.vocabulary import aligned_to, joint_vocabulary

VOCABS = {
    "base": (["<s>", "a", "b"], [], 5),  # two rows of padding
    "x": (["<s>", "b", "a"], ["<x>"], 4),  # another order, one more
    "y": (["<s>", "a", "b", "c"], ["<x>"], 4),  # "<x>" has no row
}


@pytest.fixture
def folders(tmp_path):
    for name, (tokens, more, size) in VOCABS.items():
        (tmp_path / name).mkdir()
        added = [{"id": len(tokens) + i, "content": t, "special": True} for i, t in enumerate(more)]
        content = {"model": {"vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": added}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": size}))
    return {name: tmp_path / name for name in VOCABS}


def joint(folders, source, **more):
    models = [{"model": m} for m in ("x", "y")]
    content = {"merge_method": "linear", "models": models, "base_model": "base", "tokenizer_source": source, **more}
    return joint_vocabulary(read_recipe(content), folders)


@pytest.fixture
def models():
    return {
        name: {"embed.weight": torch.arange(float(size)).view(-1, 1) + 10 * i, "wpe.weight": torch.ones(size, 1)}
        for i, (name, (_, _, size)) in enumerate(VOCABS.items())
    }


def rows(vocabulary, models, model):
    return aligned_to(vocabulary, model, models[model], models)["embed.weight"].flatten().tolist()


def test_of_the_base(folders, models):
    vocabulary = joint(folders, "base")
    assert vocabulary.tokens == {"<s>": 0, "a": 1, "b": 2} and vocabulary.rows == 3
    assert rows(vocabulary, models, "base") == [0, 1, 2]
    assert rows(vocabulary, models, "x") == [10, 12, 11]  # by token, not by number
    assert rows(vocabulary, models, "y") == [20, 21, 22]
    kept = aligned_to(vocabulary, "x", models["x"], models)
    assert torch.equal(kept["wpe.weight"], models["x"]["wpe.weight"])  # as many rows by chance
    assert kept.kinds["embed.weight"].shape == (3, 1)


def test_of_all(folders, models):
    vocabulary = joint(folders, "union")
    assert vocabulary.tokens == {"<s>": 0, "a": 1, "b": 2, "<x>": 3, "c": 4}
    assert rows(vocabulary, models, "base") == [0, 1, 2, 13, 23]  # what only one model has comes from there
    assert rows(vocabulary, models, "y") == [20, 21, 22, 13, 23]
    added = {t["content"]: t for t in vocabulary.content["added_tokens"]}
    assert added["<x>"] == {"id": 3, "content": "<x>", "special": True}
    assert added["c"]["id"] == 4 and added["c"]["special"] is False


def test_of_one_of_them_and_padding(folders, models):
    vocabulary = joint(folders, "y")
    assert set(vocabulary.tokens) == {"<s>", "a", "b", "c"}
    padded = joint(folders, None, tokenizer={"source": "base", "pad_to_multiple_of": 4})
    assert padded.rows == 4 and rows(padded, models, "x") == [10, 12, 11, 11]  # the mean of the others


def test_a_token_that_two_have_comes_from_the_base_or_is_their_mean(folders, models):
    (folders["y"] / "config.json").write_text(json.dumps({"vocab_size": 5}))
    models["y"]["embed.weight"] = torch.arange(5.0).view(-1, 1) + 20
    vocabulary = joint(folders, "union")
    assert rows(vocabulary, models, "base")[3] == (13 + 24) / 2
    without = {m: t for m, t in models.items() if m != "x"}
    assert rows(vocabulary, without, "base")[3] == 24


def test_none_is_asked_for(folders):
    assert joint(folders, None) is None


def test_what_cannot_be_joined(folders):
    with pytest.raises(ConfigError, match="tokenizer_source: got 'z', expected base, union or one of base, x, y"):
        joint(folders, "z")
    (folders["base"] / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match="base has no tokenizer.json; save its tokenizer again with"):
        joint(folders, "base")
    (folders["x"] / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="config.json has no vocab_size, which tokenizer_source needs"):
        joint(folders, "base")


def test_unigrams_are_a_list(folders):
    content = {"model": {"vocab": [["<s>", 0.0], ["a", -1.0], ["q", -2.0]]}}
    (folders["base"] / "tokenizer.json").write_text(json.dumps(content))
    assert joint(folders, "base").tokens == {"<s>": 0, "a": 1, "q": 2}
