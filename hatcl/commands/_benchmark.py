"""The option `--benchmark` of `hatcl train`: the tasks and measures of a published benchmark, read from the user's
copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.benchmarks import BENCHMARKS, benchmark_files
from ..errors import ConfigError

FromBenchmark = Annotated[
    Optional[str],  # noqa: UP007, UP045 (Python 3.10 evaluates the alias at once)
    typer.Option(
        "--benchmark",
        metavar="NAME[:ORDER]=FOLDER",
        help="In place of --task, the tasks of long_sequence or trace in a published order, each by its own measure, "
        "from a folder with their files.",
    ),
]


def tasks_of_benchmark(asked: str, task: list[str] | None, text: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The benchmark as the values of `--task` and of the options for texts. A measure given for a task is kept.

    Raises:
        ConfigError: the text has another form, or `--task` was given too; also the errors of `read_benchmark`.
    """
    head, equals, folder = asked.partition("=")
    spelled, colon, order = head.partition(":")
    name = spelled.replace("-", "_")
    if not (equals and folder) or (colon and not order.isdigit()):
        raise ConfigError(f"--benchmark: got {asked!r}, expected NAME=FOLDER or NAME:ORDER=FOLDER, such as trace=data")
    if task:
        raise ConfigError(
            f"--task: got {task[0]!r} together with --benchmark, which has its own tasks; leave one of them out"
        )
    files = benchmark_files(name, Path(folder), order=int(order) if colon else None)
    given = list(text.get("measure") or ())
    chosen = {spec.partition("=")[0] for spec in given}
    measures = {t: BENCHMARKS[name].measure(t) for t in files if t not in chosen}
    given += [f"{t}={measure}" for t, measure in measures.items() if measure != "match"]
    return [f"{t}={path}" for t, path in files.items()], {**text, **({"measure": tuple(given)} if given else {})}
