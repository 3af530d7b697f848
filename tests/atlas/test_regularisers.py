"""The penalty and the cosines, by hand."""

from __future__ import annotations

import pytest
import torch

from hatcl import ConfigError, TaskVector
from hatcl.atlas import cosines, penalty

LAMBDA = torch.tensor([[3.0, 0.0, -1.0], [-4.0, 2.0, 0.0]])


def test_the_penalty_is_the_mean_norm_over_vectors():
    # columns: |3| + |4| = 7, 2, 1 and sqrt(9 + 16) = 5, 2, 1
    assert penalty(LAMBDA, 1).item() == pytest.approx(0.5 * 10 / 3)
    assert penalty(LAMBDA, 2).item() == pytest.approx(0.5 * 8 / 3)
    assert penalty(LAMBDA, 2, weight=3).item() == pytest.approx(8)


@pytest.mark.parametrize("p", [1, 2])
def test_its_gradient_at_zero_is_finite(p):
    lam = torch.zeros(2, 3, requires_grad=True)
    penalty(lam, p).backward()
    assert lam.grad.tolist() == [[0.0] * 3] * 2


def test_another_norm_is_refused():
    with pytest.raises(ConfigError, match="p: got 3, expected 1 or 2"):
        penalty(LAMBDA, 3)


def test_orthogonality_is_a_matrix_of_cosines():
    vectors = [
        TaskVector({"w": torch.tensor([1.0, 0]), "b": torch.tensor([0.0])}),
        TaskVector({"w": torch.tensor([0.0, 2]), "b": torch.tensor([0.0])}),
        TaskVector({"w": torch.tensor([3.0, 0]), "b": torch.tensor([-3.0])}),
    ]
    want = torch.tensor([[1, 0, 0.5**0.5], [0, 1, 0], [0.5**0.5, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines(vectors), want)
