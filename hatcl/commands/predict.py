"""`hatcl predict`: task and class of images, by a run's router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import hatcl

from ..continual.folder import find_model
from ..errors import IntegrityError
from ._command import Device, command
from ._console import out
from ._options import usable_device
from ._routing import about, load_router


@command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run of hatcl train --router.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Files of images.")],
    among: Annotated[
        list[int] | None,
        typer.Option(help="A task that comes into question, counted from 0; repeatable. By default all."),
    ] = None,
    device: Device = "auto",
) -> list[dict[str, Any]]:
    """Say to which task and class each image belongs, without being told the task.

    Grey images are taken as grey. Values are those of the files, 0 to 255, so the run's data must have had them too. A
    class is the label in the task's own data.
    """
    pictures = [_picture_at(path) for path in images]  # or an error, before anything is printed
    where = usable_device(device)
    model = hatcl.from_pretrained(find_model(run)).to(where)
    router = load_router(run, model)
    names = (about(run) or {})["tasks"]
    answers: list[dict[str, Any]] = []
    for path, picture in zip(images, pictures, strict=True):
        p = hatcl.predict(model, picture, router=router, among=among or None)
        task = int(p.task)
        answers.append({
            "image": str(path), "task": task, "name": names[task], "label": int(p.label),
            "probability": float(p.probability), "rejected": bool(p.rejected),
        })  # fmt: skip
        _tell(answers[-1])
    return answers


def _tell(answer: dict[str, Any]) -> None:
    verdict = "rejected; nearest is " if answer["rejected"] else ""
    out.print(
        f"{answer['image']}: {verdict}task {answer['task']} ({answer['name']}), class {answer['label']}, probability "
        f"{answer['probability']:.3f}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


def _picture_at(path: Path) -> Tensor:
    """An image's values, `[1, H, W]` of a grey one or `[1, H, W, 3]`."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            grey: Sequence[str] = ("1", "L", "LA")
            values = np.asarray(file.convert("L" if file.mode in grey else "RGB"))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read as an image ({error}); is the path right?") from error
    return torch.from_numpy(values.copy()).unsqueeze(0)
