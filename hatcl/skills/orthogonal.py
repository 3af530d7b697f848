"""TaSL's orthogonality regulariser: it keeps the pairs of an adapter from learning the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import SkillError
from .product import factor_pairs
from .tensors import adapters_of, skill_tensors


def orthogonality(model: nn.Module, adapter: str | None = None, squared: bool = False) -> Tensor:
    """The mean over all factors of an adapter of

        || A A^T - I ||_F  for A [r, in]      || B^T B - I ||_F  for B [out, r]

    as in TaSL's code (Feng et al. 2024, arXiv 2408.05200; AdaLoRA, arXiv 2303.10512, has it for its SVD layers). It is
    zero where the rows of every A and the columns of every B are orthonormal. TaSL adds it to the loss with weight 0.1:

        loss = task_loss + 0.1 * orthogonality(model)

    At B = 0, where LoRA starts, its gradient in B is zero, so it does not move B before the task does. Not in TaSL's
    code: embeddings and convolutions (a kernel is flattened into `in`), the choice of one adapter if a model holds
    several, and float32 if the factors are stored or multiplied in fewer bits.

    Args:
        adapter: its name; default: the active one. squared: use squared norms, whose gradient vanishes towards the
            minimum, while that of the norm keeps its size.

    Returns:
        A scalar with a graph to the factors.

    Raises:
        SkillError: the model has no LoRA adapter, or not this one.
    """
    if not adapters_of(model):
        raise SkillError(
            f"{type(model).__name__} has no LoRA adapter, but orthogonality needs its factors A and B; leave the "
            "regulariser out in full fine-tuning"
        )
    tensors = skill_tensors(model, adapter)
    norms = []
    for a, b in factor_pairs(tensors):
        norms += [_off_identity(tensors[a].flatten(1), squared), _off_identity(tensors[b].flatten(1).T, squared)]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).mean()


def _off_identity(rows: Tensor, squared: bool) -> Tensor:
    """`|| X X^T - I ||_F` of X [r, d]."""
    with torch.autocast(rows.device.type, enabled=False):  # autocast would multiply in half precision
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        off = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        return off.square().sum() if squared else torch.linalg.vector_norm(off)
