"""OPCM against a reference in numpy, written from the paper's equations and its authors' projection."""

from __future__ import annotations

import numpy as np
import torch

from hatcl.vectors.merging import merge, opcm_step
from hatcl.vectors.task_vector import TaskVector

# float32 SVDs of numbers below 5: measured 1.5e-6 over 50 seeds
SLACK = 2e-5


def vectors_of(tasks=3, shape=(6, 8)):
    return [TaskVector({"w": torch.randn(shape), "b": torch.randn(4)}) for _ in range(tasks)]


def norm(w, b):
    return np.sqrt((w**2).sum() + (b**2).sum())


def reference(vectors, alpha):
    """With full decompositions and lambda, step by step as published."""
    taus = [(v["w"].double().numpy(), v["b"].double().numpy()) for v in vectors]
    w, b = taus[0]
    norms, before = [norm(w, b)], 1.0
    for tw, tb in taus[1:]:
        u, s, vh = np.linalg.svd(w)
        seen = u.T @ tw @ vh.T
        np.fill_diagonal(seen, 0)
        r = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
        seen[:r, :r] = 0
        w, b = before * w + u @ seen @ vh, before * b + tb
        norms.append(norm(tw, tb))
        lam = norm(w, b) / np.mean(norms)
        w, b, before = w / lam, b / lam, lam
    return w, b


def test_as_in_the_paper():
    for alpha in (0.2, 0.5, 0.8):
        vectors = vectors_of()
        got, (w, b) = merge(vectors, "opcm", alpha=alpha), reference(vectors, alpha)
        assert np.abs(got["w"].numpy() - w).max() < SLACK and np.abs(got["b"].numpy() - b).max() < SLACK


def test_one_at_a_time_is_the_same():
    vectors, state = vectors_of(4), None
    for i, v in enumerate(vectors):
        state = opcm_step(state, v)
        want = merge(vectors[: i + 1], "opcm")
        # kept in float32 between the steps, as in merge
        torch.testing.assert_close(state.vector["w"], want["w"], rtol=0, atol=0)
        torch.testing.assert_close(state.vector["b"], want["b"], rtol=0, atol=0)


def test_it_has_the_mean_norm_of_the_vectors():
    vectors = vectors_of(5)
    want = np.mean([v.norm() for v in vectors])
    assert abs(merge(vectors, "opcm").norm() - want) < SLACK
    assert merge(vectors[:1], "opcm").norm() == vectors[0].norm()


def test_leading_directions_of_the_first_are_not_written_again():
    """The second task pushes along the first one's own direction, and along another."""
    one, other = torch.zeros(3, 3), torch.zeros(3, 3)
    one[0, 0], one[1, 1], other[0, 0], other[0, 2], other[2, 1] = 3.0, 1.0, 5.0, 2.0, 2.0
    total = opcm_step(opcm_step(None, TaskVector({"w": one})), TaskVector({"w": other})).total["w"]
    want = one.clone()
    want[0, 2], want[2, 1] = 2.0, 2.0
    torch.testing.assert_close(total, want, rtol=0, atol=SLACK)


def test_directions_that_nothing_has_stay_open():
    """Half of the first update is of rank 1: the rest of the space is free, whatever a decomposition returns there."""
    one, other = torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    one[0, 0] = 1.0
    total = opcm_step(opcm_step(None, TaskVector({"w": one})), TaskVector({"w": other})).total["w"]
    torch.testing.assert_close(total, torch.diag(torch.tensor([1.0, 2.0, 3.0])), rtol=0, atol=SLACK)


def test_the_order_matters():
    vectors = vectors_of()
    assert not torch.equal(merge(vectors, "opcm")["w"], merge(vectors[::-1], "opcm")["w"])
