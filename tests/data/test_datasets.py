"""Data sets by their names, in made-up folders as torchvision and the repositories lay them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hatcl.data.datasets import (
    ARRAYS_OF,
    PHOTOS_OF,
    absolute_images,
    data_name,
    names_inside,
    read_images,
    torchvision_task,
)
from hatcl.data.prompts import CLASS_NAMES, TEMPLATES
from hatcl.errors import ConfigError

CLASSES = {"dtd": ["banded", "dotted"], "resisc45": ["airplane", "sea_ice"]}
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
           "Residential", "River", "SeaLake"]  # fmt: skip


def put(path: Path, value: int) -> Path:
    """An image whose grey value tells what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.full((6, 9, 3), value, dtype=np.uint8))
    image.save(path, quality=100) if path.suffix == ".jpg" else image.save(path)
    return path


def folders(root: Path, classes: list[str], parts=("train", "test"), count: int = 2) -> None:
    for part in parts:
        for c, name in enumerate(classes):
            for i in range(count):
                put(root / part / name / f"{i}.png", 20 * c)


def cars(root: Path) -> None:
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General", "Audi_S4"], dtype=object)})
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros(3, dtype=[("fname", object), ("class", object)])
        for i, c in enumerate((0, 1, 1)):
            rows[i] = (put(base / f"cars_{part}" / f"{i}.jpg", 20 * c).name, c + 1)
        savemat(base / file, {"annotations": rows})


def dtd(root: Path) -> None:
    for part in ("train", "val", "test"):
        lines = []
        for c, name in enumerate(CLASSES["dtd"]):
            lines.append(f"{name}/{part}{c}.jpg")
            put(root / "dtd" / "dtd" / "images" / lines[-1], 20 * c)
        labels = root / "dtd" / "dtd" / "labels"
        labels.mkdir(parents=True, exist_ok=True)
        (labels / f"{part}1.txt").write_text("\n".join(lines) + "\n")


def eurosat(root: Path) -> None:
    folders(root / "eurosat", EUROSAT, ["2750"], 3)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    rows = ["Filename;ClassId"]
    for c in range(43):
        put(base / "GTSRB" / "Training" / f"{c:05d}" / "0.ppm", 5 * c)
        rows.append(f"{put(base / 'GTSRB' / 'Final_Test' / 'Images' / f'{c}.ppm', 5 * c).name};{c}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def resisc45(root: Path) -> None:
    base = root / "resisc45"
    for part in ("train", "test", "val"):
        names = []
        for c, name in enumerate(CLASSES["resisc45"]):
            names.append(put(base / "NWPU-RESISC45" / name / f"{name}_{part}.jpg", 20 * c).name)
        (base / f"resisc45-{part}.txt").write_text("\n".join(names) + "\n")


def sun397(root: Path) -> None:
    base, classes = root / "SUN397", ["/a/abbey", "/a/apartment_building/outdoor"]
    for part in ("Training", "Testing"):
        lines = []
        for c, name in enumerate(classes):
            lines.append(f"{name}/sun_{part}.jpg")
            put(base / lines[-1].lstrip("/"), 20 * c)
        (base / f"{part}_01.txt").write_text("\n".join(lines) + "\n")
    (base / "ClassName.txt").write_text("\n".join(classes) + "\n")


NAMES = {
    "cars": ("AM General", "Audi_S4"),
    "dtd": ("banded", "dotted"),
    "eurosat": CLASS_NAMES["eurosat"],
    "gtsrb": CLASS_NAMES["gtsrb"],
    "resisc45": ("airplane", "sea ice"),
    "sun397": ("abbey", "apartment building outdoor"),
}
# data set -> how many to learn from and to test on, of the folders above
COUNTS = {"cars": (3, 3), "dtd": (4, 2), "eurosat": (20, 10), "gtsrb": (43, 43), "resisc45": (2, 2), "sun397": (2, 2)}
STEPS = {"gtsrb": 5}


@pytest.mark.parametrize("name", PHOTOS_OF)
def test_each_is_read_as_torchvision_lays_it_out(tmp_path, name):
    globals()[name](tmp_path)
    task = read_images(f"{name.upper()}@{tmp_path}")
    assert (task.name, task.classes, task.templates) == (name, NAMES[name], TEMPLATES[name])
    assert (len(task.x_train), len(task.x_test)) == COUNTS[name]
    for photos, labels in ((task.x_train, task.y_train), (task.x_test, task.y_test)):
        seen = [int(np.asarray(p)[0, 0, 0]) for p in photos]
        assert seen == [STEPS.get(name, 20) * c for c in labels]  # every image has its own class's value
    train, test = ({p.paths[i] for i in p.ids} for p in (task.x_train, task.x_test))
    assert not train & test


@pytest.mark.parametrize(
    ("name", "folder", "classes", "names", "test"),
    [
        ("dtd", "dtd", ["banded", "dotted"], ("banded", "dotted"), "val"),
        ("eurosat", "EuroSAT_splits", EUROSAT, CLASS_NAMES["eurosat"], "test"),
        ("resisc45", "resisc45", ["airplane", "sea_ice"], ("airplane", "sea ice"), "test"),
        ("sun397", "sun397", ["a_abbey", "b_bar_outdoor"], ("abbey", "bar outdoor"), "val"),
    ],
)
def test_each_is_read_as_the_repositories_lay_it_out(tmp_path, name, folder, classes, names, test):
    folders(tmp_path / folder, classes, ("train", test))
    task = read_images(f"{name}@{tmp_path}")
    assert task.classes == names and task.templates == TEMPLATES[name]
    assert task.y_train.tolist() == task.y_test.tolist() == sorted(2 * list(range(len(classes))))


def test_eurosat_is_cut_the_same_each_time_and_by_class(tmp_path):
    eurosat(tmp_path)
    one, two = (read_images(f"eurosat@{tmp_path}") for _ in range(2))
    assert one.digest() == two.digest() and sorted(one.y_test.tolist()) == list(range(10))


def test_a_folder_of_classes(tmp_path):
    folders(tmp_path / "pets", ["a_cat", "dog"], ("train", "val"))
    task = read_images(tmp_path / "pets")
    assert (task.name, task.classes, task.templates) == ("pets", ("a cat", "dog"), ())
    put(tmp_path / "pets" / "val" / "bird" / "0.png", 1)
    with pytest.raises(ConfigError, match=r"train/ and val/ differ in the folders of classes: \['bird'\]"):
        read_images(tmp_path / "pets")
    with pytest.raises(ConfigError, match=r"has no folders train/ and test/ .* write NAME@"):
        read_images(tmp_path)
    (tmp_path / "pets" / "test").mkdir()
    with pytest.raises(ConfigError, match="Couldn't find any class folder .*: expected .*test to have one folder per"):
        read_images(tmp_path / "pets")


def test_svhn_and_mnist_are_arrays(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import MNIST, SVHN

    (tmp_path / "svhn").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / "svhn" / f"{part}_32x32.mat", {"X": x, "y": np.arange(1, 11)[:, None]})
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)  # it knows the digests of the real files
    task = read_images(f"svhn@{tmp_path}")
    assert task.y_train.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] and np.array_equal(task.x_train[0], x[..., 0])

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images = np.full((n, 28, 28), 7, dtype=np.uint8)
        head = [np.array([0, 0, 8, 3], dtype=np.uint8).tobytes(), np.array([n, 28, 28], dtype=">i4").tobytes()]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"".join(head) + images.tobytes())
        head = [np.array([0, 0, 8, 1], dtype=np.uint8).tobytes(), np.array([n], dtype=">i4").tobytes()]
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(head) + labels.tobytes())
    assert len(MNIST(str(tmp_path), train=False)) == 10
    task = read_images(f"mnist@{tmp_path}")
    assert task.num_classes == 10 and task.x_train.shape == (20, 28, 28, 3) and bool((task.x_train == 7).all())


@pytest.mark.parametrize("name", [*PHOTOS_OF, *ARRAYS_OF])
def test_what_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"(^{name}@|: expected .*){tmp_path}"):
        read_images(f"{name}@{tmp_path}")


def test_unknown_names_and_broken_folders(tmp_path):
    with pytest.raises(ConfigError, match="no data set 'dtt'; did you mean 'dtd'"):
        read_images(f"dtt@{tmp_path}")
    folders(tmp_path / "EuroSAT_splits", EUROSAT[:3])
    with pytest.raises(ConfigError, match="eurosat: there are 3 folders of classes, expected 10"):
        read_images(f"eurosat@{tmp_path}")
    dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "val1.txt").write_text("banded/val0.jpg\n")
    with pytest.raises(ConfigError, match="dtd: its three parts in .* differ in their classes"):
        read_images(f"dtd@{tmp_path}")
    resisc45(tmp_path)
    (tmp_path / "resisc45" / "NWPU-RESISC45" / "airplane" / "airplane_test.jpg").unlink()
    with pytest.raises(ConfigError, match="resisc45: airplane_test.jpg is in no class folder of .*1 such files"):
        read_images(f"resisc45@{tmp_path}")
    gtsrb(tmp_path)
    with (tmp_path / "gtsrb" / "GT-final_test.csv").open("a") as file:
        file.write("0.ppm;43\n")
    with pytest.raises(ConfigError, match="gtsrb has labels up to 43 but 43 classes"):
        read_images(f"gtsrb@{tmp_path}")


def test_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_images("dtd@~/data") == f"dtd@{tmp_path / 'home' / 'data'}"
    folders(tmp_path / "home" / "dtd", ["banded", "dotted"], ("train", "val"))
    assert len(read_images("dtd@~").x_test) == 4
    assert absolute_images("dtd@data") == f"dtd@{tmp_path / 'data'}" and absolute_images("a.npz") == f"{tmp_path}/a.npz"
    names = [data_name(w) for w in ("DTD@/x", "some/mnist.npz", "some/mnist/data.npz", "data/pets")]
    assert names == ["dtd", "mnist", "mnist", "pets"]
    x, y = np.zeros((2, 4, 4), dtype=np.uint8), np.arange(2)
    np.savez("a.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(["cat", "dog"]))
    np.savez("b.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=y)
    np.savez("c.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert [names_inside(w, read_images(w)) for w in ("a.npz", "b.npz", "c.npz")] == [("cat", "dog"), (), ()]
    with pytest.raises(ConfigError, match="none.npz is not a file; expected an .npz"):
        read_images("none.npz")


def test_torchvision_from_a_folder_and_its_errors(tmp_path, monkeypatch):
    from torchvision import datasets

    class Tiny:
        def __init__(self, root, train=True, download=False):
            if not download and not (Path(root) / "here").exists():
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            self.count = 8 if train else 4

        def __iter__(self):
            return iter([(Image.new("L", (8, 8), 10 * i), i % 4) for i in range(self.count)])

    monkeypatch.setattr(datasets, "MNIST", Tiny)
    with pytest.raises(ConfigError, match="Dataset not found.*put its files there or give --download"):
        torchvision_task("MNIST", tmp_path)
    (tmp_path / "here").touch()
    task = torchvision_task("MNIST", tmp_path)
    assert task.x_train.shape == (8, 8, 8, 3) and task.num_classes == 4 and task.name == "mnist"
    with pytest.raises(ConfigError, match="has no 'CIFAR1000'; did you mean 'CIFAR100'"):
        torchvision_task("CIFAR1000", tmp_path)
