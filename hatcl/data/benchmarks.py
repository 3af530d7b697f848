"""Benchmarks of continual learning by name, read from the user's own copy: their tasks, orders, and measures.

long_sequence   15 tasks of classification (Razdaibiedina et al. 2023, arXiv 2301.12314), in the three orders of
                O-LoRA and TaSL, and the four tasks of the standard benchmark in three more
trace           8 tasks of LLMs (Wang et al. 2023, arXiv 2310.06762)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import one_of
from ..errors import ConfigError
from .texts import TextData, parts_beside, parts_of_tasl, read_parts, read_texts

ENDS = (".json", ".json.gz")


@dataclass(frozen=True)
class Benchmark:
    """Tasks in their published orders.

    Attributes:
        orders: by number, as published. measures: for tasks that are not scored by `match`, see
            `hatcl.continual.text_scores`.
    """

    name: str
    orders: Mapping[int, tuple[str, ...]]
    measures: Mapping[str, str]

    def order(self, number: int | None) -> tuple[str, ...]:
        """The tasks of an order; None = the first.

        Raises:
            ConfigError: there is no such order.
        """
        first = next(iter(self.orders))
        chosen = first if number is None else number
        if chosen not in self.orders:
            known = ", ".join(map(str, self.orders))
            raise ConfigError(f"order: got {number!r}, expected one of {known}, the numbers of {self.name}")
        return self.orders[chosen]

    def measure(self, task: str) -> str:
        """The measure that scores the task."""
        return self.measures.get(task, "match")


_LONG = {
    1: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    2: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    3: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
    4: "dbpedia amazon yahoo agnews",
    5: "dbpedia amazon agnews yahoo",
    6: "yahoo amazon agnews dbpedia",
}
BENCHMARKS = {
    "long_sequence": Benchmark("long_sequence", {k: tuple(v.split()) for k, v in _LONG.items()}, {}),
    "trace": Benchmark(
        "trace",
        {1: ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")},
        {"MeetingBank": "rouge_l", "Py150": "similarity", "ScienceQA": "answer", "20Minuten": "sari"},
    ),
}


def read_benchmark(
    name: str, folder: str | Path, *, order: int | None = None, only: Sequence[str] | None = None
) -> dict[str, TextData]:
    """The tasks of a benchmark, in order.

    For each task the folder has `TASK.json` (or .gz) in a form of `read_texts`, the folder `TASK` with `train`, `eval`
    or `dev`, and `test` as .json (TRACE's and O-LoRA's, at any depth), or `train/TASK_T5.json` and so on (TaSL's).

    Args:
        order: by its published number; None = the first. only: some of its tasks, if the others are not available.
            Figures for fewer tasks are not comparable with the benchmark's.

    Raises:
        ConfigError: the name or order is unknown, or a task is missing in the folder or not part of the benchmark.
            IntegrityError: a file is damaged.
    """
    found = _found_parts(name, folder, order, only)
    return {task: read_texts(parts[""]) if "" in parts else read_parts(parts) for task, parts in found.items()}


def benchmark_files(name: str, folder: str | Path, *, order: int | None = None) -> dict[str, Path]:
    """The same tasks as files for `read_texts`: one file with all parts, or that of the training part. Raises the
    errors of `read_benchmark`."""
    return {t: parts.get("") or parts["train"] for t, parts in _found_parts(name, folder, order, None).items()}


def _found_parts(
    name: str, folder: str | Path, order: int | None, only: Sequence[str] | None
) -> dict[str, dict[str, Path]]:
    one_of("benchmark", name, list(BENCHMARKS))
    tasks = BENCHMARKS[name].order(order)
    for task in only or ():
        one_of("only", task, tasks)
    wanted = [task for task in tasks if only is None or task in only]
    found = {task: _parts_of(Path(folder), task) for task in wanted}
    missing = [task for task, parts in found.items() if not parts]
    if missing:
        at_hand = [task for task in wanted if task not in missing]
        raise ConfigError(
            f"{folder} has no {', '.join(missing)} of {name}; put TASK.json, TASK/train.json and test.json, or "
            f"train/TASK_T5.json and test/TASK_T5.json there, or name the available tasks (only={at_hand}; on the "
            "command line --task TASK=FILE for each)"
        )
    return found


def _parts_of(folder: Path, task: str) -> dict[str, Path]:
    """Part -> file, or one file with all parts under the name ''."""
    for end in ENDS:
        if (folder / f"{task}{end}").is_file():
            return {"": folder / f"{task}{end}"}
    ways = [parts_beside(p) for p in sorted(folder.rglob("*")) if p.is_dir() and p.name.lower() == task.lower()]
    ways.append(parts_of_tasl(folder / "train" / f"{task}_T5.json"))
    return next((found for found in ways if {"train", "test"} <= set(found)), {})


def general_ability(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """TRACE's general ability delta, `mean_i (R_after,i - R_before,i)` over tasks that were not learned (arXiv
    2310.06762, eq. 3); the same for instruction following.

    Raises:
        ConfigError: the scores are for different tasks, or for none.
    """
    if not before or before.keys() != after.keys():
        raise ConfigError(
            f"general_ability: got scores for {', '.join(sorted(before)) or 'nothing'} before and for "
            f"{', '.join(sorted(after)) or 'nothing'} after, expected the same tasks"
        )
    return sum(after[name] - before[name] for name in before) / len(before)
