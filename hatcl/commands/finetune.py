"""The `hatcl finetune` command: fine-tune a model on texts or images into a run's folder, which `hatcl graft` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..engine.loop import Progress
from ..errors import ConfigError
from ..finetuning import FinetuneOptions, Run, TaskOptions, finetune_run, holds, list_finetune_modes
from .atlas import spelled_out
from .atlas_run import Bar, err, out
from .options import chosen, key_values, usable_device

LEARNING = {
    "optimizer": "Any of timm's: after sgd few weights hold the skill, after adamw only with --l1.",
    "lr": "The highest learning rate.",
    "momentum": "Of optimizers that have one.",
    "weight_decay": "Weight decay, not of biases and norms.",
    "max_steps": "How many steps, however many passes they take; 1,000 unless --epochs are given.",
    "epochs": "Passes over the training examples, in place of --max-steps.",
    "batch_size": "Examples per step.",
    "schedule": "constant, linear or cosine down to 0, tanh, step or poly; auto is constant for sgd and else linear.",
    "warmup": "Share of the steps in which the rate rises.",
    "train_bias_only": "Train biases alone, and a new head.",
    "fix_embeddings": "Leave embeddings as they are.",
    "fix_head": "Leave the head as it is; by default a language model's or a fitted one stays, a random one learns.",
    "l1": "Pull to the pretrained weights: what the loss pulls less than this ends exactly there; try 1e-4 to 1e-2.",
    "clip": "Clip the gradient's norm, 0 = off.",
    "accumulate": "So many batches make one step.",
    "amp": "Mixed precision: none, bf16 or fp16.",
    "compile": "Run training steps through torch.compile.",
    "dropout": "Train with the model's dropout.",
    "statistics": "Running statistics of batch norms: held, so that weights are all that changes, or learned.",
    "evaluate_every": "Steps between two validations; the best weights are kept.",
    "seed": "Of a new head, the order of examples and dropout.",
}


@spelled_out(FinetuneOptions(), LEARNING)
def finetune_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder of transformers or a name on its hub; with --mode image timm's name."
        ),
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="finetune (a new linear head), prompt (a template and label words, masked language model), "
            "autoregressive (the same, causal model), labels (cosines with label words, bare encoder), or image."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Texts: .json or .json.gz with train, dev and test lists of pairs of a text and its label; images: "
            ".npz with x_train, y_train, x_test, y_test.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", metavar="RUN", help="The run's folder. The same command shows a finished run.")
    ],
    learning: FinetuneOptions,
    k: Annotated[
        int | None,
        typer.Option(help="Learn from so many examples of each class and validate on as many others; by default all."),
    ] = None,
    data_seed: Annotated[int, typer.Option(help="Of the choice of these examples.")] = TaskOptions.data_seed,
    file_seed: Annotated[
        int, typer.Option(help="Which choice to take of a file that holds several (LM-BFF's seeds).")
    ] = TaskOptions.file_seed,
    test: Annotated[int | None, typer.Option(help="At most so many test examples.")] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=WORD", help="The word that stands for a label (its verbalizer); may be repeated."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Text around {text} with a {mask}; by default '{text} It was {mask}.'")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text with its template.")] = TaskOptions.max_length,
    cut: Annotated[str, typer.Option(help="What a long text loses: its end or its head; never the template.")] = (
        TaskOptions.cut
    ),
    token: Annotated[
        str, typer.Option(help="With --mode finetune, what the head reads: cls (the first token), mask or last.")
    ] = TaskOptions.token,
    head: Annotated[
        str,
        typer.Option(help="A new head starts random, or fitted on the pretrained features of the training examples."),
    ] = TaskOptions.head,
    scale: Annotated[float, typer.Option(help="With --mode labels, of the cosines.")] = TaskOptions.scale,
    plain: Annotated[
        bool, typer.Option("--plain", help="Leave out the inputs' first line (the question) and a last 'Answer:'.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --mode image, the model's weights: a safetensors file.")
    ] = None,
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(help="With --mode image, key=value for the model, such as pretrained=True; may be repeated."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Images are brought to this size; 0 keeps their own; by default the model's.")
    ] = None,
    fit: Annotated[str, typer.Option(help="How: resize or pad.")] = TaskOptions.fit,
    normalise: Annotated[
        str, typer.Option(help="Images by the mean and deviation of: data (the training images), or model (timm's).")
    ] = TaskOptions.normalise,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Fine-tune a model on one classification task, for hatcl graft.

    RUN holds both models' weights, the options and digests of what was read, and accuracies. Interrupted, the same
    command goes on from the last checkpoint; there is one a minute. Validation examples choose among the steps; test
    examples are only reported.
    """
    chosen("--mode", mode, list(list_finetune_modes()))
    where = usable_device(device)
    if not data.is_file():
        raise ConfigError(f"--data: there is no file {data}")
    if weights is not None and not weights.exists():
        raise ConfigError(f"--weights: there is no file {weights}")
    options = TaskOptions(
        mode, model, str(data), k=k, data_seed=data_seed, file_seed=file_seed, test=test, words=_words(word),
        template=template, max_length=max_length, cut=cut, token=token, head=head, scale=scale, plain=plain,
        weights=None if weights is None else str(weights), model_kwargs=key_values("--model-kwargs", model_kwargs),
        size=size, fit=fit, normalise=normalise,
    )  # fmt: skip
    finished = holds(output, options, learning)
    try:
        with Bar(1, "steps") as bar:
            bar.says("reading")
            run = finetune_run(options, learning, output, device=where, on_progress=_Telling(bar))
    except KeyboardInterrupt:
        err.print("\nstopped. The same command goes on from the last checkpoint, one a minute", soft_wrap=True)
        raise typer.Exit(130) from None
    if finished:
        out.print(f"{output} is finished already.", soft_wrap=True)
    _show(output, run)


class _Telling:
    """Steps into the bar; without a terminal, a line per validation."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def __call__(self, at: Progress) -> None:
        if at.doing != "learning":
            return
        words = [f"{name} {value:.4f}" for name, value in {"loss": at.value, **at.measured}.items()]
        self.bar.progress.update(self.bar.bar, completed=at.step, total=at.steps, description=", ".join(words))
        if at.measured and not out.is_terminal:
            out.print(f"step {at.step}: {', '.join(words)}", soft_wrap=True)


def _words(pairs: Sequence[str] | None) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for pair in pairs or ():
        label, equals, value = pair.partition("=")
        if not equals or not label or not value:
            raise ConfigError(f"--word: got {pair!r}, expected LABEL=WORD")
        if label in found:
            raise ConfigError(f"--word: two words for the label {label!r}")
        found[label] = value
    return found or None


def _show(folder: Path, run: Run) -> None:
    metrics: dict[str, Any] = run.metrics
    table = Table(title=f"{run.task.name}: accuracy in %", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for column in ("validation", "test"):
        table.add_column(column, justify="right")
    for key, title in (("pretrained", "pretrained"), ("finetuned", "fine-tuned")):
        row = metrics["accuracy"][key]
        table.add_row(title, *[f"{100 * row[part]:.1f}" if part in row else "·" for part in ("validation", "test")])
    out.print(table)
    moved, examples = metrics["trained"], metrics["examples"]
    out.print(
        f"{moved['changed']:,} of {moved['elements']:,} trained elements changed; {examples['train']} training, "
        f"{examples['validation']} validation and {examples['test']} test examples",
        soft_wrap=True,
    )
    out.print(f"{folder}  ({metrics['seconds']:.0f} s). Go on with: hatcl graft {folder}", style="dim", soft_wrap=True)
