"""Adapters for other libraries."""

from . import peft_models, timm_names, transformers_models

__all__ = ["peft_models", "timm_names", "transformers_models"]
