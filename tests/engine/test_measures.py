from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hatcl.engine import measures as metrics
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
