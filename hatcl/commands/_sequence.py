"""The model and the tasks of a run of `hatcl train`, from its options as config.json has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import hatcl

from ..config import HATConfig
from ..continual.images import ImageOptions, image_tasks
from ..continual.loading import TextOptions, adapted_model, text_tasks, with_adapter
from ..continual.methods import list_continual_methods
from ..continual.tasks import ContinualTask
from ..data.images import ImageData, Source, npz_task
from ..errors import ConfigError, nearest
from ..finetuning.prompts import positions_of
from ..integrations.timm_names import PREFIX
from ..lend import Evaluating
from ._options import made

HAT = "hat"
TEXTS = (".json", ".gz")


def task_files(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` or `FILE`, which is then named after itself.

    Raises:
        ConfigError: something else, two of one name, or a file that is not there.
    """
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


def are_texts(files: Mapping[str, Path]) -> bool:
    """Whether the tasks are of texts.

    Raises:
        ConfigError: some are, and some are not.
    """
    found = {path.suffix in TEXTS for path in files.values()}
    if len(found) > 1:
        raise ConfigError("--task: images and texts together; give .npz files, or .json and .json.gz files")
    return found == {True}


def tasks_of(options: Mapping[str, Any]) -> list[ContinualTask]:
    """The tasks of a run's options.

    Raises:
        ConfigError, IntegrityError: they cannot be read.
    """
    files = task_files(options["task"] or ())
    return texts(options, files)[1] if are_texts(files) else images(options, image_data(options))


# --- texts ---


def texts(options: Mapping[str, Any], files: Mapping[str, Path]) -> tuple[nn.Module, list[ContinualTask]]:
    """The base model with its new adapter, and the tasks."""
    form: TextOptions = made(TextOptions, options)
    adapted, tokenizer, kind = adapted_model(options["model"], form, options["seed"])
    return adapted, text_tasks(files, adapted, tokenizer, kind, form, positions_of(adapted))


def gated(model: nn.Module, tasks: Sequence[ContinualTask], config: HATConfig) -> nn.Module:
    """Gates over the pairs of an adapted model."""
    return hatcl.convert(model, len(tasks), tasks[0].inputs(), config=config)


# --- images ---


def image_data(options: Mapping[str, Any]) -> list[ImageData]:
    """The images of a run's tasks.

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
        return [dataclasses.replace(npz_task(path), name=name) for name, path in task_files(tasks).items()]
    return Source().load()


def images(options: Mapping[str, Any], stream: Sequence[ImageData]) -> list[ContinualTask]:
    """The tasks of some images."""
    return image_tasks(
        stream, made(ImageOptions, options), one_head=options["method"] != HAT,
        validated=options["score_on"] == "validation", seed=options["seed"],
    )  # fmt: skip


def image_model(options: Mapping[str, Any], stream: Sequence[ImageData], tasks: Sequence[ContinualTask]) -> nn.Module:
    """The untrained model, its weights drawn from the run's seed: with gates for `hat`; for other methods plain, with
    one head for the classes of all tasks, and an adapter where the method learns one.

    Raises:
        ConfigError: there is no such model, it does not fit the method, or it does not take the images.
    """
    name, method = options["model"], list_continual_methods()[options["method"]]
    _check_name(name, method.name)
    classes = [data.num_classes for data in stream]
    more: dict[str, Any] = {"num_classes": sum(classes)}
    if method.name == HAT:
        config = HATConfig.from_dict({"num_tasks": len(stream), **options["set_"]})
        if config.num_tasks < len(stream):
            raise ConfigError(
                f"--set num_tasks: got {config.num_tasks}, expected at least the {len(stream)} tasks at hand"
            )
        widths = classes + [max(classes)] * (config.num_tasks - len(classes))  # room for tasks to come
        more = {"num_classes": widths, "num_tasks": config.num_tasks, "hat_config": config}
    torch.manual_seed(options["seed"])
    try:
        model: nn.Module = timm.create_model(name, pretrained=options["pretrained"], **more, **options["model_kwargs"])
    except TypeError as error:
        raise ConfigError(
            f"--model-kwargs: timm cannot make {name} with {options['model_kwargs']} ({error})"
        ) from error
    if method.lora != "none":
        head = getattr(model, "pretrained_cfg", {}).get("classifier")
        beside = [head] if isinstance(head, str) and method.lora == "with_head" else []
        model = with_adapter(model, made(TextOptions, options), beside)
    _try_images(name, model, tasks[0])
    return model


def model_name(name: str, gates: bool) -> str:
    """timm's name as the method needs it, with `hat_` in front or without."""
    plain = name.removeprefix(PREFIX)
    return PREFIX + plain if gates else plain


def _check_name(name: str, method: str) -> None:
    known = hatcl.list_models("*") if method == HAT else timm.list_models()
    if name.split(".")[0] in known:
        return
    near = nearest(name, known)
    raise ConfigError(f"--model: there is no {name!r}; did you mean {near!r}? hatcl list PATTERN shows all")


def _try_images(name: str, model: nn.Module, task: ContinualTask) -> None:
    """Do images pass through the model?"""
    x = task.inputs()
    try:
        with Evaluating(model), torch.no_grad():
            model(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--model: {name} does not take images of {list(x.shape[1:])} ({str(error).splitlines()[0]}); give --size, "
            f"or, where timm takes it, --model-kwargs img_size={x.shape[-1]}"
        ) from error
