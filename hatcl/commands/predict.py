"""`hatcl predict`: find the task and class of images or texts with a run's router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import hatcl

from ..config import whole
from ..continual.folder import find_model
from ..continual.routing import TextLogits
from ..continual.tasks import TextReading
from ..data.pairs import Chat
from ..errors import IntegrityError
from ..lend import Evaluating
from ._command import Device, command
from ._console import out
from ._options import usable_device
from ._routing import load_router, routed


@command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run of hatcl train --router.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUTS", help="Files of images; for a run that learned texts, texts.")
    ],
    among: Annotated[
        list[int] | None,
        typer.Option(help="Consider only this task, counted from 0; repeatable. By default all."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Find the task in one forward pass, and run this many of the likeliest tasks; by default all are run."
        ),
    ] = None,
    device: Device = "auto",
) -> list[dict[str, Any]]:
    """Find the task and the class of each image or text.

    Grey images stay grey. Pixel values are those of the files, 0 to 255, so the run's data must have used them too. A
    class is the label in the task's own data. If a task generates its answers, the answer is shown.
    """
    whole("--top", top, optional=True)
    known = routed(run)
    of_texts = "labels" in known
    pictures = [] if of_texts else [_picture_at(Path(path)) for path in inputs]  # errors come first
    chat = of_texts and all(known["chats"])
    asked: list[str] = [Chat([("user", x)]) if chat else x for x in inputs]
    where = usable_device(device)
    model = hatcl.from_pretrained(find_model(run)).to(where)
    router = load_router(run, model)
    each = router.logits.each if isinstance(router.logits, TextLogits) else []
    answers: list[dict[str, Any]] = []
    for i, said in enumerate(inputs):
        x = each[0].tokens([asked[i]]) if of_texts else pictures[i]
        p = hatcl.predict(model, x, router=router, among=among or None, top=top)
        task, label = int(p.task), int(p.label)
        answers.append({
            "text" if of_texts else "image": said, "task": task, "name": known["tasks"][task],
            "label": _answer_to(model, asked[i], each[task], task, label) if of_texts else label,
            "probability": float(p.probability), "rejected": bool(p.rejected),
        })  # fmt: skip
        _tell(answers[-1])
    return answers


def _answer_to(model: nn.Module, text: str, how: TextReading, task: int, label: int) -> str:
    """The label of a task's class, or the answer that the task generates."""
    if how.written is None:
        return how.labels[label]
    with hatcl.task(model, task), Evaluating(model), torch.no_grad():
        return how.written(model, [text])[0]


def _tell(answer: dict[str, Any]) -> None:
    verdict = "rejected; nearest is " if answer["rejected"] else ""
    said = answer.get("image") or repr(answer["text"])
    out.print(
        f"{said}: {verdict}task {answer['task']} ({answer['name']}), class {answer['label']}, probability "
        f"{answer['probability']:.3f}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


def _picture_at(path: Path) -> Tensor:
    """An image's values, `[1, H, W]` for a grey image, else `[1, H, W, 3]`."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            grey: Sequence[str] = ("1", "L", "LA")
            values = np.asarray(file.convert("L" if file.mode in grey else "RGB"))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read as an image ({error}); is the path right?") from error
    return torch.from_numpy(values.copy()).unsqueeze(0)
