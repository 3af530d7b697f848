"""Images of tasks: arrays from scikit-learn, `.npz` files or torchvision, split into tasks, made ready for networks."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..errors import ConfigError, IntegrityError, nearest
from .shots import draw, held_out

FITS = ("resize", "pad")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """One training problem as it came: images N x H x W (grey) or N x H x W x C, labels 0 .. num_classes - 1.

    Raises:
        ConfigError: arrays of a wrong shape or type, a label out of range, or no examples.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)) or x.dtype.kind not in "uif":
                raise ConfigError(
                    f"task {self.name!r}: x_{part} is {x.dtype}{list(x.shape)}, expected images as numbers of shape "
                    "N x H x W (grey) or N x H x W x C with C = 1 or 3 (channels last)"
                )
            if y.ndim != 1 or y.dtype.kind not in "ui" or len(y) != len(x) or len(y) == 0:
                raise ConfigError(
                    f"task {self.name!r}: y_{part} is {y.dtype}{list(y.shape)}, expected {max(len(x), 1)} whole "
                    f"numbers, one label per image of x_{part}"
                )
            if y.min() < 0 or y.max() >= self.num_classes:
                raise ConfigError(
                    f"task {self.name!r}: y_{part} holds labels from {y.min()} to {y.max()}, expected "
                    f"0 to {self.num_classes - 1}"
                )
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ConfigError(
                f"task {self.name!r}: the training images are {list(self.x_train.shape[1:])}, the test images "
                f"{list(self.x_test.shape[1:])}; expected one shape"
            )

    def on_validation(self, share: float = 0.2, seed: int = 0) -> ImageData:
        """The task to choose options and methods by: of each class a share of the training images is held out and takes
        the place of the test images, which are not used.

        Raises:
            ConfigError: a share outside [0, 1), or one that leaves no images on one of the sides.
        """
        kept, out = (ids.numpy() for ids in held_out(self.y_train, share, seed))
        if not len(out):
            raise ConfigError(f"task {self.name!r}: a share of {share} holds out no image of {len(self.y_train)}")
        parts = self.x_train[kept], self.y_train[kept], self.x_train[out], self.y_train[out]
        return ImageData(self.name, *parts, self.num_classes)

    def digest(self) -> str:
        """sha256 over the arrays; a resumed run compares it to know that it goes on with the same data."""
        out = hashlib.sha256()
        for name in ARRAYS:
            array = getattr(self, name)
            out.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            out.update(np.ascontiguousarray(array).data)
        return out.hexdigest()


# --- where tasks come from ---


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a run's tasks come from, JSON-able so that a run folder can load them again.

    `kind` is `digits`, `npz` (each of `paths` a task), `split` (the one path, cut into `split` tasks) or `torchvision`
    (`dataset` under `root`, cut into `split` tasks).
    """

    kind: str = "digits"
    paths: tuple[str, ...] = ()
    split: int = 1
    dataset: str | None = None
    root: str | None = None
    download: bool = False

    def load(self) -> list[ImageData]:
        """The tasks. Raises `ConfigError` or `IntegrityError` where they cannot be read."""
        if self.kind == "digits":
            return digits_tasks()
        if self.kind == "npz":
            return [npz_task(path) for path in self.paths]
        if self.kind == "split":
            return split_classes(npz_task(self.paths[0]), self.split)
        if self.kind == "torchvision" and self.dataset is not None and self.root is not None:
            return split_classes(torchvision_task(self.dataset, self.root, download=self.download), self.split)
        raise ConfigError(f"tasks: got {self}, expected kind digits, npz, split or torchvision with its fields")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "paths": list(self.paths)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Source:
        return cls(**{**fields, "paths": tuple(fields.get("paths", ()))})


def digits_tasks(num_tasks: int = 5) -> list[ImageData]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey) as `num_tasks` tasks of consecutive classes.

    The test part is every fifth image of each class, so it is the same everywhere.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the embedded digits need scikit-learn, which is not installed; run: pip install 'hatcl[data]' "
            "(or give data of your own: --tasks, --split or --dataset)"
        ) from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 grey levels over the full range
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::5]] = True
    whole = ImageData("digits", images[~test], labels[~test], images[test], labels[test], num_classes=10)
    return split_classes(whole, num_tasks)


def npz_task(path: str | Path) -> ImageData:
    """A task from an `.npz` file holding `x_train`, `y_train`, `x_test`, `y_test`; it is named after the file, or after
    the folder where the file is called `data.npz`. Labels are remapped to 0, 1, ... in ascending order.

    Raises:
        ConfigError: no such file, or an array is missing.
        IntegrityError: the file is truncated, no `.npz`, or holds pickles where arrays are expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"tasks: {path} is not a file; expected an .npz file with the arrays {', '.join(ARRAYS)}")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ConfigError(f"tasks: {path} holds one array, expected an .npz file with {', '.join(ARRAYS)}")
        with file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                raise ConfigError(
                    f"tasks: {path} lacks {', '.join(missing)}; it holds {', '.join(file.files)}, expected "
                    f"{', '.join(ARRAYS)}"
                )
            arrays = {name: file[name] for name in ARRAYS}
    except ConfigError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"tasks: {path} cannot be read as plain arrays ({error}); expected an .npz file written by numpy.savez "
            "without pickled objects. Write or copy it again"
        ) from error
    name = path.parent.name if path.stem == "data" and path.parent.name else path.stem
    return _relabelled(name, arrays)


def torchvision_task(dataset: str, root: str | Path, *, download: bool = False) -> ImageData:
    """One of torchvision's image classification data sets as a single task.

    Raises:
        ConfigError: torchvision has no such data set, it is not under `root`, or its images differ in size.
    """
    from torchvision import datasets

    known = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if dataset not in known:
        near = nearest(dataset, known)
        raise ConfigError(f"--dataset: torchvision.datasets has no {dataset!r}; did you mean {near!r}?")
    factory = getattr(datasets, dataset)
    accepted = inspect.signature(factory).parameters
    arrays = {}
    for part in ("train", "test"):
        options: dict[str, Any] = {"root": str(root)}
        if "train" in accepted:
            options["train"] = part == "train"
        elif "split" in accepted:
            options["split"] = part
        else:
            raise ConfigError(
                f"--dataset: {dataset} has no training and test part of its own; expected a data set with "
                "train= or split=, or your own arrays with --tasks or --split"
            )
        if "download" in accepted:
            options["download"] = download
        try:
            examples = factory(**options)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"--dataset: {dataset} cannot be loaded from --root {root} ({error}); put its files there or give "
                "--download"
            ) from error
        images, labels = zip(*examples, strict=True)
        arrays[f"x_{part}"] = _stacked(dataset, [np.asarray(image.convert("RGB")) for image in images])
        arrays[f"y_{part}"] = np.asarray(labels)
    return _relabelled(dataset.lower(), arrays)


def split_classes(task: ImageData, num_tasks: int) -> list[ImageData]:
    """`task` cut into `num_tasks` tasks of consecutive classes (the first ones get one more where it does not divide),
    each with its labels remapped to 0, 1, ...

    Raises:
        ConfigError: fewer than two classes would be left for a task.
    """
    if num_tasks == 1:
        return [task]
    if num_tasks < 1 or task.num_classes < 2 * num_tasks:
        raise ConfigError(
            f"--split: {task.name!r} has {task.num_classes} classes, which do not make {num_tasks} tasks of at least "
            f"two classes; expected a number from 1 to {task.num_classes // 2}"
        )
    out = []
    for classes in np.array_split(np.arange(task.num_classes), num_tasks):
        first, last = int(classes[0]), int(classes[-1])
        train = (task.y_train >= first) & (task.y_train <= last)
        test = (task.y_test >= first) & (task.y_test <= last)
        out.append(
            ImageData(
                f"{task.name} {first}-{last}",
                task.x_train[train],
                task.y_train[train] - first,
                task.x_test[test],
                task.y_test[test] - first,
                num_classes=len(classes),
            )
        )
    return out


def _relabelled(name: str, arrays: Mapping[str, np.ndarray]) -> ImageData:
    """A task whose labels are the ranks of the labels met in training."""
    classes = np.unique(arrays["y_train"])
    unknown = np.setdiff1d(arrays["y_test"], classes)
    if len(unknown):
        raise ConfigError(f"task {name!r}: y_test holds labels never seen in y_train: {unknown.tolist()[:10]}")
    labels = {part: np.searchsorted(classes, arrays[part]).astype(np.int64) for part in ("y_train", "y_test")}
    return ImageData(
        name, arrays["x_train"], labels["y_train"], arrays["x_test"], labels["y_test"], num_classes=len(classes)
    )


def _stacked(dataset: str, images: list[np.ndarray]) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ConfigError(
            f"--dataset: the images of {dataset} differ in size (for example {sorted(shapes)[0]} and "
            f"{sorted(shapes)[-1]}); expected one size. Resize them into an .npz file and give it with --tasks"
        )
    return np.stack(images)


# --- from arrays to batches ---


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Turns a task's images into the float tensors N x 3 x size x size that a network takes.

    Values are normalised by the mean and standard deviation of the task's own training images, per channel; grey is
    repeated to three channels. `size` None keeps the images' own size. `fit` is `resize` (bilinear) or `pad` (black
    border; images larger than `size` are resized).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    fit: str = "resize"

    @classmethod
    def of(cls, task: ImageData, *, size: int | None = None, fit: str = "resize") -> Preparation:
        """Measured on `task`. Raises `ConfigError` on an unknown `fit`."""
        if fit not in FITS:
            raise ConfigError(f"--fit: got {fit!r}, expected one of {', '.join(FITS)}")
        images = task.x_train if task.x_train.ndim == 4 else task.x_train[..., None]
        axes = (0, 1, 2)
        mean = images.mean(axes, dtype=np.float64)
        std = images.std(axes, dtype=np.float64)
        std[std == 0] = 1.0  # a channel that never changes
        return cls(tuple(mean.tolist()), tuple(std.tolist()), size, fit)

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Images N x H x W (x C) as a normalised float tensor N x 3 x H x W."""
        x = torch.from_numpy(np.ascontiguousarray(images)).float()
        x = rearrange(x, "n h w -> n 1 h w" if x.ndim == 3 else "n h w c -> n c h w")
        height, width = x.shape[-2:]
        if self.size is not None and (height, width) != (self.size, self.size):
            if self.fit == "pad" and max(height, width) <= self.size:
                top, left = (self.size - height) // 2, (self.size - width) // 2
                x = F.pad(x, (left, self.size - width - left, top, self.size - height - top))  # 0 is black
            else:
                x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)
        return (repeat(x, "n 1 h w -> n c h w", c=3) if x.shape[1] == 1 else x).contiguous()


def shifted(x: Tensor, offsets: Tensor, crop: int) -> Tensor:
    """Each image moved by its offset: its window in the image with `crop` more pixels at each edge.

    Shapes: x: `[N, C, H, W]`. offsets: `[N, 2]`, rows and columns from 0 to 2 * crop.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (crop, crop, crop, crop), mode="replicate")
    places = zip(padded, offsets.tolist(), strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in places])


@dataclass(frozen=True, eq=False)
class Images:
    """Images and labels of one part of a task. Its length is their number; item i is (image, label).

    Args:
        x: `N x H x W` or `N x H x W x C`, or `data.photos.Photos`. y: labels, `[N]`. prepare: makes them a network's
            input, such as a `Preparation`.
    """

    x: Any
    y: np.ndarray
    prepare: Callable[[Any], Tensor]

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


def k_shot_images(images: Images, k: int, seed: int = 0) -> tuple[Images, Images]:
    """K images of each class to learn from and K others, as `data.texts.k_shot` takes texts."""
    keys, labels = [x.tobytes() for x in images.x], images.y.tolist()
    classes = sorted(set(labels))
    first = draw(keys, labels, k, seed, classes, "train")
    taken = {keys[i] for i in first}
    rest = [i for i, key in enumerate(keys) if key not in taken]
    second = draw([keys[i] for i in rest], [labels[i] for i in rest], k, seed, classes, "validation")
    return images.at(torch.tensor(first)), images.at(torch.tensor([rest[i] for i in second]))


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
    task: ImageData,
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
