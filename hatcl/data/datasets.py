"""Data sets by their names, in the user's own copy: the eight of task arithmetic, CIFAR, and folders of classes.

Each is looked for as torchvision lays it out and, where the repositories of task vectors and aTLAS have a layout of
their own, in that (which comes first where both are there).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, nearest
from .images import npz_task, torchvision_task
from .photos import PhotoData, Photos
from .prompts import CLASS_NAMES, TEMPLATES

Labelled = tuple[Sequence[Path], Sequence[int]]
FoundParts = tuple[Labelled, Labelled, Sequence[str]]  # to learn from, to test on, and the names of the classes
ARRAYS_OF = {"mnist": "MNIST", "svhn": "SVHN", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FOLDERS = ("train", ("test", "val"))
SPLIT_SEED = 0  # of data sets that come in one piece
TESTED = 0.1  # their share of each class that is tested on: 270 of 2,700 images of EuroSAT, as in aTLAS


def read_images(where: str | Path) -> Any:
    """A task of images: an `.npz` file (`npz_task`), `DATASET@ROOT`, or a folder with `train/` and `test/` (or `val/`)
    and in these a folder for each class.

    Returns:
        `ImageData` or `PhotoData`: both have x_train, y_train, x_test, y_test, num_classes, name and digest().

    Raises:
        ConfigError: an unknown data set, or one that is not there. IntegrityError: a file that cannot be read.
    """
    text = str(where)
    name, at, root = text.partition("@")
    if not at or Path(text).exists():
        return _folder(Path(text)) if Path(text).is_dir() else npz_task(text)
    name, root = name.lower(), str(Path(root).expanduser())  # no shell does so behind an @
    if name in ARRAYS_OF:
        own = Path(root) / name  # where the repositories have SVHN
        try:
            return torchvision_task(ARRAYS_OF[name], own if name == "svhn" and own.is_dir() else root)
        except ConfigError as error:
            why = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"{text}: torchvision.datasets.{ARRAYS_OF[name]} is not in {root} ({why})") from error
    if name not in PHOTOS_OF:
        known = (*PHOTOS_OF, *ARRAYS_OF)
        raise ConfigError(f"{text}: no data set {name!r}; did you mean {nearest(name, known)!r}? Of {', '.join(known)}")
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
    """The data set's name that a text for `read_images` has in it, or that the file or folder is called."""
    text = str(where)
    name, at, _ = text.partition("@")
    path = Path(text)
    return name.lower() if at else (path.parent.name if path.stem == "data" else path.stem).lower()


def names_inside(where: str | Path, task: Any) -> tuple[str, ...]:
    """The names of the classes that the images come with: those of a data set or of folders, or the array `classes` of
    texts in an `.npz` file; empty where they come with none."""
    own: tuple[str, ...] = getattr(task, "classes", ())
    if own or Path(where).suffix != ".npz":
        return own
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
    name: str, train: Labelled, test: Labelled, classes: Sequence[str], templates: tuple[str, ...] = ()
) -> PhotoData:
    labels = [np.asarray(part[1], dtype=np.int64) for part in (train, test)]
    most = max((int(y.max()) for y in labels if len(y)), default=0)
    if most >= len(classes):
        raise ConfigError(f"{name}: has labels up to {most} and {len(classes)} classes; are folders missing?")
    return PhotoData(name, Photos(train[0]), labels[0], Photos(test[0]), labels[1], tuple(classes), templates)


# ---- folders of classes ----------------------------------------------------------------------------------------------


def _folder(path: Path) -> PhotoData:
    """A folder with a part to learn from and one to test on."""
    parts = _published(path)
    if parts is None:
        raise ConfigError(
            f"{path}: has no folders train/ and test/ (or val/) with a folder for each class in them; for a data set "
            f"by its name write NAME@{path}"
        )
    train, test, classes = parts
    return _photo_data(path.name, train, test, [c.replace("_", " ") for c in classes])


def _published(path: Path) -> FoundParts | None:
    """The two parts of a folder and the names of the folders of classes; None where there are none."""
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
        raise ConfigError(f"{error}: expected {path} with a folder for each class in it") from error
    return _of(found.samples), found.classes


def _of(samples: Sequence[tuple[Any, int]]) -> Labelled:
    return [Path(path) for path, _ in samples], [int(label) for _, label in samples]


# ---- data sets -------------------------------------------------------------------------------------------------------


def _cars(root: Path) -> FoundParts:
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(str(root), split=part) for part in ("train", "test"))
    return _of(train._samples), _of(test._samples), train.classes


def _dtd(root: Path) -> FoundParts:
    """The first of the ten partitions: two of its three parts to learn from, as published."""
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
    """Its folders are in the order of the names in `CLASS_NAMES`. Where it comes in one piece, `TESTED` of each class
    is tested on."""
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
    """Of each class a share, by a seed that is always the same."""
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
                f"resisc45: {missing[0]} is in no folder of a class in {folder / 'NWPU-RESISC45'} ({len(missing)} such "
                "files); the archive's files lie in one folder each class, move them there"
            )
        train, test = (_samples_at(samples, sorted(at[name] for name in names)) for names in listed)
        parts = train, test, classes
    return *parts[:2], [c.replace("_", " ") for c in parts[2]]


def _sun397(root: Path) -> FoundParts:
    """torchvision's `SUN397/` with the lists `Training_01.txt` and `Testing_01.txt` of the data set's page in it (the
    first of ten partitions, as published); or the repositories' `sun397/train` and `sun397/val`."""
    parts = _published(root / "sun397")
    if parts is not None:  # their folders are called a_abbey
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
"""Data set -> what finds its files under a root."""
