"""TaSL in the loop."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    QUICK,
    adapted,
    bert,
    text_tasks,
    texts,
    tokenizer,
)

from hatcl.continual import (  # noqa: E402
    label_word_task,
    learn_sequence,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tasl_keeps_more_of_the_first_task_than_sequential_does():
    """Two tasks that ask for opposite answers: the cases of consolidation leave more of the first one."""
    base = bert()
    first = text_tasks(base, 1)[0]
    data = texts(0)
    other = {"warm": "cold", "cold": "warm"}
    against = label_word_task("against", data.renamed(other), base, tokenizer())
    kept_ = {}
    for method in ("sequential", "tasl"):
        model = adapted(copy.deepcopy(base))
        options = {"orthogonality": 0.0} if method == "tasl" else None
        result = learn_sequence(
            model, [first, dataclasses.replace(against)], method, {**QUICK, "epochs": 6}, method_options=options
        )
        kept_[method] = result.matrix
    assert np.array_equal(kept_["sequential"][0], kept_["tasl"][0])  # the first task is learned alike
    assert kept_["tasl"][1, 0] > kept_["sequential"][1, 0]
