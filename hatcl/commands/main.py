"""The `hatcl` command: train a stream of tasks, certify, forget and describe what was learned; compose checkpoints."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

import hatcl

from ..config import HATConfig
from ..continual.images_run import RunResult, TrainOptions, Watcher, logits_digest, probe_inputs, test_logits, train
from ..data.images import Preparation, Source, Task
from ..engine import folder as checkpoints
from ..errors import ConfigError, HATError, IntegrityError, nearest
from ..files import write_files
from ..report.picture import draw_run
from ..report.tables import known_table, matrix_table, tasks_table, units_table, zoo_line
from ..vectors.stream import compose_files
from ..zoo import catalog
from ..zoo import page as zoo_page
from ..zoo.run import prove_all
from .atlas import app as atlas_app
from .finetune import finetune_command
from .graft import graft_command
from .options import key_values, usable_device
from .tasl import app as tasl_app

DEFAULT_MODEL = "hat_test_resnet"
RUNS = Path("runs")
ZOO_RESULTS = Path("benchmarks/results/zoo.json")
# what may differ when a run is taken up again: where it computes, and what helps a loss that went NaN
FREE_ON_RESUME = {"device", "compile_steps", "checkpoint_seconds", "lr", "clip", "amp"}

app = typer.Typer(
    name="hatcl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn one task after another; what an earlier task learned stays, bit for bit.",
)
app.add_typer(atlas_app)
app.add_typer(tasl_app)
app.command("finetune")(finetune_command)
app.command("graft")(graft_command)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of hatcl.save_pretrained.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Errors that hatcl raises on purpose are shown as one message, with exit code 2."""
    try:
        app(args)
    except HATError as error:
        err.print(Text.assemble(("error: ", "bold red"), (str(error), "red")), soft_wrap=True)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(hatcl.__version__)
        raise typer.Exit


# --- train ---


@app.command("train")
def train_command(
    context: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(help="a.npz,b.npz,...: each file is a task (arrays x_train, y_train, x_test, y_test)."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="path.npz:5 cuts a file's classes into 5 tasks; a number does so for --dataset.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="One of torchvision.datasets, such as CIFAR100.")] = None,
    root: Annotated[str | None, typer.Option(help="Where --dataset lies.")] = None,
    download: Annotated[bool, typer.Option(help="Let torchvision download --dataset.")] = False,
    model: Annotated[str, typer.Option(help="Any timm name with hat_ in front; see hatcl list.")] = DEFAULT_MODEL,
    pretrained: Annotated[bool, typer.Option(help="Start from timm's pretrained weights.")] = False,
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="key=value for the model, such as drop_path_rate=0.1; may be repeated.")
    ] = None,
    hat: Annotated[
        list[str] | None, typer.Option(help="key=value of HATConfig, such as max_scale=200; may be repeated.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over each task.")] = TrainOptions.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = TrainOptions.batch_size,
    optimizer: Annotated[str, typer.Option(help="Optimizer, by timm's name.")] = TrainOptions.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = TrainOptions.lr,
    weight_decay: Annotated[float, typer.Option(help="Weight decay; frozen weights do not decay.")] = (
        TrainOptions.weight_decay
    ),
    momentum: Annotated[float | None, typer.Option(help="Of optimizers that have one.")] = TrainOptions.momentum,
    max_steps: Annotated[
        int | None, typer.Option(help="So many steps of each task, in place of --epochs.")
    ] = TrainOptions.max_steps,
    schedule: Annotated[
        str, typer.Option(help="Learning rate over each task: constant, linear, cosine, tanh, step or poly.")
    ] = TrainOptions.schedule,
    warmup: Annotated[
        float, typer.Option(help="Share of a task's steps in which the rate rises.")
    ] = TrainOptions.warmup,
    accumulate: Annotated[int, typer.Option(help="So many batches make one step.")] = TrainOptions.accumulate,
    fresh_optimizer: Annotated[
        bool, typer.Option(help="A new optimizer for each task instead of one for all.")
    ] = TrainOptions.fresh_optimizer,
    clip: Annotated[float, typer.Option(help="Clip the gradients' norm, 0 = off.")] = TrainOptions.clip,
    amp: Annotated[str, typer.Option(help="Mixed precision: none, bf16 or fp16.")] = TrainOptions.amp,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Run training steps through torch.compile.")
    ] = TrainOptions.compile,
    flip: Annotated[bool, typer.Option(help="Mirror training images at random.")] = TrainOptions.flip,
    crop: Annotated[int, typer.Option(help="Shift training images by up to this many pixels.")] = TrainOptions.crop,
    size: Annotated[int, typer.Option(help="Images are brought to this size; 0 keeps their own.")] = (
        TrainOptions.size or 0
    ),
    fit: Annotated[str, typer.Option(help="How: resize or pad.")] = TrainOptions.fit,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = TrainOptions.seed,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one in runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output (by default the newest in runs/).")
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Seconds between checkpoints within a task.")
    ] = TrainOptions.checkpoint_seconds,
) -> None:
    """Learn tasks one after another and show that none was forgotten, not by a bit.

    Without options: five two-class tasks of scikit-learn's digits.
    """
    flags = {name: value for name, value in context.params.items() if name not in ("output", "resume")}
    flags["device"] = usable_device(device)
    if tasks:
        flags["tasks"] = ",".join(str(Path(path).absolute()) for path in tasks.split(","))
    if split and not split.isdigit():
        flags["split"] = str(Path(split).absolute())
    if root:
        flags["root"] = str(Path(root).absolute())
    folder = _run_folder(output, resume)
    if resume and (folder / checkpoints.CONFIG).exists():
        given = {name for name in flags if _was_given(context, name)}
        flags = _resumed_flags(folder, flags, given)
    elif (folder / checkpoints.CONFIG).exists():
        raise ConfigError(
            f"--output: {folder} already holds a run; add --resume to go on with it, or name another folder"
        )

    options = _options(flags)
    hat_options = key_values("--hat", flags["hat"])
    stream = _source(flags).load()
    if (folder / checkpoints.METRICS).exists():
        result = RunResult.from_dict(checkpoints.read_json(folder / checkpoints.METRICS))
        checkpoints.tidy(folder)
        out.print(f"{folder} is finished already.")
    else:
        checkpoint = checkpoints.load_checkpoint(folder, torch.device(options.device)) if resume else None
        network = _new_model(flags, hat_options, stream, options) if checkpoint is None else checkpoint.model
        prepare = Preparation.of(stream[0], size=options.size, fit=options.fit)
        content = {
            "hatcl": hatcl.__version__,
            "flags": flags,
            "tasks": [{"name": task.name, "classes": task.num_classes} for task in stream],
            "input_shape": list(probe_inputs(stream[0], prepare, 1).shape[1:]),
        }
        checkpoints.write_json(folder / checkpoints.CONFIG, content)
        try:
            with _Display(out, flags["model"], folder) as display:
                result = train(network, stream, options, folder=folder, watcher=display, checkpoint=checkpoint)
        except KeyboardInterrupt:
            err.print(f"\nstopped. Go on with: hatcl train --resume --output {folder}", soft_wrap=True)
            raise typer.Exit(130) from None
    _conclude(folder, result)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _conclude(folder: Path, result: RunResult) -> None:
    """Print what a run showed and draw its picture."""
    content = result.to_dict()
    names = [record.name for record in result.records]
    out.print(matrix_table(result.rows, names))
    out.print(f"average accuracy  {100 * content['average_accuracy']:.2f} %")
    out.print(f"forgetting        {100 * content['forgetting']:.2f} %")
    out.print(tasks_table(names, content["records"], units=result.units))
    out.print(_certificate_line(result))
    try:
        write_files({folder / checkpoints.PICTURE: draw_run(content)})
    except ConfigError as error:
        out.print(f"no picture: {error}", style="yellow", soft_wrap=True)
    out.print(f"{folder}  ({result.seconds:.0f} s)", style="dim", soft_wrap=True)
    if not (result.exact and result.bit_equal):
        raise typer.Exit(1)


def _certificate_line(result: RunResult) -> Text:
    count = len(result.records)
    if result.exact and result.bit_equal:
        return Text(
            f"certificate: exact. The logits of all {count} sealed tasks are bit-equal to those at sealing, on the "
            "whole test sets, and stay so when everything that is not theirs is overwritten.",
            style="green",
        )
    moved = [str(t) for t, record in enumerate(result.records) if not record.bit_equal]
    leaks = [f"task {t} by {diff:g}" for t, diff in (result.max_abs_diff or {}).items() if diff != 0]
    return Text(
        f"certificate: NOT exact. Logits moved since sealing: {', '.join(moved) or 'none'}; "
        f"moved by overwriting what is not theirs: {', '.join(leaks) or 'none'}.",
        style="bold red",
    )


class _Display(Watcher):
    """A progress bar over a table that fills while tasks are learned; without a terminal, a line for each task."""

    def __init__(self, console: Console, model: str, folder: Path) -> None:
        self.console, self.model, self.folder = console, model, folder
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task("starting", total=None)
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.names: list[str] = []
        self.steps: list[int] = []
        self.result = RunResult()
        self.running: dict[str, Any] | None = None
        self.drawn = 0.0

    def __enter__(self) -> _Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def started(self, tasks: Sequence[Task], steps: Sequence[int], result: RunResult) -> None:
        self.names, self.steps, self.result = [task.name for task in tasks], list(steps), result
        self.console.print(f"{self.model}: {len(tasks)} tasks, run folder {self.folder}", soft_wrap=True)
        self.progress.update(self.bar, total=sum(steps))

    def learning(self, task: int, step: int) -> None:
        self.progress.update(
            self.bar,
            description=f"task {task} {self.names[task]}",
            completed=sum(self.steps[:task]) + step,
        )

    def stepped(self, task: int, step: int, loss: float, penalty: float, scale: float) -> None:
        self.progress.advance(self.bar)
        self.running = {"loss": loss, "penalty": penalty, "scale": scale}
        self._draw()

    def sealed(self, task: int, result: RunResult) -> None:
        self.running = None
        self._draw(force=True)
        if not self.console.is_terminal:
            record = result.records[task]
            self.console.print(
                f"task {task} {record.name} sealed: {100 * record.hard_accuracy:.1f} % with hard gates "
                f"({100 * record.soft_accuracy:.1f} % with soft ones), {record.units_used} of {result.units} units, "
                f"{record.seconds:.1f} s",
                soft_wrap=True,
            )

    def _draw(self, force: bool = False) -> None:
        """At most ten times a second: drawing must not cost more than learning."""
        now = time.monotonic()
        if self.live.is_started and (force or now - self.drawn > 0.1):
            records = self.result.to_dict()["records"]
            table = tasks_table(self.names, records, units=self.result.units, running=self.running)
            self.live.update(Group(table, self.progress), refresh=True)
            self.drawn = now


# --- from flags to a run ---


def _run_folder(output: Path | None, resume: bool) -> Path:
    if output is not None:
        return output
    numbers = sorted(int(path.name) for path in RUNS.glob("*") if path.name.isdigit())
    if resume:
        if not numbers:
            raise ConfigError(f"--resume: there is no run in {RUNS}/; name its folder with --output")
        return RUNS / f"{numbers[-1]:03d}"
    return RUNS / f"{(numbers[-1] if numbers else 0) + 1:03d}"


def _resumed_flags(folder: Path, flags: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    """The flags the run was started with; those given again have to agree, but for `FREE_ON_RESUME`."""
    stored = checkpoints.read_json(folder / checkpoints.CONFIG)
    if not isinstance(stored, dict) or set(stored.get("flags", ())) != set(flags):
        raise IntegrityError(f"{folder / checkpoints.CONFIG} does not hold the flags of a run of this version of hatcl")
    kept = dict(stored["flags"])
    for name in sorted(given):
        if name in FREE_ON_RESUME:
            kept[name] = flags[name]
        elif flags[name] != kept[name]:
            raise ConfigError(
                f"--resume: the run in {folder} was started with --{name.replace('_', '-')} {kept[name]}, now came "
                f"{flags[name]}; leave the flag out, or start a new run in another folder"
            )
    return kept


def _options(flags: Mapping[str, Any]) -> TrainOptions:
    names = {"compile": "compile_steps"}
    fields = {name: flags[names.get(name, name)] for name in TrainOptions().to_dict() if name != "eval_batch_size"}
    return TrainOptions.from_dict({**fields, "size": fields["size"] or None})


def _source(flags: Mapping[str, Any]) -> Source:
    tasks, split, dataset, root = flags["tasks"], flags["split"], flags["dataset"], flags["root"]
    if sum(bool(flag) for flag in (tasks, dataset, split and not split.isdigit())) > 1:
        raise ConfigError("--tasks, --split path.npz:5 and --dataset exclude each other; give one of them")
    if dataset:
        if not root:
            raise ConfigError("--dataset needs --root, the folder where its files lie")
        return Source("torchvision", dataset=dataset, root=root, split=int(split or 1), download=flags["download"])
    if split:
        path, _, count = split.rpartition(":")
        if not path or not count.isdigit():
            raise ConfigError(f"--split: got {split!r}, expected path.npz:5 (or a number together with --dataset)")
        return Source("split", paths=(path,), split=int(count))
    if tasks:
        return Source("npz", paths=tuple(path for path in tasks.split(",") if path))
    return Source()


def _new_model(
    flags: Mapping[str, Any], hat: Mapping[str, Any], stream: Sequence[Task], options: TrainOptions
) -> nn.Module:
    """The untrained model, its weights drawn from the run's seed."""
    config = HATConfig.from_dict({"num_tasks": len(stream), **hat})
    if config.num_tasks < len(stream):
        raise ConfigError(f"--hat num_tasks: got {config.num_tasks}, expected at least the {len(stream)} tasks at hand")
    name = flags["model"]
    known = hatcl.list_models("*")
    if name.split(".")[0] not in known:
        near = nearest(name, known)
        raise ConfigError(f"--model: there is no {name!r}; did you mean {near!r}? hatcl list PATTERN shows all")
    classes = [task.num_classes for task in stream]
    classes += [max(classes)] * (config.num_tasks - len(classes))  # room for tasks to come
    torch.manual_seed(options.seed)
    return timm.create_model(
        name,
        pretrained=flags["pretrained"],
        num_tasks=config.num_tasks,
        num_classes=classes,
        hat_config=config,
        **key_values("--model-kwargs", flags["model_kwargs"]),
    )


# --- certify, forget, describe, list ---


@app.command("certify")
def certify_command(run: RunFolder, device: Device = "auto") -> None:
    """Attack everything that is not a sealed task's own and demand bit-equal outputs; compare with those at sealing."""
    where = torch.device(usable_device(device))
    model = hatcl.from_pretrained(checkpoints.find_model(run)).to(where)
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
        out.print(", ".join(words), style="red" if moved.get(task) or certificate.max_abs_diff[task] else "green")
    if not certificate.exact or any(moved.values()):
        raise typer.Exit(1)


def _compare_with_sealing(
    run: Path, model: nn.Module, sealed: Sequence[int], device: torch.device
) -> tuple[dict[int, bool], torch.Tensor]:
    """Which tasks' test logits are no longer those at sealing, and inputs to certify with. Without a run's records or
    its data, nothing is compared and the inputs are random."""
    if not (run / checkpoints.CONFIG).exists() or not (run / checkpoints.METRICS).exists():
        out.print("no finished run's records here, so logits are not compared with those at sealing", style="yellow")
        shape = (3, 224, 224)
        if (run / checkpoints.CONFIG).exists():
            shape = tuple(checkpoints.read_json(run / checkpoints.CONFIG).get("input_shape", shape))
        return {}, torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    config = checkpoints.read_json(run / checkpoints.CONFIG)
    result = RunResult.from_dict(checkpoints.read_json(run / checkpoints.METRICS))
    options = _options({**config["flags"], "device": str(device)})
    try:
        stream = _source(config["flags"]).load()
    except HATError as error:
        out.print(f"logits are not compared with those at sealing: {error}", style="yellow", soft_wrap=True)
        return {}, torch.randn(8, *config["input_shape"], generator=torch.Generator().manual_seed(0))
    moved = {}
    for t in sealed:
        if t < len(result.records) and t not in result.forgotten:
            prepare = Preparation.of(stream[t], size=options.size, fit=options.fit)
            with hatcl.task(model, t):
                digest = logits_digest(test_logits(model, stream[t], prepare, options))
            moved[t] = digest != result.records[t].logits_sha256
    return moved, probe_inputs(stream[0], Preparation.of(stream[0], size=options.size, fit=options.fit))


@app.command("forget")
def forget_command(
    run: RunFolder,
    task: Annotated[int, typer.Option(help="The task to forget, counted from 0.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be erased.")] = False,
) -> None:
    """Erase what only this task holds; every other task stays as it is, bit for bit."""
    folder = checkpoints.find_model(run)
    of_a_run = (run / checkpoints.CONFIG).exists() and folder != run
    if of_a_run and not dry_run:
        if not (run / checkpoints.METRICS).exists():
            raise ConfigError(f"{run} is not finished; finish it with: hatcl train --resume --output {run}")
        checkpoints.tidy(run)  # no older copy may keep what is to be forgotten
    model = hatcl.from_pretrained(folder)
    report = hatcl.forget_task(model, task, dry_run=dry_run)
    if of_a_run and not dry_run:
        checkpoints.save_model(run, model)
        _note_forgotten(run, task)
    elif not dry_run:
        hatcl.save_pretrained(model, folder)
    out.print(str(report), soft_wrap=True)


def _note_forgotten(run: Path, task: int) -> None:
    """Write into the run's records that `task` is gone; the model itself was replaced before."""
    path = run / checkpoints.METRICS
    content = checkpoints.read_json(path)
    checkpoints.write_json(path, {**content, "forgotten": sorted({*content["forgotten"], task})})


@app.command("describe")
def describe_command(run: RunFolder) -> None:
    """Units per layer, how they are shared, and what each task uses."""
    folder = checkpoints.find_model(run)
    description = hatcl.describe(hatcl.from_pretrained(folder)).to_dict()
    out.print(units_table(description))
    elements = description["elements"]
    total = max(1, sum(elements.values()))
    out.print(f"{total:,} elements: ", end="")
    out.print(", ".join(f"{name.replace('_', ' ')} {100 * count / total:.1f} %" for name, count in elements.items()))


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A name with wildcards, such as 'hat_*resnet*'.")] = "*",
) -> None:
    """Names for --model."""
    names = hatcl.list_models(pattern)
    if not names:
        raise ConfigError(f"no model matches {pattern!r}; try a wider pattern such as 'hat_*resnet*'")
    for name in names:
        print(name)  # plain, for pipes


# --- compose ---


@app.command("compose")
def compose_command(
    base: Annotated[Path, typer.Argument(help="The pretrained checkpoint: a safetensors file, or a folder of shards.")],
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART[:COEFFICIENT]...",
            help="Fine-tuned checkpoints, saved task vectors or folders of LoRA adapters, such as cars/:0.4.",
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="A folder, or a file that ends in .safetensors.")],
    method: Annotated[str | None, typer.Option(help="A merging method, such as ties, instead of the sum.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value for --method, such as density=0.2; may be repeated.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="How large a file may become: 100MB, 2GB, ...")] = "100MB",
    vector: Annotated[bool, typer.Option("--vector", help="Write the task vector instead of the checkpoint.")] = False,
    buffers: Annotated[
        bool, typer.Option("--buffers", help="Compose running statistics too; otherwise they are BASE's.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Refuse task vectors that were taken from another base.")] = True,
) -> None:
    """Add what fine-tuning changed to a checkpoint: BASE + sum of COEFFICIENT * (PART - BASE), file to file.

    Coefficients are 1 where none is given. The memory needed is that of one shard and a few tensors. When it was
    interrupted, the same command goes on where it stopped.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    pairs = [_part(text) for text in parts]
    with Progress(*columns, console=out) as progress:
        bar = progress.add_task("composing", total=None)
        try:
            compose_files(
                base, pairs, output,
                method=method, options=key_values("--option", option), vector=vector, buffers=buffers, check=check,
                shard_bytes=_bytes("--shard-size", shard_size),
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )  # fmt: skip
        except KeyboardInterrupt:
            err.print("\nstopped. The same command goes on from here", soft_wrap=True)
            raise typer.Exit(130) from None
    out.print(f"{output}: {base} and {len(pairs)} part{'s' * (len(pairs) > 1)}", soft_wrap=True)


def _part(text: str) -> tuple[Path, float]:
    """`path` or `path:coefficient`."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        raise ConfigError(
            f"{text}: no such file, and {number!r} is no coefficient; expected PATH or PATH:COEFFICIENT"
        ) from None


def _bytes(flag: str, text: str) -> int:
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    found = re.fullmatch(r"([\d.]+) *([KMG]?I?B)", text.strip().upper())
    try:
        size = int(float(found[1]) * units[found[2]]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{flag}: got {text!r}, expected a size such as 100MB or 2GB")
    return size


# --- zoo ---


@app.command("zoo")
def zoo_command(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Models to prove: timm names, torchvision/NAME or hf/NAME, with wildcards."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only of this family: timm's module, such as resnet.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All that the catalog knows.")] = False,
    max_params: Annotated[float, typer.Option(help="Leave out larger models, such as 2e6.")] = float("inf"),
    results: Annotated[Path, typer.Option(help="Where the figures go; what is there is not run again.")] = ZOO_RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run also what --results holds.")] = False,
    seconds: Annotated[float, typer.Option(help="What one model may take.")] = 900.0,
    memory: Annotated[float, typer.Option(help="What one model may take, in GB.")] = 16.0,
    publish: Annotated[
        bool, typer.Option("--publish", help="In a checkout: write docs/zoo.md and the list that ships with hatcl.")
    ] = False,
) -> None:
    """List the models that are known to convert, or prove some: each is converted, learns two tasks, is attacked, saved
    and loaded in processes of its own."""
    if not patterns and family is None and not every:
        if publish:
            _publish(results)
            return
        out.print(known_table(zoo_page.known_models()))
        return
    found = {pattern: catalog.find(pattern, family) for pattern in patterns or ["*"]}
    for pattern, matches in found.items():
        if not matches:
            where = f" in family {family!r}" if family else ""
            raise ConfigError(f"no model matches {pattern!r}{where}; see hatcl list and try a wider pattern")
    names = list(dict.fromkeys(name for matches in found.values() for name in matches))
    if max_params < float("inf"):
        names = [name for name in names if catalog.parameters(name) <= max_params]
        if not names:
            raise ConfigError(f"--max-params {max_params:,.0f} parameters: all models that match are larger")
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        bar = progress.add_task("", total=len(names))
        run = prove_all(names, results, seconds=seconds, memory_gb=memory, again=again)
        for name in names:
            progress.update(bar, description=name)
            _, row = next(run)
            failed += not row["passed"]
            progress.console.print(zoo_line(name, row), soft_wrap=True)
            progress.advance(bar)
    out.print(f"{len(names) - failed} of {len(names)} passed; figures in {results}", soft_wrap=True)
    if publish:
        _publish(results)
    if failed:
        raise typer.Exit(1)


def _publish(results: Path) -> None:
    if not zoo_page.KNOWN.resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError("--publish writes docs/zoo.md; run it in a checkout of hatcl")
    if not results.exists():
        raise ConfigError(f"--publish: there is no {results} yet; prove some models first, such as hatcl zoo 'test_*'")
    models = checkpoints.read_json(results)["models"]
    write_files({Path("docs/zoo.md"): zoo_page.to_page(models).encode()})
    checkpoints.write_json(zoo_page.KNOWN, zoo_page.to_known(models))
