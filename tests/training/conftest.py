"""Small tasks that need no data."""

from __future__ import annotations

import numpy as np
import pytest

from hatcl.training.stream import Task


def blobs(name: str, seed: int, classes: int = 2, count: int = 24, size: int = 16) -> Task:
    """Grey images with a bright square whose corner tells the class."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part in ("train", "test"):
        labels = np.arange(count) % classes
        images = rng.integers(0, 120, size=(count, size, size), dtype=np.uint8)
        half = size // 2
        for image, label in zip(images, labels, strict=True):
            top, left = divmod(int(label), 2)
            image[top * half : (top + 1) * half, left * half : (left + 1) * half] += 120
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images, labels.astype(np.int64)
    return Task(name, num_classes=classes, **arrays)


@pytest.fixture
def three_tasks() -> list[Task]:
    return [blobs(f"blobs{seed}", seed, classes=2 + seed % 2) for seed in range(3)]


@pytest.fixture
def npz_files(tmp_path, three_tasks):
    paths = []
    for task in three_tasks:
        path = tmp_path / f"{task.name}.npz"
        np.savez(path, x_train=task.x_train, y_train=task.y_train, x_test=task.x_test, y_test=task.y_test)
        paths.append(path)
    return paths
