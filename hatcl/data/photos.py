"""Images of any size: opened when asked for, in the place of an array that would hold all of them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, IntegrityError

THREADS = 16


T = TypeVar("T")


class Photos:
    """Images in the place of an array of images: they are indexed as an array is, and opened when passed over.

    Args:
        paths: of the files; or their content as bytes, or PIL images. ids: which of them, and in which order; None =
            all.
    """

    def __init__(self, paths: Sequence[Any], ids: np.ndarray | None = None) -> None:
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
        from PIL import Image
        from torchvision.datasets.folder import default_loader

        source = self.paths[i]
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        try:
            if isinstance(source, bytes):
                return Image.open(io.BytesIO(source)).convert("RGB")
            return default_loader(str(source))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            name = f"image {i}" if isinstance(source, bytes) else source
            raise IntegrityError(f"{name} cannot be read as an image ({error}); copy it again") from error

    def each(self, change: Callable[[Any], T]) -> list[T]:
        """What a function makes of each PIL image, in order, by several threads: files are read and decoded without the
        interpreter's lock. The function must draw nothing at random."""
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda i: change(self.opened(i)), self.ids.tolist()))

    def arrays(self, size: int, pad: bool) -> np.ndarray:
        """As an array `[N, size, size, 3]`: stretched, or with `pad` as large as fits, in the middle of black."""
        return np.stack(self.each(lambda image: np.asarray(_in_square(image, size, pad))))

    def told(self, i: int) -> str:
        """The name and size of the image number i, by which a resumed run knows it again; of bytes their digest."""
        source = self.paths[i]
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        return f"{source.parent.name}/{source.name} {source.stat().st_size}" if isinstance(source, Path) else f"{i}"

    def missing(self) -> Path | None:
        """The first file that is not there."""
        sources = (self.paths[i] for i in self.ids.tolist())
        return next((s for s in sources if isinstance(s, Path) and not s.is_file()), None)


class Pictures(Sequence[Any]):
    """The images in a column of a table: paths relative to a folder, or what `datasets` stores of images.

    Args:
        rows: of the table. column: the images'. folder: where relative paths begin.
    """

    def __init__(self, rows: Sequence[Any], column: str, folder: Path) -> None:
        self.rows, self.column, self.folder = rows, column, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        """The file, or its content.

        Raises:
            ConfigError: it is something else.
        """
        value = self.rows[i][self.column]
        if isinstance(value, Mapping) and {"bytes", "path"} <= set(value):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{self.folder}: {str(value)[:60]!r} in the column {self.column!r} is no image; expected the path of a "
                "file, or what datasets stores of an image"
            )
        return self.folder / value


def _in_square(image: Any, size: int, pad: bool) -> Any:
    from torchvision.transforms.v2 import functional as change

    if not pad:
        return change.resize(image, [size, size])
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    return change.pad(change.resize(image, [height, width]), [left, top, size - width - left, size - height - top])


@dataclass(frozen=True)
class Pictured:
    """Turns images into a network's input one by one, by the network's own way.

    Args:
        transform: a PIL image -> `[3, H, W]`. drawn: does it draw random numbers? Then it is applied in order.
    """

    transform: Callable[[Any], Tensor]
    drawn: bool = False

    def __call__(self, images: np.ndarray | Photos) -> Tensor:
        """`[N, 3, H, W]` of photos, or of an array `N x H x W (x C)`.

        Raises:
            ConfigError: an array that is not of whole numbers 0 to 255.
        """
        if isinstance(images, Photos) and not self.drawn:
            return torch.stack(images.each(self.transform))
        pictures = images.each(lambda image: image) if isinstance(images, Photos) else _pictures(images)
        return torch.stack([self.transform(one) for one in pictures])


def _pictures(images: np.ndarray) -> Iterator[Any]:
    from PIL import Image

    if images.dtype != np.uint8:
        raise ConfigError(
            f"images: are {images.dtype}, expected uint8 (0 to 255) for the model's own way of cropping; store them "
            "so, or give --fit resize"
        )
    for one in images:
        yield Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one).convert("RGB")
