"""The router of a run of `hatcl train`: made of its data, measured, shown, and without the tasks that are forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

import hatcl

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
)
from ..continual.tasks import TextReading
from ..data.images import ImageData
from ..data.pairs import Chat
from ..data.texts import TextData
from ..engine import folder as runs
from ..errors import ConfigError
from ..report.routing import draw_routing
from ._console import out, percent, say
from ._options import made
from ._sequence import texts
from ._shown import draw_into, show_learning

ROUTER, ABOUT, CONFUSION = "router.safetensors", "router.json", "router.png"
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
        sequence = texts(options, data)[1]
        router = text_router(model, sequence, parts, {"seed": seed})
        examples = text_examples(sequence, parts)
        chats = [isinstance(of.train[0][0], Chat) for of in parts]
        labels = [list(read.labels) for read in readings(sequence)]
        known = {"tasks": list(data), "labels": labels, "chats": chats}
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
    """What a run's router.json says; None where it has no router."""
    return runs.read_json(run / ABOUT) if (run / ABOUT).exists() else None


def routed(run: Path) -> dict[str, Any]:
    """What a run's router.json says.

    Raises:
        ConfigError: it has no router.
    """
    known = about(run)
    if known is None:
        raise ConfigError(f"{run}: has no router; make one with: hatcl train --resume --router --output {run}")
    return known


def load_router(run: Path, model: nn.Module) -> hatcl.TaskRouter:
    """The router of a run, for images as they are stored, or for the tokens of texts.

    Raises:
        ConfigError: it has none. IntegrityError: it is damaged.
    """
    known = routed(run)
    if "prepared" in known:
        prepare = EachPrepared.from_dict(known["prepared"])
        own = OwnClasses(known["classes"]) if known.get("classes") else None
        return hatcl.TaskRouter.load(run / ROUTER, model, prepare=prepare, logits=own)
    return hatcl.TaskRouter.load(run / ROUTER, model, logits=TextLogits(text_readings(run, known)))


def text_readings(run: Path, known: Mapping[str, Any]) -> list[TextReading]:
    """How the tasks of a run read texts: from its options and labels alone, without its data."""
    pairs = [[(y, y) for y in labels] or [(y, y) for y in ("text",)] for labels in known["labels"]]
    stubs = {name: TextData(some, [], []) for name, some in zip(known["tasks"], pairs, strict=True)}
    uncut = {**runs.stored_config(run)["options"], "train": None, "test": None, "plain": False}  # type: ignore[index]
    return readings(texts({**uncut, "score_on": "test"}, stubs)[1])


def drop_routed(run: Path, model: nn.Module, task: int) -> None:
    """Take a task that was forgotten out of a run's router, exactly. What was measured with it goes too."""
    known = about(run)
    if known is None:
        return
    router = load_router(run, model)
    if task in router.tasks:
        router.remove_task(task)
        router.save(run / ROUTER)
    runs.write_json(run / ABOUT, {**known, "measured": None})
    (run / CONFUSION).unlink(missing_ok=True)


def show_run(run: Path, metrics: Mapping[str, Any]) -> None:
    """Print what a run of `hatcl train` showed, its router included."""
    show_learning(run, metrics)
    _show_routing(run)


def _show_routing(run: Path) -> None:
    """Print how well a run's router finds tasks, and draw whom it takes for whom."""
    known = about(run)
    if known is None:
        return
    found = known["measured"]
    if found is None:
        say("router: not measured since a task was forgotten", "yellow")
        return
    table = Table(box=box.SIMPLE_HEAD, title="without the task being told, in %", title_justify="left")
    shown = {name: found[key] for name, key in ROUTED.items() if key in found}
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*(percent(share) for share in shown.values()))
    out.print(table)
    draw_into(run / CONFUSION, lambda: draw_routing(found["confusion"], known["tasks"]))
