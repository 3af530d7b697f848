"""`hatcl extract`: write a task as a separate model."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hatcl

from ..continual.folder import find_model
from ..engine import folder as runs
from ..errors import ConfigError
from ..files import read_json
from ..hat.extraction.files import ABOUT, FORMATS
from ._command import RunArgument, command
from ._console import say


class Form(str, Enum):
    """The format of the file."""

    safetensors = "safetensors"
    pt2 = "pt2"
    onnx = "onnx"


@command("extract")
def extract_command(
    run: RunArgument,
    task: Annotated[int, typer.Option(help="The task to take out, counted from 0.")],
    output: Annotated[Path, typer.Option(help="The folder to write; it must not be a run's.")],
    form: Annotated[
        Form, typer.Option("--format", help="safetensors: for hatcl.load_extracted; pt2 and onnx: programs.")
    ] = Form.safetensors,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier export in --output.")] = False,
) -> dict[str, Any]:
    """Write the network that a task computes with as an ordinary smaller model, without the other tasks. The run stays
    as it is.
    """
    folder = find_model(run)
    if (output / runs.CONFIG).exists() and not (output / ABOUT).exists():
        raise ConfigError(f"--output {output}: a run or a saved model is there; name another folder")
    earlier = next((name for name in FORMATS.values() if (output / name).exists()), None)
    if earlier is not None and not replace:
        raise ConfigError(
            f"--output {output}: an export is there already ({earlier}); add --replace, or name another folder"
        )
    config = read_json(run / runs.CONFIG) if (run / runs.CONFIG).exists() else {}
    shape = config.get("input_shape")
    draw = torch.Generator().manual_seed(0)
    extracted = hatcl.extract_task(
        hatcl.from_pretrained(folder), task, None if shape is None else torch.randn(2, *shape, generator=draw)
    )
    extracted.save(output, form.value)
    say(str(extracted.report))
    say(f"written to {output}")
    return dataclasses.asdict(extracted.report)
