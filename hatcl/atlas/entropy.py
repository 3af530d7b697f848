"""Entropy minimisation on norm parameters (TENT; Wang et al. 2021, arXiv 2006.10726), to compare `adapt` with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..calls import Batches, Head, again, outputs, split_batch
from ..errors import ConfigError, NonFiniteLossError

NORMS = (
    nn.modules.batchnorm._BatchNorm,  # also instance norms
    nn.LayerNorm,
    nn.GroupNorm,
)


def minimise_entropy(
    model: nn.Module, batches: Batches, *, head: Head | None = None, lr: float = 1e-3, epochs: int = 1
) -> nn.Module:
    """A copy of the model, adapted to unlabelled batches: Adam steps on the mean entropy of its predictions that change
    only the scales and shifts of norms. Batch norms normalise with the batch's own statistics, also afterwards.

    As published: one step per batch, lr 1e-3, no weight decay. Published for batch norms; layer, group and RMS norms
    count as well here, as is usual for transformers.

    Args:
        batches: inputs, or (inputs, labels), whose labels are ignored. epochs: passes over them.

    Raises:
        ConfigError: the model has no norm parameters. NonFiniteLossError: an entropy is not finite.
    """
    out = copy.deepcopy(model).requires_grad_(False)
    out.eval()
    parameters = norm_parameters(out)
    if not parameters:
        raise ConfigError("minimise_entropy: the model has no norms with scales and shifts to adapt")
    for module in out.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    for p in parameters.values():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr)
    for _ in range(epochs):
        for batch in again(batches, "batches"):
            loss = mean_entropy(outputs(out, split_batch(batch)[0], head))
            if not bool(torch.isfinite(loss)):
                raise NonFiniteLossError(f"minimise_entropy: the entropy is {float(loss.detach())}; lower lr ({lr:g})")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for p, was in zip(out.parameters(), model.parameters(), strict=True):
        p.requires_grad_(was.requires_grad)
        p.grad = None
    return out


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and shifts of norms, by name: torch's own norms, and modules whose class says Norm."""
    return {
        f"{name}.{key}" if name else key: p
        for name, module in model.named_modules()
        if isinstance(module, NORMS) or type(module).__name__.rstrip("0123456789d").endswith("Norm")
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 1
    }


def mean_entropy(logits: Tensor) -> Tensor:
    """`-mean_b sum_c p log p`."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
