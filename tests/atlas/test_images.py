from __future__ import annotations

import numpy as np
import pytest
import torch

from hatcl.data.images import Images, Preparation, held_out
from hatcl.errors import ConfigError

X = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
Y = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
IMAGES = Images(X, Y, Preparation((10.0,), (2.0,)))


def test_batches_hold_every_image_once_prepared():
    assert len(IMAGES) == 10 and len(IMAGES.batches(4)) == 3
    parts = list(IMAGES.batches(4))
    assert [len(y) for _, y in parts] == [4, 3, 3]  # nearly equal
    x = torch.cat([x for x, _ in parts])
    assert x.shape == (10, 3, 4, 4) and x[2, 0, 0, 1] == (33 - 10) / 2
    assert torch.cat([y for _, y in parts]).tolist() == Y.tolist()
    one, label = IMAGES[2]
    assert torch.equal(one, x[2]) and label == 0


def test_a_shuffled_pass_follows_torchs_generator():
    batches = IMAGES.batches(4, shuffle=True)
    torch.manual_seed(3)
    first, second = (torch.cat([x for x, _ in batches]) for _ in range(2))
    torch.manual_seed(3)
    again = torch.cat([x for x, _ in batches])
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_none_and_bad_sizes():
    none = IMAGES.at(torch.zeros(0, dtype=torch.long))
    assert len(none) == 0 and list(none.batches(4)) == []
    with pytest.raises(ConfigError, match="batch size: got 0, expected at least 1"):
        IMAGES.batches(0)


def test_held_out_is_a_share_of_each_class_and_seeded():
    keep, held = held_out(Y, 0.5, seed=0)
    assert sorted([*keep.tolist(), *held.tolist()]) == list(range(10))
    assert Y[held.numpy()].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(held, held_out(Y, 0.5, seed=0)[1])
    assert any(not torch.equal(held, held_out(Y, 0.5, seed=s)[1]) for s in (1, 2, 3))
    assert len(held_out(Y, 0.0, seed=0)[1]) == 0 and len(held_out(Y, 0.24, seed=0)[1]) == 1  # rounded down
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="expected a share of at least 0 and below 1"):
            held_out(Y, share, seed=0)
