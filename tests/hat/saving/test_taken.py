"""What a model takes, as a recipe without any example in it."""

from __future__ import annotations

import json

import parts
import pytest
import torch

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.saving.taken import made_by, recipe_of

LIKE = torch.zeros(1)
TAKEN = {
    "an image": torch.randn(2, 3, 8, 8),
    "words": {"input_ids": torch.tensor([[3, 9, 4]]), "attention_mask": torch.tensor([[1, 1, 0]]), "use_cache": False},
    "several": (torch.randn(2, 3), [torch.ones(2, dtype=torch.bool), None, 0.5], "mean"),
    "nothing": torch.zeros(0, 3, dtype=torch.int64),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
}


def kinds(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    if isinstance(x, dict):
        return {name: kinds(part) for name, part in x.items()}
    return (type(x), [kinds(part) for part in x]) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_made_is_of_the_same_kind(name):
    recipe = json.loads(json.dumps(recipe_of(TAKEN[name])))
    made = made_by(recipe, LIKE)
    assert kinds(made) == kinds(TAKEN[name])
    assert str(made) == str(made_by(recipe, LIKE)), "the same each time"


def test_integers_stay_in_their_range_and_masks_are_of_ones():
    made = made_by(recipe_of({"ids": torch.tensor([5, 9] * 50), "mask": torch.tensor([0, 1])}), LIKE)
    assert set(made["ids"].tolist()) == {5, 6, 7, 8, 9} and made["mask"].tolist() == [1, 1]
    assert recipe_of({"image": torch.zeros(1), "own": object()}) is None
    assert made_by(recipe_of(torch.zeros(2)), LIKE.half()).dtype == torch.float16


@pytest.mark.parametrize("labels", [[-100, 4, 9], [-100, -100], [4, 9], [-3, 4]])
def test_labels_are_classes_or_ignored(labels):
    made = made_by(recipe_of(torch.tensor(labels * 50)), LIKE)
    first = 0 if labels[0] == -100 < labels[1] else labels[0]
    assert first <= made.min() and made.max() <= labels[-1]


def test_it_travels_with_the_model_and_holds_no_example(tmp_path):
    x = parts.images("mlp", 2)
    model = parts.pretend(hatcl.convert(parts.plain("mlp"), 2, x), [0])
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.plain("mlp"))
    assert gates_of(again)[0].takes == gates_of(model)[0].takes == {"shape": [2, 3, 4, 4], "dtype": "float32"}
    assert hatcl.grow(again, 1.5).exact == [None, 0]
    assert not any(x.shape == t.shape and torch.equal(x, t) for t in [*model.buffers(), *model.parameters()])
