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


def with_tokens(folders, source="union", **tokens):
    return joint(folders, None, tokenizer={"source": source, "tokens": tokens})


def test_tokens_whose_embedding_is_chosen(folders, models):
    """Of those that a model lacks, or of all models by force; new ones are added."""
    vocabulary = with_tokens(
        folders,
        c={"source": {"kind": "zero"}},
        a={"source": "y", "force": True},
        new={"source": {"kind": "model_token", "model": "x", "token": "<x>"}},
        row={"source": {"kind": "model_token", "model": "base", "token_id": 4}},
    )
    assert vocabulary.tokens == {"<s>": 0, "a": 1, "b": 2, "<x>": 3, "c": 4, "new": 5, "row": 6}
    assert [t["id"] for t in vocabulary.content["added_tokens"]][-2:] == [5, 6]
    assert rows(vocabulary, models, "base") == [0, 21, 2, 13, 0, 13, 4]
    assert rows(vocabulary, models, "x") == [10, 21, 11, 13, 0, 13, 4]
    assert rows(vocabulary, models, "y") == [20, 21, 22, 13, 23, 13, 4]  # y has its own c


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("z", "tokenizer.tokens.a: got 'z', expected one of base, x, y"),
        ({"kind": "model_token", "model": "x", "token": "q"}, "tokenizer.tokens.a: x has no token 'q'; name another"),
        ({"kind": "model_token", "model": "x", "token_id": 4}, "tokenizer.tokens.a: x has no row 4; name another one"),
        ({"kind": "model_token", "model": "x"}, r"tokenizer.tokens.a: got .*expected force, and a source"),
        ({"kind": "model_token", "model": "x", "token_id": -1}, "token_id: got -1, expected an integer of at least 0"),
        ({"kind": "mean"}, "tokenizer.tokens.a: got .*expected force, and a source: a model, {kind: zero}"),
    ],
)
def test_sources_that_are_none(folders, source, text):
    with pytest.raises(ConfigError, match=text):
        with_tokens(folders, a={"source": source})
    with pytest.raises(ConfigError, match="force: got 'yes', expected True or False"):
        with_tokens(folders, a={"source": "x", "force": "yes"})


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
