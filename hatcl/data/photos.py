"""Images of any size: opened when asked for, in the place of an array that would hold all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, IntegrityError

THREADS = 16


class Photos:
    """Image files in the place of an array of images: they are indexed as an array is, and opened when passed over.

    Args:
        paths: of the files. ids: which of them, and in which order; None = all.
    """

    def __init__(self, paths: Sequence[Path], ids: np.ndarray | None = None) -> None:
        self.paths = paths
        self.ids = np.arange(len(paths)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: slice | np.ndarray) -> Photos:
        return Photos(self.paths, self.ids[at])

    def __iter__(self) -> Iterator[Any]:
        """PIL images in RGB, see `opened`."""
        return (self.opened(i) for i in self.ids.tolist())

    def opened(self, i: int) -> Any:
        """Of the file number i, the PIL image in RGB.

        Raises:
            IntegrityError: the file is missing, or is no image.
        """
        from torchvision.datasets.folder import default_loader

        try:
            return default_loader(str(self.paths[i]))
        except OSError as error:
            raise IntegrityError(f"{self.paths[i]} cannot be read as an image ({error}); copy it again") from error


@dataclass(frozen=True)
class Pictured:
    """Turns images into a network's input one by one, by the network's own way.

    Args:
        transform: a PIL image -> `[3, H, W]`.
    """

    transform: Callable[[Any], Tensor]

    def __call__(self, images: np.ndarray | Photos) -> Tensor:
        """`[N, 3, H, W]` of photos, or of an array `N x H x W (x C)`.

        Raises:
            ConfigError: an array that is not of whole numbers 0 to 255.
        """
        if not isinstance(images, Photos):
            return torch.stack([self.transform(one) for one in _pictures(images)])
        with ThreadPoolExecutor(
            min(THREADS, os.cpu_count() or 1)
        ) as pool:  # files are read and decoded without the GIL
            return torch.stack(list(pool.map(lambda i: self.transform(images.opened(i)), images.ids.tolist())))


def _pictures(images: np.ndarray) -> Iterator[Any]:
    from PIL import Image

    if images.dtype != np.uint8:
        raise ConfigError(
            f"images: are {images.dtype}, expected uint8 (0 to 255) for the model's own way of cropping; store them "
            "so, or give --fit resize"
        )
    for one in images:
        yield Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one).convert("RGB")


@dataclass(frozen=True, eq=False)
class PhotoData:
    """One training problem whose images are files.

    Args:
        name: the data set's. y_train, y_test: labels, 0 to the number of classes - 1.
        classes: the names of the classes, in the order of the labels. templates: of prompts; empty = none of its own.
    """

    name: str
    x_train: Photos
    y_train: np.ndarray
    x_test: Photos
    y_test: np.ndarray
    classes: tuple[str, ...]
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not len(getattr(self, f"y_{part}")):
                raise ConfigError(f"{self.name}: has no images to {part}; are the folders empty?")

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def digest(self) -> str:
        """sha256 over the files' names, sizes and labels; a resumed run compares it. The images are not read."""
        out = hashlib.sha256()
        for photos, labels in ((self.x_train, self.y_train), (self.x_test, self.y_test)):
            for i, label in zip(photos.ids.tolist(), labels.tolist(), strict=True):
                path = photos.paths[i]
                out.update(f"{path.parent.name}/{path.name} {path.stat().st_size} {label}\n".encode())
        return out.hexdigest()
