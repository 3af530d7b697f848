from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hatcl.engine import measures as metrics
from hatcl.engine.measures import (
    Calibration,
    Predictions,
    accuracy,
    accuracy_per_class,
    agreement,
    calibration,
    commonest_share,
    gain_kept,
    predictions_of,
)
from hatcl.errors import ConfigError

ROWS = [[0.9], [0.7, 0.8], [0.5, 0.9, 1.0]]


def test_against_numbers_worked_out_by_hand():
    r = metrics.matrix(ROWS)
    assert math.isnan(r[0, 1]) and r[2, 1] == 0.9
    assert metrics.average_accuracy(r) == pytest.approx((0.5 + 0.9 + 1.0) / 3)
    assert metrics.forgetting(r) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)
    assert metrics.backward_transfer(r) == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)


def test_forgetting_is_measured_from_the_best():
    r = metrics.matrix([[0.5], [0.9, 1.0], [0.7, 1.0, 1.0]])
    assert metrics.forgetting(r) == pytest.approx(0.1)
    assert metrics.backward_transfer(r) == pytest.approx(0.1)


def test_forward_transfer_needs_accuracies_before_learning():
    full = np.array([[0.9, 0.6, 0.5], [0.9, 0.9, 0.7], [0.9, 0.9, 0.9]])
    assert metrics.forward_transfer(full, np.full(3, 0.5)) == pytest.approx((0.1 + 0.2) / 2)
    assert math.isnan(metrics.forward_transfer(metrics.matrix(ROWS), np.full(3, 0.5)))
    with pytest.raises(ConfigError, match="got 2 baselines, expected one for each of 3 tasks"):
        metrics.forward_transfer(full, np.zeros(2))


def test_one_task_forgets_nothing():
    r = metrics.matrix([[0.8]])
    assert (metrics.average_accuracy(r), metrics.forgetting(r), metrics.backward_transfer(r)) == (0.8, 0.0, 0.0)
    assert metrics.forward_transfer(r, np.zeros(1)) == 0.0


def test_accuracy_and_bad_shapes():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert metrics.top1(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    with pytest.raises(ConfigError, match="row 0 has 3 entries, expected at most 2"):
        metrics.matrix([[1, 2, 3], [1]])
    with pytest.raises(ConfigError, match=r"got shape \[2, 3\], expected T x T"):
        metrics.average_accuracy(np.zeros((2, 3)))


def test_zero_shot_transfer_leaves_the_baseline_out():
    r = np.array([[0.9, 0.3, 0.1], [0.8, 0.9, 0.5], [0.7, 0.8, 0.9]])
    assert metrics.zero_shot_transfer(r) == pytest.approx((0.3 + 0.5) / 2)
    assert metrics.zero_shot_transfer(r) == metrics.forward_transfer(r, np.zeros(3))
    assert metrics.zero_shot_transfer(r[:1, :1]) == 0.0


def test_joint_goal_accuracy_counts_a_turn_if_all_of_its_slots_match():
    turns = [("d", 2), ("d", 2), ("d", 4), ("e", 2), ("d", 4)]
    assert metrics.joint_goal_accuracy(turns, [True, True, True, True, False]) == 2 / 3
    assert metrics.joint_goal_accuracy(turns, [False] * 5) == 0.0
    assert metrics.joint_goal_accuracy(turns[:1], [True]) == 1.0
    for wrong in ([], [True]):
        with pytest.raises(ConfigError, match=f"got {len(turns) if wrong else 0} turns and {len(wrong)} hits"):
            metrics.joint_goal_accuracy(turns if wrong else [], wrong)


# --- accuracy ---

# rows are their own logits: predicted are 0, 1, 1 and 2
LOGITS = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 9.0, 0], [0, 0, 9.0]])
BATCHES = [(LOGITS[:3], torch.tensor([0, 1, 0])), (LOGITS[3:], torch.tensor([2]))]


def test_shares_over_batches_of_unlike_size():
    model = nn.Dropout(0.5).train()  # would zero the logits in training mode
    assert accuracy(model, BATCHES) == 3 / 4 and model.training
    assert accuracy_per_class(model, BATCHES).tolist() == [1 / 2, 1, 1]
    assert accuracy(nn.Identity(), BATCHES, head=lambda x: x.roll(-1, 1)) == 1 / 4  # 2, 0, 0, 1


def test_a_class_without_examples_has_no_accuracy():
    assert accuracy_per_class(nn.Identity(), BATCHES[1:]).isnan().tolist() == [True, True, False]


def test_no_examples_are_an_error():
    with pytest.raises(ConfigError, match="hold no examples; perhaps an iterator is exhausted;"):
        accuracy(nn.Identity(), [])


def test_labels_and_models_in_every_form():
    """What `predictions_of` reads `accuracy` reads too."""
    batches = [{"input": LOGITS, "labels": torch.tensor([0, 1, 0, 2])}]
    assert accuracy(nn.Identity(), batches) == predictions_of(nn.Identity(), batches).accuracy == 3 / 4
    with pytest.raises(ConfigError, match=r"got one without labels, expected \(inputs, labels\)"):
        accuracy(nn.Identity(), [LOGITS])


def test_rows_of_a_sequence_that_is_not_at_its_end():
    r = metrics.matrix([[0.5, 0.1, math.nan]], tasks=3)
    assert r.shape == (3, 3) and r[0, 1] == 0.1 and np.isnan(r[1:]).all() and math.isnan(r[0, 2])
    with pytest.raises(ConfigError, match="got 2 rows, expected at most 1"):
        metrics.matrix([[1.0], [1.0]], tasks=1)


def said(classes: list[int], labels: list[int], of: int) -> Predictions:
    """Predictions of these classes, each with certainty."""
    return Predictions(torch.eye(of, dtype=torch.float64)[classes], torch.tensor(labels))


# --- accuracy and F1, by hand ---


def test_accuracy_and_f1_of_two_classes():
    p = said([1, 1, 1, 0, 0], [1, 0, 1, 1, 0], of=2)  # tp 2, fp 1, fn 1
    assert p.accuracy == 0.6
    assert p.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1), abs=1e-15)  # 2/3; abs: one rounding of float64
    assert said([0, 0], [0, 0], of=2).f1 == 0.0  # class 1 nowhere: not defined


def test_f1_of_three_classes_is_the_mean_over_those_that_occur():
    p = said([0, 0, 1, 1], [0, 1, 1, 1], of=4)  # class 0: 2*1/(2+1) = 2/3; class 1: 2*2/(4+1) = 4/5; 2, 3: nowhere
    assert p.f1 == pytest.approx((2 / 3 + 4 / 5) / 2, abs=1e-15)
    assert said([2, 2], [2, 0], of=3).f1 == pytest.approx((2 / 3 + 0) / 2, abs=1e-15)


def test_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    for classes in (2, 3, 7):
        a, b = (torch.randint(classes, (40,), generator=g) for _ in range(2))
        want = metrics.f1_score(b, a, average="binary" if classes == 2 else "macro")
        assert said(a.tolist(), b.tolist(), classes).f1 == pytest.approx(want, abs=1e-12)


# --- calibration ---


def test_calibration_by_hand():
    # four bins: (0, .25], (.25, .5], (.5, .75], (.75, 1]; .5 and .75 are the last of theirs
    confidence = torch.tensor([0.5, 0.3, 0.75, 0.6, 0.9, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, True, False])
    c = calibration(confidence, right, bins=4)
    assert c.count.tolist() == [0, 2, 2, 2]
    assert c.confidence[1:].tolist() == pytest.approx([0.4, 0.675, 0.95], abs=1e-15)
    assert c.accuracy[1:].tolist() == [0.5, 1.0, 0.5]
    assert math.isnan(c.confidence[0]) and math.isnan(c.accuracy[0])
    stored = json.loads(json.dumps(c.to_dict(), allow_nan=False))
    assert stored["count"] == [0, 2, 2, 2] and stored["accuracy"] == [None, 0.5, 1.0, 0.5]
    assert stored["edges"] == [0, 0.25, 0.5, 0.75, 1]
    assert Calibration.from_dict(stored).ece == c.ece and Calibration.from_dict(stored).accuracy[0].isnan()
    gaps = [0.1, 0.325, 0.45]
    assert c.ece == pytest.approx(sum(gaps) / 3, abs=1e-15)
    assert c.mce == pytest.approx(0.45, abs=1e-15)
    assert calibration(torch.zeros(1), torch.tensor([False])).count[0] == 1  # 0 goes with the first


def test_fifteen_bins_of_the_probability_of_what_is_predicted():
    p = Predictions(torch.tensor([[0.2, 0.8], [0.7, 0.3]], dtype=torch.float64), torch.tensor([1, 1]))
    c = p.calibration()
    assert len(c.count) == 15 and c.count.nonzero().flatten().tolist() == [10, 11]  # (10/15, 11/15], (11/15, 12/15]
    assert c.ece == pytest.approx((0.2 + 0.7) / 2, abs=1e-15)


PAIRS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@settings(deadline=None)
@given(PAIRS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_laws_of_the_calibration_error(pairs, bins, random):
    confidence = torch.tensor([c for c, _ in pairs], dtype=torch.float64)
    right = torch.tensor([r for _, r in pairs])
    found = calibration(confidence, right, bins)
    assert int(found.count.sum()) == len(pairs)
    # 1e-12: sums of at most 60 float64 between 0 and 1, in another order (measured on 20,000 random cases: 4e-16)
    assert abs(float(right.double().mean() - confidence.mean())) - 1e-12 <= found.ece <= found.mce + 1e-12 <= 1 + 2e-12
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert calibration(confidence[order], right[order], bins).ece == pytest.approx(found.ece, abs=1e-12)
    full = ~found.confidence.isnan()
    assert ((found.confidence >= found.edges[:-1] - 1e-12) & (found.confidence <= found.edges[1:] + 1e-12))[full].all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 15))
def test_perfect_calibration_is_zero(groups, bins):
    """Groups of ten examples of which h are right, said with confidence h / 10."""
    confidence = torch.cat([torch.full((10 * many,), h / 10, dtype=torch.float64) for h, many in groups])
    right = torch.cat([(torch.arange(10) < h).repeat(many) for h, many in groups])
    assert calibration(confidence, right, bins).ece == pytest.approx(
        0, abs=1e-12
    )  # measured on 20,000 random cases: 3e-15


# --- models ---


def test_predict_reads_batches_in_order_and_leaves_modes():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    running = model[1].running_mean.clone()
    p = predictions_of(model, zip(x.split(4), y.split(4), strict=True))
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(p.labels, y) and p.probabilities.dtype == torch.float64
    with torch.no_grad():
        want = model.eval()(x).double().softmax(1)
    assert (p.probabilities - want).abs().max() < 1e-6  # batches of 4 and of 10: float32 products (measured 6e-8)
    named = predictions_of(model, [{"x": x, "y": y}], lambda m, batch: (m(batch["x"]), batch["y"]))
    assert torch.equal(named.predicted, p.predicted)


def test_predict_reads_mappings_and_outputs_with_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(11, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    p = predictions_of(model, [batch])
    assert p.probabilities.shape == (4, 3) and p.labels.tolist() == [0, 1, 2, 0]


def test_half_precision_and_a_batch_norm_net():
    model = timm.create_model("test_resnet", num_classes=3).to(torch.bfloat16)
    p = predictions_of(model, [(torch.randn(4, 3, 32, 32).bfloat16(), torch.tensor([0, 1, 2, 0]))])
    # each row sums to one in float64 although the logits have eight bits
    assert (p.probabilities.sum(1) - 1).abs().max() < 1e-12  # measured 9e-16
    assert 0 <= p.calibration().ece <= 1


def test_modes_come_back_after_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        predictions_of(model, [(torch.randn(1, 3), torch.tensor([0]))])
    assert model.training


def test_agreement():
    a, b = said([0, 1, 1, 0], [0, 0, 1, 1], of=2), said([0, 1, 0, 0], [0, 0, 1, 1], of=2)
    assert agreement(a, b) == agreement(b, a) == 0.75
    assert agreement(a, a) == 1.0


def test_gain_kept():
    assert gain_kept(0.5, 0.9, 0.8) == pytest.approx(0.75, abs=1e-15)  # a rounding of float64
    assert gain_kept(0.5, 0.9, 0.5) == 0 and gain_kept(0.5, 0.9, 0.9) == 1
    assert gain_kept(0.5, 0.9, 0.4) < 0
    assert math.isnan(gain_kept(0.9, 0.9, 0.9)) and math.isnan(gain_kept(0.9, 0.8, 0.85))


def logits_of(value):
    return lambda m, batch: (value, torch.zeros(len(value), dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: calibration(torch.rand(3), torch.ones(3).bool(), 0), ConfigError, "bins: got 0, expected at least 1"),
        (lambda: calibration(torch.rand(3), torch.ones(2).bool()), ConfigError, r"got \[3\] confidences and \[2\] ans"),
        (lambda: calibration(torch.rand(0), torch.ones(0).bool()), ConfigError, "at least one example"),
        (lambda: calibration(torch.tensor([1.2]), torch.tensor([True])), ConfigError, "a confidence outside 0 to 1"),
        (
            lambda: calibration(torch.tensor([math.nan]), torch.tensor([True])), ConfigError, "a confidence outside 0",
        ),
        (lambda: said([0], [0, 1], of=2), ConfigError, r"probabilities \[1, 2\] and labels \[2\]"),
        (lambda: said([0, 1], [0, 2], of=2), ConfigError, "from 0 to 2, expected whole numbers from 0 to 1"),
        (lambda: said([0, 1], [0, -1], of=2), ConfigError, "from -1 to 0, expected whole numbers from 0 to 1"),
        (lambda: predictions_of(nn.Linear(1, 1), []), ConfigError, "batches: got none"),
        (lambda: predictions_of(nn.Linear(1, 1), [torch.ones(2, 1)]), ConfigError, "got one without labels"),
        (
            lambda: predictions_of(nn.Linear(1, 1), [0], logits_of(torch.tensor([[0.0, 1], [math.nan, 0]]))),
            ConfigError, "1 of 2 examples have no finite probabilities",
        ),
        (
            lambda: agreement(said([0], [0], of=2), said([0], [1], of=2)),
            ConfigError, "for 1 and 1 examples that are not the same",
        ),
        (lambda: agreement(said([0], [0], of=2), said([0, 1], [0, 1], of=2)), ConfigError, "for 1 and 2 examples"),
        (lambda: predictions_of(nn.LSTM(1, 1), [(torch.ones(2, 1), torch.zeros(2))]), ConfigError, "gives a tuple"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@given(st.lists(st.integers(0, 3), min_size=1))
def test_no_constant_answer_is_right_more_often_than_the_commonest(answers):
    shares = [answers.count(x) / len(answers) for x in range(4)]
    assert commonest_share(answers) == max(shares) and math.isnan(commonest_share([]))
