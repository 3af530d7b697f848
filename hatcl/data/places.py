"""The places that the data of tasks is read from; one function reads them all.

FILE            by its suffix, see `FILE_KINDS`: .npz, .csv, .tsv, .json, .jsonl, .parquet
FOLDER images with one folder per class, in train/ and test/ or val/ or directly; tables of parts (train.csv, test.csv);
a data set saved by `datasets` NAME@FOLDER     a data set of torchvision in this folder, such as CIFAR100@data hf:NAME a
data set on Hugging Face's hub; hf:NAME:CONFIG with one of its configurations digits scikit-learn's
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
IMAGE_COLUMNS = ("image", "img")  # the names without another meaning

Task = TextData | ImageData


@dataclass(frozen=True)
class DataOptions(Changeable):
    """The meaning of columns and labels.

    Args:
        column: ROLE=NAME, the column of a table for a role: text, text2, image, label, task, split, messages,
            instruction, input or output; a label made of several columns separates them by commas. Repeatable; columns
            with usual names are found automatically.
        problem: classification, multilabel (several labels for an image), regression, or `auto`: inferred from the
            labels.

    Raises:
        ConfigError: a role or a problem is unknown.
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
    """A requested task, or several if a table has a column `task`.

    Args:
        data: its place, see above. name: the task's name; "" = the data's name. classes: the classes to learn, in this
            order, by name (or by number if they have no names); empty = all. column, problem: see `DataOptions`; they
            override the run's.

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
        """Read `[NAME=]PLACE`, or a JSON object with the fields.

        Raises:
            ConfigError: the text has another form; for an unknown field the error has the nearest one.
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
        """The same place with an absolute path."""
        there = self.data if self.data.startswith(HUB) or self.data == DIGITS else absolute_images(self.data)
        return dataclasses.replace(self, data=there, name=self.name or self.own_name)

    def written(self) -> str:
        """The text that `parsed` reads."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if plain == {**plain, "classes": (), "column": {}, "problem": AUTO}:
            return f"{self.name}={self.data}" if self.name else self.data
        return json.dumps({n: v for n, v in plain.items() if v not in ((), {}, "", AUTO)})

    @property
    def own_name(self) -> str:
        """The task's name if none is given."""
        if self.data.startswith(HUB):
            return self.data.removeprefix(HUB).rpartition("/")[2].replace(":", "_")
        return data_name(self.data) if "@" in self.data and not Path(self.data).exists() else own_name(Path(self.data))

    @property
    def file(self) -> Path | None:
        """The file, if the place is one."""
        path = Path(self.data)
        return path if path.is_file() else None

    def read(self, options: DataOptions, seed: int = 0) -> dict[str, Task]:
        """Name -> data of the task, or of the tasks that a table's column `task` distinguishes.

        Args:
            options: the run's options. seed: cuts a table that has no parts.

        Raises:
            ConfigError: the place is empty or of an unknown kind, or labels or columns do not fit. IntegrityError: a
                file is damaged.
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
        """The data at the place."""
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
                f"--task: {text} does not exist; expected a file, a folder, NAME@FOLDER of torchvision, or hf:NAME"
            )
        return npz_task(path, options.problem) if path.suffix == ".npz" else read_beside(path)

    def _some_of(self, task: Task, name: str) -> Task:
        """The task with the chosen classes, under its name."""
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
    """The task of a table: of images if it has a column of images, else of texts.

    Raises:
        ConfigError: it has neither images nor texts.
    """
    lower = {c.lower() for c in records.columns}
    texts = None if "image" in records.named or lower & {*IMAGE_COLUMNS} else text_form(records)
    if texts is None and records.called("image") and records.called("label"):
        return images_of(records, name, problem, seed)
    if problem != AUTO and texts is not None:
        raise ConfigError(f"--problem: got {problem!r} for the texts of {name}; the option is for images only")
    return texts_of(records, seed)


def split_task(task: Task, how: str) -> list[ImageData]:
    """Cut a task by its classes: `5` into five tasks of all classes, `5x2` into five tasks of two classes each.

    Raises:
        ConfigError: the text has another form, the task consists of texts, or there are too few classes.
    """
    count, x, each = how.partition("x")
    if not count.isdigit() or not (each.isdigit() if x else True):
        raise ConfigError(f"--split: got {how!r}, expected a number of tasks (5), or tasks x classes (5x2)")
    if isinstance(task, TextData):
        raise ConfigError("--split cuts the classes of images; give each task of texts separately (--task)")
    return split_classes(task, int(count), int(each) if x else None)
