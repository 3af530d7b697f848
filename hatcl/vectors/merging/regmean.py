"""RegMean: match each layer's outputs on every task's inputs, in closed form. Jin et al. 2023, arXiv 2212.09849."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as tf

from ...calls import one_pass, split_batch
from ...config import number
from ...errors import VectorError
from ...lend import Evaluating
from ..task_vector import TaskVector
from .blocks import Forward, average, blockwise, own_logits, per_vector, weighted
from .registry import merge_method

log = logging.getLogger(__name__)
# eigenvalues (of a matrix with ones on its diagonal) below these are rounding errors of matrices that are kept in
# float32, or in float64; the inputs do not span these directions
ROUNDED, EXACT = 1e-5, 1e-10


@merge_method(
    "regmean",
    paper="Jin et al. 2023, arXiv 2212.09849",
    needs={
        "model": "the pretrained model that the vectors start from",
        "batches": "a list with the batches (no labels needed) of each vector's task",
    },
    instead="grams",
)
def regmean(
    vectors: Sequence[TaskVector],
    *,
    model: nn.Module | None = None,
    batches: Sequence[Iterable[Any]] | None = None,
    forward: Forward = own_logits,
    grams: Sequence[Mapping[str, Tensor]] | None = None,
    alpha: float = 0.9,
) -> TaskVector:
    """The linear layer that is nearest in least squares to each fine-tuned one on its own inputs, G_t = X_t' X_t:

        W = (sum_t W_t G_t) (sum_t G_t)^-1,   off-diagonals of G_t times alpha

    The base drops out of it: the same holds for the updates. Needs the pretrained model and some batches per task, or
    the matrices. Filters (`nn.Conv2d`) are linear layers of the patches they see. Everything else is averaged, as in
    the paper: biases, norms, embeddings, and weights that are not used by their own layer's forward (such as those of
    `nn.MultiheadAttention`); the log lists them by name.

    G_t is divided by the number of inputs, so that tasks count equally regardless of their number of batches. In
    directions that no task's inputs reach (a singular sum, possible only for alpha = 1 or an input that is always 0)
    the mean is taken.

    Args:
        model, batches, forward: see `input_grams`, which is run on each fine-tuned model. grams: the matrices, one
            mapping per vector, if they are known. alpha: the paper takes 0.9 (and 0.1 for T5-base).

    Raises:
        ConfigError: not one of these per vector, or alpha outside 0 to 1.
        VectorError: a matrix that others have is missing, or one of another shape or not finite.
    """
    off = number("alpha", alpha, 0, 1)
    if grams is None:
        tasks = per_vector("batches", batches, vectors, "iterable of batches")
        assert model is not None
        grams = [
            input_grams(v.apply_to(model), b, forward=forward, task=i)
            for i, (v, b) in enumerate(zip(vectors, tasks, strict=True))
        ]
    given = per_vector("grams", grams, vectors, "mapping")
    kinds = {n: k for v in vectors for n, k in v.kinds.items()}
    of = {n: checked_grams(n, kinds[n].shape, given) for n in kinds if any(n in g for g in given)}
    rest = [n for n in kinds if n not in of]
    log.info("regmean: %d tensors averaged, %d solved; averaged: %s", len(rest), len(of), ", ".join(rest))

    def one(name: str, taus: list[Tensor]) -> Tensor:
        return solved(taus, of[name], off) if name in of else average(taus)

    return blockwise(vectors, one)


def input_grams(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = own_logits,
    task: int = 0,
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`X' X / N` of the inputs of every linear layer and filter, by the name of its weight: `[groups, in, in]`, one
    group for linear layers. The model stays as it is; it is run in evaluation mode.

    Args:
        batches: inputs, `(inputs, labels)`, or mappings of keyword arguments. forward: `(model, inputs, task)`, to
            run another forward than the model's own. task: passed on to it. only: the names of these weights; None =
            all. In the order in which the layers are run.

    Raises:
        ConfigError: no batches.
    """
    layers = [(layer, name) for layer, name in _layers(model) if only is None or name in only]
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def seeing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = _inputs(layer, args[0].detach())
            g = x.transpose(1, 2) @ x
            sums[name] = sums[name] + g if name in sums else g
            rows[name] = rows.get(name, 0) + x.shape[1]

        return hook

    hooks = [layer.register_forward_pre_hook(seeing(name)) for layer, name in layers]
    try:
        with Evaluating(model), torch.no_grad():
            for batch in one_pass(batches, f"batches of task {task}"):
                forward(model, split_batch(batch)[0], task)
    finally:
        for h in hooks:
            h.remove()
    return {name: g / rows[name] for name, g in sums.items()}


def _layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Linear layers and filters whose weight no other kind of layer holds, and the name that stands for it."""
    first: dict[int, str] = {}
    others: set[int] = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(p), name)
    for m in model.modules():
        if not isinstance(m, (nn.Linear, nn.Conv2d)):
            others |= {id(p) for p in m.parameters(recurse=False)}
    found = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and id(m.weight) in first]
    return [(m, first[id(m.weight)]) for m in found if id(m.weight) not in others]


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs that a layer multiplies with its weight, `[groups, rows, in]`, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(layer, nn.Conv2d):
        return rearrange(x, "... i -> 1 (...) i")
    x = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = tf.pad(x, layer._reversed_padding_repeated_twice, mode)
    patches = tf.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return rearrange(patches, "n (groups i) places -> groups (n places) i", groups=layer.groups)


def checked_grams(name: str, shape: tuple[int, ...], grams: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The matrix of one weight from each vector's mapping. Raises `VectorError` where it is missing or does not fit."""
    width = math.prod(shape[1:])
    for i, given in enumerate(grams):
        if name not in given:
            raise VectorError(f"{name}: vector {i} has no matrix of its inputs, others have; was the layer not run?")
        g = given[name]
        if g.dim() != 3 or tuple(g.shape[1:]) != (width, width) or shape[0] % max(len(g), 1):
            raise VectorError(
                f"{name}: vector {i}'s matrix of inputs is {list(g.shape)}, expected [groups, {width}, {width}] for a "
                f"weight of {list(shape)}; take it from input_grams"
            )
        if not bool(torch.isfinite(g).all()):
            raise VectorError(f"{name}: vector {i}'s matrix of inputs is not finite; are there NaN in its batches?")
    return [given[name] for given in grams]


def _damped(g: Tensor, alpha: float) -> Tensor:
    """Off-diagonals times alpha."""
    return g * alpha + torch.diag_embed(g.diagonal(dim1=1, dim2=2)) * (1 - alpha)


def solved(taus: Sequence[Tensor], grams: Sequence[Tensor], alpha: float) -> Tensor:
    """`mean + (sum_t (tau_t - mean) G_t) (sum_t G_t)^+`: RegMean where the sum can be inverted, and the mean in
    directions that no input has."""
    noise = EXACT if all(g.dtype == torch.float64 for g in grams) else ROUNDED
    grams = [_damped(g.to(taus[0].device, torch.float64), alpha) for g in grams]
    groups = len(grams[0])
    middle = average(taus)
    rows = [rearrange(tau.double() - middle, "(groups o) ... -> groups o (...)", groups=groups) for tau in taus]
    right = weighted([r @ g for r, g in zip(rows, grams, strict=True)], [1.0] * len(rows))
    total = weighted(grams, [1.0] * len(grams))
    size = total.diagonal(dim1=1, dim2=2).sqrt()
    dead = size == 0  # an input that is always zero
    size = size.masked_fill(dead, 1).unsqueeze(1)
    # with ones on the diagonal its eigenvalues are at least 1 - alpha, whatever the inputs' sizes
    total = total / size / size.mT + torch.diag_embed(dead.double())
    if 1 - alpha > noise:
        solution = torch.cholesky_solve((right / size).mT, torch.linalg.cholesky(total)).mT / size
        return middle + solution.reshape(middle.shape)
    values, vectors = torch.linalg.eigh(total)
    out = torch.empty_like(right)
    for g in range(groups):
        seen = values[g] > noise
        inverse = vectors[g][:, seen] / values[g][seen] @ vectors[g][:, seen].T
        unseen = torch.linalg.qr(vectors[g][:, ~seen] / size[g].T).Q
        solution = (right[g] / size[g]) @ inverse / size[g]
        out[g] = solution - solution @ unseen @ unseen.T
    return middle + out.reshape(middle.shape)
