"""Classification by label words: the logits, what the labels' embeddings depend on, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from continual_parts import adapted, bert, texts, tokenizer, vocabulary  # noqa: E402

from hatcl.continual import TextData, label_word_task  # noqa: E402
from hatcl.continual.label_words import pooled  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.skills.tensors import skill_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = texts(0)


def ids(*names):
    return torch.tensor([tokenizer().convert_tokens_to_ids(list(names))])


@torch.no_grad()
def test_the_loss_by_hand():
    base = bert().eval()
    task = label_word_task("t", DATA, base, tokenizer(), labels={"warm": "red blue", "cold": "cold"}, scale=5.0)
    batch = task.collate([("w1 w2 w3", "cold"), ("w4", "warm")])
    assert batch[0]["input_ids"].shape == (2, 3) and batch[1].tolist() == [1, 0]

    def mean(*names):  # without any padding
        return F.normalize(base(input_ids=ids(*names)).last_hidden_state[0].mean(0), dim=0)

    anchors = torch.stack([mean("red", "blue"), mean("cold")])
    logits = 5.0 * torch.stack([mean("w1", "w2", "w3"), mean("w4")]) @ anchors.T
    expected = F.cross_entropy(logits, torch.tensor([1, 0]))
    # padded and unpadded attention sum in another order: 1e-7 of hidden states of size 1
    assert torch.allclose(task.loss(base, batch), expected, atol=1e-5)


def test_the_labels_come_from_the_base_alone():
    base = bert()
    expected = label_word_task("t", DATA, base, tokenizer())
    model = adapted(base)
    for p in skill_tensors(model).values():
        p.data.normal_()
    model.train()
    task = label_word_task("t", DATA, model, tokenizer())
    assert model.training
    model.eval()
    batch = task.collate(DATA.train[:4])
    with torch.no_grad():
        assert torch.equal(task.loss(model, batch), expected.loss(model, batch))
        assert not torch.allclose(pooled(model, batch[0]), pooled(base_of(model), batch[0]))


def base_of(model):
    return lambda_of(model)


def lambda_of(model):
    """The base with the adapters off, called like a model."""

    class Off(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **tokens):
            with self.inner.disable_adapter():
                return self.inner(**tokens)

    return Off()


@torch.no_grad()
def test_score_and_validate_are_accuracies():
    base = bert().eval()
    task = label_word_task("t", DATA, base, tokenizer(), score_batch=5)
    for score, pairs in ((task.score, DATA.test), (task.validate, DATA.validation)):
        hits = [float(task.loss(base, task.collate([p]))) < float(torch.tensor(2.0).log()) for p in pairs]
        assert score(base) == sum(hits) / len(pairs)
    assert label_word_task("t", TextData(DATA.train, [], DATA.test), base, tokenizer()).validate is None


def test_bad_input():
    base = bert()
    with pytest.raises(ConfigError, match="task t: got the labels .'warm'., expected at least two"):
        label_word_task("t", DATA, base, tokenizer(), labels=["warm"])
    with pytest.raises(ConfigError, match="has the label 'cold', expected one of warm, red"):
        label_word_task("t", DATA, base, tokenizer(), labels=["warm", "red"])
    numbers = TextData([("w1", "0"), ("w2", "1")], [], [])
    with pytest.raises(
        ConfigError, match=r"the label word '0' carries no meaning; give words for.* \(--word t:0=bad\)"
    ):
        label_word_task("t", numbers, base, tokenizer())
    headed = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=vocabulary(), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ConfigError, match="returns no last_hidden_state; label words need a bare encoder"):
        label_word_task("t", DATA, headed, tokenizer())
