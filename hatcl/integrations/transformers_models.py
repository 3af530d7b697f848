"""Models of transformers: saved with their config, so that `hatcl.from_pretrained` makes them again by itself."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..registry import register_source


def _recognise(model: nn.Module) -> dict[str, Any] | None:
    cls = type(model)
    if not cls.__module__.startswith("transformers.models."):
        return None
    config: Any = model.config
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": config._attn_implementation,  # not part of the JSON, and others differ in the last bits
    }


@register_source("transformers", _recognise)
def _remake(source: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, source["class"])
    config = cls.config_class.from_dict(source["config"])
    config._attn_implementation = source["attention"]
    made: nn.Module = cls(config)
    return made
