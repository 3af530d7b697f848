"""Models of transformers: saved with their config, so that `hatcl.from_pretrained` can rebuild them by itself."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import IntegrityError
from ..sources import register_source
from .timm_names import check_name, without_files

log = logging.getLogger(__name__)
# options that make transformers run code from elsewhere, or look for weights or kernels there
UNTRUSTED = {
    "_name_or_path", "name_or_path", "auto_map", "trust_remote_code", "quantization_config", "use_kernels",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "use_pretrained_backbone", "use_timm_backbone",
    "backbone_kwargs",
}  # fmt: skip
NUMBERS_NOT_SIZES = (
    "heads",
    "layers",
    "vocab",
    "position",
    "token",
    "length",
    "labels",
)  # numbers in a config that are not sizes
TRIED_CONFIGS = 64
ATTENTION = (None, "eager", "sdpa", "flex_attention")  # torch's own; others may be kernels on a hub
PASS_BASE = "pass base= an instance of the plain module"


def _recognise(model: nn.Module) -> dict[str, Any] | None:
    cls, library = type(model), sys.modules.get("transformers")
    config: Any = getattr(model, "config", None)
    if library is None or config is None or getattr(library, cls.__name__, None) is not cls:
        return None
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": config._attn_implementation,  # not part of the JSON; other kernels differ in the last bits
    }


def _fit_config(source: dict[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """The config with changed sizes that gives a model of these shapes: numbers that equal a size, or a size per head,
    are replaced by the new size and tried."""
    want = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    config = source["config"]
    whole = _shapes_of(source)
    if whole.keys() != want.keys():
        return None
    now: dict[int, set[int]] = {}
    for name, shape in whole.items():
        for a, b in zip(shape, want[name], strict=False):
            now.setdefault(a, set()).add(b)
    heads = {v for k, v in config.items() if type(v) is int and "heads" in k and v > 0}
    options: dict[str, list[int]] = {}
    for key, v in config.items():
        if type(v) is int and v > 1 and not any(part in key for part in NUMBERS_NOT_SIZES):
            per_head = {b // h for h in heads for b in now.get(v * h, ()) if b % h == 0}
            found = sorted((now.get(v, set()) | per_head) - {v}) + [v]
            if len(found) > 1:
                options[key] = found
    for choice in itertools.islice(itertools.product(*options.values()), TRIED_CONFIGS):
        fitted = {**source, "config": {**config, **dict(zip(options, choice, strict=True))}}
        try:
            if _shapes_of(fitted) == want:
                return fitted
        except Exception as error:
            log.debug("%s is no config of %s: %s", choice, source["class"], error)
    return None


def _shapes_of(source: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in _remake_transformers(source).state_dict().items()}


def _as_transformers_has_it(source: dict[str, Any]) -> dict[str, Any]:
    return {**source["config"], "architectures": [source["class"]]}


@register_source("transformers", _recognise, _fit_config, _as_transformers_has_it)
def _remake_transformers(source: dict[str, Any]) -> nn.Module:
    cls, attention = _model_class(source["class"]), source["attention"]
    if attention not in ATTENTION:
        raise IntegrityError(
            f"the plain model is to compute its attention by {attention!r}, expected one of "
            f"{', '.join(map(repr, ATTENTION))}: transformers would get another one from a hub where it is not "
            f"installed; {PASS_BASE}"
        )
    with tempfile.TemporaryDirectory() as folder:  # special values (infinity) are only read back from a file
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(_without_files(source["config"])))
        config = cls.config_class.from_json_file(path)
    config._attn_implementation = attention
    made: nn.Module = cls(config)
    return made


def _model_class(name: object) -> Any:
    import transformers

    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    of_theirs = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not of_theirs or getattr(cls, "config_class", None) is None:
        raise IntegrityError(f"the plain model is to be transformers' {name!r}, which is no model of it; {PASS_BASE}")
    return cls


def _without_files(config: Any) -> Any:
    """A config, and those inside of it, without what makes transformers open files, run code or reach the network."""
    if isinstance(config, list):
        return [_without_files(x) for x in config]
    if not isinstance(config, dict):
        return config
    kept = {k: _without_files(v) for k, v in config.items() if k not in UNTRUSTED}
    if isinstance(kept.get("architecture"), str):
        check_name(kept["architecture"])
    if isinstance(kept.get("model_args"), dict):
        kept["model_args"] = without_files(kept["model_args"])
    if isinstance(kept.get("backbone"), str):
        if kept.get("model_type") != "timm_backbone":
            raise IntegrityError(
                f"the plain model is to have the backbone {kept['backbone']!r}, which transformers would look for on a "
                f"hub; {PASS_BASE}"
            )
        check_name(kept["backbone"])
    return kept
