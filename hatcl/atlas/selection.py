"""Select the blocks of many task vectors for which learning coefficients is worthwhile (Zhang et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import Batches, Head, again, one_pass, outputs
from ..config import one_of
from ..errors import ConfigError, VectorError
from ..vectors.bases import joined_kinds
from ..vectors.task_vector import Delta, TaskVector
from ..vectors.tensors import Lazy

WAYS = ("blocks", "vectors", "features", "random")


@dataclass(frozen=True)
class Selection:
    """The choice of `select_blocks`.

    Attributes:
        vectors: `budget` task vectors to compose: mixed from the best blocks, or whole ones.
        chosen: `[budget, J]`, the vector that each block comes from, best first. blocks: names of the J blocks.
        scores: `[T, J]`: `|d loss / d lambda_ij|` at 0; empty if they were not needed.
    """

    vectors: list[TaskVector]
    chosen: Tensor
    blocks: tuple[str, ...]
    scores: Tensor


def select_blocks(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    batches: Batches | None = None,
    budget: int = 1,
    *,
    by: str = "blocks",
    head: Head | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    centroids: Tensor | None = None,
    target: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """Keep the most informative of T task vectors, so that `budget` of them need memory while learning.

        mixed = hatcl.atlas.select_blocks(model, vectors, batches, budget=2).vectors
        composer = hatcl.compose(model, mixed)

    A block's information is `|d loss / d lambda_ij| = |<d loss / d theta_j, tau_ij>|` at lambda = 0, over all batches.
    The published way loads `budget` vectors at a time and passes over the data for each load. The gradient of theta
    does not depend on the vectors, so here the data is read once, and then one block of one vector is in memory at a
    time: the same numbers with less memory.

    Args:
        vectors: those of other tasks than the target; vectors from files are read block by block and stay in their
        files.
        batches: (inputs, labels) of the target task; for `blocks` and `vectors`.
        budget: the number of vectors to make. by: `blocks`: the best `budget` of each block across tasks, mixed;
            `vectors`: whole vectors by their mean over blocks; `features`: whole vectors whose task's `centroids` `[T,
            d]` (mean embeddings of the pretrained model) have the largest cosine with the `target`'s `[d]`; `random`:
            blocks at random, by `seed`.
        loss: the mean loss of logits and labels.

    Raises:
        ConfigError: `by` is unknown, the budget is above T, or a required argument is missing. VectorError: vectors
            lack blocks of others (except adapters', whose missing blocks count as zero).
    """
    one_of("by", by, WAYS)
    if not 1 <= budget <= len(vectors):
        raise ConfigError(f"budget: got {budget}, expected 1 to {len(vectors)}, the number of vectors")
    source = dict(model.named_parameters())
    blocks = tuple(n for n in source if any(n in v for v in vectors))
    if not blocks:
        raise VectorError("select_blocks: the vectors have none of the model's parameters")
    for name, kind in joined_kinds([(v.kinds, v.partial) for v in vectors]).items():
        if name in source and kind.shape != tuple(source[name].shape):
            raise VectorError(f"{name} is {list(kind.shape)} in the vectors, {list(source[name].shape)} in the model")
    scores = torch.zeros(0)
    if by in ("blocks", "vectors"):
        if batches is None:
            raise ConfigError(f"batches: missing; choosing by {by} needs examples of the target task")
        gradient = _loss_gradient(model, again(batches, "batches"), head, loss, blocks)
        scores = _block_scores(gradient, vectors, blocks)
    if by == "blocks":
        chosen = scores.argsort(dim=0, descending=True, stable=True)[:budget]
    elif by == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(len(vectors), len(blocks), generator=generator).argsort(0)[:budget]
    else:
        if by == "vectors":
            of_vectors = scores.mean(1)
        elif centroids is None or target is None or centroids.shape != (len(vectors), *target.shape):
            shapes = [None if x is None else list(x.shape) for x in (centroids, target)]
            raise ConfigError(
                f"features: centroids and target of shapes {shapes}; expected [{len(vectors)}, d] and [d]"
            )
        else:
            of_vectors = F.cosine_similarity(centroids, target[None], dim=-1)
        best = of_vectors.argsort(descending=True, stable=True)[:budget]
        return Selection([vectors[i] for i in best], best[:, None].expand(-1, len(blocks)), blocks, scores)
    return Selection(
        [mixed(vectors, dict(zip(blocks, row, strict=True))) for row in chosen.tolist()], chosen, blocks, scores
    )


def mixed(vectors: Sequence[TaskVector], origin: dict[str, int]) -> TaskVector:
    """A vector whose block j is that of vector `origin[j]`, read on demand."""
    kinds, base = {}, {}
    for name, i in origin.items():
        if name in vectors[i]:
            kinds[name] = vectors[i].kinds[name]
            of = vectors[i].base
            if of is not None and name in of:
                base[name] = of[name]

    def read(name: str) -> Delta:
        return vectors[origin[name]].delta(name)

    return TaskVector(Lazy(kinds, read), base if len(base) == len(kinds) else None, partial=True)


def _loss_gradient(
    model: nn.Module,
    batches: Batches,
    head: Head | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    blocks: tuple[str, ...],
) -> dict[str, Tensor]:
    """`d loss / d theta_j` summed over the batches' mean losses, in evaluation mode. The model is not changed."""
    work = copy.deepcopy(model).requires_grad_(False).eval()
    parameters = dict(work.named_parameters())
    for name in blocks:
        parameters[name].requires_grad_(True)
    for inputs, labels in one_pass(batches, "batches"):
        logits = outputs(work, inputs, head)
        loss(logits, labels.to(logits.device)).backward()
    return {n: g for n in blocks if (g := parameters[n].grad) is not None}


def _block_scores(gradient: dict[str, Tensor], vectors: Sequence[TaskVector], blocks: tuple[str, ...]) -> Tensor:
    out = torch.zeros(len(vectors), len(blocks), dtype=torch.float64)
    for i, v in enumerate(vectors):
        for j, name in enumerate(blocks):
            if name in v and name in gradient:
                g = gradient[name].double()
                out[i, j] = float((g * v[name].to(g)).sum().abs())
    return out
