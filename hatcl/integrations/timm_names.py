"""timm's names with `hat_` in front: `timm.create_model("hat_resnet18.a1_in1k", num_tasks=5)`, and two names that timm
does not have: `resnet18s` and `resnet34s`, for small images.

`hat_local-dir:FOLDER` and `hat_hf-hub:ORGANISATION/NAME` are converted from timm's model there, or loaded with their
tasks if `hatcl.save_pretrained` wrote them; in the latter case timm's own `local-dir:` and `hf-hub:` names give the
same.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerScale, LayerScale2d
from timm.models import _factory, _registry, build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from ..config import HATConfig
from ..errors import ConfigError, IntegrityError
from ..files import read_json
from ..hat.convert import convert
from ..hat.gates import gates_of
from ..hat.layers import HATLayer
from ..hat.registry import register_layer
from ..hat.saving.hub import located
from ..hat.saving.pretrained import CONFIG, from_pretrained
from ..sources import register_source

log = logging.getLogger(__name__)
PREFIX = "hat_"
READING = ("checkpoint_path", "cache_dir", "file", "url", "hf_hub_id", "hf_hub_filename")  # and pretrained...
PLACES = ("local-dir", "hf-hub", "hf_hub")  # timm's prefixes before a colon
DOT = "\0"  # replaces a dot in the name of a place, after which timm would look for a tag


_SMALL = {
    "input_size": (3, 32, 32), "pool_size": (4, 4), "num_classes": 1000, "crop_pct": 1.0, "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "conv1", "classifier": "fc",
}  # fmt: skip
default_cfgs = {"resnet18s": _SMALL, "resnet34s": _SMALL}  # the name that timm looks for


class SmallImageResNet(ResNet):
    """timm's ResNet for images of about 32 x 32: a stem of 3 x 3 with stride 1, and no pooling after it, so that the
    last stage has an eighth of the image's side. (HAT-CL's networks of these names have this stem but keep the
    pooling.) There are no pretrained weights."""

    conv1: nn.Module
    maxpool: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stem: Any = self.conv1
        if not isinstance(stem, nn.Conv2d):
            raise ConfigError(
                f"stem_type: got {kwargs.get('stem_type')!r}; the stem of resnet18s and resnet34s is one convolution, "
                "leave it out"
            )
        self.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()


@register_model
def resnet18s(pretrained: bool = False, **options: Any) -> SmallImageResNet:
    """ResNet-18 for small images."""
    return build_model_with_cfg(
        SmallImageResNet, "resnet18s", pretrained, **{"block": BasicBlock, "layers": (2, 2, 2, 2), **options}
    )


@register_model
def resnet34s(pretrained: bool = False, **options: Any) -> SmallImageResNet:
    """ResNet-34 for small images."""
    return build_model_with_cfg(
        SmallImageResNet, "resnet34s", pretrained, **{"block": BasicBlock, "layers": (3, 4, 6, 3), **options}
    )


for _name in default_cfgs:  # part of timm's own family of ResNets, not a family of this file
    _registry._module_to_models.pop(_registry._model_to_module[_name], None)
    _registry._model_to_module[_name] = "resnet"
    _registry._module_to_models["resnet"].add(_name)


@register_layer(LayerScale, LayerScale2d)
class TaskIndexedLayerScale(HATLayer):
    """timm's layer scale with a copy per task, as in HAT-CL, and as for a norm's weight. It has one number per channel:
    if it were shared, the first task to use a channel would fix it for all."""

    hat_copied: ClassVar[tuple[str, ...]] = ("gamma",)


class _Entrypoints(dict):
    """timm's registry, in which every name also exists with `hat_` in front. Listings stay as they were."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (
            isinstance(name, str)
            and name.startswith(PREFIX)
            and (super().__contains__(name[len(PREFIX) :]) or _is_place(name[len(PREFIX) :]))
        )

    def __missing__(self, name: str) -> Callable[..., nn.Module]:
        if name not in self:
            raise KeyError(name)

        def create(**options: Any) -> nn.Module:
            return create_hat_model(name[len(PREFIX) :].replace(DOT, "."), **options)

        return create


def _is_place(name: str) -> bool:
    return name.partition(":")[0].lower() in PLACES and ":" in name


def install() -> None:
    """Make timm know the `hat_` names. Called on `import hatcl`."""
    if isinstance(_registry._model_entrypoints, _Entrypoints):
        return
    _registry._model_entrypoints = _Entrypoints(_registry._model_entrypoints)
    parse = _factory.parse_model_name

    def parse_model_name(model_name: str) -> tuple[str | None, str]:
        if model_name.startswith(PREFIX) and _is_place(model_name[len(PREFIX) :]):
            return None, model_name.replace(".", DOT)  # no place of timm's, but a name of the registry
        found: tuple[str | None, str] = parse(model_name)
        return found

    _factory.parse_model_name = parse_model_name


def list_models(pattern: str = "*") -> list[str]:
    """The `hat_` names that match a shell pattern: `hatcl.list_models("hat_*resnet*")`."""
    return fnmatch.filter([PREFIX + name for name in timm.list_models()], pattern)


def create_hat_model(
    name: str,
    *,
    num_tasks: int | None = None,
    num_classes: int | Sequence[int] | None = None,
    hat_config: HATConfig | Mapping[str, Any] | None = None,
    verify: bool = True,
    **options: Any,
) -> nn.Module:
    """timm's model `name`, converted. All other options go to `timm.create_model`.

    Args:
        num_tasks: tasks to make room for. num_classes: an int, or one per task.
        hat_config: `HATConfig` or a mapping of its options.
        verify: prove the conversion (see `hatcl.convert`).

    Raises:
        ConfigError: options exclude each other, or a saved model already has them.
    """
    place = _saved_place(name, options)
    if place is not None:
        own = {"num_tasks": num_tasks, "num_classes": num_classes, "hat_config": hat_config}
        return _load_saved(place, {**own, **options})
    for refused, instead in (
        ("features_only", "convert timm.create_model(..., features_only=True) with hatcl.convert"),
        ("mask_inputs", f"call hatcl.convert(timm.create_model({name!r}, ...), ..., mask_inputs=True)"),
    ):
        if options.get(refused):
            raise ConfigError(f"{PREFIX}{name}: {refused}=True is not for hat_ names; {instead}")
    from timm.layers import is_scriptable

    if is_scriptable():
        raise ConfigError(
            f"{PREFIX}{name}: scriptable=True cannot work, tasks are chosen at run time; use torch.compile"
        )
    config = hat_config if isinstance(hat_config, HATConfig) else HATConfig.from_dict(hat_config or {})
    if num_tasks is None and isinstance(num_classes, Sequence):
        num_tasks = len(num_classes)
    widths = list(num_classes) if isinstance(num_classes, Sequence) else None
    if widths is not None:
        options["num_classes"] = max(2, *widths)  # the map tells no head by a single output; each task gets its width
    elif num_classes is not None:
        options["num_classes"] = num_classes
    options = {k: v for k, v in options.items() if v is not None}
    base = timm.create_model(name, **options)
    x = example_input(base, options)
    model = convert(base, num_tasks, x, config=config, num_classes=widths, verify=verify, inplace=True)
    if _is_place(name):  # a saved model names no place: timm's config of it names the model
        name, options = base.pretrained_cfg["architecture"], {**base._model_args, "num_classes": base.num_classes}
    kept = {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str, list, tuple))}
    gates_of(model)[0].source = timm_source(name, kept)
    return model


def _saved_place(name: str, options: Mapping[str, Any]) -> str | None:
    """The folder, or the name on a hub, of a model that `hatcl.save_pretrained` wrote, if it is one."""
    given = options.get("pretrained_cfg")
    if isinstance(given, Mapping) and "fingerprint" in given:  # timm has read the config.json there
        return str(given.get("hf_hub_id") or given["file"])
    kind, _, place = name.partition(":")
    if not place or kind.lower() not in PLACES:
        return None
    if kind.lower() == "local-dir":
        config = Path(place) / CONFIG
    else:
        repository, _, revision = place.partition("@")
        cache = options.get("cache_dir")
        config = located(repository, CONFIG, revision=revision or None, cache_dir=cache) / CONFIG
    return place if config.is_file() and "fingerprint" in read_json(config) else None


def _load_saved(place: str, options: Mapping[str, Any]) -> nn.Module:
    known = ("pretrained", "pretrained_cfg", "cache_dir")
    beside = sorted(k for k, v in options.items() if v not in (None, False) and k not in known)
    if beside:
        raise ConfigError(
            f"{beside[0]}: the model in {place} was saved with its tasks and options, so this has no effect; leave it "
            "out, and see hatcl.add_tasks for more tasks"
        )
    if Path(place).exists():
        return from_pretrained(place)
    repository, _, revision = place.partition("@")
    return from_pretrained(repository, revision=revision or None, cache_dir=options.get("cache_dir"))


def timm_source(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The description from which `hatcl.from_pretrained` makes a timm model."""
    return {"kind": "timm", "name": name, "options": without_files(options)}


def without_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `timm.create_model` that neither open files nor reach the network; weights are loaded
    afterwards."""
    return {k: v for k, v in options.items() if not k.startswith("pretrained") and k not in READING}


def check_name(name: object) -> str:
    """A name from a file, if it is one of timm's own.

    Raises:
        IntegrityError: timm would look for it in a folder (`local-dir:`) or on the network (`hf-hub:`), or not find it.
    """
    if not isinstance(name, str) or set(name) & set(":/\\") or not timm.is_model(name):
        raise IntegrityError(
            f"the plain model is to be timm's {name!r}, expected one of timm.list_models(): a saved model names no "
            "folder and no address to get a model from. Pass base= an instance of the plain module"
        )
    return name


def example_input(model: nn.Module, options: Mapping[str, Any]) -> torch.Tensor:
    """Two images of the size that the model was made for."""
    size = getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
    channels, height, width = size
    channels = options.get("in_chans", channels)
    image = options.get("img_size")
    if image is not None:
        height, width = (image, image) if isinstance(image, int) else image
    x = torch.randn(2, channels, height, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return x.to(next(model.parameters()))


@register_source("timm", config=lambda source: {"architecture": PREFIX + source["name"]})
def _remake_timm(source: dict[str, Any]) -> nn.Module:
    return timm.create_model(check_name(source["name"]), pretrained=False, **without_files(source["options"]))
