"""`hatcl grow`: give a model more units, and room for more tasks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import hatcl

from ..continual import folder as kept
from ..continual.options import LearnOptions
from ..continual.sequence import OPTIMIZER
from ..engine import folder as runs
from ..engine.schedule import make_optimizer
from ..engine.state import kept_whole, load_optimizer
from ..errors import ConfigError
from ..files import complete, held_by_one, read_torch, replaced_folder
from ._command import RunArgument, command
from ._console import say

FACTOR = 1.5


@command("grow")
def grow_command(
    run: RunArgument,
    factor: Annotated[
        float | None,
        typer.Option(help="Multiply the number of units of each layer by this; 1.5 if no other growth is requested."),
    ] = None,
    layer: Annotated[
        Mapping[str, str] | None,
        typer.Option(
            "--layer",
            metavar="NAME=UNITS",
            help="Instead of a factor, the number of new units of a layer, such as layer1.0.conv1=16; repeatable. "
            "hatcl describe shows the names.",
        ),
    ] = None,
    add_tasks: Annotated[int | None, typer.Option(help="Make room for this many more tasks.")] = None,
    num_classes: Annotated[
        list[int] | None,
        typer.Option(help="The number of classes of the new tasks: once for all of them, or once for each."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the model to this folder and leave the run as it is.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier model in --output.")] = False,
) -> dict[str, Any]:
    """Give a trained network more units and room for more tasks; every sealed task stays as it is, bit for bit.

    A run that stopped, for example because its network was full, can continue in the larger network: grow it, then call
    hatcl train --resume. If it stopped in the middle of a task, that task is learned from its beginning.
    """
    if factor is not None and layer:
        raise ConfigError("--factor, --layer: got both; --layer names the layers that grow, leave --factor out")
    if num_classes and add_tasks is None:
        raise ConfigError(
            "--num-classes belongs to the tasks that --add-tasks makes room for; add --add-tasks, or "
            "leave --num-classes out"
        )
    how = _new_units(layer) if layer else FACTOR if factor is None and add_tasks is None else factor
    if output is not None and (run / runs.CONFIG).exists() and run.resolve() in output.resolve().parents:
        raise ConfigError(f"--output {output}: lies in {run}, which is to stay as it is; name another folder")
    if output is not None and (output / runs.CONFIG).exists():
        if "command" in runs.read_json(output / runs.CONFIG):
            raise ConfigError(f"--output {output}: a run is there; name another folder")
        if not replace:
            raise ConfigError(f"--output {output}: a model is there already; add --replace, or name another folder")
    folder = kept.find_model(run)
    of_a_run = output is None and (run / runs.CONFIG).exists() and folder != run
    stopped = of_a_run and not (run / runs.METRICS).exists()
    if stopped and add_tasks is not None:
        raise ConfigError(
            f"--add-tasks: {run} is not finished, so its tasks are still those that it was started with; finish it "
            "first "
            f"(hatcl train --resume --output {run}), or write the model to another folder with --output"
        )
    with held_by_one(run / runs.LOCK) if of_a_run else contextlib.nullcontext():
        model = hatcl.from_pretrained(folder)
        optimizer = _optimizer_of(run, model) if stopped else None
        grown = None if how is None else hatcl.grow(model, how, optimizer=optimizer)
        classes = None if not num_classes else num_classes[0] if len(num_classes) == 1 else num_classes
        added = None if add_tasks is None else hatcl.add_tasks(model, add_tasks, classes)
        if not of_a_run:
            hatcl.save_pretrained(model, output or folder)
        elif (run / runs.METRICS).exists():
            _write_finished(run, model)
        else:
            _write_stopped(run, model, optimizer)
    for report in (grown, added):
        if report is not None:
            say(str(report))
    say(f"written to {output or run}")
    return {name: None if r is None else r.to_dict() for name, r in (("grown", grown), ("added", added))}


def _new_units(layers: Mapping[str, str]) -> dict[str, int]:
    for name, units in layers.items():
        if not units.isdecimal():
            raise ConfigError(f"--layer: got {name}={units}, expected a whole number of new units")
    return {name: int(units) for name, units in layers.items()}


def _optimizer_of(run: Path, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer that a stopped run uses for all of its tasks; None if each task has its own."""
    path = complete(run / kept.CHECKPOINT) / OPTIMIZER
    if not path.exists():
        return None
    with kept_whole(run / runs.CONFIG):
        options = LearnOptions().changed(runs.read_json(run / runs.CONFIG)["learning"])
    optimizer = make_optimizer(model if options.weight_decay else model.parameters(), options)
    with kept_whole(path):
        load_optimizer(optimizer, read_torch(path)["optimizer"], path)
    return optimizer


def _write_stopped(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Write the checkpoint of a stopped run, with its model and its optimizer in their new sizes."""
    for midway in run.glob(kept.MIDWAY.format("*")):  # its tensors have the old sizes
        say(f"the task in which the run stopped is learned from its beginning ({midway.name} is dropped)")
        midway.unlink()
    at = complete(run / kept.CHECKPOINT)
    moments = None if optimizer is None else {**read_torch(at / OPTIMIZER), "optimizer": optimizer.state_dict()}
    with replaced_folder(run / kept.CHECKPOINT) as new:
        shutil.copytree(at, new, dirs_exist_ok=True)
        hatcl.save_pretrained(model, new / kept.MODEL)
        if moments is not None:
            torch.save(moments, new / OPTIMIZER)


def _write_finished(run: Path, model: nn.Module) -> None:
    """Write the model of a finished run, and the units in its metrics."""
    metrics = runs.read_json(run / runs.METRICS)
    described = hatcl.describe(model).to_dict()
    details = {**metrics["details"], "units": described["units"], "layers": described["layers"]}
    kept.save_model(run, model, metrics)
    runs.write_json(run / runs.METRICS, {**metrics, "details": details})
