"""New linear heads: random by a seed, or fitted on a pretrained model's features."""

from __future__ import annotations

import torch
from torch import nn

from ..atlas.heads import trained_head
from ..errors import ConfigError
from .tasks import FinetuneTask


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    """A head with torch's own initialisation from a seed; the global generator is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes)


@torch.no_grad()
def fit_head(task: FinetuneTask, path: str) -> None:
    """Fit the linear module at `path` of the task's model on the features of the training examples, by logistic
    regression (`hatcl.atlas.trained_head`), which gives the same result every time.

    Raises:
        ConfigError: the module is not an `nn.Linear`.
    """
    model = task.model
    head = linear_at(model, path)
    owner, _, leaf = path.rpartition(".")
    parent = model.get_submodule(owner)
    setattr(parent, leaf, nn.Identity())
    try:
        fitted = trained_head(model, task.batches("train", 64), len(task.labels))
    finally:
        setattr(parent, leaf, head)
    head.weight.copy_(fitted.get_buffer("weight"))
    if head.bias is not None:
        head.bias.copy_(fitted.get_buffer("bias"))


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear module at a path. Raises `ConfigError` if there is none."""
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.Linear):
        raise ConfigError(
            f"classifier: {path!r} of {type(model).__name__} is {type(found).__name__}, expected the nn.Linear that "
            "computes the logits; name it"
        )
    return found
