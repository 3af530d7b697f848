"""Images for the procedures: batches that are prepared anew in every pass, so that memory holds them as they came."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..training.stream import Preparation, Task


@dataclass(frozen=True, eq=False)
class Images:
    """Images and labels of one part of a task. Its length is their number; item i is (image, label).

    Args:
        x: `N x H x W` or `N x H x W x C`. y: labels, `[N]`. prepare: makes them a network's input.
    """

    x: np.ndarray
    y: np.ndarray
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.prepare(self.x[i : i + 1])[0], int(self.y[i])

    def at(self, ids: Tensor) -> Images:
        """Those at these indices."""
        return dataclasses.replace(self, x=self.x[ids.numpy()], y=self.y[ids.numpy()])

    def batches(self, size: int, *, shuffle: bool = False) -> ImageBatches:
        """In batches of nearly equal size, at most `size`."""
        return ImageBatches(self, size, shuffle)


class ImageBatches:
    """(inputs, labels) in batches, in order or in one drawn anew for each pass from torch's global generator, which
    `fit` seeds and keeps in its checkpoint."""

    def __init__(self, images: Images, size: int, shuffle: bool) -> None:
        if size < 1:
            raise ConfigError(f"batch size: got {size}, expected at least 1")
        self.images, self.shuffle = images, shuffle
        self.count = -(-len(images) // size)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, n = self.images, len(self.images)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for ids in order.tensor_split(self.count) if self.count else ():
            yield images.prepare(images.x[ids.numpy()]), torch.from_numpy(images.y[ids.numpy()])


def preparation_for(
    task: Task,
    cfg: Mapping[str, Any],
    *,
    size: int | None = None,
    image_size: int | Sequence[int] | None = None,
    fit: str = "resize",
    normalise: str = "data",
) -> Preparation:
    """How a timm model takes a task's images.

    Args:
        cfg: the model's `pretrained_cfg`. size: bring images to it; 0 keeps their own, None takes the model's, which is
            `image_size` where it was made with one. fit: `resize` or `pad`.
        normalise: by the mean and deviation of the `data`, or those of the `model`.
    """
    if size is None:
        own = cfg.get("input_size") or (3, 224, 224)
        chosen = own if image_size is None else image_size
        size = chosen if isinstance(chosen, int) else int(chosen[-1])
    prepare = Preparation.of(task, size=size or None, fit=fit)
    if normalise == "model":
        full = 255.0 if task.x_train.dtype.kind in "ui" else 1.0
        mean, std = (tuple(full * float(v) for v in cfg[k]) for k in ("mean", "std"))
        prepare = dataclasses.replace(prepare, mean=mean, std=std)
    return prepare


def held_out(labels: np.ndarray, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to keep and indices held out: of each class the share, rounded down, by the seed.

    Raises:
        ConfigError: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"validation: got {share!r}, expected a share of at least 0 and below 1")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    y = torch.from_numpy(labels)[order]
    out = torch.zeros(len(labels), dtype=torch.bool)
    for c in y.unique():
        of_class = order[y == c]
        out[of_class[: int(share * len(of_class))]] = True
    return (~out).nonzero().view(-1), out.nonzero().view(-1)
