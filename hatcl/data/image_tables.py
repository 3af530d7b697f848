"""Tables whose rows have an image and its target: a class, several labels, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.problems import CLASSES, LABELS, NUMBERS, likely_problem
from ..errors import ConfigError
from .images import ImageData
from .photos import Photos, Pictures
from .records import Records

BETWEEN = "|"  # separates several labels in one text


def images_of(records: Records, name: str, problem: str = "auto", seed: int = 0) -> ImageData:
    """The task of a table with the columns `image` and `label` (or others that the user assigns to these roles).

    Texts or whole numbers are classes; lists, or texts with `|` in between, are several labels; fractions are a
    regression. Each of several label columns holds one number, or 0 or 1.

    Args:
        problem: the meaning of the labels; `auto` = inferred from the training labels. seed: cuts a table that has no
            parts.

    Raises:
        ConfigError: a column or an image file is missing, labels do not fit the problem, or training lacks a label.
    """
    image, label = records.needed("image"), records.needed("label")
    divided = records.divided()
    first = next(iter(divided.parts)) if "train" not in divided.parts else "train"
    kind = _problem_of(divided, first, label) if problem == "auto" else problem
    parts = divided.in_parts(label if kind == CLASSES and "," not in label else None, seed)
    labels = {part: _values(parts, part, label) for part in parts.parts}
    classes, found = {CLASSES: _of_classes, LABELS: _of_labels, NUMBERS: _of_numbers}[kind](parts, label, labels)
    arrays: dict[str, Any] = {f"y_{part}": y for part, y in found.items()}
    for part, rows in parts.parts.items():
        photos = Photos(Pictures(rows, image, records.where.parent))
        missing = photos.missing()
        if missing is not None:
            raise ConfigError(
                f"{records.where}: there is no file {missing}; paths in the column {image!r} are relative to the "
                "table's folder"
            )
        arrays[f"x_{part}"] = photos
    return ImageData(name, num_classes=len(classes), classes=tuple(classes), problem=kind, **arrays)


def _values(records: Records, part: str, column: str) -> list[Any]:
    """The labels of a part; with several columns, a list for each row."""
    names = column.split(",")
    if len(names) == 1:
        return records.values(part, column)
    return [list(row) for row in zip(*(records.values(part, name) for name in names), strict=True)]


def _problem_of(records: Records, part: str, column: str) -> str:
    values = _values(records, part, column)
    if "," in column:
        return likely_problem(_number_rows(records, column, values))
    if any(isinstance(v, (list, tuple, np.ndarray)) for v in values):
        return NUMBERS if any(isinstance(x, float) for v in values for x in v) else LABELS
    if any(isinstance(v, str) and BETWEEN in v for v in values):
        return LABELS
    try:
        return likely_problem(np.asarray([float(v) for v in values]))
    except (ValueError, TypeError):
        return CLASSES


def _number_rows(records: Records, column: str, values: Sequence[Any]) -> np.ndarray:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{records.where}: the column {column!r} holds something other than numbers, or lists of different "
            f"lengths ({error})"
        ) from error
    return found[:, None] if found.ndim == 1 else found


def _of_numbers(
    records: Records, column: str, labels: dict[str, list[Any]]
) -> tuple[Sequence[str], dict[str, np.ndarray]]:
    found = {part: _number_rows(records, column, values) for part, values in labels.items()}
    names, width = column.split(","), found["train"].shape[1]
    return (names if len(names) == width else [f"{column}[{i}]" for i in range(width)]), found


def _of_classes(
    records: Records, column: str, labels: dict[str, list[Any]]
) -> tuple[Sequence[str], dict[str, np.ndarray]]:
    classes = _in_order(records, column, set(labels["train"]))
    place = {c: i for i, c in enumerate(classes)}
    found = {}
    for part, values in labels.items():
        _check_known(records, column, part, values, place)
        found[part] = np.asarray([place[v] for v in values], dtype=np.int64)
    return _names_of_classes(records, column, classes), found


def _of_labels(
    records: Records, column: str, labels: dict[str, list[Any]]
) -> tuple[Sequence[str], dict[str, np.ndarray]]:
    if "," in column:
        return _of_numbers(records, column, labels)
    lists = {part: [_several_labels(v) for v in values] for part, values in labels.items()}
    classes = _in_order(records, column, {x for some in lists["train"] for x in some})
    place = {c: i for i, c in enumerate(classes)}
    found = {}
    for part, values in lists.items():
        _check_known(records, column, part, [x for some in values for x in some], place)
        found[part] = np.zeros((len(values), len(classes)), dtype=np.int64)
        for i, some in enumerate(values):
            found[part][i, [place[x] for x in some]] = 1
    return _names_of_classes(records, column, classes), found


def _several_labels(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [text.strip() for text in value.split(BETWEEN) if text.strip()]
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def _in_order(records: Records, column: str, labels: set[Any]) -> list[Any]:
    """The labels sorted by number, even if the numbers are texts; otherwise alphabetically.

    Raises:
        ConfigError: a label is neither text nor number.
    """
    wrong = next((v for v in labels if not isinstance(v, (str, int, float))), None)
    if wrong is not None:
        raise ConfigError(
            f"{records.where}: {str(wrong)[:40]!r} in the column {column!r} is a {type(wrong).__name__}, expected a "
            "text or a number"
        )
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels, key=str)


def _check_known(records: Records, column: str, part: str, values: Sequence[Any], place: dict[Any, int]) -> None:
    """Raise `ConfigError` for a label that training lacks."""
    unknown = sorted({str(v) for v in values if v not in place})
    if unknown:
        raise ConfigError(
            f"{records.where}: {part} has {', '.join(map(repr, unknown[:5]))} in the column {column!r}, which training "
            f"lacks; it has {', '.join(map(str, [*place][:10]))}"
        )


def _names_of_classes(records: Records, column: str, classes: Sequence[Any]) -> list[str]:
    """The names of the classes; for numbers, the names in the table if it has them."""
    names = records.classes.get(column)
    return [str(c) if names is None or isinstance(c, str) else names[c] for c in classes]
