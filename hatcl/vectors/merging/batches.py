"""Batches in the forms that loaders give them, and what a model makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError

Forward = Callable[[Any, Any, int], Tensor]


def split(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch: `(inputs, labels)`, inputs alone, or a mapping of keyword arguments, of which
    `labels` are the labels."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ConfigError("batches: got an empty batch, expected inputs or (inputs, labels)")
        return batch[0], (batch[1] if len(batch) > 1 else None)
    return batch, None


def logits(model: Any, inputs: Any, task: int = 0) -> Tensor:
    """What a model says to inputs; of an output that is no tensor, its `logits`."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        raise ConfigError(
            f"the model gives a {type(out).__name__}, expected logits; pass forward=lambda model, inputs, task: ..."
        )
    return out


def examples(inputs: Any) -> Iterator[Any]:
    """The examples of a batch's inputs one by one, each as a batch of one."""
    if isinstance(inputs, Tensor):
        yield from inputs.split(1)
    else:
        for i in range(len(next(iter(inputs.values())))):
            yield {k: v[i : i + 1] for k, v in inputs.items()}


def again(batches: Iterable[Any], task: int) -> Iterator[Any]:
    """Batches without end.

    Raises:
        ConfigError: there are none, or they cannot be read a second time.
    """
    rounds = 0
    while True:
        seen = 0
        for batch in batches:
            seen += 1
            yield batch
        if not seen:
            why = "can be read only once" if rounds else "are none"
            raise ConfigError(f"batches: those of task {task} {why}; pass a list or a DataLoader with batches in it")
        rounds += 1


class Evaluating:
    """A model in evaluation mode for a while, and after that each module in the mode it was in."""

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
    """A model to train for a while: inside it is in evaluation mode, only `trained` require gradients, and none has one
    yet. After it gradients, modes and what requires gradients are as before, and buffers too, but for those in `moved`.
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
