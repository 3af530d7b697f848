"""Images of any size, opened when they are used instead of held in one array."""

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
    """A stand-in for an array of images: it is indexed like an array and opens the images when iterated.

    Args:
        paths: paths of the files, their content as bytes, or PIL images. ids: which of them, in which order; None =
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
        """The PIL image in RGB of file number i.

        Raises:
            IntegrityError: the file is missing, or is not an image.
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
        """Apply a function to each PIL image with several threads, and return the results in order: files are read and
        decoded without the interpreter's lock. The function must not draw random numbers."""
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda i: change(self.opened(i)), self.ids.tolist()))

    def arrays(self, size: int, pad: bool) -> np.ndarray:
        """An array `[N, size, size, 3]` of the images, stretched or, with `pad`, scaled to fit and centred on black."""
        return np.stack(self.each(lambda image: np.asarray(_in_square(image, size, pad))))

    def told(self, i: int) -> str:
        """The name and size of the image number i, by which a resumed run recognises it; for bytes their digest."""
        source = self.paths[i]
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        return f"{source.parent.name}/{source.name} {source.stat().st_size}" if isinstance(source, Path) else f"{i}"

    def missing(self) -> Path | None:
        """The first file that does not exist."""
        sources = (self.paths[i] for i in self.ids.tolist())
        return next((s for s in sources if isinstance(s, Path) and not s.is_file()), None)


class Pictures(Sequence[Any]):
    """The images in a column of a table: paths relative to a folder, or images as `datasets` stores them.

    Args:
        rows: the table's rows. column: the column of images. folder: the base of relative paths.
    """

    def __init__(self, rows: Sequence[Any], column: str, folder: Path) -> None:
        self.rows, self.column, self.folder = rows, column, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        """The file, or its content.

        Raises:
            ConfigError: the value is neither.
        """
        value = self.rows[i][self.column]
        if isinstance(value, Mapping) and {"bytes", "path"} <= set(value):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{self.folder}: {str(value)[:60]!r} in the column {self.column!r} is not an image; expected the "
                "path of a file, or an image as datasets stores it"
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
    """Turns images into a network's input one by one, with the network's own transform.

    Args:
        transform: a PIL image -> `[3, H, W]`. drawn: whether it draws random numbers; if so, it is applied in order.
    """

    transform: Callable[[Any], Tensor]
    drawn: bool = False

    def __call__(self, images: np.ndarray | Photos) -> Tensor:
        """The input `[N, 3, H, W]` made from photos or from an array `N x H x W (x C)`.

        Raises:
            ConfigError: the array does not hold whole numbers from 0 to 255.
        """
        if isinstance(images, Photos) and not self.drawn:
            return torch.stack(images.each(self.transform))
        pictures = images.each(lambda image: image) if isinstance(images, Photos) else _pictures(images)
        return torch.stack([self.transform(one) for one in pictures])


def _pictures(images: np.ndarray) -> Iterator[Any]:
    from PIL import Image

    if images.dtype != np.uint8:
        raise ConfigError(
            f"images: got {images.dtype}, expected uint8 (0 to 255) for the model's own cropping; store them as "
            "uint8, or give --fit resize"
        )
    for one in images:
        yield Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one).convert("RGB")
