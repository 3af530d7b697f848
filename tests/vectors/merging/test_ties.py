"""TIES against numbers worked out by hand, and against the paper's steps written out."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.vectors.merging import merge
from hatcl.vectors.merging.ties import elected
from hatcl.vectors.task_vector import TaskVector


def vector(row):
    return TaskVector({"w": torch.tensor(row)})


def test_trim_elect_and_merge():
    rows = [4.0, -1.0, 0.5, 3.0], [-2.0, 5.0, 0.1, 3.0], [1.0, -3.0, -0.2, -7.0]
    # half of each: [4 0 0 3], [0 5 0 3], [0 -3 0 -7]; mass 4, 2, 0, -1
    assert merge([vector(r) for r in rows], density=0.5)["w"].tolist() == [4.0, 5.0, 0.0, -7.0]
    assert merge([vector(r) for r in rows], density=0.5, scale=0.5)["w"].tolist() == [2.0, 2.5, 0.0, -3.5]
    # nothing trimmed: mass 3, 1, 0.4, -1
    want = torch.tensor([2.5, 5.0, 0.3, -7.0])
    assert torch.equal(merge([vector(r) for r in rows], density=1.0)["w"], want)


def test_equal_mass_on_both_sides_gives_nothing():
    assert merge([vector([3.0, 1.0]), vector([-3.0, 1.0])], density=1.0)["w"].tolist() == [0.0, 1.0]


def test_the_whole_vector_is_trimmed_not_each_tensor():
    v = TaskVector({"large": torch.tensor([9.0, 8.0]), "small": torch.tensor([2.0, 1.0])})
    merged = merge([v], density=0.5)
    assert merged["large"].tolist() == [9.0, 8.0] and merged["small"].tolist() == [0.0, 0.0]


def test_of_equal_magnitudes_those_of_the_first_name_stay_in_whatever_order_the_names_come():
    tensors = {"b": torch.ones(2), "a": -torch.ones(2)}
    for order in (["a", "b"], ["b", "a"]):
        merged = merge([TaskVector({n: tensors[n] for n in order})], density=0.5)
        assert merged["a"].tolist() == [-1.0, -1.0] and merged["b"].tolist() == [0.0, 0.0]


def by_the_paper(rows, density):
    """Algorithm 1, element by element."""
    keep = int(density * len(rows[0]))
    trimmed = []
    for row in rows:
        first = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:keep]  # stable: of equal ones the first
        trimmed.append([x if i in first else 0.0 for i, x in enumerate(row)])
    out = []
    for column in zip(*trimmed, strict=True):
        mass = sum(column)
        agree = [x for x in column if x * mass > 0]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return out


# quarters: exact in float32, and their sums too, so that the reference's order of adding is nothing
QUARTERS = st.integers(-40, 40).map(lambda i: i / 4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(QUARTERS, min_size=6, max_size=6), min_size=1, max_size=4), st.sampled_from([0.0, 0.2, 0.5, 1.0])
)
def test_law_as_the_paper_says(rows, density):
    want = torch.tensor(by_the_paper(rows, density), dtype=torch.float64).float()
    assert torch.equal(merge([vector(r) for r in rows], density=density)["w"], want)


def test_twin_averaging_all_votes_differs():
    taus = [torch.tensor([4.0]), torch.tensor([-1.0])]
    assert elected(taus, [1.0, 1.0]).item() == 4.0 != sum(taus).item() / 2
