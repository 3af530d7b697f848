"""What a task asks of a head: labels, losses and measures, compared with scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.engine.problems import (
    CLASSES,
    LABELS,
    MEASURED_BY,
    NUMBERS,
    PROBLEMS,
    average_precision,
    check_problem_labels,
    likely_problem,
    mean_average_precision,
    micro_f1,
    pearson,
    problem_named,
    r_squared,
)
from hatcl.errors import ConfigError

EXAMPLES = {
    CLASSES: (torch.tensor([[9.0, -9], [-9, 9], [-9, 9]]), np.array([0, 1, 1])),
    LABELS: (torch.tensor([[9.0, -9], [9, 9], [-9, 9]]), np.array([[1, 0], [1, 1], [0, 1]])),
    NUMBERS: (None, np.array([[1.5], [-2.0], [7.0]])),
}


def perfect(name):
    """Outputs that say the labels, and what they are compared with."""
    outputs, labels = EXAMPLES[name]
    targets = PROBLEMS[name].targets(labels, labels)
    return targets if outputs is None else outputs, targets


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_outputs_have_no_loss_and_the_full_score(name):
    problem, (outputs, targets) = PROBLEMS[name], perfect(name)
    assert problem.name == name and problem.fits(EXAMPLES[name][1])
    assert float(problem.loss(outputs, targets)) < 1e-3
    for measure in problem.measures:
        assert problem.measure(measure)(outputs, targets) == pytest.approx(1, abs=1e-6)  # a correlation is of roots
        assert problem.measure(measure)(-outputs, targets) < 0.9
    assert problem.measure(None) is next(iter(problem.measures.values()))
    with pytest.raises(ConfigError, match=f"measured_by, of a {name}: got 'no', expected one of"):
        problem.measure("no")
    assert set(problem.measures) <= set(MEASURED_BY)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_the_measures_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    outputs = torch.tensor([[float(v), -float(v)] for v, _, _ in rows])
    targets = torch.tensor([[float(a), float(b)] for _, a, b in rows])
    some = [c for c in range(2) if targets[:, c].any()]
    for c in some:
        want = metrics.average_precision_score(targets[:, c].numpy(), outputs[:, c].numpy())
        assert average_precision(outputs[:, c], targets[:, c]) == pytest.approx(want, abs=1e-12)  # of float64
    want = np.mean([metrics.average_precision_score(targets[:, c], outputs[:, c]) for c in some]) if some else 0
    assert mean_average_precision(outputs, targets) == pytest.approx(want, abs=1e-12)
    want = metrics.f1_score(targets.numpy(), (outputs > 0).numpy(), average="micro", zero_division=0)
    assert micro_f1(outputs, targets) == pytest.approx(want, abs=1e-12)
    said, numbers = outputs.double().numpy(), (outputs + targets).double()
    assert r_squared(outputs, numbers) == pytest.approx(metrics.r2_score(numbers.numpy(), said), abs=1e-9)


def test_a_constant_says_nothing():
    y = torch.tensor([[1.0], [2.0], [3.0]])
    assert pearson(torch.ones(3, 1), y) == 0 and r_squared(torch.full((3, 1), 2.0), y) == 0
    assert r_squared(torch.ones(3, 1), torch.ones(3, 1)) == 1 and r_squared(y, torch.ones(3, 1)) == 0
    assert pearson(torch.cat([y, -y], 1), torch.cat([y, y], 1)) == pytest.approx(0, abs=1e-12)
    assert mean_average_precision(y, torch.zeros(3, 1)) == micro_f1(-y, torch.zeros(3, 1)) == 0


def test_targets_of_a_regression_have_the_scale_of_the_training_targets():
    known = np.array([[100_000.0, 5], [300_000, 5]])
    made = PROBLEMS[NUMBERS].targets(np.array([[200_000.0, 6]]), known)
    assert made.tolist() == [[0.0, 1.0]] and made.dtype == torch.float32
    assert PROBLEMS[NUMBERS].targets(known, known).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_labels_say_of_what_they_are():
    for y, name in (
        (np.array([0, 1, 2]), CLASSES), (np.array([0.0, 1.0]), CLASSES), (np.array([0.5, 1.0]), NUMBERS),
        (np.array([[0, 1], [1, 1]]), LABELS), (np.array([[0, 2], [1, 1]]), NUMBERS),
    ):  # fmt: skip
        assert likely_problem(y) == name
    with pytest.raises(ConfigError, match="problem: got 'regresion'.*did you mean 'regression'"):
        problem_named("regresion")


@pytest.mark.parametrize(
    ("problem", "y", "words"),
    [
        (
            CLASSES,
            np.array([0.0, 1.5]),
            r"it is float64\[2\], expected 2 for a classification: .*a regression has such",
        ),
        (CLASSES, np.array([[0, 1], [1, 1]]), "a multilabel has such"),
        (CLASSES, np.array([0, 2]), "it holds labels from 0 to 2, expected 0 to 1"),
        (LABELS, np.array([[0, 2], [0, 1]]), "expected 2 for a multilabel: a 0 or 1 for each example and label"),
        (NUMBERS, np.array([[np.nan], [1.0]]), "expected 2 for a regression: finite numbers"),
        (NUMBERS, np.array([[1.0], [1.0]]), "it has 1 columns, expected 2"),
        (CLASSES, np.array([0, 1, 1]), r"it is int64\[3\], expected 2 for a classification"),
    ],
)
def test_labels_that_do_not_fit(problem, y, words):
    with pytest.raises(ConfigError, match=words):
        check_problem_labels("it", problem, y, 2, 2)
