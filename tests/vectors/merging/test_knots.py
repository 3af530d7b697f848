"""KnOTS-TIES against a reference in numpy, written from the paper and the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hatcl import merge
from hatcl.vectors.task_vector import TaskVector

# float32 sums of numbers below 5: measured 6e-7 over 50 seeds
SLACK = 1e-5
SHAPES = {"a": (6, 10), "b": (8, 4)}


def lora(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return TaskVector(
        {
            n: torch.randn(m, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
            for n, (m, k) in SHAPES.items()
        }
    )


def reference(vectors, density, scale):
    bases, parts = {}, [[] for _ in vectors]
    for name, (_, width) in SHAPES.items():
        side_by_side = np.concatenate([v[name].double().numpy() for v in vectors], 1)
        u, s, vh = np.linalg.svd(side_by_side, full_matrices=False)
        u, s, vh = u[:, s > 1e-5], s[s > 1e-5], vh[s > 1e-5]
        bases[name] = u
        for task, part in enumerate(parts):
            part.append((s[:, None] * vh[:, task * width : (task + 1) * width]).ravel())
    flat = np.stack([np.concatenate(p) for p in parts])
    k = int(density * flat.shape[1])
    for row in flat:
        row[np.argsort(-np.abs(row), kind="stable")[k:]] = 0
    sign = np.sign(flat.sum(0))
    agree = (np.sign(flat) == sign) & (sign != 0)
    merged = np.where(agree, flat, 0).sum(0) / np.maximum(agree.sum(0), 1)
    out = {}
    for name, (_, width) in SHAPES.items():
        rank = bases[name].shape[1]
        out[name] = scale * bases[name] @ merged[: rank * width].reshape(rank, width)
        merged = merged[rank * width :]
    return out


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_as_in_the_paper(rank, density):
    vectors = [lora(rank, seed) for seed in range(3)]
    want = reference(vectors, density, 0.6)
    got = merge(vectors, "knots", density=density, scale=0.6)
    for name in SHAPES:
        assert np.abs(got[name].numpy() - want[name]).max() < SLACK


def test_one_task_is_itself_when_nothing_is_trimmed():
    vector = lora(2, 0)
    got = merge([vector], "knots", density=1.0)
    for name in SHAPES:
        assert float((got[name] - vector[name]).abs().max()) < SLACK


def test_it_speaks_of_ranks_and_not_of_rotations():
    """The outputs turned: the merge is turned alike. Trimmed elements of weights (`ties`) are not."""
    vectors = [lora(2, seed) for seed in range(2)]
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    turned = [TaskVector({"a": turn @ v["a"], "b": v["b"]}) for v in vectors]
    for method, same in (("knots", True), ("ties", False)):
        gap = merge(turned, method)["a"] - turn @ merge(vectors, method)["a"]
        assert (float(gap.abs().max()) < SLACK) == same


def test_what_is_no_matrix_is_averaged():
    vectors = [TaskVector({"b": torch.tensor([1.0, 4.0])}), TaskVector({"b": torch.tensor([3.0, -2.0])})]
    assert merge(vectors, "knots", scale=2.0)["b"].tolist() == [4.0, 2.0]
