"""TaSL in the loop."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    QUICK,
    adapted,
    bert,
    state,
    text_tasks,
    texts,
    tokenizer,
)

from hatcl.continual import label_word_task, learn_sequence  # noqa: E402

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


@pytest.mark.parametrize("grain", ["lora_pair", "matrix", "block"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_what_is_trained_beside_the_pairs_is_averaged_as_important_to_neither(grain, share):
    """DoRA's magnitudes, a module in full and biases, by a weight of the current task that only these have."""
    base, seen = bert(), []

    def learned(count, consolidate):
        options = {"grain": grain, "orthogonality": 0.0, "consolidate": consolidate}
        model = adapted(
            copy.deepcopy(base), target_modules=["query"], modules_to_save=["value"], use_dora=True, bias="lora_only"
        )
        learn_sequence(model, text_tasks(base, count), "tasl", QUICK, method_options=options)
        return {n: t for n, t in state(model).items() if model.get_parameter(n).requires_grad and "lora_A" not in n}

    first = learned(1, {})
    current = learned(2, {"neither": (0.0, 1.0), "both": (0.0, 1.0), "previous_only": (0.0, 1.0)})
    merged = learned(2, {"neither": (1 - share, share)})
    for name in first:
        if "lora_B" not in name:
            seen.append(name.split(".")[-3])
            assert not torch.equal(first[name], current[name])
            assert torch.allclose(merged[name], torch.lerp(first[name], current[name], share), atol=1e-6)
    assert {"modules_to_save", "lora_magnitude_vector", "query"} <= set(seen)
