"""Shared by the commands that learn coefficients: their options, the run around a procedure, and its display."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ...atlas.experiment import CHECKPOINT, HEADS, ISOTROPIC, Experiment, Writing
from ...atlas.files import per_block
from ...atlas.loading import FITTED_HEADS, TEXT, Reading
from ...atlas.options import AtlasOptions
from ...data.datasets import absolute_images
from ...engine.folder import CONFIG, RunFolder, check_inputs
from ...errors import ConfigError
from ...files import read_json, write_files
from ...report.heatmap import draw_coefficients
from ...report.tables import accuracy_table
from .._command import Asked
from .._console import Bar, out, say
from .._options import absolute_path, usable_device

HEAT_MAP = "coefficients.png"
STARTS = ("zero", "search", "isotropic")
TASK = "task"  # the name of a command's only task

Base = Annotated[
    Path,
    typer.Argument(
        metavar="BASE", help="The pretrained checkpoint: safetensors (a file, or a folder), or a state dict (.pt)."
    ),
]
DATA_FORMS = (
    "an .npz file with x_train, y_train, x_test, y_test; DATASET@ROOT, such as dtd@/data, a data set by its name; "
    "or a folder with train/ and test/, each with one folder per class"
)
DataFile = Annotated[str, typer.Option(metavar="DATA", help=f"Images: {DATA_FORMS}.")]
Vectors = Annotated[
    list[str], typer.Option(metavar="NAME=PATH", help="A task vector to compose (not the task's own); repeatable.")
]
TaskSpecs = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VECTOR:DATA",
        help="A task: its name, its task vector (a saved one, a fine-tuned checkpoint or a folder of a LoRA adapter) "
        f"and its images ({DATA_FORMS}); repeatable.",
    ),
]
WarmStart = Annotated[
    str,
    typer.Option(
        help="Where learning starts: zero, search (the best scale that all vectors share), or isotropic (search, then "
        "one learned coefficient per vector)."
    ),
]


class TaskSpec(NamedTuple):
    """A task as the command line names it."""

    name: str
    vector: Path
    data: str

    def __str__(self) -> str:
        return f"{self.name}={absolute_path(self.vector)}:{absolute_images(self.data)}"


def learned(
    asked: Asked, reading: Reading, writing: Writing, learning: AtlasOptions,
    vectors: Mapping[str, Path], data: Mapping[str, str], work: Callable[[Experiment], None],
    *, needs_validation: bool = False, stages: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run a procedure, resume an interrupted one, or return the result of a finished one.

    Args:
        stages: what else is learned before the procedure's own coefficients.
    """
    if reading.head not in (*FITTED_HEADS, TEXT):
        asked.options["head"] = absolute_path(reading.head)
    for option in ("data", "control"):
        if option in asked.options:
            asked.options[option] = absolute_images(asked.options[option])
    for option in ("model", "text_from"):
        if asked.options[option] is not None and Path(asked.options[option]).exists():
            asked.options[option] = absolute_path(asked.options[option])
    for option in ("class_names", "templates"):
        texts = getattr(reading, option)
        asked.options[option] = {n: absolute_path(t) if Path(t).exists() else t for n, t in texts.items()}
    folder = asked.folder()
    if folder.finished:
        say(f"{folder.path} is finished already.")
        return _tidied(folder)
    name = asked.command.name.split()[-1]
    order = [*stages, name]

    with Bar(learning.epochs * len(order), "epochs") as bar:

        def tell(at: str, entry: Mapping[str, float]) -> None:
            if not entry:
                bar.says(at)
                return
            if "step" in entry:
                folder.tell(name=at, stage=order.index(at), **entry)
                return
            text = ", ".join(f"{key} {entry[key]:.4g}" for key in ("loss", "score") if key in entry)
            epoch = int(entry["epoch"])
            bar.says(f"{at}: {text}", completed=order.index(at) * learning.epochs + epoch)
            bar.line(f"{at}, epoch {epoch}: {text}")
            folder.tell(name=at, stage=order.index(at), **entry)

        run = Experiment(name, here(reading), writing, learning, folder.path, tell)
        run.read(vectors, data, needs_validation=needs_validation)
        inputs = folder.same_inputs(run.files)
        if folder.begun:
            check_inputs(folder.path, read_json(folder.path / CONFIG).get("inputs", {}), run.digests)
        inputs |= run.digests
        with folder.claimed(light={HEADS}, inputs=inputs):
            work(run)
            metrics = run.write()
            try:
                blocks = [b.name for b in run.composer.blocks]
                picture = draw_coefficients(per_block(run.composer).tolist(), run.names, blocks)
                write_files({folder.path / HEAT_MAP: picture})
            except ConfigError as error:
                say(f"no picture: {error}", "yellow")
            folder.finish(metrics)
    return _tidied(folder)


def _tidied(folder: RunFolder) -> dict[str, Any]:
    for file in (CHECKPOINT, ISOTROPIC):
        (folder.path / file).unlink(missing_ok=True)
    return folder.metrics


def show_learned(run: Path, metrics: dict[str, Any]) -> None:
    """Print the result of a procedure."""
    out.print(accuracy_table(metrics["accuracy"]))
    fitted = metrics["fitted"][metrics["procedure"]]
    epoch, last = fitted["epoch"], len(fitted["history"])
    words = {-1: "all zero: the pretrained model is the best", 0: "those of the start"}.get(epoch, f"of epoch {epoch}")
    vectors, groups = metrics["coefficients"]
    say(f"coefficients ({vectors} x {groups}): {words}{f' of {last}' if epoch > 0 else ''}")
    say(f"{metrics['seconds']:.0f} s", "dim")


def here(reading: Reading) -> Reading:
    """The same reading, on a device that can be used here."""
    return dataclasses.replace(reading, device=usable_device(reading.device))


def task_specs(flag: str, texts: Sequence[str]) -> list[TaskSpec]:
    """Read `NAME=VECTOR:DATA`. With several colons, it splits where both parts are existing paths, else at the last."""
    found = []
    for text in texts:
        name, equals, rest = text.partition("=")
        cuts = [i for i, letter in enumerate(rest) if letter == ":" and 0 < i < len(rest) - 1]
        if not (name and equals and cuts):
            raise ConfigError(f"{flag}: got {text!r}, expected NAME=VECTOR:DATA")
        pairs = [(Path(rest[:i]), rest[i + 1 :]) for i in reversed(cuts)]
        there = (p for p in pairs if p[0].exists() and Path(p[1].partition("@")[2] or p[1]).exists())
        found.append(TaskSpec(name, *next(there, pairs[0])))
    _distinct(flag, [s.name for s in found])
    return found


def vector_paths(asked: Asked, texts: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=PATH`; config.json then holds the paths in absolute form."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, path) in zip(texts, pairs, strict=True):
        if not (name and equals and path):
            raise ConfigError(f"--vector: got {text!r}, expected NAME=PATH")
    _distinct("--vector", [name for name, _, _ in pairs])
    asked.options["vector"] = [f"{name}={absolute_path(path)}" for name, _, path in pairs]
    return {name: Path(path) for name, _, path in pairs}


def _distinct(flag: str, names: Sequence[str]) -> None:
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise ConfigError(f"{flag}: the name {twice!r} appears twice; each needs its own name")
