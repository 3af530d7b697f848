"""Small tasks that need no data."""

from __future__ import annotations

import numpy as np

from hatcl.data.images import ImageData


def blobs(name: str, seed: int, classes: int = 2, count: int = 24, size: int = 16) -> ImageData:
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
    return ImageData(name, num_classes=classes, **arrays)
