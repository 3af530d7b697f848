"""Rooms in which other libraries are met."""

from . import timm_names, transformers_models

__all__ = ["timm_names", "transformers_models"]
