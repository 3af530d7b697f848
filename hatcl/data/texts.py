"""Text tasks as files: pairs of an input and an output, with the turns that scoring dialogues needs.

hatcl reads tables of records (`records.py`; `pairs.py` has the columns) and JSON files, also as .gz, in these forms of
public benchmarks:

    {train, dev, test: [[input, output], ...]}                      the long-sequence benchmark as prepared for TaSL
    {train, test: [[instruction, input, output], ...], test_idx}    dialogue state tracking, with the test rows' turns
    {seeds: {13: {train, dev}, ...}, test: [[text, label], ...]}    16 shots per class (LM-BFF)
    {all: [[text, label], ...]}                                     one list, cut in three by a seed
    [{prompt, answer}, ...], or {Definition, Instances}             a train.json, with eval or dev and test.json
                                                                    next to it, as TRACE and O-LoRA have it

A row of three may also be a pair of sentences, `[text, text2, label]`; its input has both as two lines (`Sentences`).
Tables as GLUE and others publish them are read in `published.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import one_of
from ..errors import ConfigError
from ..files import parse_json
from .kinds import JSON, LINES, content_of, file_kind, read_file, read_text
from .pairs import Chat, Pair, Sentences, pairs_of, strata_of
from .records import EACH_HELD_OUT, WHOLE, Records, part_named, read_beside, read_folder, records_of
from .shots import draw, same_few

JSON_ENDS = (".json", ".json.gz")
TEXT_ENDS = (*JSON_ENDS, ".jsonl", ".csv", ".tsv", ".parquet")
HELD_OUT_TEXTS = 0.1  # the share of the training pairs that validates if the data has no validation part


class Turn(NamedTuple):
    """The turn of a dialogue that a row belongs to: its state is right if the values of all its slots are."""

    dialogue: str
    turn: str
    service: str


@dataclass(frozen=True)
class TextData:
    """The pairs (input, output) of one task.

    Attributes:
        train, validation, test: pairs. turns: the turn of each test pair in dialogue state tracking; otherwise empty.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    turns: list[Turn] = dataclasses.field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The different outputs of training, sorted."""
        return sorted({output for _, output in self.train})

    def on_validation(self, seed: int = 0) -> TextData:
        """The task for choosing options and methods: it tests on the validation pairs or, if there are none, on a tenth
        of the training pairs, which then are not trained on; the test pairs are not used.

        Raises:
            ConfigError: there is no pair to hold out.
        """
        if self.validation:
            return TextData(self.train, self.validation, self.validation)
        held = set(same_few(len(self.train), round(HELD_OUT_TEXTS * len(self.train)), seed))
        if not held:
            raise ConfigError(
                f"validation: a share of {HELD_OUT_TEXTS} of {len(self.train)} training examples is less than one"
            )
        out = [pair for i, pair in enumerate(self.train) if i in held]
        return TextData([pair for i, pair in enumerate(self.train) if i not in held], out, out)

    def digest(self) -> str:
        """sha256 of the pairs; a resumed run compares it."""
        parts = [self.train, self.validation, self.test, self.turns]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def cut(self, train: int | None = None, test: int | None = None, validation: int | None = None) -> TextData:
        """At most this many pairs of each part, always the same random ones; for dialogues the first turns, each
        complete.

        Raises:
            ConfigError: a number is below 1.
        """
        sizes = {"train": train, "test": test, "validation": validation}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name}: got {size}, expected at least 1")
        if not self.turns:
            return self._mapped(lambda part, rows: [rows[i] for i in same_few(len(rows), sizes[part])])
        most = len(self.test) if test is None else test
        kept: set[Turn] = set()
        for turn, size in Counter(self.turns).items():  # in the order of the file; the first turn is always kept
            if kept and size > most:
                break
            kept.add(turn)
            most -= size
        rows = [i for i, turn in enumerate(self.turns) if turn in kept]
        return TextData(
            [self.train[i] for i in same_few(len(self.train), train)],
            [self.validation[i] for i in same_few(len(self.validation), validation)],
            [self.test[i] for i in rows],
            [self.turns[i] for i in rows],
        )

    def plain(self, drop_question: bool = True) -> TextData:
        """The inputs without the first line, which states the question and lists the answers, and without the last line
        `Answer:`, for models that are not prompted in words. Conversations stay as they are."""

        def text(value: str) -> str:
            value = value.strip().removesuffix("Answer:").strip()
            first, _, rest = value.partition("\n")
            return rest.strip() if drop_question and rest.strip() else value

        return self._mapped(lambda part, rows: [(x if isinstance(x, Chat) else text(x), y) for x, y in rows])

    def of_labels(self, labels: Sequence[str]) -> TextData:
        """The pairs with these outputs.

        Raises:
            ConfigError: no training pair has one of the outputs.
        """
        for label in labels:
            one_of("classes", label, self.labels)
        parts = [[p for p in part if p[1] in labels] for part in (self.train, self.validation, self.test)]
        kept = TextData(parts[0], parts[1], parts[2])
        if not kept.test:
            raise ConfigError(f"classes: no test example has one of {', '.join(labels)}")
        return kept

    def renamed(self, labels: Mapping[str, str]) -> TextData:
        """The task with its outputs replaced by other words.

        Raises:
            ConfigError: an output has no replacement.
        """
        for _, y in [*self.train, *self.validation, *self.test]:
            if y not in labels:
                raise ConfigError(f"labels: {y!r} has no word; words are given for {', '.join(labels)}")
        return self._mapped(lambda part, rows: [(x, labels[y]) for x, y in rows])

    def _mapped(self, change: Callable[[str, list[Pair]], list[Pair]]) -> TextData:
        parts = [change(n, getattr(self, n)) for n in ("train", "validation", "test")]
        return TextData(parts[0], parts[1], parts[2], self.turns)


def k_shot(
    data: TextData,
    k: int,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    class_of: Callable[[str], str] = str,
) -> TextData:
    """K examples of each class for training and K others for validation, as in LM-BFF (Gao et al. 2021, arXiv
    2012.15723). The same seed gives the same examples.

    Validation is drawn from the data's own validation pairs, or from all remaining pairs if these are too few. A text
    appears only once in train or validation, even if the data repeats it; test loses the texts that were drawn.

    Args:
        labels: the classes; None = all classes of the data. class_of: the class of an output, if it is not the output
            itself (halves of a scale).

    Raises:
        ConfigError: k is below 1, or a class, which the text names, has too few different texts.
    """
    every = [*data.train, *data.validation, *data.test]
    classes = sorted({class_of(y) for _, y in every}) if labels is None else list(labels)
    chosen = draw([x for x, _ in data.train], [class_of(y) for _, y in data.train], k, seed, classes, "train")
    train = [data.train[i] for i in chosen]
    taken = {x for x, _ in train}
    pool = [p for p in data.validation if p[0] not in taken]
    counts = Counter(class_of(y) for _, y in set(pool))
    if any(counts[y] < k for y in classes):
        pool += [p for p in data.train if p[0] not in taken]
    chosen = draw([x for x, _ in pool], [class_of(y) for _, y in pool], k, seed, classes, "validation")
    validation = [pool[i] for i in chosen]
    taken |= {x for x, _ in validation}
    rows = [i for i, (x, _) in enumerate(data.test) if x not in taken]
    turns = [data.turns[i] for i in rows] if data.turns else []
    return TextData(train, validation, [data.test[i] for i in rows], turns)


def read_texts(path: str | Path, *, shots_seed: int = 13, seed: int = 0) -> TextData:
    """The pairs of a file, or of a folder of tables.

    Args:
        shots_seed: selects a seed in a few-shot file. seed: cuts a file with one list.

    Raises:
        IntegrityError: a file is missing or damaged. ConfigError: the content has another form; the text names it and
            the supported ones.
    """
    path = Path(path)
    if path.is_dir():
        return texts_of(read_folder(path), seed)
    if not path.name.endswith(JSON_ENDS):
        found = read_beside(path)
        if not isinstance(found, Records):
            raise ConfigError(f"{path} holds images; texts are read from {', '.join(TEXT_ENDS)}")
        return texts_of(found, seed)
    content = _json_of(path)
    if path.name.endswith("_T5.json") and "test" in (tasl := parts_of_tasl(path)):
        return read_parts(tasl)
    if path.name == "train.json" and (isinstance(content, list) or "Instances" in content):
        return read_parts(parts_beside(path.parent))
    table = _table_in(path, content)
    return _of_forms(path, content, shots_seed, seed) if table is None else texts_of(table, seed)


@file_kind(JSON, *JSON_ENDS)
def read_json_data(path: Path) -> Records | TextData:
    """Records, or pairs in one of the forms of benchmarks. Raises the errors of `read_texts`."""
    if path.name.endswith("_T5.json") and "test" in parts_of_tasl(path):  # TaSL keeps the other parts in other folders
        return read_texts(path)
    table = _table_in(path, _json_of(path))
    return read_texts(path) if table is None else table


def texts_of(records: Records, seed: int = 0) -> TextData:
    """The pairs of a table, in parts; an undivided table is cut by the seed.

    Raises:
        ConfigError: the columns are not texts with outputs, or a row lacks one of them.
    """
    parts = records.divided()
    parts = parts.in_parts(strata_of(parts), seed)
    found = {part: pairs_of(parts, part) for part in parts.parts}
    return TextData(found["train"], found.get("validation", []), found["test"])


def _json_of(path: Path) -> Any:
    return read_file(path) if content_of(path) == LINES else parse_json(read_text(path), path, object)


def _are_objects(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict)


def _table_in(path: Path, content: Any) -> Records | None:
    """The table in a file: a list of objects, or one list for each part; None if the content is something else."""
    if isinstance(content, Records):
        return content
    if _are_objects(content):
        return records_of(path, {WHOLE: content})
    parts = {part_named(n) or "": rows for n, rows in content.items() if rows} if isinstance(content, dict) else {}
    parts.pop("", None)
    if "train" in parts and all(_are_objects(rows) for rows in parts.values()):
        return records_of(path, parts)
    return None


def _of_forms(path: Path, content: Any, shots_seed: int, seed: int) -> TextData:
    if isinstance(content, list) and content and isinstance(content[0], list):
        content = {"all": content}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got a {type(content).__name__}, expected an object with train and test")
    if "all" in content:
        rows = _pairs(path, "all", content["all"])
        random.Random(seed).shuffle(rows)
        held = round(len(rows) * EACH_HELD_OUT)
        return _whole(path, TextData(rows[2 * held :], rows[held : 2 * held], rows[:held]))
    if "seeds" in content:
        seeds = content["seeds"]
        if str(shots_seed) not in seeds:
            raise ConfigError(f"{path} has no seed {shots_seed}, expected one of {', '.join(seeds)}")
        content = {**seeds[str(shots_seed)], "test": content.get("test")}
    if not {"train", "test"} <= set(content):
        raise ConfigError(f"{path} holds {', '.join(sorted(content)) or 'nothing'}; expected train and test, or all")
    parts = [_pairs(path, n, content.get(n, [])) for n in ("train", "dev", "test")]
    turns = _turns(path, content["test_idx"], len(parts[2])) if "test_idx" in content else []
    return _whole(path, TextData(parts[0], parts[1], parts[2], turns))


def parts_beside(folder: Path) -> dict[str, Path]:
    """The existing files of a task's parts in the task's folder."""
    names = {"train": ("train",), "validation": ("eval", "dev"), "test": ("test",)}
    tried = {part: [folder / f"{name}.json" for name in names[part]] for part in names}
    found = {part: next((p for p in paths if p.is_file()), None) for part, paths in tried.items()}
    return {part: path for part, path in found.items() if path is not None}


def parts_of_tasl(path: Path) -> dict[str, Path]:
    """The existing files of a task's parts in TaSL's folders, found from the file of one part."""
    folders = {"train": "train", "validation": "dev", "test": "test"}
    tried = {part: path.parent.parent / name / path.name for part, name in folders.items()}
    return {part: file for part, file in tried.items() if file.is_file()}


def read_parts(parts: Mapping[str, Path]) -> TextData:
    """The pairs of a task whose parts are separate files: lists of `[input, output]`, of objects with `input` and
    `output` (and `instruction`), or with `prompt` and `answer`; or an object with such a list as `Instances` and a
    `Definition`.

    Args:
        parts: `train`, `test` and optionally `validation` -> their files.

    Raises:
        IntegrityError, ConfigError: as `read_texts`.
    """
    if "test" not in parts:
        raise ConfigError(f"{parts['train']} has no test.json next to it, expected one of the same form")
    found = {part: _part_of(path, part) for part, path in parts.items()}
    return _whole(parts["train"], TextData(found["train"], found.get("validation", []), found["test"]))


def _part_of(path: Path, part: str) -> list[Pair]:
    content = _json_of(path)
    if isinstance(content, dict) and isinstance(content.get("Instances"), list):
        said = content.get("Definition", [])
        first = said if isinstance(said, str) else next(iter(said), "")
        content = [{**row, "instruction": first} if isinstance(row, dict) else row for row in content["Instances"]]
    if isinstance(content, Records) or _are_objects(content):
        table = content if isinstance(content, Records) else records_of(path, {WHOLE: content})
        return pairs_of(table, WHOLE)
    if not isinstance(content, list):
        raise ConfigError(f"{path}: got a {type(content).__name__}, expected a list of examples, or Instances")
    return _pairs(path, part, content)


def _pairs(path: Path, part: str, rows: Any) -> list[Pair]:
    out = []
    for i, row in enumerate(rows if isinstance(rows, Sequence) else []):
        if not isinstance(row, list) or len(row) not in (2, 3):
            raise ConfigError(
                f"{path}: {part}[{i}] is {str(row)[:60]!r}, expected [input, output] or [instruction, ...]"
            )
        wrong = next((v for v in row if not isinstance(v, (str, int, float))), "")
        if not isinstance(wrong, str):
            raise ConfigError(f"{path}: {part}[{i}] holds {str(wrong)[:60]!r}, expected texts and numbers")
        *before, output = (str(v) for v in row)
        out.append((Sentences(*before) if len(before) == 2 else before[0], output))
    return out


def _turns(path: Path, text: Any, count: int) -> list[Turn]:
    """Read the lines `dialogue|||dialogue|||turn|||...|||service|||slot`."""
    if not isinstance(text, str):
        raise ConfigError(f"{path}: test_idx is a {type(text).__name__}, expected one text with a line per test row")
    lines = [line.split("|||") for line in text.splitlines() if line.strip()]
    if len(lines) != count:
        raise ConfigError(f"{path}: test_idx has {len(lines)} lines for {count} test rows; expected one line per row")
    wrong = next((line for line in lines if len(line) != 6), None)
    if wrong is not None:
        raise ConfigError(f"{path}: test_idx has a line of {len(wrong)} parts ({'|||'.join(wrong)}), expected 6")
    return [Turn(line[1], line[2], line[4]) for line in lines]


def _whole(path: Path, data: TextData) -> TextData:
    for name in ("train", "test"):
        if not getattr(data, name):
            raise ConfigError(f"{path}: {name} is empty")
    return data
