"""An image classifier with a new linear head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...config import one_of
from ...data.images import ImageData, Images, Preparation, k_shot_images, preparation_for
from ...data.shots import held_out
from ...errors import ConfigError
from ..forwards import embedding_names
from ..heads import fit_head, linear_at, new_head
from ..options import HEADS, TaskOptions
from ..tasks import FinetuneTask, LabelledBatch
from .registry import finetune_mode

VALIDATION = 0.1  # share of each class's training images for validation if k is not given


def image_task(
    data: ImageData,
    model: nn.Module,
    *,
    prepare: Preparation | None = None,
    classifier: str | None = None,
    head: str = "random",
    k: int | None = None,
    data_seed: int = 0,
    validation: float = VALIDATION,
    seed: int = 0,
    name: str | None = None,
    measure: str | None = None,
) -> FinetuneTask:
    """A task of images for a timm model or any other whose last layer is linear; on a copy of the model, that layer is
    replaced by one for the task's classes.

    Args:
        prepare: None = normalise by the training images' mean and deviation, in their own size.
        classifier: the path of the last layer; None = timm's entry for the model.
        head: `random` (torch's initialisation, from the seed), or `fitted` on the pretrained model's features of the
            training examples.
        k: the number of images of each class for training, and as many others for validation; None = all, with the
            share `validation` of each class held out. data_seed: seeds both choices.

    Raises:
        ConfigError: the classifier is not linear, the model does not accept the images, or a class has too few.
    """
    one_of("head", head, HEADS)
    images = Images(data.x_train, data.y_train, prepare or Preparation.of(data))
    if k is not None:
        train, held = k_shot_images(images, k, data_seed)
    else:
        keep, out = held_out(data.y_train, validation, data_seed)
        train, held = images.at(keep), images.at(out)
    path = classifier or _classifier(model)
    made = copy.deepcopy(model).eval()
    old = linear_at(made, path)
    owner, _, leaf = path.rpartition(".")
    setattr(made.get_submodule(owner), leaf, new_head(old.in_features, data.num_classes, seed).to(old.weight))
    _try(made, train, data.num_classes)
    first = {id(p): n for n, p in made.named_parameters()}
    names = tuple(first[id(p)] for p in linear_at(made, path).parameters())
    task = FinetuneTask(
        name or data.name, "image", tuple(str(c) for c in range(data.num_classes)), made, train, held,
        Images(data.x_test, data.y_test, images.prepare), _collate, None, embedding_names(made), names, names,
        fixed_head=head == "fitted", measure=measure or "accuracy",
    )  # fmt: skip
    if head == "fitted":
        fit_head(task, path)
    return task


@finetune_mode("image", loads="", paper="grafts of vision models, not in the paper", own=("head",))
def _image(options: TaskOptions, data: ImageData, model: nn.Module, tokenizer: Any, seed: int) -> FinetuneTask:
    prepare = preparation_for(
        data, getattr(model, "pretrained_cfg", None) or {}, size=options.size, fit=options.fit,
        image_size=options.model_kwargs.get("img_size"), normalise=options.normalise,
    )  # fmt: skip
    return image_task(
        data, model, prepare=prepare, head=options.head, k=options.k,
        data_seed=options.data_seed, seed=seed, name=options.name, measure=options.measure,
    )  # fmt: skip


def _collate(images: Images) -> LabelledBatch:
    return images.prepare(images.x), torch.from_numpy(images.y)


def _classifier(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    found = cfg.get("classifier")
    if not isinstance(found, str):
        raise ConfigError(
            f"classifier: timm names {found!r} for {type(model).__name__}, expected one linear layer; name it "
            "(image_task(classifier=...)), or use another model"
        )
    return found


@torch.no_grad()
def _try(model: nn.Module, images: Images, classes: int) -> None:
    """Check that the model accepts two images and returns logits."""
    x = images.prepare(images.x[:2]).to(next(model.parameters()).device)
    try:
        shape = list(model(x).shape)
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"data: {type(model).__name__} does not accept images of {list(x.shape[1:])} "
            f"({str(error).splitlines()[0]}); resize them (--size), or give model_kwargs img_size"
        ) from error
    if shape != [len(x), classes]:
        raise ConfigError(
            f"classifier: {type(model).__name__} returns {shape}, expected {[len(x), classes]}; name its last layer"
        )
