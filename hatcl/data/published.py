"""The text tasks of LM-BFF and of the graft papers by name: template, label words, measure, and file format.

    Gao et al. 2021, arXiv 2012.15723, table 1 (manual templates and label words), its run_experiment.sh for lengths
    Panigrahi et al. 2023, arXiv 2302.06600, its run_experiment.sh for AG News

They are read from the user's own copy (the folder of GLUE, of SNLI, of LM-BFF's few-shot samples, or a JSON file as in
`texts.py`), or from the hub by Hugging Face's `datasets`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import number
from ..errors import ConfigError, IntegrityError, nearest
from .pairs import Pair, Sentences
from .records import load_hub
from .texts import TextData, read_texts

IT_WAS, THIS_IS = "{text} It was {mask}.", "{text} This is {mask}."
IN_FRONT = "{mask}: {text}"
SAME, FOLLOWS = "{text} {mask}, {text2:lower}", "{text:-}? {mask}, {text2:lower}"
FILMS = {"0": "terrible", "1": "great"}
ENTAILED = {"not_entailment": "No", "entailment": "Yes"}
INFERENCE = {"contradiction": "No", "entailment": "Yes", "neutral": "Maybe"}
PART_FILES = {
    "train": ("train",),
    "validation": ("dev", "dev_matched", "validation", "validation_matched"),
    "test": ("test", "test_matched"),
}
SHORT = 0.001  # the share of a file's rows that may lack columns
UNLABELLED = ("-", "-1", "-1.0", "")  # marks of a missing label: the annotators did not agree, or it is kept secret


@dataclass(frozen=True)
class Hub:
    """A task's place on Hugging Face's hub: `datasets.load_dataset(path, config)`.

    Attributes:
        columns: those of the text(s) and the label. labels: the published label for number i; empty = the number
            itself.
    """

    path: str
    config: str | None
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedTask:
    """One task as it was published.

    Attributes:
        template: has `{text}`, `{mask}` and, for pairs, `{text2}`. words: label -> word, in the order of the classes.
        measure: the measure in its papers: `accuracy`, `f1` (for the second label), `mcc` or `pearson`. bounds: for a
        regression, the lowest and the highest score, for which the first and the second word stand.
        max_length: the tokens per example.
        header: the columns of its files, with the label last: names in the first line; integers = positions in files
        without such a line.
        hub: its place on the hub; None = the user must give a copy.
    """

    name: str
    template: str
    words: Mapping[str, str]
    header: tuple[str | int, ...]
    measure: str = "accuracy"
    bounds: tuple[float, float] | None = None
    max_length: int = 128
    hub: Hub | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """Whether its examples are pairs of sentences."""
        return "{text2" in self.template

    def half(self, score: str) -> str:
        """The class of a regression's score for few-shot sampling: the lower half (including its end) or the upper
        half."""
        assert self.bounds is not None
        low, high = self.words
        return low if score_in(self.name, score, self.bounds) <= 0.5 else high


def score_in(name: str, score: str, bounds: tuple[float, float]) -> float:
    """The position of a score between the bounds, 0 to 1.

    Raises:
        ConfigError: the score is not a number, or lies outside the bounds.
    """
    low, high = bounds
    try:
        value = float(score)
    except ValueError:
        raise ConfigError(f"task {name}: got the score {score!r}, expected a number from {low:g} to {high:g}") from None
    return (number(f"task {name}, score", value, low, high) - low) / (high - low)


def _glue(config: str, *columns: str, labels: tuple[str, ...] = ()) -> Hub:
    return Hub("nyu-mll/glue", config, columns, labels)


_THREE = ("entailment", "neutral", "contradiction")
_TWO = ("entailment", "not_entailment")
_TASKS = (
    PublishedTask("sst-2", IT_WAS, FILMS, ("sentence", "label"), hub=_glue("sst2", "sentence", "label")),
    PublishedTask(
        "sst-5", IT_WAS, {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"}, (1, 0),
        hub=Hub("SetFit/sst5", None, ("text", "label")),
    ),
    PublishedTask(
        "mr", IT_WAS, FILMS, (1, 0), hub=Hub("cornell-movie-review-data/rotten_tomatoes", None, ("text", "label"))
    ),
    PublishedTask("cr", IT_WAS, FILMS, (1, 0)),
    PublishedTask("mpqa", IT_WAS, FILMS, (1, 0)),
    PublishedTask("subj", THIS_IS, {"0": "subjective", "1": "objective"}, (1, 0)),
    PublishedTask(
        "trec", IN_FRONT,
        {"0": "Description", "1": "Entity", "2": "Expression", "3": "Human", "4": "Location", "5": "Number"}, (1, 0),
    ),
    PublishedTask(
        "cola", THIS_IS, {"0": "incorrect", "1": "correct"}, (3, 1), measure="mcc",
        hub=_glue("cola", "sentence", "label"),
    ),
    PublishedTask(
        "mnli", FOLLOWS, INFERENCE, ("sentence1", "sentence2", "gold_label"), max_length=256,
        hub=_glue("mnli", "premise", "hypothesis", "label", labels=_THREE),
    ),
    PublishedTask(
        "snli", FOLLOWS, INFERENCE, ("sentence1", "sentence2", "gold_label"), max_length=256,
        hub=Hub("stanfordnlp/snli", None, ("premise", "hypothesis", "label"), _THREE),
    ),
    PublishedTask(
        "qnli", FOLLOWS, ENTAILED, ("question", "sentence", "label"),
        hub=_glue("qnli", "question", "sentence", "label", labels=_TWO),
    ),
    PublishedTask(
        "rte", FOLLOWS, ENTAILED, ("sentence1", "sentence2", "label"), max_length=256,
        hub=_glue("rte", "sentence1", "sentence2", "label", labels=_TWO),
    ),
    PublishedTask(
        "mrpc", SAME, {"0": "No", "1": "Yes"}, ("#1 String", "#2 String", "Quality"), measure="f1",
        hub=_glue("mrpc", "sentence1", "sentence2", "label"),
    ),
    PublishedTask(
        "qqp", SAME, {"0": "No", "1": "Yes"}, ("question1", "question2", "is_duplicate"), measure="f1",
        hub=_glue("qqp", "question1", "question2", "label"),
    ),
    PublishedTask(
        "sts-b", SAME, {"0": "No", "1": "Yes"}, ("sentence1", "sentence2", "score"), measure="pearson",
        bounds=(0.0, 5.0), hub=_glue("stsb", "sentence1", "sentence2", "label"),
    ),
    PublishedTask(
        "agnews", IN_FRONT, {"0": "World", "1": "Sports", "2": "Business", "3": "Tech"}, (1, 2, 0),
        hub=Hub("fancyzhx/ag_news", None, ("text", "label")), renamed={"1": "0", "2": "1", "3": "2", "4": "3"},
    ),
)  # fmt: skip
PUBLISHED_TASKS = {task.name: task for task in _TASKS}


def published_task(name: str) -> PublishedTask:
    """The task of that name; SST2, sst_2 and SST-2 are the same.

    Raises:
        ConfigError: there is none; the text has the nearest name.
    """
    plain = {_letters(n): n for n in PUBLISHED_TASKS}
    if _letters(name) not in plain:
        raise ConfigError(
            f"task: got {name!r}, expected one of {', '.join(PUBLISHED_TASKS)}; did you mean "
            f"{nearest(name, PUBLISHED_TASKS)!r}?"
        )
    return PUBLISHED_TASKS[plain[_letters(name)]]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def read_published(task: PublishedTask, data: str | Path | None, *, shots_seed: int = 13, seed: int = 0) -> TextData:
    """The task's examples.

    Args:
        data: a JSON file for `read_texts`, or a folder with `train`, `dev` and `test` as .tsv or .csv; None = from the
            hub, or its cache by `datasets`. shots_seed, seed: see `read_texts`.

    A test part without labels (GLUE keeps them secret) is replaced by the dev part, as in the papers; then there is no
    validation part, and `k_shot` draws it from the remaining training examples. Examples without a label are left out.

    Raises:
        ConfigError: a folder or file has another form, labels are not the task's, the hub cannot be reached, or
            `datasets` is not installed. IntegrityError: a file cannot be read.
    """
    if data is None:
        found = _from_hub(task)
    elif Path(data).is_dir():
        found = _from_folder(task, Path(data))
    else:
        found = read_texts(data, shots_seed=shots_seed, seed=seed)
    return _as_task_has_it(task, found)


def published_files(data: str | Path) -> list[Path]:
    """The files of a folder that `read_published` reads."""
    found = (_file_of(Path(data), names) for names in PART_FILES.values())
    return [path for path in found if path is not None]


def _as_task_has_it(task: PublishedTask, data: TextData) -> TextData:
    for x, y in [*data.train, *data.validation, *data.test]:
        if task.paired and not isinstance(x, Sentences):
            raise ConfigError(
                f"task {task.name}: {x[:60]!r} is one sentence, but its template has two; give rows of [text, text2, "
                "label]"
            )
        if task.bounds is not None:
            score_in(task.name, y, task.bounds)
        elif y not in task.words:
            raise ConfigError(
                f"task {task.name}: {x[:40]!r} has the label {y!r}, expected one of {', '.join(task.words)}"
            )
    return data


def _three(parts: Mapping[str, list[Pair]]) -> TextData:
    """The three parts, where the dev part becomes the test part if that has no labels."""
    if parts.get("test"):
        return TextData(parts["train"], list(parts.get("validation", ())), list(parts["test"]))
    return TextData(parts["train"], [], list(parts.get("validation", ())))


# --- folders ---


def _file_of(folder: Path, names: Sequence[str]) -> Path | None:
    tried = (folder / f"{name}{end}" for name in names for end in (".tsv", ".csv"))
    return next((path for path in tried if path.is_file()), None)


def _from_folder(task: PublishedTask, folder: Path) -> TextData:
    parts: dict[str, list[Pair]] = {}
    for part, names in PART_FILES.items():
        path = _file_of(folder, names)
        if path is not None:
            parts[part] = list(_table_rows(task, path, secret=part == "test"))
    if not parts.get("train") or not (parts.get("validation") or parts.get("test")):
        raise ConfigError(
            f"{folder}: holds no {'train' if not parts.get('train') else 'dev or test'} part of {task.name} (.tsv or "
            ".csv); name the folder that has them"
        )
    return _three(parts)


def _table_rows(task: PublishedTask, path: Path, secret: bool) -> Iterator[Pair]:
    """The rows of a file. GLUE's .tsv have no quoting; .csv do. A few rows of QQP lack columns and are left out, as in
    the papers' code."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); is the path right, and the file whole?") from error
    tabs = path.suffix == ".tsv"
    rows = (
        (line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()) if tabs
        else csv.reader(io.StringIO(text, newline=""))
    )  # fmt: skip
    places: Sequence[int] | None = None
    if not isinstance(task.header[0], str):
        places = [int(c) for c in task.header]
    read = short = 0
    for row in rows:
        read += 1
        if places is None:
            lacking = [c for c in task.header if c not in row]
            if lacking == [task.header[-1]] and secret:
                return  # the labels are kept secret
            if lacking:
                raise ConfigError(
                    f"{path}: its first line has the columns {', '.join(row)}; {task.name} needs "
                    f"{', '.join(map(str, task.header))}"
                )
            places = [row.index(str(c)) for c in task.header]
        elif max(places) >= len(row):
            short += 1
        else:
            *texts, label = (row[i].strip() for i in places)
            if label in UNLABELLED:
                continue
            yield _input(task, texts), task.renamed.get(label, label)
    if short > SHORT * read:
        raise ConfigError(
            f"{path}: {short} of {read} rows have fewer than {max(places or [0]) + 1} columns; is it a file of "
            f"{task.name}?"
        )


def _input(task: PublishedTask, texts: Sequence[str]) -> str:
    """The input of an example; a task of single sentences joins two texts (AG News' title and description)."""
    return Sentences(*texts) if task.paired else " ".join(texts)


# --- the hub ---


def _from_hub(task: PublishedTask) -> TextData:
    hub = task.hub
    if hub is None:
        raise ConfigError(f"data: {task.name} cannot be read from a hub; give your copy of it (--data FILE or FOLDER)")
    found = load_hub(hub.path, hub.config, f"give your copy of {task.name} (--data FILE or FOLDER)")
    parts = {}
    for part, names in PART_FILES.items():
        name = next((n for n in names if n in found), None)
        parts[part] = [] if name is None else list(_hub_rows(task, hub, found[name]))
    return _three(parts)


def _hub_rows(task: PublishedTask, hub: Hub, rows: Any) -> Iterator[Pair]:
    for row in rows:
        *texts, label = (row[c] for c in hub.columns)
        if str(label) not in UNLABELLED:
            yield _input(task, texts), hub.labels[label] if hub.labels else str(label)
