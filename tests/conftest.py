"""The tests' shared parts are in `parts.py`, which this makes importable."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def three_tasks():
    from image_parts import blobs

    return [blobs(f"blobs{seed}", seed, classes=2 + seed % 2) for seed in range(3)]


@pytest.fixture
def npz_files(tmp_path, three_tasks):
    paths = []
    for task in three_tasks:
        path = tmp_path / f"{task.name}.npz"
        np.savez(path, x_train=task.x_train, y_train=task.y_train, x_test=task.x_test, y_test=task.y_test)
        paths.append(path)
    return paths
