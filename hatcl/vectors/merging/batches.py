"""Batches in the forms that loaders give them, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

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
