"""`hatcl finetune`: fine-tune a model on texts or images into a run's folder, which `hatcl graft` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..config import one_of
from ..engine.loop import Progress
from ..errors import ConfigError
from ..finetuning import FinetuneOptions, TaskOptions, finetune_run, list_finetune_modes
from ..finetuning.run import described_by
from ..functional import score_text, score_unit
from ._command import Asked, Device, command
from ._console import Bar, out, say
from ._options import usable_device
from ._pages import finetune_page


def show_finetuned(run: Path, metrics: dict[str, Any]) -> None:
    """Print the scores of both models, and how many elements changed."""
    measure = metrics["measure"]
    table = Table(
        title=f"{metrics['task']}: {measure} {score_unit([measure])}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("")
    for column in ("validation", "test"):
        table.add_column(column, justify="right")
    told = {**metrics["score"], "commonest": metrics.get("commonest", {})}
    titles = {"pretrained": "pretrained", "finetuned": "fine-tuned", "commonest": "always the most common answer"}
    for key, title in titles.items():
        table.add_row(title, *[score_text(told[key].get(part), measure) for part in ("validation", "test")])
    out.print(table)
    part = "test" if "test" in told["finetuned"] else "validation"
    score, guess = told["finetuned"].get(part), told["commonest"].get(part)
    unit = " %" if score_unit([measure]) == "in %" else ""
    if score is not None and guess is not None and score <= guess:
        say(
            f"{score_text(score, measure)}{unit} on the {part} examples is no better than always giving the most "
            f"common answer ({score_text(guess, measure)}{unit}), so nothing shows that the task was "
            "learned; try more steps (--max-steps), another rate (--lr), or more examples",
            "yellow",
        )
    moved, examples = metrics["trained"], metrics["examples"]
    say(
        f"{moved['changed']:,} of {moved['elements']:,} trained elements changed; {examples['train']} training, "
        f"{examples['validation']} validation and {examples['test']} test examples"
    )
    say(f"{metrics['seconds']:.0f} s. Next: hatcl graft {run}", "dim")


@command("finetune", show=show_finetuned, page=finetune_page)
def finetune(
    asked: Asked,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder of transformers or a name on its hub; with --mode image a timm name."
        ),
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="finetune (a new linear head), prompt (a template and label words, masked language model), "
            "autoregressive (the same, causal model), labels (cosines with label words, bare encoder), or image."
        ),
    ] = "prompt",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts: .json or .json.gz with train, dev and test lists of \\[text, label] or "
            "\\[text, text2, label], "
            "or with --task a folder of .tsv or .csv; images: .npz with x_train, y_train, x_test, "
            "y_test. Without it, the package datasets reads --task from the hub.",
        ),
    ] = None,
    device: Device = "auto",
    *,
    task: TaskOptions,
    learning: FinetuneOptions,
) -> dict[str, Any]:
    """Fine-tune a model on one classification task, for hatcl graft.

    The run holds both models' weights, the options, digests of the files that were read, and accuracies. Validation
    examples choose the step to keep; test examples are only reported. A checkpoint is written every minute.
    """
    one_of("--mode", mode, list(list_finetune_modes()))
    where = usable_device(device)
    for flag, file in (("--data", data), ("--weights", task.weights)):
        folder_too = flag == "--data" and task.task is not None
        if file is not None and not (Path(file).is_file() or (folder_too and Path(file).is_dir())):
            raise ConfigError(f"{flag}: there is no file {file}")
    asked.options = described_by(task, learning)
    folder = asked.folder()
    if folder.finished:
        say(f"{folder.path} is finished already.")
    with Bar(None, "steps") as bar:

        def tell(at: Progress) -> None:
            if at.doing != "learning":
                return
            told = {"loss": at.value, **at.measured}
            text = ", ".join(f"{name} {told[name]:.4f}" for name in ("loss", "validation") if name in told)
            bar.says(text, completed=at.step, total=at.steps)
            folder.tell(step=at.step, **told)
            if "validation" in told:
                bar.line(f"step {at.step}: {text}")

        finetune_run(task, learning, folder.path, device=where, on_progress=tell)
    return folder.metrics
