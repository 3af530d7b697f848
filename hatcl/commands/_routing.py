"""The router of a run of `hatcl train`: make it from the run's data, measure it, show it, and drop forgotten tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

import hatcl

from ..continual.folder import base_of
from ..continual.images import ImageOptions
from ..continual.loading import TextOptions, part_used
from ..continual.routing import (
    EachPrepared,
    OwnClasses,
    TextLogits,
    image_examples,
    image_router,
    readings,
    routing_measures,
    text_examples,
    text_router,
    tokens_digest,
)
from ..continual.tasks import ContinualTask, TextReading
from ..data.images import ImageData
from ..data.pairs import Chat
from ..data.texts import TextData
from ..engine import folder as runs
from ..errors import ConfigError, IntegrityError
from ..report.routing import draw_routing
from ._console import out, percent, say
from ._options import made
from ._sequence import texts
from ._shown import draw_into, show_learning

ROUTER, ABOUT, CONFUSION = "router.safetensors", "router.json", "router.png"
READ_WITH = {"base": "a base model", "tokens": "a tokenizer"}
ROUTED = {
    "task found": "task_accuracy",
    "in one forward": "at_first_sight",
    "by the largest logit": "largest_logit",
    "class-incremental": "class_incremental",
    "task-incremental": "task_incremental",
}


def route(
    run: Path, model: nn.Module, data: Mapping[str, TextData] | Sequence[ImageData], options: Mapping[str, Any]
) -> None:
    """Make a finished run's router, and measure it."""
    say("router: statistics of every task's training examples", "dim")
    validated, seed = options["score_on"] == "validation", options["seed"]
    known: dict[str, Any]
    if isinstance(data, Mapping):
        form: TextOptions = made(TextOptions, options)
        parts = [part_used(of, form, validated=validated, seed=seed) for of in data.values()]
        base, sequence = texts(options, data)
        router = text_router(model, sequence, parts, {"seed": seed})
        examples = text_examples(sequence, parts)
        chats = [isinstance(of.train[0][0], Chat) for of in parts]
        labels = [list(read.labels) for read in readings(sequence)]
        known = {"tasks": list(data), "labels": labels, "chats": chats, **_read_with(base, sequence, all(chats))}
    else:
        of_images: ImageOptions = made(ImageOptions, options)
        stream = [of.on_validation(of_images.validation, seed) if validated else of for of in data]
        router = image_router(model, stream, of_images, {"seed": seed})
        examples = image_examples(stream, of_images.eval_batch_size)
        counts = [of.num_classes for of in stream] if of_images.rotate else None
        prepared = EachPrepared.of(stream, of_images).to_dict()
        known = {"tasks": [of.name for of in stream], "prepared": prepared, "classes": counts}
    found = routing_measures(router, model, examples)
    router.save(run / ROUTER)
    runs.write_json(run / ABOUT, {**known, "measured": found})


def about(run: Path) -> dict[str, Any] | None:
    """The content of a run's router.json; None if it has no router."""
    return runs.read_json(run / ABOUT) if (run / ABOUT).exists() else None


def routed(run: Path) -> dict[str, Any]:
    """The content of a run's router.json.

    Raises:
        ConfigError: the run has no router.
    """
    known = about(run)
    if known is None:
        raise ConfigError(f"{run} has no router; make one with: hatcl train --resume --router --output {run}")
    return known


def load_router(run: Path, model: nn.Module, asked: bool = True) -> hatcl.TaskRouter:
    """Load a run's router, which reads images as they are stored, or the tokens of texts.

    Args:
        asked: whether it will be asked for the task of an input; for texts this needs the base model and tokenizer.

    Raises:
        ConfigError: the run has no router. IntegrityError: the router is damaged, or the base model or its tokenizer
            has changed.
    """
    known = routed(run)
    if "prepared" in known:
        prepare = EachPrepared.from_dict(known["prepared"])
        own = OwnClasses(known["classes"]) if known.get("classes") else None
        return hatcl.TaskRouter.load(run / ROUTER, model, prepare=prepare, logits=own)
    return hatcl.TaskRouter.load(run / ROUTER, model, logits=TextLogits(text_readings(run, known) if asked else []))


def text_readings(run: Path, known: Mapping[str, Any]) -> list[TextReading]:
    """How each task of a run reads texts, found from the run's options and labels without its data."""
    pairs = [[(y, y) for y in labels] or [("text", "text")] for labels in known["labels"]]
    stubs = {name: TextData(some, [], []) for name, some in zip(known["tasks"], pairs, strict=True)}
    options: dict[str, Any] = runs.stored_config(run)["options"]  # type: ignore[index]
    base, sequence = texts({**options, "train": None, "test": None, "plain": False, "score_on": "test"}, stubs)
    for what, digest in _read_with(base, sequence, all(known["chats"])).items():
        if known[what] != digest:
            raise IntegrityError(
                f"{run}: its router was made with {READ_WITH[what]} that is no longer the one at "
                f"{options['model']}, so texts would be read differently; restore the files that were there"
            )
    return readings(sequence)


def _read_with(base: nn.Module, sequence: Sequence[ContinualTask], chat: bool) -> dict[str, str]:
    """Digests of the base model and the chat template: texts are read with them, but the run does not contain them."""
    return {"base": base_of(base), "tokens": tokens_digest(readings(sequence), chat)}


def drop_routed(run: Path, model: nn.Module, task: int) -> None:
    """Remove a forgotten task from a run's router exactly, along with the figures measured with it."""
    known = about(run)
    if known is None:
        return
    router = load_router(run, model, asked=False)
    if task in router.tasks:
        router.remove_task(task)
        router.save(run / ROUTER)
    runs.write_json(run / ABOUT, {**known, "measured": None})
    (run / CONFUSION).unlink(missing_ok=True)


def show_run(run: Path, metrics: Mapping[str, Any]) -> None:
    """Print the results of a run of `hatcl train`, including its router."""
    show_learning(run, metrics)
    _show_routing(run)


def _show_routing(run: Path) -> None:
    """Print how well a run's router finds tasks, and draw which task it takes for which."""
    known = about(run)
    if known is None:
        return
    found = known["measured"]
    if found is None:
        say("router: not measured since a task was forgotten", "yellow")
        return
    table = Table(box=box.SIMPLE_HEAD, title="without being given the task, in %", title_justify="left")
    shown = {name: found[key] for name, key in ROUTED.items() if key in found}
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*(percent(share) for share in shown.values()))
    out.print(table)
    draw_into(run / CONFUSION, lambda: draw_routing(found["confusion"], known["tasks"]))
