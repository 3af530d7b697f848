"""`hatcl train`: tasks one after another, images by hard attention and texts with an adapter by any method."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn

import hatcl

from .. import continual
from ..config import HATConfig, one_of
from ..continual import folder as kept
from ..continual.images_run import RunResult, TrainOptions, Watcher, probe_inputs
from ..continual.images_run import train as learn_images
from ..continual.loading import TextOptions, adapted_model, example_of, text_tasks
from ..continual.options import LearnOptions
from ..data.images import ImageData, Preparation, Source, npz_task
from ..engine import folder as runs
from ..engine.schedule import make_optimizer
from ..errors import ConfigError, nearest
from ..files import write_files
from ..finetuning.prompts import positions_of
from ..report.picture import draw_run
from ..report.skills import draw_overlap, draw_skills
from ..report.tables import matrix_table, tasks_table
from ..skills.scores import SkillScores, localize
from ._command import Answer, Asked, Device, command
from ._console import Bar, out, percent, say
from ._options import Either, absolute_path, made, options_of, spelled, usable_device

DEFAULT_MODEL = "hat_test_resnet"
HAT, TASL = "hat", "tasl"
SKILLS, OVERLAP = "skills.png", "overlap.png"
SHARE = 0.2  # of the units, for the picture of the overlap
# what may differ when images are learned on: where it computes, and what helps a loss that went NaN
FREE = {"device", "compile", "checkpoint_seconds", "lr", "clip", "amp"}
IMAGES = ("split", "dataset", "root", "download", "pretrained", "model_kwargs")  # beside the fields of TrainOptions
TEXTS = (".json", ".gz")


def show_learning(run: Path, metrics: dict[str, Any]) -> None:
    """Print what came of a run and draw its pictures."""
    if "records" in metrics:
        _show_images(run, metrics)
    else:
        _show_texts(metrics)
        show_skills(run, SHARE)


@command("train", show=show_learning, free=FREE)
def train_command(
    asked: Asked,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="A task, in the order of learning; repeatable. Images: an .npz file with x_train, y_train, x_test, "
            "y_test. Texts: a .json or .json.gz file with train, test and dev lists of pairs of input and output.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="FILE.npz:5 cuts a file's classes into 5 tasks; a number does so for --dataset.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="One of torchvision.datasets, such as CIFAR100.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where --dataset lies.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Let torchvision download --dataset.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Images: any timm name with hat_ in front, see hatcl list; by default {DEFAULT_MODEL}. Texts: a "
            "folder of transformers, or a name on its hub."
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Images: start from timm's weights.")] = False,
    model_kwargs: Annotated[
        Mapping[str, Any] | None,
        typer.Option(
            "--model-kwargs", metavar="KEY=VALUE", help="Images: for the model, such as drop_path_rate=0.1; repeatable."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How to learn; see hatcl methods. By default hat for images and tasl for texts."),
    ] = None,
    set_: Annotated[
        Mapping[str, Any] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the method, such as grain=matrix; with hat of HATConfig, such as max_scale=200; "
            "repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, the order of examples, and what else is random.")] = 0,
    device: Device = "auto",
    *,
    learning: Annotated[Mapping[str, Any], Either((TrainOptions, LearnOptions))],
    texts: Annotated[Mapping[str, Any], Either((TextOptions,))],
) -> Any:
    """Learn tasks one after another, and show what each still knows.

    Images are learned by hard attention to the task, and none is forgotten, not by a bit. Texts are learned with one
    LoRA adapter by any of the methods; after each task its adapter is written in peft's own format, with the scores of
    its units, and all tasks are scored. Without options: five two-class tasks of scikit-learn's digits.
    """
    where = usable_device(device)
    specs = _specs(task or ())
    of_texts = bool(specs) and all(path.suffix in TEXTS for path in specs.values())
    if specs and not of_texts and any(path.suffix in TEXTS for path in specs.values()):
        raise ConfigError("--task: images and texts together; give .npz files, or .json and .json.gz files")
    if not specs and method not in (None, HAT):
        raise ConfigError(f"--method {method} learns texts; give them with --task NAME=FILE.json")
    one_of("--method", chosen := method or (TASL if of_texts else HAT), list(continual.list_continual_methods()))
    options = {
        "method": chosen,
        "seed": seed,
        "device": device,
        "task": [f"{n}={absolute_path(p)}" for n, p in specs.items()],
    }
    if of_texts:
        _none_of(asked.given, {*(options_of(TrainOptions) - options_of(LearnOptions)), *IMAGES}, "texts")
        own, form = made(LearnOptions, {**learning, "seed": seed}), made(TextOptions, texts)
        if model is None:
            raise ConfigError("--model: texts need one: a folder of transformers, or a name on its hub")
        base = absolute_path(model) if Path(model).exists() else model
        options |= {"model": base, "set_": dict(set_ or {})}
        asked.options = {**options, **spelled(own), **spelled(form)}
        return _texts(asked, own, form, specs, base, where)
    _none_of(asked.given, {*(options_of(LearnOptions) - options_of(TrainOptions)), *options_of(TextOptions)}, "images")
    if chosen != HAT:
        raise ConfigError(f"--method {chosen} learns texts with an adapter; images are learned by --method {HAT}")
    if split and ":" in split:
        split = f"{absolute_path(split.rpartition(':')[0])}:{split.rpartition(':')[2]}"
    asked.options = {
        **spelled(TrainOptions()), **learning, **options, "model": model or DEFAULT_MODEL, "set_": dict(set_ or {}),
        "split": split, "dataset": dataset, "root": None if root is None else absolute_path(root), "download": download,
        "pretrained": pretrained, "model_kwargs": dict(model_kwargs or {}),
    }  # fmt: skip
    return _images(asked, image_options(asked.options, where))


def _none_of(given: Collection[str], others: Collection[str], data: str) -> None:
    """Options of the other kind of data would have no effect."""
    wrong = next((n for n in sorted({*others} - {"seed", "device"}) if n in given), None)
    if wrong is not None:
        raise ConfigError(f"--{wrong.replace('_', '-')}: has no effect on learning {data}; leave it out")


def _specs(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` or `FILE`, which is then named after itself."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path = Path(rest) if equals and not Path(text).exists() else Path(text)
        if not (equals and path == Path(rest)):
            name = (
                path.parent.name if path.name.split(".")[0] == "data" and path.parent.name else path.name.split(".")[0]
            )
        if not name or not str(path) or path == Path():
            raise ConfigError(f"--task: got {text!r}, expected NAME=FILE")
        if name in found:
            raise ConfigError(f"--task: two are named {name!r}; give each a name of its own, NAME=FILE")
        if not path.is_file():
            raise ConfigError(f"--task: {path} is not a file; expected .npz (images) or .json, .json.gz (texts)")
        found[name] = path
    return found


# --- images ---


def image_tasks(options: Mapping[str, Any]) -> list[ImageData]:
    """The tasks of a run's options.

    Raises:
        ConfigError, IntegrityError: they cannot be read.
    """
    tasks, split, dataset, root = (options.get(name) for name in ("task", "split", "dataset", "root"))
    if sum(bool(given) for given in (tasks, dataset, split and not split.isdigit())) > 1:
        raise ConfigError("--task, --split FILE.npz:5 and --dataset exclude each other; give one of them")
    if dataset:
        if not root:
            raise ConfigError("--dataset needs --root, the folder where its files lie")
        return Source(
            "torchvision", dataset=dataset, root=root, split=int(split or 1), download=options["download"]
        ).load()
    if split:
        path, _, count = split.rpartition(":")
        if not path or not count.isdigit():
            raise ConfigError(f"--split: got {split!r}, expected FILE.npz:5 (or a number together with --dataset)")
        return Source("split", paths=(path,), split=int(count)).load()
    if tasks:
        pairs = (text.partition("=") for text in tasks)
        return [dataclasses.replace(npz_task(path), name=name) for name, _, path in pairs]
    return Source().load()


def image_options(options: Mapping[str, Any], device: str) -> TrainOptions:
    """How the run of these options learns."""
    learning: TrainOptions = made(TrainOptions, {**options, "size": options["size"] or None, "device": device})
    return learning


def _images(asked: Asked, options: TrainOptions) -> Any:
    stream = image_tasks(asked.options)
    folder = asked.folder()
    if folder.finished:
        say(f"{folder.path} is finished already.")
        return _judged(folder.metrics)
    checkpoint = runs.load_checkpoint(folder.path, torch.device(options.device))
    network = _new_model(asked.options, stream, options.seed) if checkpoint is None else checkpoint.model
    make_optimizer(network, options)  # or an error, before anything is written
    prepare = Preparation.of(stream[0], size=options.size, fit=options.fit)
    facts: dict[str, Any] = {
        "hatcl": hatcl.__version__,
        "tasks": [{"name": task.name, "classes": task.num_classes} for task in stream],
        "input_shape": list(probe_inputs(stream[0], prepare, 1).shape[1:]),
    }
    with folder.claimed(light=(), **facts), _Display(asked.options["model"], folder) as display:
        learn_images(network, stream, options, folder=folder.path, watcher=display, checkpoint=checkpoint)
    return _judged(folder.metrics)


def _new_model(options: Mapping[str, Any], stream: Sequence[ImageData], seed: int) -> nn.Module:
    """The untrained model, its weights drawn from the run's seed."""
    config = HATConfig.from_dict({"num_tasks": len(stream), **options["set_"]})
    if config.num_tasks < len(stream):
        raise ConfigError(f"--set num_tasks: got {config.num_tasks}, expected at least the {len(stream)} tasks at hand")
    name = options["model"]
    known = hatcl.list_models("*")
    if name.split(".")[0] not in known:
        near = nearest(name, known)
        raise ConfigError(f"--model: there is no {name!r}; did you mean {near!r}? hatcl list PATTERN shows all")
    classes = [task.num_classes for task in stream]
    classes += [max(classes)] * (config.num_tasks - len(classes))  # room for tasks to come
    torch.manual_seed(seed)
    try:
        made: nn.Module = timm.create_model(
            name, pretrained=options["pretrained"], num_tasks=config.num_tasks, num_classes=classes, hat_config=config,
            **options["model_kwargs"],
        )  # fmt: skip
    except TypeError as error:
        raise ConfigError(
            f"--model-kwargs: timm cannot make {name} with {options['model_kwargs']} ({error})"
        ) from error
    return made


def _judged(metrics: dict[str, Any]) -> Any:
    """Exit code 1 where a sealed task has moved."""
    return metrics if metrics["exact"] and metrics["bit_equal"] else Answer(metrics)


def _show_images(run: Path, metrics: Mapping[str, Any]) -> None:
    """Print what a run showed and draw its picture; tasks that were forgotten are left out."""
    gone = set(metrics.get("forgotten", ()))
    stay = [i for i in range(len(metrics["records"])) if i not in gone]
    records = [metrics["records"][i] for i in stay]
    rows = [[math.nan if v is None else v for j, v in enumerate(metrics["rows"][i]) if j in stay] for i in stay]
    names = [record["name"] for record in records]
    out.print(matrix_table(rows, names))
    if metrics.get("average_accuracy") is not None:
        say(f"average accuracy  {100 * metrics['average_accuracy']:.2f} %")
        say(f"forgetting        {100 * metrics['forgetting']:.2f} %")
    out.print(tasks_table(names, records, units=metrics["units"]))
    if gone:
        say(f"forgotten since: task {', '.join(map(str, sorted(gone)))}; the others are counted anew here", "yellow")
    say(_certificate_line(metrics, records))
    layers = [
        {**x, "used": {str(k): x["used"][str(i)] for k, i in enumerate(stay) if str(i) in x["used"]}}
        for x in metrics["layers"]
    ]
    if records:
        try:
            picture = draw_run({**metrics, "records": records, "rows": rows, "layers": layers})
            write_files({run / runs.PICTURE: picture})
        except ConfigError as error:
            say(f"no picture: {error}", "yellow")
    say(f"{metrics['seconds']:.0f} s", "dim")


def _certificate_line(metrics: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Text:
    if not metrics["finished"]:
        return Text(f"{len(records)} tasks are learned; the run is not finished", style="yellow")
    if metrics["exact"] and metrics["bit_equal"]:
        return Text(
            f"certificate: exact. The logits of all {len(records)} sealed tasks are bit-equal to those at sealing, on "
            "the whole test sets, and stay so when everything that is not theirs is overwritten.",
            style="green",
        )
    moved = [str(t) for t, record in enumerate(records) if not record["bit_equal"]]
    leaks = [f"task {t} by {diff:g}" for t, diff in (metrics["max_abs_diff"] or {}).items() if diff != 0]
    return Text(
        f"certificate: NOT exact. Logits moved since sealing: {', '.join(moved) or 'none'}; "
        f"moved by overwriting what is not theirs: {', '.join(leaks) or 'none'}.",
        style="bold red",
    )


class _Display(Watcher):
    """A progress bar over a table that fills while tasks are learned; without a terminal, a line for each task."""

    def __init__(self, model: str, folder: runs.RunFolder) -> None:
        self.model, self.folder = model, folder
        self.bar = Bar(None, "steps", "starting")
        self.live = Live(console=out, auto_refresh=False, transient=True)
        self.names: list[str] = []
        self.steps: list[int] = []
        self.result = RunResult()
        self.running: dict[str, Any] | None = None
        self.drawn = 0.0

    def __enter__(self) -> _Display:
        if out.is_terminal and not out.quiet:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def started(self, tasks: Sequence[ImageData], steps: Sequence[int], result: RunResult) -> None:
        self.names, self.steps, self.result = [task.name for task in tasks], list(steps), result
        say(f"{self.model}: {len(tasks)} tasks, run folder {self.folder.path}")
        self.bar.says("learning", total=sum(steps))

    def learning(self, task: int, step: int) -> None:
        self.bar.says(f"task {task} {self.names[task]}", completed=sum(self.steps[:task]) + step)

    def stepped(self, task: int, step: int, loss: float, penalty: float, scale: float) -> None:
        self.bar.advance()
        self.running = {"loss": loss, "penalty": penalty, "scale": scale}
        self.folder.tell(task=task, step=step, **self.running)
        self._draw()

    def sealed(self, task: int, result: RunResult) -> None:
        self.running = None
        self._draw(force=True)
        record = result.records[task]
        self.bar.line(
            f"task {task} {record.name} sealed: {100 * record.hard_accuracy:.1f} % with hard gates "
            f"({100 * record.soft_accuracy:.1f} % with soft ones), {record.units_used} of {result.units} units, "
            f"{record.seconds:.1f} s"
        )

    def _draw(self, force: bool = False) -> None:
        """At most ten times a second: drawing must not cost more than learning."""
        now = time.monotonic()
        if self.live.is_started and (force or now - self.drawn > 0.1):
            records = self.result.to_dict()["records"]
            table = tasks_table(self.names, records, units=self.result.units, running=self.running)
            self.live.update(Group(table, self.bar.progress), refresh=True)
            self.drawn = now


# --- texts ---


def _texts(
    asked: Asked, options: LearnOptions, form_of: TextOptions, specs: Mapping[str, Path], model: str, device: str
) -> dict[str, Any]:
    method, settings, seed = (asked.options[name] for name in ("method", "set_", "seed"))
    gates = HATConfig.from_dict(settings) if method == HAT else None
    chosen = continual.make_method(method, None if gates else settings)
    folder = asked.folder(free={"device"})
    inputs = folder.same_inputs(list(specs.values()))
    if folder.finished:
        say(f"{folder.path} is finished already.")
        return folder.metrics
    adapted, tokenizer, form = adapted_model(model, form_of, seed)
    adapted.to(device)
    tasks = text_tasks(specs, adapted, tokenizer, form, form_of, positions_of(adapted))
    if gates is not None:
        adapted = hatcl.convert(adapted, len(tasks), example_of(tasks[0]), config=gates)
    stages = chosen.stages(len(tasks))
    steps = [sum(options.epochs * -(-len(tasks[i].train) // options.batch_size) for i in some) for some in stages]
    with folder.claimed(hatcl=hatcl.__version__, inputs=inputs), Bar(sum(steps), "steps") as bar:

        def tell(at: continual.Progress) -> None:
            learning = at.doing == "learning"
            if at.doing == "epoch":
                return
            text = f"{at.task}: {'loss' if learning else 'score'} {at.value:.4f}"
            if learning:
                bar.says(text, completed=sum(steps[: at.stage]) + at.step)
                folder.tell(stage=at.stage, step=at.step, name=at.task, loss=at.value)
            else:
                bar.line(f"{'before learning' if at.stage < 0 else f'stage {at.stage}'}, {text}")

        continual.learn_sequence(adapted, tasks, chosen, options, folder=folder.path, on_progress=tell)
    return folder.metrics


def _show_texts(metrics: dict[str, Any]) -> None:
    result = continual.SequenceResult.from_dict(metrics)
    out.print(matrix_table(result.rows, result.tasks))
    for j, name in enumerate(result.tasks):
        say(f"task {j}  {name}", "dim")
    if len(result.rows) < len(result.tasks):
        say(f"{len(result.rows)} of {len(result.tasks)} tasks are learned", "yellow")
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"{result.method}, in %", title_justify="left")
    for column in ("average", "FWT", "BWT", "zero-shot"):
        table.add_column(column, justify="right")
    shown = ("average_accuracy", "forward_transfer", "backward_transfer", "zero_shot_transfer")
    table.add_row(*(percent(result.measures[n]) for n in shown))
    out.print(table)


def show_skills(run: Path, share: float) -> None:
    """Draw the units' scores, and how far the tasks' skills overlap, where the method has scored units.

    Args:
        share: of the units that count as a task's skill.
    """
    found = sorted((run / kept.TASKS).glob("*/scores.safetensors"), key=lambda p: int(p.parent.name.split("_")[0]))
    scores = {path.parent.name.partition("_")[2]: SkillScores.load(path) for path in found}
    if not scores:
        return
    skills = {name: localize(s, share) for name, s in scores.items()}
    try:
        write_files({run / SKILLS: draw_skills(scores), run / OVERLAP: draw_overlap(skills)})
        say(f"{run / SKILLS}, {run / OVERLAP}", "dim")
    except ConfigError as error:
        say(f"no picture: {error}", "yellow")
