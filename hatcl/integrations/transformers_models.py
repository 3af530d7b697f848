"""Models of transformers: saved with their config, so that `hatcl.from_pretrained` makes them again by itself."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..registry import register_source


def _recognise(model: nn.Module) -> dict[str, Any] | None:
    cls, library = type(model), sys.modules.get("transformers")
    config: Any = getattr(model, "config", None)
    if library is None or config is None or getattr(library, cls.__name__, None) is not cls:
        return None
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": config._attn_implementation,  # not part of the JSON, and others differ in the last bits
    }


@register_source("transformers", _recognise)
def _remake(source: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, source["class"])
    with tempfile.TemporaryDirectory() as folder:  # only from a file are special values (infinity) read back
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(source["config"]))
        config = cls.config_class.from_json_file(path)
    config._attn_implementation = source["attention"]
    made: nn.Module = cls(config)
    return made
