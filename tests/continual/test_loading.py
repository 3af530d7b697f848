from __future__ import annotations

import json

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import bert, texts, tokenizer  # noqa: E402

from hatcl.continual.loading import TextOptions, adapted_model, label_words, text_tasks  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    data = texts(0, count=16)
    parts = {"train": data.train, "dev": data.validation, "test": data.test}
    (tmp_path / "a.json").write_text(json.dumps({n: [list(pair) for pair in rows] for n, rows in parts.items()}))
    return tmp_path


def test_a_model_with_an_adapter_and_its_tasks(folder):
    options = TextOptions(rank=2, target=("query",), train=8, word=("a:warm=red",))
    model, words, form = adapted_model(str(folder / "bert"), options, 0)
    again, _, _ = adapted_model(str(folder / "bert"), options, 0)
    assert form == "labels"
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".query.lora_" in n for n in names)
    assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))
    (task,) = text_tasks({"a": folder / "a.json"}, model, words, form, options, None)
    assert task.name == "a" and len(task.train) == 8
    assert set(task.inputs()) >= {"input_ids", "attention_mask"}


def test_words_of_labels():
    assert label_words(["a:warm=red", "a:cold=sky blue"], ["a"]) == {"a": {"warm": "red", "cold": "sky blue"}}
    with pytest.raises(ConfigError, match="--word: got 'warm=red', expected NAME:LABEL=WORD"):
        label_words(["warm=red"], ["a"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"form": "label"}, "did you mean 'labels'"),
        ({"rank": 0}, "rank: got 0, expected an integer of at least 1"),
        ({"train": 0}, "train: got 0"),
        ({"dropout": 1}, "dropout: got 1, expected a share"),
        ({"plain": 1}, "plain: got 1, expected True or False"),
    ],
)
def test_options_out_of_range(changes, text):
    with pytest.raises(ConfigError, match=text):
        TextOptions(**changes)


def test_without_peft(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"learning texts needs peft; run: pip install 'hatcl\[hf\]'"):
        adapted_model("any", TextOptions(), 0)
