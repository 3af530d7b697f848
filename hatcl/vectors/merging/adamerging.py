"""AdaMerging. Yang et al. 2024, arXiv 2310.02575."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...calls import endless, split_batch
from ...config import number, whole
from ...errors import ConfigError
from ..compose import Composer
from ..task_vector import TaskVector
from .blocks import Forward, aligned, average, blockwise, own_logits, per_vector, weighted
from .registry import merge_method

LEARNED_GRAINS = ("block", "global")


@merge_method(
    "adamerging",
    paper="Yang et al. 2024, arXiv 2310.02575",
    needs={
        "model": "the pretrained model that the vectors start from",
        "batches": "a list with the batches (no labels needed) of each vector's task",
    },
)
def adamerging(
    vectors: Sequence[TaskVector],
    *,
    model: nn.Module,
    batches: Sequence[Iterable[Any]],
    grain: str = "block",
    start: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    forward: Forward = own_logits,
) -> TaskVector:
    """`tau_l = sum_t lambda_tl tau_tl`, with the coefficients that make the merged model most confident on unlabelled
    test inputs:

        min over lambda of  sum_t  mean_{x of task t} H(p(y | x))

    by Adam, from 0.3, one batch of each task per step, in the order given. Needs the pretrained model and batches per
    task; labels in them are ignored.

    In the authors' code (github EnnengYang/AdaMerging, main_layer_wise_adamerging.py) a layer is a tensor as well. A
    step there has two batches of 16 of each task, drawn again: pass shuffled batches of 32 for the same. It clamps the
    coefficients that the model sees to 0 to 1 while the parameter moves further, and no gradient brings it back; here
    the coefficients themselves are clamped to 0 to 1 and can return.

    The model runs in evaluation mode: norms with running statistics use the base's. Such buffers in the vectors are
    averaged. Vectors are read into memory for the search.

    Args:
        grain: `block` (layer-wise) or `global` (one coefficient per task: task-wise). start: the first coefficients.
        steps, lr: the authors', with Adam's own betas and no weight decay. forward: `(model, inputs, task) -> logits
            [..., C]`, for instance with the task's own head.

    Raises:
        ConfigError: there is not one entry per vector, the grain is another one, or a value is outside its range.
            VectorError, IntegrityError: the vectors do not belong to this model.
    """
    if grain not in LEARNED_GRAINS:
        raise ConfigError(f"grain: got {grain!r}, expected {' or '.join(LEARNED_GRAINS)}; hatcl.compose has the others")
    first, rate, steps = number("start", start, 0, 1), number("lr", lr, 0), whole("steps", steps, 0)
    tasks = [
        endless(b, f"batches of task {i}")
        for i, b in enumerate(per_vector("batches", batches, vectors, "iterable of batches"))
    ]
    in_place = [v._map(lambda _, d: d._replace(value=aligned(d.value))) for v in vectors]
    composer = Composer(model, in_place, grain).eval()
    lam = composer.coefficients
    lam.data.fill_(first)
    optimizer = torch.optim.Adam([lam], lr=rate)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            for t, loader in enumerate(tasks):
                entropy(forward(composer, split_batch(next(loader))[0], t)).backward()
            optimizer.step()
            lam.data.clamp_(0, 1)
    column = {name: i if grain == "block" else 0 for i, name in enumerate(composer.grain.shapes)}
    found = lam.detach().cpu()

    def one(name: str, taus: list[Tensor]) -> Tensor:
        return weighted(taus, found[:, column[name]].tolist()) if name in column else average(taus)

    return blockwise(vectors, one)


def entropy(logits: Tensor) -> Tensor:
    """`-sum_y p log p` of softmax, averaged over all but the last dimension."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
