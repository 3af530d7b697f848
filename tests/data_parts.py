"""Small files of every format, for the tests of data."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SAID = [{"text": f"w{i}", "label": ("warm", "cold")[i % 2]} for i in range(20)]


def picture(path: Path, bright: bool = False, seed: int = 0, size: int = 16) -> Path:
    """An image whose left half is bright or not; images differ in width."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (size, size + seed % 3, 3), dtype=np.uint8)
    pixels[:, : size // 2] += np.uint8(120 * bright)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(folder: Path, classes: Sequence[str], count: int = 4, parts: Sequence[str] = ("",)) -> Path:
    """A folder for each class, in the folders of the parts."""
    for part in parts:
        for c, name in enumerate(classes):
            for i in range(count):
                picture(folder / part / name / f"{i}.png", c % 2 == 0, seed=10 * c + i)
    return folder


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows in the format that the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1))
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)
    return path
