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
from ..continual.routing import EachPrepared, image_router, routing_measures
from ..data.images import ImageData
from ..engine import folder as runs
from ..errors import ConfigError
from ..report.routing import draw_routing
from ._console import out, percent, say
from ._options import made
from ._shown import draw_into, show_learning

ROUTER, ABOUT, CONFUSION = "router.safetensors", "router.json", "router.png"
ROUTED = {
    "task found": "task_accuracy",
    "by the largest logit": "largest_logit",
    "class-incremental": "class_incremental",
    "task-incremental": "task_incremental",
}


def route(run: Path, model: nn.Module, stream: Sequence[ImageData], options: Mapping[str, Any]) -> None:
    """Make a finished run's router, and measure it."""
    of_images: ImageOptions = made(ImageOptions, options)
    if options["score_on"] == "validation":
        stream = [data.on_validation(of_images.validation, options["seed"]) for data in stream]
    say("router: statistics of every task's training images", "dim")
    router = image_router(model, stream, of_images, {"seed": options["seed"]})
    found = routing_measures(router, model, stream, of_images)
    router.save(run / ROUTER)
    prepared = EachPrepared.of(stream, of_images).to_dict()
    runs.write_json(run / ABOUT, {"tasks": [d.name for d in stream], "prepared": prepared, "measured": found})


def about(run: Path) -> dict[str, Any] | None:
    """What a run's router.json says; None where it has no router."""
    return runs.read_json(run / ABOUT) if (run / ABOUT).exists() else None


def load_router(run: Path, model: nn.Module) -> hatcl.TaskRouter:
    """The router of a run, for images as they are stored.

    Raises:
        ConfigError: it has none. IntegrityError: it is damaged.
    """
    known = about(run)
    if known is None:
        raise ConfigError(f"{run}: has no router; make one with: hatcl train --resume --router --output {run}")
    prepare = EachPrepared.from_dict(known["prepared"])
    return hatcl.TaskRouter.load(run / ROUTER, model, prepare=prepare)


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
    for name in ROUTED:
        table.add_column(name, justify="right")
    table.add_row(*(percent(found[key]) for key in ROUTED.values()))
    out.print(table)
    draw_into(run / CONFUSION, lambda: draw_routing(found["confusion"], known["tasks"]))
