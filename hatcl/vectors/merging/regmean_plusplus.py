"""RegMean++: RegMean with the inputs of the merged model. Nguyen et al. 2025, arXiv 2508.03121."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...calls import again
from ...config import number
from ..task_vector import TaskVector
from ..tensors import named_tensors
from .blocks import Forward, average, blockwise, own_logits, per_vector
from .registry import merge_method
from .regmean import checked_grams, input_grams, solved

log = logging.getLogger(__name__)


@merge_method(
    "regmean_plusplus",
    paper="Nguyen et al. 2025, arXiv 2508.03121",
    needs={
        "model": "the pretrained model that the vectors start from",
        "batches": "a list with the batches (no labels needed) of each vector's task",
    },
)
def regmean_plusplus(
    vectors: Sequence[TaskVector],
    *,
    model: nn.Module,
    batches: Sequence[Iterable[Any]],
    forward: Forward = own_logits,
    alpha: float = 0.9,
) -> TaskVector:
    """`regmean`, block after block: a block is merged with the inputs that each task's own block sees when all earlier
    blocks are the merged ones (3.2), so that the inputs are those of the resulting model:

        X_t = what a layer of task t's block l sees behind the merged blocks 1 ... l-1,   G_t = X_t' X_t / N
        W = (sum_t W_t G_t) (sum_t G_t)^-1

    Needs the pretrained model and some batches per task, which are iterated once per block: lists, not generators.
    Everything that `regmean` averages is averaged here too, and is in the merged model before the blocks are run
    (embeddings), or with its block.

    A block is named by the innermost number in a path (`encoder.layer.3`, `blocks.0`, `layer1.0`); a layer without a
    number is its own block. They are taken in the order in which the model runs them.

    Args:
        model, batches, forward: as in `regmean`. alpha: the paper takes 0.95 for ViT-B/32 and L/14.

    Raises:
        ConfigError: not one of these per vector, or alpha outside 0 to 1. VectorError: a layer that some tasks' batches
            do not reach, or inputs that are not finite.
    """
    off = number("alpha", alpha, 0, 1)
    tasks = [
        again(b, f"batches of task {i}")
        for i, b in enumerate(per_vector("batches", batches, vectors, "iterable of batches"))
    ]
    mean = blockwise(vectors, lambda _, taus: average(taus))
    merged, own = mean.apply_to(model), [v.in_memory() for v in vectors]
    found: dict[str, Tensor] = {}
    kinds = mean.kinds
    base, shown = named_tensors(model), named_tensors(merged)
    blocks = _blocks_as_run(merged, tasks, forward)
    rest = [n for n in mean if n not in {n for names in blocks.values() for n in names}]
    log.info("regmean_plusplus: %d blocks solved; averaged: %s", len(blocks), ", ".join(rest))
    for block, names in blocks.items():
        inside = [n for n in mean if block_of(n) == block]
        grams = []
        for task, vector in enumerate(own):
            _show(shown, {n: base[n] + vector[n] for n in inside if n in vector})
            grams.append(input_grams(merged, tasks[task], forward=forward, task=task, only=names))
        for name in (n for n in names if n in kinds):
            taus = [v[name] if name in v else torch.zeros(kinds[name].shape) for v in own]
            found[name] = solved(taus, checked_grams(name, kinds[name].shape, grams), off)
        _show(shown, {n: base[n] + (found[n] if n in found else mean[n]) for n in inside})
    return blockwise(vectors, lambda name, taus: found[name] if name in found else average(taus))


def _blocks_as_run(model: nn.Module, tasks: Sequence[Iterable[Any]], forward: Forward) -> dict[str, list[str]]:
    """Block -> the weights of its linear layers and filters, in the order in which a model runs them on the first batch
    of each task."""
    out: dict[str, list[str]] = {}
    for task, batches in enumerate(tasks):
        for name in input_grams(model, itertools.islice(batches, 1), forward=forward, task=task):
            names = out.setdefault(block_of(name), [])
            if name not in names:
                names.append(name)
    return out


def block_of(name: str) -> str:
    """The block of a tensor, by its name: up to the last number in it, else its own layer."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts[:-1])


@torch.no_grad()
def _show(tensors: Any, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
