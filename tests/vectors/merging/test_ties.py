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


def test_weights_count_in_signs_and_means():
    rows = [[4.0, -1.0], [-3.0, 2.0], [2.0, 0.0]]
    merged = merge([vector(r) for r in rows], density=1.0, weights=[0.5, 2.0, 1.0])["w"]
    # masses 2 - 6 + 2 and -0.5 + 4 + 0: the second's signs win
    assert merged.tolist() == [-3.0, 2.0]
    # dividing by the weights of those that agree is not scaling the vectors beforehand
    assert merge([vector(r) * w for r, w in zip(rows, [0.5, 2.0, 1.0], strict=True)], density=1.0)["w"].tolist() == [
        -6,
        4,
    ]
    summed = merge([vector(r) for r in rows], density=1.0, weights=[0.5, 2.0, 1.0], normalise=False)["w"]
    assert summed.tolist() == [-6.0, 4.0]
    negative = merge([vector([1.0]), vector([2.0])], density=1.0, weights=[1.0, -0.25])["w"]
    assert negative.tolist() == [1.0]  # 1 against -0.5


def test_a_density_for_each_vector_and_at_least_one_element():
    rows = [[4.0, 1.0, 2.0], [3.0, 2.0, 1.0]]
    assert merge([vector(r) for r in rows], density=[0.34, 1.0])["w"].tolist() == [3.5, 2.0, 1.0]
    assert merge([vector([4.0, 1.0, 2.0])], density=0.1)["w"].tolist() == [4.0, 0.0, 0.0]
    assert merge([vector([4.0, 1.0, 2.0])], density=0.0)["w"].tolist() == [0.0, 0.0, 0.0]


def test_undecided_signs_and_restored_mass():
    rows = [[2.0, 1.0], [-2.0, 1.0]]
    assert merge([vector(r) for r in rows], density=1.0, undecided="positive")["w"].tolist() == [2.0, 1.0]
    assert merge([vector([3.0, 1.0])], density=0.5, rescale="l1")["w"].tolist() == [4.0, 0.0]
