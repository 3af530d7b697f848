"""Data sets by their names, in the user's own copy: the eight of task arithmetic, CIFAR, and folders of classes.

Each is searched in torchvision's layout and in that of the repositories of task vectors and aTLAS, if they have their
own, which comes first if both exist.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, nearest
from .images import DATA_PARTS, ImageData, labelled_images, npz_task
from .photos import Photos
from .prompts import CLASS_NAMES, TEMPLATES

Labelled = tuple[Sequence[Path], Sequence[int]]
FoundParts = tuple[Labelled, Labelled, Sequence[str]]  # training part, test part, and the names of the classes
ARRAYS_OF = {"mnist": "MNIST", "svhn": "SVHN", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FOLDERS = ("train", ("test", "val"))
SPLITS = {"validation": "val"}  # torchvision's name
SPLIT_SEED = 0  # for data sets without parts
TESTED = 0.1  # the share of each class that tests them: 270 of 2,700 images of EuroSAT, as in aTLAS


def read_images(where: str | Path) -> ImageData:
    """A task of images: an `.npz` file (`npz_task`), `DATASET@ROOT`, or a folder with `train/` and `test/` (or `val/`),
    each with one folder per class.

    Returns:
        `ImageData`: arrays for an `.npz` file, CIFAR, SVHN or MNIST, else photos.

    Raises:
        ConfigError: the data set is unknown or missing. IntegrityError: a file cannot be read.
    """
    text = str(where)
    name, at, root = text.partition("@")
    if not at or Path(text).exists():
        return _folder(Path(text)) if Path(text).is_dir() else npz_task(text)
    name, root = name.lower(), str(Path(root).expanduser())  # a shell does not expand ~ after an @
    if name in ARRAYS_OF:
        own = Path(root) / name  # the repositories' place for SVHN
        try:
            return torchvision_task(ARRAYS_OF[name], own if name == "svhn" and own.is_dir() else root)
        except ConfigError as error:
            why = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"{text}: torchvision.datasets.{ARRAYS_OF[name]} is not in {root} ({why})") from error
    if name not in PHOTOS_OF:
        known = (*PHOTOS_OF, *ARRAYS_OF)
        raise ConfigError(
            f"{text}: no data set {name!r}; did you mean {nearest(name, known)!r}? Known are {', '.join(known)}"
        )
    try:
        train, test, classes = PHOTOS_OF[name](Path(root))
    except ConfigError:
        raise
    except (RuntimeError, OSError, KeyError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{text}: {name} cannot be read from {root} ({str(error).splitlines()[0]}); expected the layout of "
            "torchvision.datasets, or that of the repositories of task vectors"
        ) from error
    return _photo_data(name, train, test, CLASS_NAMES.get(name, classes), TEMPLATES[name])


def data_name(where: str | Path) -> str:
    """The name of the data set in a text for `read_images`, or the name of the file or folder."""
    text = str(where)
    name, at, _ = text.partition("@")
    path = Path(text)
    return name.lower() if at else (path.parent.name if path.stem == "data" else path.stem).lower()


def names_inside(where: str | Path, task: ImageData) -> tuple[str, ...]:
    """The class names that the images come with: from a data set, from folders, or from the array `classes` of texts in
    an `.npz` file; empty if there are none."""
    if task.classes or Path(where).suffix != ".npz":
        return task.classes
    with np.load(where, allow_pickle=False) as file:
        found = file["classes"] if "classes" in file.files else np.empty(0, dtype="U1")
    return tuple(found.tolist()) if found.dtype.kind == "U" else ()


def absolute_images(where: str | Path) -> str:
    """The text for `read_images` with its path made absolute."""
    name, at, root = str(where).partition("@")
    return (
        f"{name}@{Path(root).expanduser().absolute()}"
        if at and not Path(where).exists()
        else str(Path(where).absolute())
    )


def _photo_data(
    name: str,
    train: Labelled,
    test: Labelled,
    classes: Sequence[str],
    templates: tuple[str, ...] = (),
    validation: Labelled | None = None,
) -> ImageData:
    parts = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    labels = {part: np.asarray(y, dtype=np.int64) for part, (_, y) in parts.items()}
    most = max((int(y.max()) for y in labels.values() if len(y)), default=0)
    if most >= len(classes):
        raise ConfigError(f"{name} has labels up to {most} but {len(classes)} classes; are folders missing?")
    arrays: dict[str, Any] = {f"x_{part}": Photos(paths) for part, (paths, _) in parts.items()}
    arrays |= {f"y_{part}": y for part, y in labels.items()}
    return ImageData(name, num_classes=len(classes), classes=tuple(classes), templates=templates, **arrays)


# ---- torchvision ----


def torchvision_task(dataset: str, root: str | Path, *, download: bool = False) -> ImageData:
    """One of torchvision's image classification data sets as a single task, including its validation part if it has
    one. Images of one size become an array, others are opened when they are used.

    Raises:
        ConfigError: torchvision has no such data set, or it is not under `root`.
    """
    from torchvision import datasets

    known = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if dataset not in known:
        near = nearest(dataset, known)
        raise ConfigError(f"--dataset: torchvision.datasets has no {dataset!r}; did you mean {near!r}?")
    factory = getattr(datasets, dataset)
    accepted = inspect.signature(factory).parameters
    if not {"train", "split"} & set(accepted):
        raise ConfigError(
            f"--dataset: {dataset} has no separate training and test parts; expected a data set with train= or "
            "split=, or your own folder with --task"
        )
    arrays: dict[str, Any] = {}
    for part in DATA_PARTS if "split" in accepted else DATA_PARTS[:2]:
        options: dict[str, Any] = {"root": str(root)}
        options |= {"train": part == "train"} if "train" in accepted else {"split": SPLITS.get(part, part)}
        if "download" in accepted:
            options["download"] = download
        try:
            examples = factory(**options)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            if part == "validation":  # few data sets have one
                continue
            raise ConfigError(
                f"--dataset: {dataset} cannot be loaded from --root {root} ({error}); put its files there or give "
                "--download"
            ) from error
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _images_of(examples)
    if any(isinstance(x, Photos) for x in arrays.values()):
        arrays = {
            n: Photos([*map(_picture, x)]) if isinstance(x, np.ndarray) and n[0] == "x" else x
            for n, x in arrays.items()
        }
    return labelled_images(dataset.lower(), arrays)


class _Examples(Sequence[Any]):
    """The images of a torchvision data set, opened when they are indexed."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: Any) -> Any:
        return self.examples[i][0]


def _images_of(examples: Any) -> tuple[Any, np.ndarray]:
    """Images and labels of a data set; the images are an array if all have one size."""
    arrays: list[np.ndarray] | None = []
    labels = []
    for image, label in examples:
        labels.append(label)
        if arrays is not None:
            arrays.append(np.asarray(image.convert("RGB")))
            arrays = arrays if arrays[-1].shape == arrays[0].shape else None
    return Photos(_Examples(examples)) if arrays is None else np.stack(arrays), np.asarray(labels)


def _picture(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(array)


# ---- folders of classes ----------------------------------------------------------------------------------------------


def _folder(path: Path) -> ImageData:
    """A folder with a training and a test part (and a validation part if it has both `val` and `test`), or with only
    one folder per class, where a tenth of each class becomes the test part."""
    parts = _published(path)
    if parts is None:
        parts = _one_piece(path)
    if parts is None:
        raise ConfigError(
            f"{path} has no folders train/ and test/ (or val/) with one folder per class, and no folders of images; "
            f"for a data set by its name write NAME@{path}"
        )
    train, test, classes = parts
    validation = None
    if all((path / part).is_dir() for part in FOLDERS[1]):
        validation, named = _classes_in(path / FOLDERS[1][1])
        if list(named) != list(classes):
            raise ConfigError(f"{path}: train/ and val/ differ in the folders of classes")
    return _photo_data(path.name, train, test, [c.replace("_", " ") for c in classes], validation=validation)


def _one_piece(path: Path) -> FoundParts | None:
    """The parts of a folder that has one folder per class; None if these have no images."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    inside = [folder for folder in path.iterdir() if folder.is_dir()]
    if not any(file.suffix.lower() in IMG_EXTENSIONS for folder in inside for file in folder.iterdir()):
        return None
    samples, classes = _classes_in(path)
    return *_cut_by_class(samples), classes


def _published(path: Path) -> FoundParts | None:
    """The two parts of a folder and the names of its class folders; None if there are none."""
    test = next((path / n for n in FOLDERS[1] if (path / n).is_dir()), None)
    if test is None or not (path / FOLDERS[0]).is_dir():
        return None
    (train, classes), (held, others) = _classes_in(path / FOLDERS[0]), _classes_in(test)
    if classes != others:
        raise ConfigError(
            f"{path}: train/ and {test.name}/ differ in the folders of classes: {sorted({*classes} ^ {*others})[:5]}"
        )
    return train, held, classes


def _classes_in(path: Path) -> tuple[Labelled, list[str]]:
    """Files, labels and classes of a folder of folders."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(path), allow_empty=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: expected {path} to have one folder per class") from error
    return _of(found.samples), found.classes


def _of(samples: Sequence[tuple[Any, int]]) -> Labelled:
    return [Path(path) for path, _ in samples], [int(label) for _, label in samples]


# ---- data sets -------------------------------------------------------------------------------------------------------


def _cars(root: Path) -> FoundParts:
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(str(root), split=part) for part in ("train", "test"))
    return _of(train._samples), _of(test._samples), train.classes


def _dtd(root: Path) -> FoundParts:
    """The first of the ten partitions; two of its three parts are for training, as published."""
    parts = _published(root / "dtd")
    if parts is not None:
        return parts
    from torchvision.datasets import DTD

    made = [DTD(str(root), split=part) for part in ("train", "val", "test")]
    if len({tuple(m.classes) for m in made}) > 1:
        raise ConfigError(f"dtd: its three parts in {root} differ in their classes")
    train, val, test = [(m._image_files, m._labels) for m in made]
    return ([*train[0], *val[0]], [*train[1], *val[1]]), test, made[0].classes


def _eurosat(root: Path) -> FoundParts:
    """Its folders are in the order of the names in `CLASS_NAMES`. If it has no parts, the share `TESTED` of each class
    becomes the test part."""
    parts = _published(root / "EuroSAT_splits")
    if parts is None:
        from torchvision.datasets import EuroSAT

        whole = EuroSAT(str(root))
        parts = (*_cut_by_class(_of(whole.samples)), whole.classes)
    if len(parts[2]) != len(CLASS_NAMES["eurosat"]):
        raise ConfigError(
            f"eurosat: there are {len(parts[2])} folders of classes, expected {len(CLASS_NAMES['eurosat'])}"
        )
    return parts


def _cut_by_class(samples: Labelled) -> tuple[Labelled, Labelled]:
    """Cut off a share of each class, always by the same seed."""
    labels = np.asarray(samples[1])
    tested = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        of_class = np.flatnonzero(labels == c)
        order = np.random.default_rng([SPLIT_SEED, int(c)]).permutation(of_class)
        tested[order[: max(1, round(TESTED * len(of_class)))]] = True
    train, test = (np.flatnonzero(at).tolist() for at in (~tested, tested))
    return _samples_at(samples, train), _samples_at(samples, test)


def _samples_at(samples: Labelled, ids: Sequence[int]) -> Labelled:
    return [samples[0][i] for i in ids], [samples[1][i] for i in ids]


def _gtsrb(root: Path) -> FoundParts:
    from torchvision.datasets import GTSRB

    train, test = (GTSRB(str(root), split=part) for part in ("train", "test"))
    return _of(train._samples), _of(test._samples), CLASS_NAMES["gtsrb"]


def _resisc45(root: Path) -> FoundParts:
    """`resisc45/NWPU-RESISC45/CLASS/*.jpg` and `resisc45/resisc45-{train,test}.txt` with the names of their files; or
    `resisc45/train` and `resisc45/test`."""
    folder = root / "resisc45"
    parts = _published(folder)
    if parts is None:
        samples, classes = _classes_in(folder / "NWPU-RESISC45")
        listed = [set((folder / f"resisc45-{part}.txt").read_text().split()) for part in ("train", "test")]
        at = {p.name: i for i, p in enumerate(samples[0])}
        missing = sorted(name for names in listed for name in names if name not in at)
        if missing:
            raise ConfigError(
                f"resisc45: {missing[0]} is in no class folder of {folder / 'NWPU-RESISC45'} ({len(missing)} such "
                "files); move the archive's files into one folder per class"
            )
        train, test = (_samples_at(samples, sorted(at[name] for name in names)) for names in listed)
        parts = train, test, classes
    return *parts[:2], [c.replace("_", " ") for c in parts[2]]


def _sun397(root: Path) -> FoundParts:
    """torchvision's `SUN397/` with the lists `Training_01.txt` and `Testing_01.txt` from the data set's page (the first
    of ten partitions, as published); or the repositories' `sun397/train` and `sun397/val`."""
    parts = _published(root / "sun397")
    if parts is not None:  # their folders have names such as a_abbey
        return *parts[:2], [c[2:].replace("_", " ") for c in parts[2]]
    folder = root / "SUN397"
    classes = (folder / "ClassName.txt").read_text().split()
    index = {c: i for i, c in enumerate(classes)}
    found: list[Labelled] = []
    for name in ("Training_01.txt", "Testing_01.txt"):
        files = (folder / name).read_text().split()
        paths = [folder / file.lstrip("/") for file in files]
        found.append((paths, [index[file.rpartition("/")[0]] for file in files]))
    return found[0], found[1], [re.sub("[_/]", " ", c[3:]) for c in classes]


PHOTOS_OF: dict[str, Callable[[Path], FoundParts]] = {
    "cars": _cars,
    "dtd": _dtd,
    "eurosat": _eurosat,
    "gtsrb": _gtsrb,
    "resisc45": _resisc45,
    "sun397": _sun397,
}
"""Data set -> the function that finds its files under a root."""
