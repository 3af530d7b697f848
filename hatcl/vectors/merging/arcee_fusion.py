"""Arcee Fusion: the important changes of one fine-tuning. mergekit (Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError, VectorError
from ..delta import Delta, restore
from ..task_vector import TaskVector
from ..tensors import TensorSource, named_tensors
from .blocks import aligned
from .registry import merge_method

EPSILON = 1e-8  # added to probabilities (mergekit's)


@merge_method(
    "arcee_fusion",
    paper="mergekit; Goddard et al. 2024, arXiv 2403.13257",
    needs={"pretrained": "the pretrained model that the vector starts from, as a module, a state dict or a path"},
)
def arcee_fusion(vectors: Sequence[TaskVector], *, pretrained: TensorSource) -> TaskVector:
    """Keep the changes of a tensor's elements whose importance reaches a threshold; the others become zero:

        importance = |tau| KL(softmax(theta + tau) || softmax(theta)),   threshold = median + 1.5 (q3 - q1)

    with the softmax along the last dimension and the quartiles (the lower of two elements) of the whole tensor. Needs
    the pretrained weights. In float32, as in mergekit; for small changes the divergence is mostly rounding. mergekit
    estimates the quartiles of more than a million elements from a random sample; here they are exact.

    Raises:
        ConfigError: there is more than one vector. VectorError: the pretrained model lacks a tensor.
    """
    if len(vectors) != 1:
        raise ConfigError(f"arcee_fusion: got {len(vectors)} vectors, expected 1; merge the others first")
    start = named_tensors(pretrained)
    lacking = next((n for n, k in vectors[0].kinds.items() if n not in start or start[n].shape != k.shape), None)
    if lacking is not None:
        raise VectorError(f"pretrained: it has no {lacking} of the vector's shape; pass the vector's own base")

    def one(name: str, delta: Delta) -> Delta:
        if not delta.value.numel():
            return delta
        kind = torch.promote_types(delta.value.dtype, torch.float32)
        before = aligned(start[name].to(delta.value.device, kind))
        after = restore(before, delta, kind)
        p, q = (torch.softmax(x, -1) + EPSILON for x in (after, before))
        importance = (after - before).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
        low, middle, high = (_lower_quantile(importance, quarters) for quarters in (1, 2, 3))
        return delta.where(importance >= middle + 1.5 * (high - low))

    return vectors[0]._map(one)


def _lower_quantile(x: Tensor, quarters: int) -> Tensor:
    return x.flatten().kthvalue(quarters * (x.numel() - 1) // 4 + 1).values
