"""Fine-tuning on few examples in the modes of Panigrahi et al. 2023 (arXiv 2302.06600) and two more; grafts are found
in its runs.

    run = finetune_run(TaskOptions("prompt", "roberta-base", "sst-2.json.gz", k=16, words={"0": "terrible", ...}),
                       FinetuneOptions(max_steps=500), "runs/sst2")
"""

from ..data.images import k_shot_images
from ..data.texts import k_shot
from .loading import load_model, make_task, read_data
from .modes import (
    FinetuneMode,
    autoregressive_task,
    finetune_mode,
    head_task,
    image_task,
    labels_task,
    list_finetune_modes,
    mode_of,
    prompt_task,
)
from .options import FinetuneOptions, TaskOptions
from .prompts import PromptReader, Template, label_tokens
from .run import Run, finetune_run, load_run, save_run
from .tasks import FinetuneTask, TaskBatches
from .tune import finetune_, pull_, reached, trained_names

__all__ = [
    "FinetuneMode", "FinetuneOptions", "FinetuneTask", "PromptReader", "Run", "TaskBatches", "TaskOptions", "Template",
    "autoregressive_task", "finetune_", "finetune_mode", "finetune_run", "head_task", "image_task",
    "k_shot", "k_shot_images", "label_tokens", "labels_task", "list_finetune_modes", "load_model",
    "load_run", "make_task", "mode_of", "prompt_task", "pull_", "reached", "read_data", "save_run", "trained_names",
]  # fmt: skip
