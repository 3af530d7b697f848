"""Rooms in which other libraries are met."""

from . import peft_models, timm_names, transformers_models

__all__ = ["peft_models", "timm_names", "transformers_models"]
