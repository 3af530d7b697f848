"""Which chat template a recipe's result gets."""

from __future__ import annotations

import json

import pytest
import recipe_parts

from hatcl import ConfigError
from hatcl.vectors.chat import chat_template_of, joint_template
from hatcl.vectors.mergekit import follow_recipe
from hatcl.vectors.recipe import read_recipe

ONE, OTHER = (f"{{% for m in messages %}}{word} {{{{ m['content'] }}}}\n{{% endfor %}}" for word in ("one", "other"))


def asking(template, *models):
    parts = [{"model": m, "parameters": {"weight": 1.0}} for m in models]
    return {"merge_method": "linear", "models": parts, "chat_template": template}


def test_where_a_template_stands(tmp_path):
    assert chat_template_of(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for stored, want in (
        ({}, None),
        ({"chat_template": ONE}, ONE),
        ({"chat_template": [{"name": "tool", "template": OTHER}, {"name": "default", "template": ONE}]}, ONE),
        ({"chat_template": [{"name": "tool", "template": OTHER}]}, None),
    ):
        config.write_text(json.dumps(stored))
        assert chat_template_of(tmp_path) == want
    (tmp_path / "chat_template.jinja").write_text(OTHER)
    assert chat_template_of(tmp_path) == OTHER


@pytest.fixture
def models(tmp_path, monkeypatch):
    recipe_parts.write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, template in {"a": ONE, "b": OTHER, "c": OTHER}.items():
        (tmp_path / name / "chat_template.jinja").write_text(f"{template}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "names", "want"),
    [
        (None, "abc", f"{ONE}\n"),  # the tokenizer's own
        ("auto", "abc", OTHER),
        ("auto", "ab", ONE),  # of equally many the first's
        ("{{ messages[0]['content'] }}!", "ab", "{{ messages[0]['content'] }}!"),
    ],
)
def test_transformers_reads_it(models, asked, names, want):
    from transformers import AutoTokenizer

    (models / "a" / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((models / "a" / "tokenizer_config.json").read_text()), "chat_template": "an old one"})
    )
    out = follow_recipe(asking(asked, *names), models / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == want
    said = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert "abc" in said
    assert tokenizer("abcd").input_ids == AutoTokenizer.from_pretrained("a")("abcd").input_ids
    stored = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert stored == ("an old one" if asked is None else want)  # for transformers that read no file
    follow_recipe(asking(asked, *names), models / "out")  # its own files are no other model's


def test_auto_where_no_model_has_one(models):
    recipe = read_recipe(asking("auto", "base"))
    assert joint_template(recipe, {"base": models / "base"}) is None


def test_what_is_refused(models):
    for asked in ("chatml", "no braces in all of this text"):
        with pytest.raises(ConfigError, match="chat_template: got .*, expected auto or the text of a Jinja template"):
            joint_template(read_recipe(asking(asked, "a")), {"a": models / "a"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (models / "a" / file).unlink()
    with pytest.raises(ConfigError, match="chat_template: a, whose tokenizer the result gets, has none; leave it out"):
        joint_template(read_recipe(asking(ONE, "a")), {"a": models / "a"})
