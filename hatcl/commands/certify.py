"""`hatcl certify`: the proof that every sealed task is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hatcl

from ..continual.images_run import RunResult, logits_digest, probe_inputs, test_logits
from ..data.images import Preparation
from ..engine import folder as runs
from ..errors import ConfigError, HATError
from ..files import read_json
from ._command import Answer, Device, RunArgument, command
from ._console import say
from ._options import usable_device
from .train import image_options, image_tasks


@command("certify")
def certify_command(run: RunArgument, device: Device = "auto") -> Any:
    """Attack everything that is not a sealed task's own and demand bit-equal outputs; compare with those at sealing."""
    where = torch.device(usable_device(device))
    model = hatcl.from_pretrained(runs.find_model(run)).to(where)
    sealed = hatcl.tasks(model)
    if not sealed:
        raise ConfigError(f"{run}: no task is sealed yet, so there is nothing to certify")
    moved, inputs = _compare_with_sealing(run, model, sealed, where)
    certificate = hatcl.certify(model, inputs.to(where))
    for task in sealed:
        words = [f"task {task}: {'exact' if certificate.max_abs_diff[task] == 0 else 'LEAKS'}"]
        if certificate.max_abs_diff[task] != 0:
            words.append(f"logits move by {certificate.max_abs_diff[task]:g} under attack")
        if task in moved:
            words.append("logits MOVED since sealing" if moved[task] else "logits bit-equal to those at sealing")
        say(", ".join(words), "red" if moved.get(task) or certificate.max_abs_diff[task] else "green")
    report = {
        "exact": certificate.exact,
        "max_abs_diff": {task: float(certificate.max_abs_diff[task]) for task in sealed},
        "moved_since_sealing": moved,
    }
    return report if certificate.exact and not any(moved.values()) else Answer(report)


def _compare_with_sealing(
    run: Path, model: nn.Module, sealed: Sequence[int], device: torch.device
) -> tuple[dict[int, bool], torch.Tensor]:
    """Which tasks' test logits are no longer those at sealing, and inputs to certify with. Without a run's records or
    its data, nothing is compared and the inputs are random."""
    config = read_json(run / runs.CONFIG) if (run / runs.CONFIG).exists() else {}
    shape = tuple(config.get("input_shape", (3, 224, 224)))
    drawn = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    if not config or not (run / runs.METRICS).exists():
        say("no finished run's records here, so logits are not compared with those at sealing", "yellow")
        return {}, drawn
    result = RunResult.from_dict(read_json(run / runs.METRICS))
    options = image_options(config["options"], str(device))
    try:
        stream = image_tasks(config["options"])
    except HATError as error:
        say(f"logits are not compared with those at sealing: {error}", "yellow")
        return {}, drawn
    moved = {}
    for t in sealed:
        if t < len(result.records) and t not in result.forgotten:
            prepare = Preparation.of(stream[t], size=options.size, fit=options.fit)
            with hatcl.task(model, t):
                digest = logits_digest(test_logits(model, stream[t], prepare, options))
            moved[t] = digest != result.records[t].logits_sha256
    return moved, probe_inputs(stream[0], Preparation.of(stream[0], size=options.size, fit=options.fit))
