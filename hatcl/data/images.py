"""Images of tasks: read from scikit-learn, `.npz` files or torchvision, split into tasks, prepared for networks."""

from __future__ import annotations

import dataclasses
import hashlib
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

from ..engine.problems import CLASSES, NUMBERS, check_problem_labels, likely_problem
from ..errors import ConfigError, IntegrityError
from .kinds import NPZ, check_content, file_kind
from .photos import Photos
from .shots import draw, held_out

FITS = ("resize", "pad")
DATA_PARTS = ("train", "test", "validation")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
VALIDATION_ARRAYS = ("x_validation", "y_validation")
# ImageNet's statistics, with which timm's and torchvision's networks are trained; for photos, which are not all read
PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """One training problem as it was read.

    Attributes:
        x_train, x_test, x_validation: images, N x H x W (grey) or N x H x W x C, or `Photos`. y_train, y_test,
            y_validation: their labels, see `hatcl.engine.problems`; for classes 0 .. num_classes - 1. Validation is
                None if the data has none.
        num_classes: the number of classes, labels or numbers that a head predicts.
        classes: the names of the classes or labels, if the data has them. templates: templates of prompts.
        problem: the kind of problem, one of `PROBLEMS`.

    Raises:
        ConfigError: arrays have a wrong shape or type, labels do not fit the problem, or there is only one class or no
            example.
    """

    name: str
    x_train: Any
    y_train: np.ndarray
    x_test: Any
    y_test: np.ndarray
    num_classes: int
    classes: tuple[str, ...] = ()
    problem: str = CLASSES
    x_validation: Any = None
    y_validation: np.ndarray | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in DATA_PARTS if self.y_validation is not None else DATA_PARTS[:2]:
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if not len(x):
                raise ConfigError(f"task {self.name!r} has no images to {part}; is the file or a folder empty?")
            if not isinstance(x, Photos):
                self._check_array(part, x)
            check_problem_labels(f"task {self.name!r}: y_{part}", self.problem, y, len(x), self.num_classes)
        if self.problem == CLASSES and self.num_classes < 2:
            only = f" ({self.classes[0]})" if self.classes else ""
            raise ConfigError(
                f"task {self.name!r} has one class{only}; expected at least 2 classes; add images of another class, "
                "or leave the task out"
            )
        if self.classes and len(self.classes) != self.num_classes:
            raise ConfigError(f"task {self.name!r} has {len(self.classes)} names for {self.num_classes} classes")

    def _check_array(self, part: str, x: np.ndarray) -> None:
        if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)) or x.dtype.kind not in "uif":
            raise ConfigError(
                f"task {self.name!r}: x_{part} is {x.dtype}{list(x.shape)}, expected images as numbers of shape "
                "N x H x W (grey) or N x H x W x C with C = 1 or 3 (channels last)"
            )
        if x.shape[1:] != self.x_train.shape[1:]:
            raise ConfigError(
                f"task {self.name!r}: the training images are {list(self.x_train.shape[1:])}, the {part} images "
                f"{list(x.shape[1:])}; expected the same shape"
            )

    @property
    def photos(self) -> bool:
        """Whether the images are opened when they are used and may have any size."""
        return isinstance(self.x_train, Photos)

    def on_validation(self, share: float = 0.2, seed: int = 0) -> ImageData:
        """The task for choosing options and methods: instead of the test images, which are not used, it tests on the
        data's validation images or, if there are none, on a share of the training images (of each class, if there are
        classes).

        Raises:
            ConfigError: the share is outside [0, 1), or leaves one of the sides without images.
        """
        if self.y_validation is not None:
            return dataclasses.replace(self, x_test=self.x_validation, y_test=self.y_validation)
        strata = self.y_train if self.problem == CLASSES else np.zeros(len(self.y_train), dtype=np.int64)
        kept, out = (ids.numpy() for ids in held_out(strata, share, seed))
        if not len(out):
            raise ConfigError(f"task {self.name!r}: a share of {share} holds out no image of {len(self.y_train)}")
        x, y = self.x_train, self.y_train
        return dataclasses.replace(self, x_train=x[kept], y_train=y[kept], x_test=x[out], y_test=y[out])

    def parts(self) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Name, images and labels of each existing part."""
        for part in DATA_PARTS:
            y = getattr(self, f"y_{part}")
            if y is not None:
                yield part, getattr(self, f"x_{part}"), y

    def of_classes(self, chosen: Sequence[int], name: str) -> ImageData:
        """The task with some of the classes, renumbered in this order.

        Raises:
            ConfigError: the task is not a classification, or a part has no image of these classes.
        """
        if self.problem != CLASSES:
            raise ConfigError(f"task {self.name!r} is a {self.problem}, which has no classes to choose from")
        place = np.full(self.num_classes, -1)
        place[list(chosen)] = np.arange(len(chosen))
        arrays: dict[str, Any] = {}
        for part, x, y in self.parts():
            some = np.flatnonzero(place[y] >= 0)
            arrays |= {f"x_{part}": x[some], f"y_{part}": place[y[some]]}
        names = tuple(self.classes[c] for c in chosen) if self.classes else ()
        return dataclasses.replace(self, name=name, num_classes=len(chosen), classes=names, **arrays)

    def digest(self) -> str:
        """sha256 of the arrays and labels, or for photos of their names and sizes (the images are not read). A resumed
        run compares it to check that the data is the same."""
        out = hashlib.sha256()
        for part, x, y in self.parts():
            if isinstance(x, Photos):
                for i, label in zip(x.ids.tolist(), y.tolist(), strict=True):
                    out.update(f"{x.told(i)} {label}\n".encode())
                continue
            for name, array in ((f"x_{part}", x), (f"y_{part}", y)):
                out.update(f"{name} {array.dtype.str} {array.shape} ".encode())
                out.update(np.ascontiguousarray(array).data)
        return out.hexdigest()


# --- sources of tasks ---


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
            "(or give your own data: --task or --dataset)"
        ) from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 grey levels over the full range
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::5]] = True
    whole = ImageData("digits", images[~test], labels[~test], images[test], labels[test], num_classes=10)
    return split_classes(whole, num_tasks)


def npz_task(path: str | Path, problem: str = CLASSES) -> ImageData:
    """A task from an `.npz` file holding `x_train`, `y_train`, `x_test`, `y_test`, and optionally `x_validation` and
    `y_validation`; it is named after the file, or after the folder if the file is called `data.npz`. Class labels are
    remapped to 0, 1, ... in ascending order.

    Args:
        problem: the meaning of the labels; `auto` = inferred from them.

    Raises:
        ConfigError: the file does not exist, has another format, or lacks an array.
        IntegrityError: the file is truncated, no `.npz`, or holds pickles where arrays are expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"tasks: {path} is not a file; expected an .npz file with the arrays {', '.join(ARRAYS)}")
    check_content(path, NPZ)
    try:
        file = np.load(path, allow_pickle=False)
        with file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                raise ConfigError(
                    f"tasks: {path} lacks {', '.join(missing)}; it holds {', '.join(file.files)}, expected "
                    f"{', '.join(ARRAYS)}"
                )
            held = [name for name in VALIDATION_ARRAYS if name in file.files]
            if len(held) == 1:
                raise ConfigError(f"tasks: {path} holds only {held[0]}, expected {' and '.join(VALIDATION_ARRAYS)}")
            arrays = {name: file[name] for name in (*ARRAYS, *held)}
    except ConfigError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"tasks: {path} cannot be read as plain arrays ({error}); expected an .npz file written by numpy.savez "
            "without pickled objects. Write or copy it again"
        ) from error
    return labelled_images(own_name(path), arrays, problem)


@file_kind(NPZ, ".npz")
def read_npz(path: Path) -> ImageData:
    """Read the arrays as a task, inferring the problem from the labels. Raises the errors of `npz_task`."""
    return npz_task(path, "auto")


def own_name(path: Path) -> str:
    """The name of a file's task: that of the file, or of its folder if the file is called data."""
    name = path.name.split(".")[0]
    return path.parent.name if name == "data" and path.parent.name else name


def split_classes(task: ImageData, num_tasks: int, each: int | None = None) -> list[ImageData]:
    """`task` cut into `num_tasks` tasks of consecutive classes, each with its labels remapped to 0, 1, ...

    Args:
        each: classes per task; further ones are left out. None = use all; if they do not divide evenly, the first tasks
            get one more.

    Raises:
        ConfigError: fewer than two classes would be left for a task, or there are too few.
    """
    if num_tasks == 1 and each is None:
        return [task]
    least = 2 * num_tasks if each is None else each * num_tasks
    if num_tasks < 1 or task.num_classes < least or (each is not None and each < 2):
        raise ConfigError(
            f"--split: {task.name!r} has {task.num_classes} classes, too few for {num_tasks} tasks of "
            f"{'at least two' if each is None or each < 2 else each} classes; expected a number from 1 to "
            f"{task.num_classes // max(each or 2, 2)}"
        )
    numbers = np.arange(task.num_classes if each is None else least)
    return [
        task.of_classes(classes.tolist(), f"{task.name} {classes[0]}-{classes[-1]}")
        for classes in np.array_split(numbers, num_tasks)
    ]


def labelled_images(name: str, arrays: Mapping[str, Any], problem: str = CLASSES) -> ImageData:
    """A task made of arrays as they were read; class labels become their ranks among the training labels.

    Args:
        problem: the meaning of the labels; `auto` = inferred from the training labels.

    Raises:
        ConfigError: labels do not fit the problem, or training lacks one.
    """
    found = dict(arrays)
    labels = {part: found[part] for part in ("y_train", "y_test", "y_validation") if part in found}
    if problem == "auto":
        problem = likely_problem(labels["y_train"])
    if problem != CLASSES:
        flat = problem == NUMBERS
        found |= {part: y[:, None] if flat and y.ndim == 1 else y for part, y in labels.items()}
        width = found["y_train"].shape[1] if found["y_train"].ndim == 2 else 0
        return ImageData(name, num_classes=width, problem=problem, **found)
    classes = np.unique(labels["y_train"])
    for part, y in labels.items():
        unknown = np.setdiff1d(y, classes)
        if len(unknown):
            raise ConfigError(f"task {name!r}: {part} holds labels never seen in y_train: {unknown.tolist()[:10]}")
        whole = np.searchsorted(classes, y).astype(np.int64)
        found[part] = whole if y.dtype.kind in "ui" else y  # `ImageData` reports labels that are no classes
    return ImageData(name, num_classes=len(classes), **found)


# --- from arrays to batches ---


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Turns a task's images into the float tensors N x 3 x size x size that a network takes.

    Values are normalised by the mean and standard deviation of the task's own training images, per channel (for photos,
    ImageNet's); grey is repeated to three channels. `size` None keeps the images' own size. `fit` is `resize`
    (bilinear) or `pad` (black border; larger images are resized, photos within their proportions).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    fit: str = "resize"

    @classmethod
    def of(cls, task: ImageData, *, size: int | None = None, fit: str = "resize") -> Preparation:
        """A preparation with statistics measured on `task`. Raises `ConfigError` for an unknown `fit`."""
        if fit not in FITS:
            raise ConfigError(f"--fit: got {fit!r}, expected one of {', '.join(FITS)}")
        if task.photos:
            if size is None:
                raise ConfigError(
                    f"--size: the images of {task.name!r} differ in size; give the size to resize them to"
                )
            return cls(tuple(255 * v for v in PHOTO_MEAN), tuple(255 * v for v in PHOTO_STD), size, fit)
        images = task.x_train if task.x_train.ndim == 4 else task.x_train[..., None]
        axes = (0, 1, 2)
        mean = images.mean(axes, dtype=np.float64)
        std = images.std(axes, dtype=np.float64)
        std[std == 0] = 1.0  # a constant channel
        return cls(tuple(mean.tolist()), tuple(std.tolist()), size, fit)

    def __call__(self, images: np.ndarray | Photos) -> torch.Tensor:
        """Images N x H x W (x C), or photos, as a normalised float tensor N x 3 x H x W."""
        if isinstance(images, Photos):
            assert self.size is not None  # checked by `of`
            images = images.arrays(self.size, self.fit == "pad")
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
    """Each image shifted by its offset: a window of the image padded with `crop` pixels at each edge.

    Shapes: x: `[N, C, H, W]`. offsets: `[N, 2]`, rows and columns from 0 to 2 * crop.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (crop, crop, crop, crop), mode="replicate")
    places = zip(padded, offsets.tolist(), strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in places])


def rotated(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Images in their four rotations, where each rotation of a class is a separate class. A network that distinguishes
    the rotations should distinguish other tasks' images from its own better (CSI, arXiv 2007.08176; with hard attention
    CLOM, arXiv 2203.09450). It needs a head with four times the classes; the first ones are the answer:

        x, y = rotated(x, y, classes)
        loss = F.cross_entropy(model(x), y) + learning.penalty()
        ...
        model(x)[:, :classes]   # of images as they are

    Args:
        x: `[N, C, H, H]`. y: `[N]`, classes from 0. classes: the number of the task's classes.

    Returns:
        `[4 N, C, H, H]`, all images as they are, then turned by 90, 180 and 270 degrees; `[4 N]`, y + classes * turns.

    Raises:
        ConfigError: the images are not square, or a label is no class and would be taken for a rotation of another.
    """
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ConfigError(
            f"rotate: got labels from {int(y.min())} to {int(y.max())}, expected classes 0 to {classes - 1}"
        )
    if x.shape[-2] != x.shape[-1]:
        raise ConfigError(
            f"rotate: got images of {list(x.shape[-2:])}, whose size a quarter turn changes; resize them to squares"
        )
    return torch.cat([x.rot90(k, (-2, -1)) for k in range(4)]), torch.cat([y + classes * k for k in range(4)])


@dataclass(frozen=True, eq=False)
class Images:
    """Images and labels of one part of a task. Its length is their number; item i is (image, label).

    Args:
        x: `N x H x W` or `N x H x W x C`, or `data.photos.Photos`. y: labels, `[N]`. prepare: turns them into a
            network's input, such as a `Preparation`.
    """

    x: Any
    y: np.ndarray
    prepare: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.prepare(self.x[i : i + 1])[0], int(self.y[i])

    def at(self, ids: Tensor) -> Images:
        """The images and labels at these indices."""
        return dataclasses.replace(self, x=self.x[ids.numpy()], y=self.y[ids.numpy()])

    def batches(self, size: int, *, shuffle: bool = False) -> ImageBatches:
        """Batches of nearly equal size, at most `size`."""
        return ImageBatches(self, size, shuffle)


def k_shot_images(images: Images, k: int, seed: int = 0) -> tuple[Images, Images]:
    """K images of each class for training and K others for validation, as `data.texts.k_shot` does for texts."""
    keys, labels = [x.tobytes() for x in images.x], images.y.tolist()
    classes = sorted(set(labels))
    first = draw(keys, labels, k, seed, classes, "train")
    taken = {keys[i] for i in first}
    rest = [i for i, key in enumerate(keys) if key not in taken]
    second = draw([keys[i] for i in rest], [labels[i] for i in rest], k, seed, classes, "validation")
    return images.at(torch.tensor(first)), images.at(torch.tensor([rest[i] for i in second]))


class ImageBatches:
    """Batches of (inputs, labels), in order or in an order drawn for each pass from torch's global generator, which
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
    """The preparation of a task's images for a timm model.

    Args:
        cfg: the model's `pretrained_cfg`. size: resize images to it; 0 keeps their own, None takes the model's, which
        is `image_size` if it was made with one. fit: `resize` or `pad`.
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
