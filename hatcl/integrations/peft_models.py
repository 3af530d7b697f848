"""Models with a LoRA adapter of peft: saved with its config, so that `hatcl.from_pretrained` can rebuild them."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from typing import Any

from torch import nn

from ..errors import IntegrityError
from ..sources import build_source, library_config, register_source, source_of

# options that read weights or data to start an adapter from, or name a place of such files
UNTRUSTED_LORA = {
    "auto_mapping", "base_model_name_or_path", "revision", "init_lora_weights", "loftq_config", "eva_config",
    "runtime_config",
}  # fmt: skip


def _recognise_lora(model: nn.Module) -> dict[str, Any] | None:
    library = sys.modules.get("peft")
    if library is None or not isinstance(model, library.PeftModel):
        return None
    if len(model.peft_config) != 1 or not isinstance(model.active_peft_config, library.LoraConfig):
        return None
    base = source_of(model.get_base_model())
    if base is None:
        return None
    stored = {k: v for k, v in model.active_peft_config.to_dict().items() if k not in UNTRUSTED_LORA}
    config = json.loads(json.dumps(stored, default=sorted))  # sets of names
    return {"base": base, "adapter": model.active_adapter, "config": config}


@register_source("peft", _recognise_lora, config=lambda source: library_config(source["base"]))
def _remake_lora(source: dict[str, Any]) -> nn.Module:
    import peft

    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)} - UNTRUSTED_LORA
    given = {k: v for k, v in source["config"].items() if k in fields}
    if given.pop("peft_type", None) != "LORA":
        raise IntegrityError("the adapter is not a LORA adapter; pass base= an instance of the plain module")
    return with_lora(build_source(source["base"]), peft.LoraConfig(**given), source["adapter"])


def with_lora(base: nn.Module, lora: Any, name: str = "default") -> Any:
    """peft's model of a base with an adapter, without the warning that peft itself triggers in transformers."""
    import peft

    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(base, lora, name)
