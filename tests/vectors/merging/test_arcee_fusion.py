from __future__ import annotations

import numpy as np
import pytest
import torch

from hatcl import ConfigError, TaskVector, VectorError
from hatcl.vectors.merging import merge


def reference(theta, tuned):
    """In float64, with the quartiles of a sorted list."""

    def soft(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = soft(tuned), soft(theta)
    importance = np.abs(tuned - theta) * (p * np.log(p / q)).sum(-1, keepdims=True)
    flat = np.sort(importance.ravel())
    low, middle, high = (flat[int(share * (flat.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), tuned - theta, 0)


@pytest.mark.parametrize("shape", [(12, 7), (9,), (3, 4, 5), ()])
def test_against_numpy(shape):
    generator = torch.Generator().manual_seed(len(shape))
    theta, tau = (torch.randn(shape, generator=generator) for _ in range(2))
    vector = TaskVector.between({"w": theta}, {"w": theta + tau})
    got = merge([vector], "arcee_fusion", pretrained={"w": theta})["w"]
    want = reference(theta.double().numpy(), (theta + tau).double().numpy())
    assert np.array_equal(got.numpy() != 0, want != 0)
    # the differences of float32 numbers below 5
    assert np.abs(got.numpy() - want).max() < 1e-6
    if len(shape) > 1:
        assert 0 < np.count_nonzero(want) < want.size


def test_kept_elements_are_the_fine_tuned_ones_bit_for_bit():
    theta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    tuned = theta * 1e-4 + 1e-3  # which theta + tau alone does not give back
    vector = TaskVector.between({"w": theta}, {"w": tuned})
    merged = merge([vector], "arcee_fusion", pretrained={"w": theta})
    out = merged.apply_to({"w": theta})["w"]
    kept = merged["w"] != 0
    assert bool(kept.any()) and torch.equal(out, torch.where(kept, tuned, theta))


def test_what_is_refused():
    vector = TaskVector({"w": torch.ones(2, 2)})
    with pytest.raises(ConfigError, match="arcee_fusion: got 2 vectors, expected 1; merge the others first"):
        merge([vector, vector], "arcee_fusion", pretrained={"w": torch.ones(2, 2)})
    for other in ({"v": torch.ones(2, 2)}, {"w": torch.ones(2)}):
        with pytest.raises(VectorError, match="pretrained: it has no w of the vector's shape; pass the vector's own"):
            merge([vector], "arcee_fusion", pretrained=other)
