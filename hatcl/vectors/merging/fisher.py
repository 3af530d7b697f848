"""Fisher-weighted averaging. Matena and Raffel 2022, arXiv 2111.09832."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ...calls import one_by_one, one_pass, split_batch
from ...config import number, one_of, whole
from ...errors import ConfigError, VectorError
from ..task_vector import TaskVector
from ..tensors import check_fit, kinds_of, pick
from .blocks import Forward, average, blockwise, own_logits, per_vector, weighted
from .registry import merge_method

LABELS = ("expected", "sampled", "given")


@merge_method(
    "fisher",
    paper="Matena and Raffel 2022, arXiv 2111.09832",
    needs={
        "model": "the pretrained model that the vectors start from",
        "batches": "a list with the batches of each vector's task",
    },
    instead="fishers",
)
def fisher(
    vectors: Sequence[TaskVector],
    *,
    model: nn.Module | None = None,
    batches: Sequence[Iterable[Any]] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    forward: Forward = own_logits,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    weights: Sequence[float] | None = None,
    normalise: bool = True,
    floor: float = 1e-6,
) -> TaskVector:
    """`theta = sum_t w_t F_t theta_t / sum_t w_t F_t`, F the diagonal of the Fisher information of each fine-tuned
    model. The base drops out of it: `tau = sum_t w_t F_t tau_t / sum_t w_t F_t`.

    Needs the pretrained model and some batches per task (labels only with `labels="given"`), or the diagonals.
    Tensors without a diagonal (buffers) are averaged.

    Args:
        model, batches, labels, seed, forward: see `diagonal_fisher`, which is run on each fine-tuned model.
        fishers: the diagonals, one mapping per vector, if they are known. weights: w, default 1 each.
        normalise: divide each diagonal by its norm over all tensors first, so that no task counts more because its
            model is less confident (as in the authors' code). floor: the least value of a diagonal's element; where all
            are below it, the result is the mean.

    The authors' code (github mmatena/model_merging) takes the exact expectation over the classes (`labels="expected"`)
    on 4096 examples, leaves heads out, and chooses the weights on a validation set: 51 points for two models, drawn
    from a Dirichlet distribution for more. It applies the same floor before normalising, where it depends on the size
    of the gradients, and by default only to the first model, whose weights then win where all diagonals are below it.

    Raises:
        ConfigError: not one of these per vector, weights that are not positive, or a floor that is not.
        VectorError: a diagonal that lacks a tensor that others have, has another shape, is negative or not finite.
    """
    least = number("floor", floor, 0)
    each = per_vector("weights", weights, vectors, "weight") if weights is not None else [1.0] * len(vectors)
    each = [number("weights", w, 0) for w in each]
    if not sum(each) or not least:
        option, value = ("floor", floor) if not least else ("weights", weights)
        raise ConfigError(f"{option}: got {value!r}, expected more than 0")
    if fishers is None:
        tasks = per_vector("batches", batches, vectors, "iterable of batches")
        assert model is not None
        fishers = [
            diagonal_fisher(v.apply_to(model), b, labels=labels, seed=seed, forward=forward, task=i)
            for i, (v, b) in enumerate(zip(vectors, tasks, strict=True))
        ]
    diagonals = [_fitting(f, vectors, i) for i, f in enumerate(per_vector("fishers", fishers, vectors, "diagonal"))]
    for i, d in enumerate(diagonals[1:], start=1):
        check_fit(diagonals[0], d, ("diagonal 0", f"diagonal {i}"))
    norms = [_diagonal_norm(d, i) for i, d in enumerate(diagonals)]
    factors = [1 / n if normalise and n else 1.0 for n in norms]

    def one(name: str, taus: list[Tensor]) -> Tensor:
        if name not in diagonals[0]:
            return average(taus)
        scores = [
            w * (d[name].to(tau.device).double() * f).clamp_(min=least)
            for w, d, f, tau in zip(each, diagonals, factors, taus, strict=True)
        ]
        return weighted(taus, scores) / weighted(scores, [1.0] * len(scores))

    return blockwise(vectors, one)


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: str = "sampled",
    seed: int = 0,
    forward: Forward = own_logits,
    task: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of a model's Fisher information, `[name]` of the parameter's shape:

        F = 1/N sum_x E_{y ~ p(y | x)} (d log p(y | x) / d theta)^2

    One backward pass per example (per example and class with `expected`): squaring a batch's gradient would be
    something else. The model is run in evaluation mode and not changed.

    Args:
        batches: inputs, `(inputs, labels)`, or mappings of keyword arguments. labels: `expected` takes the expectation
            over all classes (the authors' code, exact, a backward pass per class), `sampled` draws one class per
            example from the model (unbiased), `given` takes the batches' labels (the "empirical Fisher").
        seed: of the draws. forward: `(model, inputs, task) -> logits [N, C]`. task: passed on to it.

    Raises:
        ConfigError: an unknown way, no batches, no labels where they are needed, or logits that are not `[N, C]`.
    """
    one_of("labels", labels, LABELS)
    whole("seed", seed, 0)
    model = copy.deepcopy(model).eval().requires_grad_(True)
    named = {n: p for n, p in model.named_parameters() if p.dtype.is_floating_point}
    params = list(named.values())
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    generator, seen = torch.Generator().manual_seed(seed), 0
    with torch.inference_mode(False), torch.enable_grad():
        for batch in one_pass(batches, f"batches of task {task}"):
            inputs, given = split_batch(batch)
            if labels == "given" and (not isinstance(given, Tensor) or given.dim() != 1):
                what = (
                    type(given).__name__ if not isinstance(given, Tensor) else f"a tensor of shape {list(given.shape)}"
                )
                raise ConfigError(
                    f"batches: labels='given' needs (inputs, labels), one class per example, got {what} for labels; "
                    "take labels='sampled' without them"
                )
            for i, x in enumerate(one_by_one(inputs)):
                out = forward(model, x, task)
                if out.dim() != 2 or len(out) != 1:
                    raise ConfigError(f"forward: gives {list(out.shape)} for one example, expected logits [1, classes]")
                log_p = tf.log_softmax(out.float(), -1)[0]
                for y, share in _targets(labels, log_p, given[i] if labels == "given" else None, generator):
                    grads = torch.autograd.grad(log_p[y], params, retain_graph=labels == "expected", allow_unused=True)
                    for total, g in zip(sums, grads, strict=True):
                        if g is not None:
                            total.addcmul_(g.to(total), g.to(total), value=share)
                seen += 1
    return {n: total / seen for n, total in zip(named, sums, strict=True)}


def _targets(labels: str, log_p: Tensor, given: Any, generator: torch.Generator) -> list[tuple[int, float]]:
    """Classes and their weights."""
    if labels == "given":
        if not 0 <= int(given) < len(log_p):
            raise ConfigError(f"batches: got class {int(given)}, the model has {len(log_p)}, from 0")
        return [(int(given), 1.0)]
    p = log_p.detach().exp().cpu()
    if labels == "expected":
        return list(enumerate(p.tolist()))
    return [(int(torch.multinomial(p, 1, generator=generator)), 1.0)]


def _fitting(diagonal: Any, vectors: Sequence[TaskVector], i: int) -> Mapping[str, Tensor]:
    """The diagonal's tensors that the vectors have."""
    if not isinstance(diagonal, Mapping):
        raise ConfigError(
            f"fishers: diagonal {i} is a {type(diagonal).__name__}, expected a mapping of tensors by name"
        )
    kinds = {n: k for v in vectors for n, k in v.kinds.items()}
    mine = pick(diagonal, [n for n in kinds if n in diagonal])
    if not len(mine):
        raise VectorError(f"diagonal {i} has none of the vectors' tensors; they start with {next(iter(kinds))}")
    for name, k in kinds_of(mine).items():
        if k.shape != kinds[name].shape:
            raise VectorError(f"{name}: diagonal {i} is {list(k.shape)}, the vectors have {list(kinds[name].shape)}")
    return mine


def _diagonal_norm(diagonal: Mapping[str, Tensor], i: int) -> float:
    total = []
    for name, x in diagonal.items():
        if not bool(torch.isfinite(x).all()) or bool((x < 0).any()):
            raise VectorError(
                f"{name}: diagonal {i} has elements that are negative or not finite; they are mean squares"
            )
        total.append(float(x.double().square().sum()))
    return math.sqrt(math.fsum(total))
