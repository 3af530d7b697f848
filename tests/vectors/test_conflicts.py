"""Shares of elements whose signs disagree."""

from __future__ import annotations

import pytest
import torch

from hatcl.errors import VectorError
from hatcl.vectors import conflicts
from hatcl.vectors.conflicts import SignConflicts, sign_conflicts
from hatcl.vectors.task_vector import TaskVector


def vectors():
    return [
        TaskVector({"a": torch.tensor([1.0, 2.0, 0.0, -1.0]), "b": torch.tensor([[3.0], [1.0]])}),
        TaskVector({"a": torch.tensor([-1.0, 5.0, 0.0, 0.0]), "b": torch.tensor([[-2.0], [0.0]])}),
        TaskVector({"a": torch.tensor([0.5, 1.0, 2.0, 1.0]), "b": torch.tensor([[1.0], [0.0]])}),
    ]


def test_by_hand():
    got = sign_conflicts(vectors())
    # a: elements 0, 1 and 3 are changed by two or three, signs differ at 0 and 3; b: element 0 alone, and it differs
    assert got.blocks == {"a": 2 / 3, "b": 1.0} and got.whole == 3 / 4
    # 0 and 1 both change a0, a1, b0; 0 and 2 change a0, a1, a3, b0; 1 and 2 change a0, a1, b0
    assert got.pairs == ((0.0, 2 / 3, 1 / 4), (2 / 3, 0.0, 2 / 3), (1 / 4, 2 / 3, 0.0))


def test_two_vectors_and_their_pair_agree():
    torch.manual_seed(0)
    v, w = (TaskVector({"a": torch.randn(50, 3), "b": torch.randn(7)}) for _ in range(2))
    assert sign_conflicts([v, w]).whole == sign_conflicts([v, w]).pairs[0][1] == sign_conflicts([w, v]).pairs[0][1]
    assert sign_conflicts([v, v]).whole == 0 and sign_conflicts([v, -v]).whole == 1
    assert sign_conflicts([v, v * 0]).whole == 0  # nothing that both change


def test_pieces_do_not_matter(monkeypatch):
    whole = sign_conflicts(vectors())
    monkeypatch.setattr(conflicts, "COMPARED_AT_ONCE", 1)
    assert sign_conflicts(vectors()) == whole


def test_what_a_vector_lacks_counts_as_zeros():
    v = TaskVector({"a": torch.ones(2)}, partial=True)
    w = TaskVector({"a": -torch.ones(2), "b": torch.ones(2)}, partial=True)
    assert sign_conflicts([v, w]) == SignConflicts(1.0, {"a": 1.0, "b": 0.0}, ((0.0, 1.0), (1.0, 0.0)))


def test_prints_as_a_table():
    assert str(sign_conflicts(vectors())).splitlines() == [
        "signs disagree",
        "-----------------",
        "a          66.67%",
        "b         100.00%",
        "whole      75.00%",
        "",
        "pairs           0        1        2",
        "vector 0    0.00%   66.67%   25.00%",
        "vector 1   66.67%    0.00%   66.67%",
        "vector 2   25.00%   66.67%    0.00%",
    ]


def test_bad_input():
    with pytest.raises(VectorError, match="got 1 vectors, expected at least two"):
        sign_conflicts(vectors()[:1])
    with pytest.raises(
        VectorError, match=r"b is \[2\] in vector 0, \[3\] in vector 1; take the vectors from models of one"
    ):
        sign_conflicts([TaskVector({"b": torch.ones(2)}), TaskVector({"b": torch.ones(3)})])
