"""Use a model for a while and return it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn


class Evaluating:
    """Puts a model into evaluation mode inside the block, then each module back into its former mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes: Sequence[tuple[nn.Module, bool]] = [(m, m.training) for m in model.modules()]

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode


@contextlib.contextmanager
def lent(model: nn.Module, trained: Collection[nn.Parameter], moved: Collection[Tensor] = ()) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode, only `trained` require gradients, and no gradient is set.
    Afterwards gradients, modes and `requires_grad` are as before, and so are buffers except those in `moved`.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    own, moving = {id(p) for p in trained}, {id(b) for b in moved}
    buffers = [
        (m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items()
        if b is not None and id(b) not in moving
    ]  # fmt: skip
    try:
        with Evaluating(model):
            for p, _, _ in parameters:
                p.grad = None
                p.requires_grad_(id(p) in own)
            yield
    finally:
        for p, required, grad in parameters:
            p.requires_grad_(required)
            p.grad = grad
        with torch.no_grad():
            for module, name, b, was in buffers:
                b.copy_(was)
                module._buffers[name] = b
