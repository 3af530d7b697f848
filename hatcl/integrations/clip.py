"""CLIP models of open_clip and transformers (Radford et al. 2021, arXiv 2103.00020): the image tower as an encoder, and
the text tower for making heads from class names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, VectorError, nearest
from ..files import read_json
from ..lend import Evaluating

OPEN_CLIP = "open_clip:"
SCHEMAS = ("local-dir:", "hf-hub:")  # prefixes of open_clip's own names
QUICK = "-quickgelu"
TOWERS = {"open_clip": ("visual",), "transformers": ("vision_model", "visual_projection")}
LOGIT_SCALE = "logit_scale"
log = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], Any]


@dataclass
class Clip:
    """A CLIP model with its tokenizer and transform.

    Args:
        kind: `open_clip` or `transformers`. model: both towers. tokenize: texts -> the text tower's input.
        transform: a PIL image -> `[3, H, W]` as in the model's training: the shorter side resized to the model's size,
        the middle cut out, normalised.
        cfg: `input_size`, `mean` and `std`, as in timm's `pretrained_cfg`.
    """

    kind: str
    model: nn.Module
    tokenize: Tokenize
    transform: Callable[[Any], Tensor]
    cfg: dict[str, Any]


def kind_of_clip(model: nn.Module) -> str | None:
    """`open_clip` or `transformers`; None if it is not a CLIP model."""
    return next((kind for kind, parts in TOWERS.items() if all(hasattr(model, p) for p in (*parts, LOGIT_SCALE))), None)


class ImageTower(nn.Module):
    """The image tower of a CLIP model: images `[B, 3, H, W]` -> embeddings `[B, d]`, before they are made unit length.
    It has its own parameters, with the names that they have in the whole model.

    Args:
        model: a model of open_clip, or a `CLIPModel` of transformers. Raises: ConfigError: it is neither.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        kind = kind_of_clip(model)
        if kind is None:
            raise ConfigError(f"{type(model).__name__} is no CLIP model of open_clip or transformers")
        for name in TOWERS[kind]:
            setattr(self, name, getattr(model, name))
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        parts: Any = self
        if self.kind == "transformers":
            pooled: Tensor = parts.visual_projection(parts.vision_model(pixel_values=images).pooler_output)
            return pooled
        out = parts.visual(images)
        return out[0] if isinstance(out, tuple) else out  # CoCa returns its tokens as well


def is_clip_name(name: str) -> bool:
    """Whether `--model NAME` is a CLIP model: `open_clip:NAME`, or a folder of transformers' `CLIPModel`."""
    return name.startswith(OPEN_CLIP) or (Path(name) / "config.json").is_file()


def clip_from_name(name: str, options: Mapping[str, Any] | None = None) -> Clip:
    """A CLIP model with random weights.

    Args:
        name: `open_clip:NAME`, any name of `open_clip.list_models()`, `local-dir:FOLDER` or `hf-hub:NAME`; or a folder
            with the config and the tokenizer of transformers' `CLIPModel`.
        options: arguments of the model, such as `force_image_size=64`.

    Raises:
        ConfigError: there is no such model, it does not accept the options, or a package is not installed.
    """
    if name.startswith(OPEN_CLIP):
        return _of_open_clip(name.removeprefix(OPEN_CLIP), dict(options or {}))
    return _of_transformers(Path(name), dict(options or {}))


def _of_open_clip(name: str, options: dict[str, Any], pretrained: str | None = None) -> Clip:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"{OPEN_CLIP}{name}: open_clip is not installed; run: pip install 'hatcl[clip]'") from error
    known = open_clip.list_models()
    if name not in known and not name.startswith(SCHEMAS):
        raise ConfigError(f"--model: open_clip has no {name!r}; did you mean '{OPEN_CLIP}{nearest(name, known)}'?")
    if pretrained is None and f"{name}{QUICK}" in known and not options.get("force_quick_gelu"):
        log.warning(
            "%s computes with GELU. OpenAI's weights, and the published task vectors on them, were trained with "
            "QuickGELU: for these give %s%s%s", name, OPEN_CLIP, name, QUICK,
        )  # fmt: skip
    try:
        with _unlogged():
            model = open_clip.create_model(name, pretrained, load_weights=pretrained is not None, **options).eval()
            tokenize = open_clip.get_tokenizer(name)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        tag = "" if pretrained is None else f" and the pretrained weights {pretrained!r}"
        raise ConfigError(f"--model: open_clip cannot make {name} with {options}{tag} ({error})") from error
    cfg = open_clip.transform.PreprocessCfg(**open_clip.model.get_model_preprocess_cfg(model))
    about = {"input_size": cfg.input_size, "mean": cfg.mean, "std": cfg.std}
    return Clip("open_clip", model, tokenize, open_clip.transform.image_transform_v2(cfg, is_train=False), about)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Inside, suppress open_clip's warning that a model has no weights, which would leave a handler on the root
    logger."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _of_transformers(folder: Path, options: dict[str, Any]) -> Clip:
    """A CLIP model of transformers. Its `preprocessor_config.json` defines the preparation of images; without it,
    CLIP's is used."""
    try:
        from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel
    except ImportError as error:
        raise ConfigError(f"{folder}: transformers is not installed; run: pip install 'hatcl[hf]'") from error
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ConfigError(
            f"--model: {folder} has the kind {kind!r}, expected 'clip', a folder of transformers' CLIPModel"
        )
    if options:
        raise ConfigError(f"--model-kwargs: got {options} for {folder}, whose config.json says it all; leave them out")
    try:
        model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"--model: transformers cannot make a CLIPModel of {folder} ({error})") from error
    side = model.config.vision_config.image_size
    if (folder / "preprocessor_config.json").is_file():
        processor = CLIPImageProcessor.from_pretrained(folder)
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        longest = model.config.text_config.max_position_embeddings
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"))

    def transform(image: Any) -> Tensor:
        found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found

    cfg = {"input_size": (3, side, side), "mean": processor.image_mean, "std": processor.image_std}
    return Clip("transformers", model, tokenize, transform, cfg)


def texts_from(name: str, tag: str) -> Mapping[str, Tensor]:
    """The pretrained weights of an open_clip model by their tag, such as `openai`, from its hub or its cache.

    Raises:
        ConfigError: there is no such tag, or the weights are unavailable.
    """
    if not name.startswith(OPEN_CLIP):
        raise ConfigError(f"--text-from: {tag} is no file, and {name} has no tags; give the path of a checkpoint")
    return _of_open_clip(name.removeprefix(OPEN_CLIP), {}, tag).model.state_dict()


@torch.no_grad()
def text_embeddings(
    model: nn.Module, tokenize: Tokenize, classes: Sequence[str], templates: Sequence[str]
) -> tuple[Tensor, float]:
    """An embedding per class, `[C, d]` of unit length, and the scale of the cosines, `exp(logit_scale)`.

    `t_c = normalised mean over templates of normalised text(template(c))`, as in CLIP and in the repositories of task
    vectors.

    Args:
        model: both towers. tokenize: texts -> the text tower's input. classes: their names. templates: with `{}` in the
            place of the name.

    Raises:
        ConfigError: another kind of model.
    """
    if kind_of_clip(model) is None:
        raise ConfigError(f"{type(model).__name__} is no CLIP model of open_clip or transformers")
    whole: Any = model
    device = whole.logit_scale.device
    found = []
    with Evaluating(whole):
        for name in classes:
            tokens = tokenize([text.replace("{}", name) for text in templates])
            if isinstance(tokens, Mapping):
                out = whole.text_model(**{k: v.to(device) for k, v in tokens.items()})
                features = whole.text_projection(out.pooler_output)
            else:
                features = whole.encode_text(tokens.to(device))
            found.append(F.normalize(F.normalize(features.float(), dim=-1).mean(0), dim=-1))
    return torch.stack(found), float(whole.logit_scale.detach().float().exp())


def imagenet_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """CLIP's names of ImageNet's classes, in the order of its folders, and its 80 templates, from open_clip.

    Raises:
        ConfigError: open_clip is not installed.
    """
    try:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    except ImportError as error:
        raise ConfigError("imagenet: the names come with open_clip; run: pip install 'hatcl[clip]'") from error
    return tuple(IMAGENET_CLASSNAMES), tuple(make("{}") for make in OPENAI_IMAGENET_TEMPLATES)


def tower_names(names: Sequence[str], kind: str, where: object) -> dict[str, str]:
    """The names of a CLIP checkpoint -> those of the model, without the prefixes of wrappers (`model.visual...`,
    `module.visual...`, `image_encoder.model.visual...`).

    Raises:
        VectorError: it holds no image tower of this kind, or more than one.
    """
    first = TOWERS[kind][0]
    fronts = {name[: name.index(f".{first}.") + 1] for name in names if f".{first}." in name}
    fronts |= {"" for name in names if name.startswith(f"{first}.")}
    if len(fronts) != 1:
        other = next(
            (k for k, (start, *_) in TOWERS.items() if any(f"{start}." in n for n in names) and k != kind), None
        )
        holds = ", ".join(sorted(names)[:3])
        raise VectorError(
            f"{where}: holds {len(fronts)} image towers as {kind} calls them ({first}...), expected one; it holds "
            f"{holds}" + (f". It belongs to {other}: give --model of {other}" if other else "")
        )
    front = fronts.pop()
    return {name: name.removeprefix(front) for name in names}
