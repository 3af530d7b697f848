"""The pretrained model of an experiment, from timm or CLIP, and its preparation of images, names and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..config import number, one_of, whole, without_effect
from ..data.datasets import data_name, names_inside
from ..data.images import FITS, ImageData, preparation_for
from ..data.photos import Pictured
from ..data.prompts import CLASS_NAMES, PLAIN, TEMPLATES, read_class_names, read_templates
from ..errors import ConfigError, VectorError, nearest
from ..integrations.clip import (
    TOWERS,
    Clip,
    ImageTower,
    clip_from_name,
    imagenet_prompts,
    is_clip_name,
    texts_from,
    tower_names,
)
from ..integrations.timm_names import PREFIX
from ..vectors.tensors import check_fit, kinds_of, named_tensors, pick
from .checkpoints import names_in_linearised, under_names
from .heads import ClassHead, encoder, text_head

FITTED_HEADS = ("trained", "prototypes")
TEXT, CROP, IMAGENET = "text", "crop", "imagenet"
NORMALISED_BY = ("data", "model")
VECTOR_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Reading:
    """The model and the images of an experiment.

    Args:
        base: the pretrained checkpoint: a safetensors file, a folder of shards, or a state dict of torch.save (.pt).
        model: the timm name of BASE's model, such as vit_base_patch32_224; open_clip:NAME, such as
            open_clip:ViT-B-32-quickgelu; or a folder of transformers' CLIPModel.
        model_kwargs: arguments of the model, such as img_size=64; repeatable.
        head: frozen heads on the base's features of the training images: trained (logistic regression), prototypes
            (cosines to class means); with a CLIP model text (embeddings of the classes' names in prompts); or a
            .safetensors file with [NAME.]weight and [NAME.]bias or [NAME.]scale.
        class_names: with text, NAME=FILE: the task's classes, one per line in the order of its labels (the only task of
            few-shot and adapt is called task), or NAME=DATASET, one with names known to hatcl, such as gtsrb or
            imagenet. By default those of the images' data set; repeatable.
        templates: with text, NAME=FILE: the task's prompts, one per line with {} for the class, or NAME=DATASET. By
            default those of the data set, else "a photo of a {}."; repeatable.
        text_from: with text, the source of the text tower if BASE has none: another checkpoint, or a tag of open_clip's
        pretrained weights, such as openai.
        validation: share of each class's training images that is held out. Coefficients are chosen on it (add and
        negate also learn from it), and heads never see it.
        size: images are resized to this size; 0 keeps their own; by default the model's. fit: how they are resized:
        crop (the model's own way: the shorter side to this size, then the middle), resize or pad. By default crop for
        CLIP models and for images that are files, else resize.
        normalise: by the mean and deviation of data (its training images, as hatcl train does), or model (its own).
            By default model for CLIP models and with crop, else data.
        batch_size: images per batch.
        check: refuse task vectors of another base.
        vector_dtype: keep task vectors in memory as float32, bfloat16 or float16.
        device: where to compute.

    Raises:
        ConfigError: a value outside its range.
    """

    base: Path
    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    head: str = "trained"
    class_names: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    text_from: str | None = None
    validation: float = 0.2
    size: int | None = None
    fit: str | None = None
    normalise: str | None = None
    batch_size: int = 128
    check: bool = True
    vector_dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if Path(self.head).suffix != ".safetensors":
            one_of("head", self.head, (*FITTED_HEADS, TEXT, "FILE.safetensors"))
        if self.head != TEXT:
            without_effect(self, ("class_names", "templates", "text_from"), f"head={self.head}", f"give head={TEXT}")
        for name, choices in (("fit", (CROP, *FITS)), ("normalise", NORMALISED_BY)):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), choices)
        if self.fit == CROP and self.normalise == "data":
            raise ConfigError(
                "normalise: got 'data' with fit='crop', which is the model's own way, its mean and "
                "deviation included; leave normalise out, or give fit='resize'"
            )
        one_of("vector_dtype", self.vector_dtype, tuple(VECTOR_DTYPES))
        number("validation", self.validation, 0, 1, without="high", what="a share")
        whole("batch_size", self.batch_size)
        whole("size", self.size, 0, optional=True)


@dataclass
class Pretrained:
    """A pretrained model, and its preparation of an experiment's data.

    Args:
        model: returns embeddings; task vectors change its parameters. classifiers: modules that no task vector covers.
            cfg: the configuration of its training images: `input_size`, `mean` and `std`. transform: an image's size,
            or None for the model's -> the model's own function from a PIL image to its input. named: names of a
            checkpoint's tensors -> those of the model's parameters; None: they are the same. rest: further content of
            BASE, to be written with a merged model. text_head: classes and templates -> a frozen head; None if the
            model has no text tower.
    """

    model: nn.Module
    classifiers: tuple[str, ...]
    cfg: Mapping[str, Any]
    transform: Callable[[int | None], Callable[[Any], Tensor]]
    named: Callable[[Mapping[str, Any], object], Mapping[str, str]] | None = None
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    text_head: Callable[[Sequence[str], Sequence[str]], ClassHead] | None = None

    def preparation(self, reading: Reading, data: ImageData) -> Callable[[Any], Tensor]:
        """The function that prepares a task's images as the model's input.

        Raises:
            ConfigError: the model or the images do not allow these options.
        """
        clip, photos = self.named is not None, data.photos
        fit = reading.fit or (CROP if clip or photos else "resize")
        if fit == CROP:
            if reading.normalise == "data":
                raise ConfigError(
                    f"normalise: got 'data'; {'a CLIP model' if clip else 'what is read from image files'} is prepared "
                    "the model's own way, its mean and deviation included. Leave it out, or give fit='resize'"
                )
            if reading.size == 0:
                raise ConfigError(
                    "size: got 0, their own, with fit='crop', which brings images to one size; leave it out"
                )
            return Pictured(self.transform(reading.size))
        if photos:
            raise ConfigError(
                f"fit: got {fit!r} for {data.name}, whose images differ in size; give 'crop', or leave it"
            )
        return preparation_for(
            data, self.cfg, size=reading.size, fit=fit, image_size=reading.model_kwargs.get("img_size"),
            normalise=reading.normalise or ("model" if clip else "data"),
        )  # fmt: skip


def load_pretrained(reading: Reading) -> Pretrained:
    """The model that `reading` names, with BASE's weights.

    Raises:
        ConfigError: there is no such model, or it does not accept the options. VectorError: BASE belongs to another
            model. IntegrityError: a file cannot be read.
    """
    stored = named_tensors(reading.base)
    if is_clip_name(reading.model):
        return _clip(reading, stored)
    if reading.head == TEXT:
        raise ConfigError(
            f"head: got {TEXT!r} for {reading.model}, which has no text tower; give --model open_clip:NAME or a "
            f"folder of transformers' CLIPModel, or a head of {' or '.join(FITTED_HEADS)}"
        )
    return _timm(reading, stored)


def _fits(model: nn.Module, stored: Mapping[str, Tensor], reading: Reading) -> None:
    state = model.state_dict()
    counters = [n for n in state if n.endswith("num_batches_tracked") and n not in stored]  # some writers drop them
    try:
        check_fit({n: t for n, t in state.items() if n not in counters}, stored, (reading.model, str(reading.base)))
    except VectorError as error:
        raise VectorError(f"{error}. Is it of another --model, or made with other --model-kwargs?") from error
    model.load_state_dict({n: stored[n] for n in stored}, strict=False)


def _timm(reading: Reading, stored: Mapping[str, Tensor]) -> Pretrained:
    """The timm model, and the names of its classifiers, which no task vector covers."""
    name = reading.model
    if not timm.is_model(name) or name.startswith(PREFIX):
        near = nearest(name.split(".")[0], timm.list_models())
        raise ConfigError(f"--model: got {name!r}; did you mean {near!r}?")
    options = dict(reading.model_kwargs)
    try:
        if "num_classes" not in options:
            first = next(iter(_classifiers(timm.get_pretrained_cfg(name))), "")
            weight = kinds_of(stored).get(f"{first}.weight")
            options["num_classes"] = 0 if weight is None else weight.shape[0]
        model = timm.create_model(name, **options)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"--model, --model-kwargs: timm cannot make {name} with {options} ({error})") from error
    _fits(model, stored, reading)
    cfg = getattr(model, "pretrained_cfg", None) or {}

    def transform(size: int | None) -> Callable[[Any], Tensor]:
        chosen = timm.data.resolve_model_data_config(model)
        side = size or reading.model_kwargs.get("img_size")
        if side is not None:
            chosen["input_size"] = (3, side, side)
        made: Callable[[Any], Tensor] = timm.data.create_transform(**chosen, is_training=False)
        return made

    return Pretrained(encoder(model), _classifiers(cfg), cfg, transform)


def _classifiers(cfg: Any) -> tuple[str, ...]:
    found = cfg.get("classifier") if isinstance(cfg, Mapping) else getattr(cfg, "classifier", None)
    return () if not found else (found,) if isinstance(found, str) else tuple(found)


def _clip(reading: Reading, stored: Mapping[str, Tensor]) -> Pretrained:
    """The image tower of a CLIP model. The text tower is read only if heads are made from names."""
    clip = clip_from_name(reading.model, reading.model_kwargs)
    stored = under_names(stored, tower_names(list(stored), clip.kind, reading.base))
    model = ImageTower(clip.model)
    # buffers such as position_ids, which older versions stored, are recomputed, not read
    state = set(model.state_dict())
    inside = [n for n in stored if n.split(".")[0] in TOWERS[clip.kind] and (n in state or not is_made(n))]
    _fits(model, pick(stored, inside), reading)
    ours = {n: p.detach() for n, p in model.named_parameters()}

    def named(tensors: Mapping[str, Any], where: object) -> Mapping[str, str]:
        linear = names_in_linearised(tensors, ours, where)
        return linear or {n: new for n, new in tower_names(list(tensors), clip.kind, where).items() if new in ours}

    def of_names(classes: Sequence[str], templates: Sequence[str]) -> ClassHead:
        return text_head(clip.model.to(reading.device), clip.tokenize, classes, templates)

    if reading.head == TEXT:
        _load_texts(clip, set(inside), stored, reading)
    side = clip.cfg["input_size"][-1]

    def transform(size: int | None) -> Callable[[Any], Tensor]:
        if size not in (None, side):
            raise ConfigError(
                f"size: got {size}; {reading.model} takes images of {side}. Leave it out (for an open_clip model of "
                f"another size give --model-kwargs force_image_size={size})"
            )
        return clip.transform

    rest = pick(stored, [n for n in stored if n.split(".")[0] not in TOWERS[clip.kind]])
    return Pretrained(model, (), clip.cfg, transform, named, rest, of_names if reading.head == TEXT else None)


def _load_texts(clip: Clip, inside: set[str], stored: Mapping[str, Tensor], reading: Reading) -> None:
    """Load the weights of the text tower from BASE or, if it lacks some, from `text_from`."""
    needed = [n for n in clip.model.state_dict() if n not in inside and not is_made(n)]
    missing = [n for n in needed if n not in stored]
    source, where = stored, str(reading.base)
    if missing:
        if reading.text_from is None:
            raise ConfigError(
                f"head: got {TEXT!r}, and {reading.base} has no text tower (it lacks {missing[0]} and "
                f"{len(missing) - 1} more); give --text-from with a checkpoint that has one, or with a tag of "
                "open_clip's pretrained weights, such as openai"
            )
        where, path = reading.text_from, Path(reading.text_from)
        found = named_tensors(path) if path.exists() else texts_from(reading.model, where)
        source = under_names(found, tower_names(list(found), clip.kind, where))
    elif reading.text_from is not None:
        raise ConfigError(f"text_from: got {reading.text_from!r}, and {reading.base} has a text tower; leave it out")
    wrong = [n for n in needed if n not in source or source[n].shape != clip.model.state_dict()[n].shape]
    # the published encoders keep some of the text tower, half of which may be stored in half precision
    other = [n for n in needed if n in source and n in stored and not _same(source[n], stored[n])]
    if wrong or other:
        why = "missing or of another shape" if wrong else f"not that of {reading.base}"
        raise VectorError(
            f"{where}: {(wrong or other)[0]} is {why}"
            f" ({len(wrong or other)} such tensors); expected the text tower that belongs to {reading.base}"
        )
    clip.model.load_state_dict({n: source[n] for n in needed}, strict=False)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal up to the rounding of half precision (2^-11 of a number)."""
    return a.shape == b.shape and bool(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-6))


def is_made(name: str) -> bool:
    """Whether it is a buffer that models recompute and only some versions store."""
    return name.rpartition(".")[2] in ("position_ids", "attn_mask", "num_batches_tracked")


# ---- names and prompts -----------------------------------------------------------------------------------------------

Prompts = tuple[tuple[str, ...], tuple[str, ...]]  # names of classes, templates


def prompts_of(reading: Reading, data: Mapping[str, str], tasks: Mapping[str, Any]) -> dict[str, Prompts]:
    """The names of each task's classes and its templates: the given ones, those of its images, or those of a data set
    that hatcl recognises by the name of the file, the folder or the task.

    Raises:
        ConfigError: there are none, the numbers of names and classes differ, or a task is unknown.
    """
    for option in ("class_names", "templates"):
        for name in getattr(reading, option):
            if name not in tasks:
                raise ConfigError(
                    f"--{option.replace('_', '-')}: there is no task {name!r}; did you mean {nearest(name, tasks)!r}?"
                )
    found: dict[str, Prompts] = {}
    for name, task in tasks.items():
        known = (data_name(data[name]), name.lower())
        classes = names_inside(data[name], task)
        if name in reading.class_names:
            classes = _prompts_in(reading.class_names[name], 0, read_class_names)
        elif not classes:
            classes = next((CLASS_NAMES[k] for k in known if k in CLASS_NAMES), ())
        if len(classes) != task.num_classes:
            raise ConfigError(
                f"head: got {TEXT!r}, and {len(classes) or 'no'} names for the {task.num_classes} classes of {name}; "
                f"give --class-names {name}=FILE, one name per line in the order of the labels"
            )
        templates = getattr(task, "templates", ())
        if name in reading.templates:
            templates = _prompts_in(reading.templates[name], 1, read_templates)
        elif not templates:
            templates = next((TEMPLATES[k] for k in known if k in TEMPLATES), PLAIN)
        found[name] = tuple(classes), tuple(templates)
    return found


def _prompts_in(what: str, part: int, read: Callable[[str], tuple[str, ...]]) -> tuple[str, ...]:
    return imagenet_prompts()[part] if what == IMAGENET else read(what)
