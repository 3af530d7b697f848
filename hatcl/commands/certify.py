"""`hatcl certify`: prove that every sealed task is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hatcl

from ..calls import moved as on_device
from ..continual.folder import find_model
from ..continual.methods.hat import PROBED, outputs_digest
from ..engine import folder as runs
from ..errors import ConfigError, HATError
from ..files import read_json
from ._command import Answer, Device, RunArgument, command
from ._console import say
from ._options import usable_device
from ._sequence import tasks_of

TRAIN = "train"


@command("certify")
def certify_command(run: RunArgument, device: Device = "auto") -> Any:
    """For each sealed task, overwrite all that is not its own and require bit-equal outputs, also to those at
    sealing."""
    where = torch.device(usable_device(device))
    model = hatcl.from_pretrained(find_model(run)).to(where)
    sealed = hatcl.tasks(model)
    if not sealed:
        raise ConfigError(f"{run}: no task is sealed, so there is nothing to certify")
    moved, inputs = _compare_with_sealing(run, model, sealed, where)
    certificate = hatcl.certify(model, on_device(inputs, where))
    for task in sealed:
        words = [f"task {task}: {'exact' if certificate.max_abs_diff[task] == 0 else 'LEAKS'}"]
        if certificate.max_abs_diff[task] != 0:
            words.append(f"outputs move by {certificate.max_abs_diff[task]:g} under attack")
        if task in moved:
            words.append("outputs MOVED since sealing" if moved[task] else "outputs bit-equal to those at sealing")
        say(", ".join(words), "red" if moved.get(task) or certificate.max_abs_diff[task] else "green")
    report = {
        "exact": certificate.exact,
        "max_abs_diff": {task: float(certificate.max_abs_diff[task]) for task in sealed},
        "moved_since_sealing": moved,
    }
    return report if certificate.exact and not any(moved.values()) else Answer(report)


def _compare_with_sealing(
    run: Path, model: nn.Module, sealed: Sequence[int], device: torch.device
) -> tuple[dict[int, bool], Any]:
    """Find the tasks whose outputs differ from those at sealing, and inputs to certify with. Without a run's records or
    its data, nothing is compared and the inputs are random images."""
    config = read_json(run / runs.CONFIG) if (run / runs.CONFIG).exists() else {}
    shape = tuple(config.get("input_shape", (3, 224, 224)))
    drawn = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    if config.get("command") != TRAIN or not (run / runs.METRICS).exists():
        say("no finished run's records here, so outputs are not compared with those at sealing", "yellow")
        return {}, drawn
    metrics = read_json(run / runs.METRICS)
    try:
        tasks = tasks_of(config["options"])
    except HATError as error:
        if "input_shape" not in config:
            raise
        say(f"outputs are not compared with those at sealing: {error}", "yellow")
        return {}, drawn
    facts = metrics["facts"]
    known = {t: facts[t]["outputs_sha256"] for t in sealed if t < len(facts) and facts[t]}
    moved = {t: outputs_digest(model, tasks[t], t) != digest for t, digest in known.items()}
    return moved, tasks[0].inputs(PROBED)
