"""`hatcl train`: learn tasks of images or texts one after another, by any method."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import distributed

import hatcl

from .. import continual
from ..config import HATConfig, one_of
from ..continual.folder import find_model
from ..continual.images import ImageLearning, ImageOptions
from ..continual.loading import LORA, TextOptions
from ..continual.options import FREE, LearnOptions
from ..continual.routing import check_routable
from ..data.images import ImageData
from ..data.places import DataOptions, TaskPlace
from ..data.texts import TextData
from ..engine import folder as runs
from ..engine.processes import place, wait_for_all
from ..engine.schedule import make_optimizer
from ..errors import ConfigError
from ._benchmark import FromBenchmark, tasks_of_benchmark
from ._command import Answer, Asked, Device, command
from ._console import out, quiet, say
from ._options import Either, absolute_path, made, options_of, spelled, usable_device
from ._pages import learning_page
from ._routing import about, route, show_run
from ._sequence import HAT, gated, image_model, images, model_name, read_tasks, task_places, texts
from ._shown import Display

DEFAULT_MODEL = "hat_test_resnet"
TEXTS_BY = "tasl"
IMAGES = (
    "split",
    "dataset",
    "root",
    "download",
    "problem",
    "pretrained",
    "model_kwargs",
)  # in addition to the fields of ImageOptions


@command("train", show=show_run, page=learning_page, free={*FREE, "router"})
def train_command(
    asked: Asked,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PLACE",
            help="A task, in the order of learning; repeatable. Images: an .npz file, a folder with train/ and "
            "test/, each with one folder per class, a table of paths and labels, CIFAR100@FOLDER. Texts: a "
            ".csv, .tsv, "
            ".json, .jsonl or .parquet file. Either: a folder of such tables or of datasets, hf:NAME on the hub. "
            "docs/data.md describes each of them.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Cut the classes of the one --task or --dataset into tasks: 5, or 5x2 for five of two classes each; "
            "or PLACE:5 instead of --task."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="One of torchvision.datasets, such as CIFAR100.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where --dataset lies.")] = None,
    benchmark: FromBenchmark = None,
    download: Annotated[bool, typer.Option("--download", help="Let torchvision download --dataset.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Images: a timm name (see hatcl list), with hat_ in front for hat and without it for other "
            "methods; by default {DEFAULT_MODEL}. Texts: a folder of transformers, or a name on its hub."
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Images: start from timm's weights.")] = False,
    model_kwargs: Annotated[
        Mapping[str, Any] | None,
        typer.Option(
            "--model-kwargs",
            metavar="KEY=VALUE",
            help="Images: an argument of the model, such as drop_path_rate=0.1; repeatable.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="The method, see hatcl methods; by default hat for images and tasl for texts."),
    ] = None,
    set_: Annotated[
        Mapping[str, Any] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the method, such as grain=matrix; for hat, of HATConfig, such as max_scale=200; "
            "repeatable.",
        ),
    ] = None,
    router: Annotated[
        bool,
        typer.Option(
            "--router",
            help="With hat: also make and measure a router, which finds the task of an input; see hatcl predict. "
            "With --resume, a finished run gets one.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of the weights, the order of the examples, and everything else that is random.")
    ] = 0,
    device: Device = "auto",
    *,
    data: DataOptions,
    learning: Annotated[Mapping[str, Any], Either((ImageLearning, LearnOptions))],
    image: Annotated[Mapping[str, Any], Either((ImageOptions,))],
    text: Annotated[Mapping[str, Any], Either((TextOptions,))],
) -> Any:
    """Learn tasks one after another, and show how much of each is kept.

    With hard attention to the task (hat) nothing is forgotten, not even a bit. Texts are learned with one LoRA adapter;
    after each task its adapter is written in peft's own format, with the scores of its units. Images are learned with
    gates (hat), with a plain model, or with an adapter (tasl, ilora, olora). osf adds no adapter to either. Where an
    option has two defaults, the first is for images. Without options, it learns five two-class tasks of scikit-learn's
    digits.
    """
    if benchmark is not None:
        task, text = tasks_of_benchmark(benchmark, task, text)
    where = usable_device(device)
    if split and ":" in split:
        split = ":".join((TaskPlace.parsed(split.rpartition(":")[0]).absolute().data, split.rpartition(":")[2]))
    asked.options = {
        "seed": seed, "device": device, "router": router, "split": split, "dataset": dataset, "download": download,
        "task": [place.written() for place in task_places(task or ())],
        "root": None if root is None else absolute_path(root),
        **spelled(data), "set_": dict(set_ or {}),
    }  # fmt: skip
    found = read_tasks(asked.options)
    of_texts = isinstance(found, dict)
    one_of("--method", chosen := method or (TEXTS_BY if of_texts else HAT), list(continual.list_continual_methods()))
    asked.options["method"] = chosen
    if router and chosen != HAT:
        raise ConfigError(f"--router finds tasks that are learned by hat, but the method is {chosen}; leave it out")
    if router and not isinstance(found, dict):
        check_routable(found)
    gates = HATConfig.from_dict(asked.options["set_"]) if chosen == HAT else None
    how = continual.make_method(chosen, None if gates else asked.options["set_"])
    if of_texts:
        _none_of(asked.given, {*options_of(ImageOptions), *IMAGES}, "learning texts")
        _none_of(asked.given, () if how.adapted else LORA, f"learning texts by {chosen}, which adds no adapter")
        own = made(LearnOptions, {**learning, "seed": seed})
        if model is None:
            raise ConfigError("--model: texts need one: a folder of transformers, or a name on its hub")
        asked.options = {name: value for name, value in asked.options.items() if name not in IMAGES}
        base = absolute_path(model) if Path(model).exists() else model
        asked.options |= {"model": base, **spelled(own), **spelled(made(TextOptions, text))}
    else:
        lora = LORA if how.lora != "none" else ()
        _none_of(asked.given, options_of(TextOptions) - {*LORA}, "learning images")
        _none_of(asked.given, {*LORA} - {*lora}, f"learning images by {chosen}, which adapts no model")
        own = made(ImageLearning, {**learning, "seed": seed})
        asked.options |= {
            **spelled(own), **spelled(made(ImageOptions, image)),
            **{name: value for name, value in spelled(made(TextOptions, text)).items() if name in lora},
            "model": model_name(model or DEFAULT_MODEL, gates is not None),
            "pretrained": pretrained, "model_kwargs": dict(model_kwargs or {}),
        }  # fmt: skip
    with processes(where) as where:
        return _learn(asked, found, own, how, gates, where)


def _learn(
    asked: Asked, data: dict[str, TextData] | list[ImageData], options: LearnOptions, method: continual.Method,
    gates: HATConfig | None, device: str,
) -> Any:  # fmt: skip
    _check_no_more_tasks(asked)
    folder = asked.folder()
    files = [place.file for place in task_places(asked.options["task"]) if place.file is not None]
    facts: dict[str, Any] = {"inputs": folder.same_inputs(files)}
    wait_for_all()  # before any process writes
    if folder.finished:
        say(f"{folder.path} is finished already.")
        if asked.options["router"] and about(folder.path) is None:
            route(folder.path, hatcl.from_pretrained(find_model(folder.path)).to(device), data, asked.options)
        return _judged(folder.path, folder.metrics)
    if isinstance(data, dict):
        network, tasks = texts(asked.options, data)
        network = gated(network, tasks, gates) if gates else network
    else:
        tasks = images(asked.options, data)
        network = image_model(asked.options, data, tasks)
        facts["input_shape"] = list(tasks[0].inputs(1).shape[1:])
    network.to(device)
    make_optimizer(network, options)  # errors come before anything is written
    if place()[0] > 0:
        continual.learn_sequence(network, tasks, method, options, folder=folder.path)
        return None
    stages = method.stages(len(tasks))
    steps = [options.steps_of(sum(-(-len(tasks[i].train) // options.batch_size) for i in some)) or 0 for some in stages]
    names = [tasks[some[0]].name if len(some) == 1 else "all" for some in stages]
    scored_by = [tasks[some[-1]].measure for some in stages]
    with folder.claimed(**facts), Display(folder, names, steps, scored_by) as display:
        display.first = f"{method.name}: {len(tasks)} tasks, run folder {folder.path}"
        continual.learn_sequence(network, tasks, method, options, folder=folder.path, on_progress=display.tell)
    if asked.options["router"]:
        route(folder.path, network, data, asked.options)
    return _judged(folder.path, folder.metrics)


def _check_no_more_tasks(asked: Asked) -> None:
    """Raise if a finished run is given more tasks: it ended with a certificate of the tasks that it had."""
    run, now = asked.output, asked.options["task"]
    if not (run / runs.METRICS).exists() or not (run / runs.CONFIG).exists():
        return
    was = (runs.stored_config(run) or {})["options"].get("task") or []
    if was and len(now) > len(was) and now[: len(was)] == was:
        raise ConfigError(
            f"--task: the run in {run} is finished with {len(was)} tasks, and now got {len(now)}; it cannot learn "
            f"more here. Learn the new ones in Python, model = hatcl.from_pretrained('{find_model(run)}') and "
            "hatcl.learn("
            f"model, {len(was)}, ...), after hatcl grow --add-tasks {len(now) - len(was)} if there is no room; or "
            "learn all of them in another folder (--output)"
        )


@contextlib.contextmanager
def processes(device: str) -> Iterator[str]:
    """Inside, the processes that `torchrun` started form one group; yields this process's device. All but the first
    print nothing and exit at the end of the block: only the first runs what follows."""
    if not distributed.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        with quiet(out.quiet or distributed.get_rank() > 0):
            yield device
        first = distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()
    if not first:
        raise typer.Exit


def _judged(run: Path, metrics: dict[str, Any]) -> Any:
    """The results of a run; exit code 1 if a sealed task has moved."""
    if known := about(run):
        metrics = {**metrics, "router": known["measured"]}
    details = metrics["details"]
    return metrics if details.get("exact", True) and details.get("bit_equal", True) else Answer(metrics)


def _none_of(given: Collection[str], others: Collection[str], what: str) -> None:
    """Raise `ConfigError` for options that would have no effect."""
    wrong = next((n for n in sorted({*others} - {"seed", "device"}) if n in given), None)
    if wrong is not None:
        raise ConfigError(f"--{wrong.replace('_', '-')} has no effect on {what}; leave it out")
