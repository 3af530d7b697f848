"""Tables of records: rows with named columns, from CSV, TSV, JSON lines, Parquet, and Hugging Face's `datasets`.

A table has parts (`train`, `validation`, `test`) if it comes as several files, as a DatasetDict, or with a column that
names the part of each row; otherwise it is one piece.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, IntegrityError, nearest
from .kinds import CSV, LINES, PARQUET, TSV, file_kind, read_file, read_text

WHOLE = ""  # the part of an undivided table
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# role of a column -> its usual names, the likeliest first
ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "review"),
    "text2": ("text2",),
    "image": ("image", "img", "path", "file_name", "filename", "file", "image_path", "filepath"),
    "label": ("label", "labels", "class", "category", "target", "fine_label", "score"),
    "task": ("task",),
    "split": ("split", "partition", "subset"),
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input", "prompt", "question"),
    "output": ("output", "answer", "completion", "response", "target"),
}
# pairs of columns that hold a pair of sentences
PAIRED = (
    ("text", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip
UNKNOWN_LABELS = ("-1",)  # labels of test parts that are kept secret
TABLE_ENDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
EACH_HELD_OUT = 0.1  # the share of an undivided table for test, and for validation


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Rows with named columns.

    Attributes:
        where: their source, named in errors; relative paths in them start here.
        parts: part -> rows, with the part `WHOLE` if undivided: a list of mappings, or a data set of `datasets`, which
        makes rows when they are indexed.
        classes: column -> the names of its class numbers, if the table has them.
        named: role -> column, see `ROLES`, as the user assigned them; several columns are separated by commas.
    """

    where: Path
    parts: Mapping[str, Any]
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, rows in self.parts.items():
            if not len(rows):
                raise ConfigError(f"{self.where} has no rows{f' in {part}' if part else ''}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, taken from the first row of each part."""
        return tuple(dict.fromkeys(str(c) for rows in self.parts.values() for c in _columns_of(rows)))

    def called(self, role: str) -> str | None:
        """The column of a role; None if there is none.

        Raises:
            ConfigError: the user names a column that does not exist.
        """
        columns = self.columns
        if role not in self.named:
            found = {c.lower(): c for c in reversed(columns)}
            return next((found[name] for name in ROLES[role] if name in found), None)
        for name in self.named[role].split(","):
            if name not in columns:
                raise ConfigError(
                    f"--column {role}={name}: {self.where} has no column {name!r}; it has {', '.join(columns)}; did "
                    f"you mean {nearest(name, columns)!r}?"
                )
        return self.named[role]

    def needed(self, role: str) -> str:
        """The column of a role.

        Raises:
            ConfigError: there is none.
        """
        name = self.called(role)
        if name is None:
            raise ConfigError(
                f"{self.where} has no column for the {role}; it has {', '.join(self.columns)}. Usual names are "
                f"{', '.join(ROLES[role])}; name another (--column {role}=NAME)"
            )
        return name

    def values(self, part: str, column: str) -> list[Any]:
        """A column's values in a part.

        Raises:
            ConfigError: a row lacks the column, or has no value in it.
        """
        rows = self.parts[part]
        found = list(rows[column]) if hasattr(rows, "column_names") else [row.get(column) for row in rows]
        for i, value in enumerate(found):
            if value is None:
                raise ConfigError(f"{self.where}: {part or 'row'}[{i}] has nothing in the column {column!r}")
        return found

    def divided(self) -> Records:
        """The table divided by its column `split`, if it has one and is undivided.

        Raises:
            ConfigError: a value does not name a part, or no row is for training.
        """
        column = self.called("split")
        if WHOLE not in self.parts or column is None:
            return self
        parts: dict[str, list[int]] = {}
        for i, value in enumerate(self.values(WHOLE, column)):
            part = part_named(str(value))
            if part is None:
                raise ConfigError(
                    f"{self.where}: row[{i}] has {value!r} in the column {column!r}; expected train, validation or test"
                )
            parts.setdefault(part, []).append(i)
        if "train" not in parts:
            raise ConfigError(f"{self.where}: the column {column!r} has no train; there is nothing to learn from")
        return self._with({part: (WHOLE, ids) for part, ids in parts.items()})

    def in_parts(self, strata: str | None = None, seed: int = 0) -> Records:
        """The table with train, test and, if it has one, validation. A test part with secret labels is dropped. Without
        a test part, the validation part becomes the test part; a table with neither is cut by the seed: a tenth becomes
        the test part and a tenth the validation part.

        Args:
            strata: the column of the classes; the same share of each is taken.

        Raises:
            ConfigError: there are too few rows to cut.
        """
        parts = dict(self.divided().parts)
        if strata is not None and "test" in parts and {*self._hashable("test", strata)} <= {*UNKNOWN_LABELS}:
            del parts["test"]
        if WHOLE not in parts and "test" in parts:
            return dataclasses.replace(self, parts=parts)
        if "validation" in parts:
            return dataclasses.replace(self, parts={"train": parts["train"], "test": parts["validation"]})
        whole = parts[WHOLE if WHOLE in parts else "train"]
        one = dataclasses.replace(self, parts={WHOLE: whole})
        ids = cut_in_three(len(whole) if strata is None else one._hashable(WHOLE, strata), seed)
        if not ids["test"]:
            raise ConfigError(
                f"{self.where} has {len(whole)} rows in one piece, too few to take some for the test; give a test part"
            )
        return one._with({part: (WHOLE, chosen) for part, chosen in ids.items() if chosen})

    def _hashable(self, part: str, column: str) -> list[str]:
        return [str(value) for value in self.divided().values(part, column)]

    def by_task(self) -> dict[str, Records]:
        """Name -> the table of each task, in the order of their first rows, if a column `task` names each row's task;
        otherwise the table itself under the name ''."""
        column = self.called("task")
        if column is None:
            return {"": self}
        found: dict[str, dict[str, list[int]]] = {}
        for part in self.parts:
            for i, value in enumerate(self.values(part, column)):
                found.setdefault(str(value), {}).setdefault(part, []).append(i)
        return {name: self._with({part: (part, ids) for part, ids in parts.items()}) for name, parts in found.items()}

    def _with(self, chosen: Mapping[str, tuple[str, list[int]]]) -> Records:
        return dataclasses.replace(
            self, parts={name: rows_at(self.parts[part], ids) for name, (part, ids) in chosen.items()}
        )


def cut_in_three(strata: int | Sequence[Hashable], seed: int) -> dict[str, list[int]]:
    """Part -> ascending indices: a tenth of each class for test and for validation, and at least one of a class with
    three or more. Strata: the class of each example, or the number of examples, which then form one class."""
    of_class: dict[Hashable, list[int]] = {}
    for i, key in enumerate([None] * strata if isinstance(strata, int) else strata):
        of_class.setdefault(key, []).append(i)
    chance = random.Random(seed)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for ids in of_class.values():
        chance.shuffle(ids)
        each = max(1, round(EACH_HELD_OUT * len(ids))) if len(ids) > 2 else 0
        for part, some in (("test", ids[:each]), ("validation", ids[each : 2 * each]), ("train", ids[2 * each :])):
            parts[part] += some
    return {part: sorted(ids) for part, ids in parts.items()}


def part_named(name: str) -> str | None:
    """The part that a name stands for."""
    return next((part for part, names in PART_NAMES.items() if name.lower() in names), None)


def rows_at(rows: Sequence[Any], ids: Sequence[int]) -> Sequence[Any]:
    """Some of the rows."""
    return rows.select(ids) if hasattr(rows, "select") else [rows[i] for i in ids]


def _columns_of(rows: Sequence[Any]) -> Iterable[Any]:
    return rows.column_names if hasattr(rows, "column_names") else rows[0]


# --- files ---


@file_kind(CSV, ".csv", ".csv.gz")
def read_csv(path: Path) -> Records:
    """A comma-separated table, quoted as in RFC 4180, with the names of the columns in its first line.

    Raises:
        ConfigError: names are missing or appear twice, or a line has another length. IntegrityError: the file is not a
            text.
    """
    try:
        return _rows_of_lines(path, csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise IntegrityError(f"{path} cannot be read as CSV ({error}); is it complete and correctly quoted?") from error


@file_kind(TSV, ".tsv", ".tsv.gz")
def read_tsv(path: Path) -> Records:
    """A tab-separated table without quoting, as in GLUE. Raises the errors of `read_csv`."""
    return _rows_of_lines(path, (line.rstrip("\r").split("\t") for line in read_text(path).split("\n")))


def _rows_of_lines(path: Path, lines: Iterable[list[str]]) -> Records:
    header: list[str] | None = None
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not any(line):
            continue
        if header is None:
            header = [name.strip() for name in line]
            wrong = next((n for n in header if not n or header.count(n) > 1), None)
            if wrong is not None:
                raise ConfigError(
                    f"{path}: the names in its first line are {', '.join(map(repr, header))}; expected each once, and "
                    "none empty"
                )
        elif len(line) != len(header):
            raise ConfigError(
                f"{path}: record {number} has {len(line)} columns, expected the {len(header)} of the first line "
                f"({', '.join(header)})"
            )
        else:
            rows.append(dict(zip(header, line, strict=True)))
    return Records(path, {WHOLE: rows})


@file_kind(LINES, ".jsonl", ".jsonl.gz", ".ndjson")
def read_lines(path: Path) -> Records:
    """A JSON object in each line.

    Raises:
        IntegrityError: a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{path}: line {number} cannot be read as JSON ({error}); expected an object in each line (a file "
                "with a single value should end in .json)"
            ) from error
        rows.append(_object(path, f"line {number}", row))
    return Records(path, {WHOLE: rows})


def records_of(path: Path, parts: Mapping[str, Sequence[Any]]) -> Records:
    """The records made from each part's list of objects.

    Raises:
        ConfigError: an entry is not an object.
    """
    for part, rows in parts.items():
        for i, row in enumerate(rows):
            _object(path, f"{part or 'row'}[{i}]", row)
    return Records(path, parts)


def _object(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{path}: {place} is {str(row)[:60]!r}, expected an object with named values")
    return row


# --- datasets ---


@file_kind(PARQUET, ".parquet")
def read_parquet(path: Path) -> Records:
    """A Parquet table, including the class names and images that `datasets` wrote into it.

    Raises:
        ConfigError: `datasets` is not installed. IntegrityError: the file is damaged.
    """
    datasets = _datasets(f"to read {path}")
    import pyarrow
    from pyarrow import parquet

    try:
        return _of_sets(path, {WHOLE: datasets.Dataset(parquet.read_table(path))})
    except (OSError, pyarrow.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read as Parquet ({error}); is the file complete?") from error


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder (`save_to_disk`)."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path) -> Records:
    """A data set, or a dict of parts, that `save_to_disk` wrote.

    Raises:
        ConfigError: `datasets` is not installed. IntegrityError: the folder is damaged.
    """
    datasets = _datasets(f"to read {folder}")
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder} cannot be read by datasets ({error}); is it complete?") from error
    return _of_sets(folder, found if isinstance(found, dict) else {WHOLE: found})


def load_hub(name: str, config: str | None, remedy: str) -> Any:
    """The result of `datasets.load_dataset`, from the hub or its cache.

    Raises:
        ConfigError: `datasets` is not installed or cannot load it; the text ends with the remedy.
    """
    datasets = _datasets(f"to read {name} from the hub", remedy)
    try:
        return datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        raise ConfigError(f"data: datasets cannot load {name} ({str(error).splitlines()[0]}); {remedy}") from error


def read_hub(name: str, config: str | None = None) -> Records:
    """A data set from Hugging Face's hub, or from its cache by `datasets`. Raises the errors of `load_hub`."""
    return _of_sets(Path(name), load_hub(name, config, "give your own file or folder"))


def _datasets(why: str, remedy: str = "") -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data: {why} needs {error.name}; run: pip install 'hatcl[data]'{remedy and f', or {remedy}'}"
        ) from error
    return datasets


def _of_sets(where: Path, sets: Mapping[str, Any]) -> Records:
    """Records made from data sets, keyed by the names of their parts. Images stay as stored and are decoded on use."""
    datasets = _datasets(f"to read {where}")
    parts: dict[str, Any] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for name, rows in sets.items():
        part = WHOLE if len(sets) == 1 and name == WHOLE else part_named(str(name).split("_")[0])
        if part is None or part in parts:
            continue  # such as unsupervised, or validation_mismatched next to validation_matched
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            inner = getattr(feature, "feature", feature)  # the type of a list's entries
            if isinstance(inner, datasets.ClassLabel):
                classes[column] = tuple(inner.names)
        parts[part] = rows
    if not {"train", WHOLE} & set(parts):
        raise ConfigError(f"{where} has the parts {', '.join(map(str, sets))}; expected train and test")
    return Records(where, parts, classes)


# --- folders ---


def is_table_folder(folder: Path) -> bool:
    """Whether a folder holds a table: a data set saved by `datasets`, or one file per part."""
    return is_saved(folder) or bool(files_of_parts(folder))


def read_folder(folder: Path) -> Records:
    """The table in a folder.

    Raises:
        ConfigError: there is no table, a part has files of two kinds, or a file is not a table.
    """
    if is_saved(folder):
        return read_saved(folder)
    files = files_of_parts(folder)
    if "train" not in files:
        raise ConfigError(
            f"{folder} holds no table of records; expected train and test as {', '.join(TABLE_ENDS)}, or a data set "
            "saved by datasets (save_to_disk)"
        )
    parts: dict[str, Any] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for part, paths in files.items():
        if len({path.name.partition(".")[2] for path in paths}) > 1:
            raise ConfigError(f"{folder} has {' and '.join(p.name for p in paths)} for {part}; keep one of them")
        tables = [read_file(path) for path in paths]
        if not all(isinstance(table, Records) and WHOLE in table.parts for table in tables):
            raise ConfigError(f"{paths[0]} is not a table of records; give the file itself, not its folder")
        parts[part] = _joined([table.parts[WHOLE] for table in tables])
        classes |= tables[0].classes
    return Records(files["train"][0], parts, classes)


def read_beside(path: Path) -> Any:
    """The content of a file; for a table called train, including the parts next to it.

    Raises:
        ConfigError: such a table has no other part next to it; also the errors of `read_file`.
    """
    found = read_file(path)
    alone = isinstance(found, Records) and WHOLE in found.parts
    if not alone or part_named(path.name.split(".")[0]) != "train":
        return found
    if len(files_of_parts(path.parent)) == 1:
        raise ConfigError(
            f"{path} is called train and has no test next to it; add one, or give its folder, of which a tenth then "
            "becomes the test part"
        )
    return read_folder(path.parent)


def files_of_parts(folder: Path) -> dict[str, list[Path]]:
    """The tables in a folder by their parts: `train.csv`, or `train-00000-of-00002.parquet` and so on, in the folder or
    in `data/` as on the hub; empty if there are none."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for path in sorted(place.iterdir()) if place.is_dir() and not found else ():
            part = part_named(path.name.split(".")[0].split("-")[0])
            if path.is_file() and part is not None and path.name.lower().endswith(TABLE_ENDS):
                found.setdefault(part, []).append(path)
    return found


def _joined(rows: Sequence[Any]) -> Any:
    if len(rows) == 1:
        return rows[0]
    if hasattr(rows[0], "column_names"):
        return _datasets("to join tables").concatenate_datasets(list(rows))
    return [row for some in rows for row in some]
