"""Where the data of tasks is, and what is there: one function reads them all.

FILE            by the end of its name, see `FILE_KINDS`: .npz, .csv, .tsv, .json, .jsonl, .parquet
FOLDER          images in a folder for each class, in train/ and test/ or val/ or in one piece; tables of parts
                (train.csv, test.csv); what `datasets` saves
NAME@FOLDER     a data set of torchvision that lies there, such as CIFAR100@data
hf:NAME         a data set on Hugging Face's hub; hf:NAME:CONFIG with one of its configurations
digits          scikit-learn's
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Changeable, known_options, one_of
from ..engine.problems import PROBLEMS
from ..errors import ConfigError
from .datasets import ARRAYS_OF, PHOTOS_OF, absolute_images, data_name, read_images, torchvision_task
from .image_tables import images_of
from .images import ImageData, digits_tasks, npz_task, own_name, split_classes
from .pairs import text_form
from .records import ROLES, Records, is_table_folder, read_beside, read_folder, read_hub
from .texts import TextData, texts_of

HUB, DIGITS, AUTO = "hf:", "digits", "auto"
IMAGE_COLUMNS = ("image", "img")  # those of no other meaning

Task = TextData | ImageData


@dataclass(frozen=True)
class DataOptions(Changeable):
    """What is what in data.

    Args:
        column: ROLE=NAME, the column of a table for a role: text, text2, image, label, task, split, messages,
            instruction, input or output; a label of several columns has commas between them. Repeatable; columns with
            the usual names are found.
        problem: classification, multilabel (several labels for an image), regression, or `auto`: what the labels look
            like.

    Raises:
        ConfigError: a role or a problem that there is not.
    """

    column: Mapping[str, str] = field(default_factory=dict)
    problem: str = AUTO

    def __post_init__(self) -> None:
        one_of("problem", self.problem, [AUTO, *PROBLEMS])
        if not isinstance(self.column, Mapping):
            raise ConfigError(f"column: got {self.column!r}, expected a mapping from roles to names of columns")
        for role in self.column:
            one_of("column", role, list(ROLES))


@dataclass(frozen=True)
class TaskPlace:
    """One task as it is asked for, or several where a table has a column `task`.

    Args:
        data: where it is, see above. name: of the task; "" = as the data is called. classes: those of its classes that
            are learned, in this order, by name (or by number where they have none); empty = all. column, problem: see
            `DataOptions`, over those of the run.

    Raises:
        ConfigError: as `DataOptions`.
    """

    data: str
    name: str = ""
    classes: tuple[str, ...] = ()
    column: Mapping[str, str] = field(default_factory=dict)
    problem: str = AUTO

    def __post_init__(self) -> None:
        DataOptions(self.column, self.problem)
        if isinstance(self.classes, str) or not isinstance(self.classes, Sequence):
            raise ConfigError(f"classes of {self.name or self.data}: got {self.classes!r}, expected a list of names")
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))

    @classmethod
    def parsed(cls, text: str) -> TaskPlace:
        """Of `[NAME=]PLACE`, or of a JSON object with the fields.

        Raises:
            ConfigError: something else, with the nearest field.
        """
        if text.startswith("{"):
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--task: {text!r} cannot be read as JSON ({error})") from error
            known_options(cls, fields)
            if not isinstance(fields.get("data"), str):
                raise ConfigError(f"--task: {text!r} has no data; expected a file, a folder, NAME@FOLDER or hf:NAME")
            return cls(**fields)
        name, equals, rest = text.partition("=")
        if equals and not Path(text).exists():
            if not name or not rest:
                raise ConfigError(f"--task: got {text!r}, expected NAME=FILE")
            return cls(rest, name)
        return cls(text)

    def absolute(self) -> TaskPlace:
        """With its path made absolute."""
        there = self.data if self.data.startswith(HUB) or self.data == DIGITS else absolute_images(self.data)
        return dataclasses.replace(self, data=there, name=self.name or self.own_name)

    def written(self) -> str:
        """As `parsed` reads it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if plain == {**plain, "classes": (), "column": {}, "problem": AUTO}:
            return f"{self.name}={self.data}" if self.name else self.data
        return json.dumps({n: v for n, v in plain.items() if v not in ((), {}, "", AUTO)})

    @property
    def own_name(self) -> str:
        """What the task is called where no name is given."""
        if self.data.startswith(HUB):
            return self.data.removeprefix(HUB).rpartition("/")[2].replace(":", "_")
        return data_name(self.data) if "@" in self.data and not Path(self.data).exists() else own_name(Path(self.data))

    @property
    def file(self) -> Path | None:
        """The file, where it is one."""
        path = Path(self.data)
        return path if path.is_file() else None

    def read(self, options: DataOptions, seed: int = 0) -> dict[str, Task]:
        """Name -> data of the task, or of the tasks that a table's column `task` tells apart.

        Args:
            options: of the run. seed: of the cut of a table in one piece.

        Raises:
            ConfigError: nothing is there, or something that is not read; labels or columns that do not fit.
            IntegrityError: a damaged file.
        """
        name = self.name or self.own_name
        chosen = dataclasses.replace(options, column={**options.column, **self.column})
        if self.problem != AUTO:
            chosen = dataclasses.replace(chosen, problem=self.problem)
        found = self._found(chosen)
        if not isinstance(found, Records):
            return {name: self._some_of(found, name)}
        tables = dataclasses.replace(found, named=chosen.column).by_task()
        made = {}
        for key, table in tables.items():
            called = f"{name} {key}" if key else name
            made[called] = self._some_of(_made_of(table, called, chosen.problem, seed), called)
        return made

    def _found(self, options: DataOptions) -> Any:
        """What is at the place."""
        text, path = self.data, Path(self.data)
        if text.startswith(HUB):
            name, _, config = text.removeprefix(HUB).partition(":")
            return read_hub(name, config or None)
        if text == DIGITS and not path.exists():
            return digits_tasks(1)[0]
        if path.is_dir():
            return read_folder(path) if is_table_folder(path) else read_images(path)
        if "@" in text and not path.exists():
            return _named_set(text)
        if not path.exists():
            raise ConfigError(
                f"--task: {text} is not there; expected a file, a folder, NAME@FOLDER of torchvision, or hf:NAME"
            )
        return npz_task(path, options.problem) if path.suffix == ".npz" else read_beside(path)

    def _some_of(self, task: Task, name: str) -> Task:
        """Of the chosen classes, under its name."""
        if isinstance(task, TextData):
            return task.of_labels(self.classes) if self.classes else task
        if not self.classes:
            return dataclasses.replace(task, name=name)
        names = task.classes or tuple(map(str, range(task.num_classes)))
        for c in self.classes:
            one_of(f"classes of {name}", c, names)
        return task.of_classes([names.index(c) for c in self.classes], name)


def _named_set(text: str) -> ImageData:
    name, _, root = text.partition("@")
    if name.lower() in (*PHOTOS_OF, *ARRAYS_OF):
        return read_images(text)
    return torchvision_task(name, Path(root).expanduser())


def _made_of(records: Records, name: str, problem: str, seed: int) -> Task:
    """The task of a table: of images where it has a column of them, else of texts.

    Raises:
        ConfigError: it has neither.
    """
    lower = {c.lower() for c in records.columns}
    texts = None if "image" in records.named or lower & {*IMAGE_COLUMNS} else text_form(records)
    if texts is None and records.called("image") and records.called("label"):
        return images_of(records, name, problem, seed)
    if problem != AUTO and texts is not None:
        raise ConfigError(f"--problem: got {problem!r} for the texts of {name}, which have no head of their own")
    return texts_of(records, seed)


def split_task(task: Task, how: str) -> list[ImageData]:
    """A task cut into several: `5` of its classes in turn, or `5x2`, five of two classes each.

    Raises:
        ConfigError: another form, texts, or too few classes.
    """
    count, x, each = how.partition("x")
    if not count.isdigit() or not (each.isdigit() if x else True):
        raise ConfigError(f"--split: got {how!r}, expected a number of tasks (5), or tasks x classes (5x2)")
    if isinstance(task, TextData):
        raise ConfigError("--split: cuts the classes of images; give each task of texts by itself (--task)")
    return split_classes(task, int(count), int(each) if x else None)
