"""The model and the tasks of a run of `hatcl train`, from its options as config.json has them."""

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
    """Tasks as `--task` has them, with their paths made absolute.

    Raises:
        ConfigError: another form, or two of one name.
    """
    places = [TaskPlace.parsed(text).absolute() for text in texts]
    names = [place.name for place in places]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--task: two are named {twice!r}; give each a name of its own, NAME=FILE")
    return places


def read_tasks(options: Mapping[str, Any]) -> dict[str, TextData] | list[ImageData]:
    """The data of a run's tasks: of texts by their names, or of images.

    Raises:
        ConfigError: it cannot be read, or some are texts and some are not. IntegrityError: a damaged file.
    """
    texts, split, dataset, root = (options.get(name) for name in ("task", "split", "dataset", "root"))
    whole, _, count = (split or "").rpartition(":")
    if sum(bool(given) for given in (texts, dataset, whole)) > 1:
        raise ConfigError("--task, --split PLACE:5 and --dataset exclude each other; give one of them")
    if split and not (texts or dataset or whole):
        raise ConfigError(f"--split: got {split!r}, expected PLACE:5 (or a number together with --task or --dataset)")
    if dataset and not root:
        raise ConfigError("--dataset needs --root, the folder where its files lie")
    found: dict[str, TextData | ImageData] = {}
    if dataset:
        found[dataset] = torchvision_task(dataset, str(root), download=options["download"])
    elif not texts and not whole:
        return digits_tasks()
    for place in task_places(texts or [whole] if not dataset else ()):
        for name, data in place.read(made(DataOptions, options), options["seed"]).items():
            if name in found:
                raise ConfigError(f"--task: two are named {name!r}; give each a name of its own, NAME=FILE")
            found[name] = data
    if split:
        if len(found) > 1:
            raise ConfigError(f"--split: got {split!r} with {len(found)} tasks; it cuts one")
        return split_task(next(iter(found.values())), count)
    images = [data for data in found.values() if isinstance(data, ImageData)]
    if images and len(images) < len(found):
        raise ConfigError("--task: images and texts together; give tasks of one of them")
    return images or {name: data for name, data in found.items() if isinstance(data, TextData)}


def tasks_of(options: Mapping[str, Any]) -> list[ContinualTask]:
    """The tasks of a run's options.

    Raises:
        ConfigError, IntegrityError: they cannot be read.
    """
    data = read_tasks(options)
    return texts(options, data)[1] if isinstance(data, dict) else images(options, data)


# --- texts ---


def texts(options: Mapping[str, Any], data: Mapping[str, TextData]) -> tuple[nn.Module, list[ContinualTask]]:
    """The base model with its new adapter, where the method learns one, and the tasks."""
    form: TextOptions = made(TextOptions, options)
    adapter = list_continual_methods()[options["method"]].adapted
    adapted, tokenizer, kind = adapted_model(options["model"], form, options["seed"], adapter)
    tasks = text_tasks(
        data, adapted, tokenizer, kind, form, positions_of(adapted),
        validated=options["score_on"] == "validation", seed=options["seed"],
    )  # fmt: skip
    return adapted, tasks


def gated(model: nn.Module, tasks: Sequence[ContinualTask], config: HATConfig) -> nn.Module:
    """Gates over the pairs of an adapted model."""
    return hatcl.convert(model, len(tasks), tasks[0].inputs(), config=config)


# --- images ---


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
    times = ROTATIONS if made(ImageOptions, options).rotate else 1
    classes = [times * data.num_classes for data in stream]
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
