"""Modes of fine-tuning: one file per mode. `make_task` finds them by name."""

from . import autoregressive, finetune, image, labels, prompt
from .autoregressive import autoregressive_task
from .finetune import head_task
from .image import image_task
from .labels import labels_task
from .prompt import prompt_task
from .registry import FinetuneMode, finetune_mode, list_finetune_modes, mode_for, mode_of

__all__ = [
    "FinetuneMode", "autoregressive", "autoregressive_task", "finetune", "finetune_mode", "head_task", "image",
    "image_task", "labels", "labels_task", "list_finetune_modes", "mode_for", "mode_of", "prompt", "prompt_task",
]  # fmt: skip
