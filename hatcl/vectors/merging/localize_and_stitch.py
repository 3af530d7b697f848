"""Localize-and-Stitch. He et al. 2025, arXiv 2408.13656."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method
from .ties import cut


@merge_method("localize_and_stitch", paper="He et al. 2025, arXiv 2408.13656")
def localize_and_stitch(vectors: Sequence[TaskVector], *, density: float = 0.05) -> TaskVector:
    """The share `density` of largest magnitude of each whole vector, averaged where several tasks have an element, and
    not shrunk where only one has it (eq. 4, the dataless version, with the masks of section 3.3):

        tau = sum_t m_t tau_t / max(sum_t m_t, 1)

    Needs no data. Each masked vector is a graft (`hatcl.select_graft(base, model, sparsity=density)`), and the result
    is their union with `overlap="mean"`. The paper's version with data takes the same union of learned grafts
    (`hatcl.learn_graft`, with its 1 % and an L1 penalty). The authors' code takes 0.05 for language models and 0.1 for
    vision ones, and keeps one element less.

    Raises:
        ConfigError: a density outside 0 to 1.
    """
    share = number("density", density, 0, 1)
    cuts = [cut(v, v.__getitem__, share) for v in vectors]

    def one(name: str, taus: list[Tensor]) -> Tensor:
        masks = [c.mask(name, tau) for c, tau in zip(cuts, taus, strict=True)]
        count = sum((m.int() for m in masks), torch.zeros((), dtype=torch.int32)).clamp(min=1)
        kept = [torch.where(m, tau, 0) for m, tau in zip(masks, taus, strict=True)]
        return weighted(kept, [1.0] * len(kept)) / count

    return blockwise(vectors, one)
