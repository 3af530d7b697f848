"""TSV-Merge against matrices whose singular vectors are known."""

from __future__ import annotations

import math

import torch

from hatcl.vectors.merging import merge
from hatcl.vectors.merging.tsv import orthogonal
from hatcl.vectors.task_vector import TaskVector

# two float32 SVDs of numbers below 5: measured 1.3e-6 over 50 seeds
SLACK = 1e-5


def merged(*matrices, **options):
    return merge([TaskVector({"w": torch.as_tensor(m)}) for m in matrices], "tsv", **options)["w"]


def at(degrees):
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def near(got, want):
    assert float((got - torch.as_tensor(want)).abs().max()) < SLACK, got


def test_each_task_keeps_its_share_of_the_rank():
    near(merged([[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]), [[3.0, 0.0], [0.0, 2.0]])
    near(merged([[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]], scale=0.5), [[1.5, 0.0], [0.0, 1.0]])


def test_what_overlaps_is_turned_apart_by_equal_angles():
    """Directions at 0 and 60 degrees: the nearest orthogonal ones are at -15 and 75."""
    one, other = at(0), at(60)
    got = merged(2 * torch.outer(one, one), 3 * torch.outer(other, other))
    near(got, 2 * torch.outer(at(-15), at(-15)) + 3 * torch.outer(at(75), at(75)))
    twin = 2 * torch.outer(one, one) + 3 * torch.outer(other, other)  # without turning
    assert float((got - twin).abs().max()) > 0.5


def test_orthogonal_is_the_polar_factor():
    x = torch.randn(6, 3)
    q = orthogonal(x)
    near(q.T @ q, torch.eye(3))
    stretch = q.T @ x  # symmetric with positive eigenvalues: no orthogonal matrix is nearer
    near(stretch, stretch.T)
    assert float(torch.linalg.eigvalsh(stretch).min()) > 0


def test_one_task_is_itself():
    x = torch.randn(4, 6)
    near(merged(x), x)


def test_what_is_no_matrix_or_too_small_a_one_is_averaged():
    rows = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, -2.0])]
    assert merged(*rows).tolist() == [2.0, 1.0]
    assert merged(*[r.view(1, 2) for r in rows], scale=2.0).tolist() == [[4.0, 2.0]]
    filters = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    assert torch.equal(merged(*filters), ((filters[0].double() + filters[1].double()) / 2).float())


def test_filters_on_demand_as_their_matrices():
    filters = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    assert torch.equal(merged(*filters, convs=True).flatten(1), merged(*[f.flatten(1) for f in filters]))


def test_updates_of_low_rank_bring_no_other_directions():
    """Two tasks of rank 1 would take two directions each, one of which nobody has learned."""
    one, other = torch.outer(torch.randn(6), torch.randn(8)), torch.outer(torch.randn(6), torch.randn(8))
    assert int((torch.linalg.svdvals(merged(one, other)) > SLACK).sum()) == 2


def test_equal_tasks_merge_to_the_task():
    x = torch.outer(torch.randn(6), torch.randn(8))
    near(merged(x, x), x)
    p, _, qh = torch.linalg.svd(torch.stack([x[:, 0], x[:, 0]], 1), full_matrices=False)
    assert float((p @ qh)[:, 0].norm()) > 0.99  # the twin invents a second direction beside the one there is
    assert abs(float(orthogonal(torch.stack([x[:, 0], x[:, 0]], 1))[:, 0].norm()) - 0.5**0.5) < SLACK
