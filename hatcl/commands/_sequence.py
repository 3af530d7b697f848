"""Make the model and the tasks of a run of `hatcl train` from its options as config.json has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

import hatcl

from ..config import HATConfig
from ..continual.images import ROTATIONS, ImageOptions, image_tasks
from ..continual.loading import TextOptions, adapted_model, text_tasks, with_adapter
from ..continual.methods import list_continual_methods
from ..continual.tasks import ContinualTask
from ..data.datasets import torchvision_task
from ..data.images import ImageData, digits_tasks
from ..data.places import DataOptions, TaskPlace, split_task
from ..data.texts import TextData
from ..errors import ConfigError, nearest
from ..finetuning.prompts import positions_of
from ..integrations.timm_names import PREFIX
from ..lend import Evaluating
from ._options import made

HAT = "hat"


def task_places(texts: Sequence[str]) -> list[TaskPlace]:
    """The tasks given by `--task`, with their paths made absolute.

    Raises:
        ConfigError: a text has another form, or two tasks have the same name.
    """
    places = [TaskPlace.parsed(text).absolute() for text in texts]
    names = [place.name for place in places]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--task: two are named {twice!r}; give each its own name, NAME=FILE")
    return places


def read_tasks(options: Mapping[str, Any]) -> dict[str, TextData] | list[ImageData]:
    """The data of a run's tasks: a mapping from names to texts, or a list of images.

    Raises:
        ConfigError: the data cannot be read, or texts and images are mixed. IntegrityError: a file is damaged.
    """
    texts, split, dataset, root = (options.get(name) for name in ("task", "split", "dataset", "root"))
    whole, _, count = (split or "").rpartition(":")
    if sum(bool(given) for given in (texts, dataset, whole)) > 1:
        raise ConfigError("--task, --split PLACE:5 and --dataset exclude each other; give one of them")
    if split and not (texts or dataset or whole):
        raise ConfigError(f"--split: got {split!r}, expected PLACE:5 (or a number together with --task or --dataset)")
    if dataset and not root:
        raise ConfigError("--dataset needs --root, the folder of its files")
    found: dict[str, TextData | ImageData] = {}
    if dataset:
        found[dataset] = torchvision_task(dataset, str(root), download=options["download"])
    elif not texts and not whole:
        return digits_tasks()
    for place in task_places(texts or [whole] if not dataset else ()):
        for name, data in place.read(made(DataOptions, options), options["seed"]).items():
            if name in found:
                raise ConfigError(f"--task: two are named {name!r}; give each its own name, NAME=FILE")
            found[name] = data
    if split:
        if len(found) > 1:
            raise ConfigError(f"--split: got {split!r} with {len(found)} tasks; it cuts one")
        return split_task(next(iter(found.values())), count)
    images = [data for data in found.values() if isinstance(data, ImageData)]
    if images and len(images) < len(found):
        raise ConfigError("--task: got images and texts together; give tasks of one kind")
    return images or {name: data for name, data in found.items() if isinstance(data, TextData)}


def tasks_of(options: Mapping[str, Any]) -> list[ContinualTask]:
    """The tasks of a run's options.

    Raises:
        ConfigError, IntegrityError: the tasks cannot be read.
    """
    data = read_tasks(options)
    return texts(options, data)[1] if isinstance(data, dict) else images(options, data)


# --- texts ---


def texts(options: Mapping[str, Any], data: Mapping[str, TextData]) -> tuple[nn.Module, list[ContinualTask]]:
    """The base model, with a new adapter if the method learns one, and the tasks."""
    form: TextOptions = made(TextOptions, options)
    adapter = list_continual_methods()[options["method"]].adapted
    adapted, tokenizer, kind = adapted_model(options["model"], form, options["seed"], adapter)
    tasks = text_tasks(
        data, adapted, tokenizer, kind, form, positions_of(adapted),
        validated=options["score_on"] == "validation", seed=options["seed"],
    )  # fmt: skip
    return adapted, tasks


def gated(model: nn.Module, tasks: Sequence[ContinualTask], config: HATConfig) -> nn.Module:
    """Put gates over the LoRA pairs of an adapted model."""
    return hatcl.convert(model, len(tasks), tasks[0].inputs(), config=config)


# --- images ---


def images(options: Mapping[str, Any], stream: Sequence[ImageData]) -> list[ContinualTask]:
    """The tasks made from a stream of image data."""
    return image_tasks(
        stream, made(ImageOptions, options), one_head=options["method"] != HAT,
        validated=options["score_on"] == "validation", seed=options["seed"],
    )  # fmt: skip


def image_model(options: Mapping[str, Any], stream: Sequence[ImageData], tasks: Sequence[ContinualTask]) -> nn.Module:
    """The untrained model, with weights drawn from the run's seed: for `hat` with gates; for other methods a plain
    model with one head for the classes of all tasks, and an adapter if the method learns one.

    Raises:
        ConfigError: there is no such model, it does not fit the method, or it does not accept the images.
    """
    name, method = options["model"], list_continual_methods()[options["method"]]
    _check_name(name, method.name)
    times = ROTATIONS if made(ImageOptions, options).rotate else 1
    classes = [times * data.num_classes for data in stream]
    more: dict[str, Any] = {"num_classes": sum(classes)}
    if method.name == HAT:
        config = HATConfig.from_dict({"num_tasks": len(stream), **options["set_"]})
        if config.num_tasks < len(stream):
            raise ConfigError(
                f"--set num_tasks: got {config.num_tasks}, expected at least {len(stream)}, the number of tasks given"
            )
        widths = classes + [max(classes)] * (config.num_tasks - len(classes))  # room for later tasks
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
    """timm's name in the form that the method needs, with or without `hat_` in front."""
    plain = name.removeprefix(PREFIX)
    return PREFIX + plain if gates else plain


def _check_name(name: str, method: str) -> None:
    known = hatcl.list_models("*") if method == HAT else timm.list_models()
    if name.split(".")[0] in known:
        return
    near = nearest(name, known)
    raise ConfigError(f"--model: there is no {name!r}; did you mean {near!r}? hatcl list PATTERN shows all")


def _try_images(name: str, model: nn.Module, task: ContinualTask) -> None:
    """Check that images pass through the model."""
    x = task.inputs()
    try:
        with Evaluating(model), torch.no_grad():
            model(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--model: {name} does not take images of {list(x.shape[1:])} ({str(error).splitlines()[0]}); give --size, "
            f"or, if timm accepts it, --model-kwargs img_size={x.shape[-1]}"
        ) from error
