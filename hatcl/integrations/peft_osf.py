"""peft's Orthogonal Subspace Fine-tuning (OSF) in the linear layers of a model, inserted for a task and then merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "osf"


def split_weights(model: nn.Module, names: Sequence[str], preserved: float) -> None:
    """Replace these linear layers by OSF's, in place: `W = U_high S_high V_high + U_low S_low V_low` by singular
    values; only the low part is trained.

    Args:
        preserved: the share of the singular values in the high part; in each layer at least one and not all.
    """
    import peft

    sizes = {name: min(model.get_submodule(name).weight.shape) for name in names}  # type: ignore[arg-type]
    ranks = {f"^{re.escape(n)}$": min(max(round(preserved * size), 1), size - 1) for n, size in sizes.items()}
    config = peft.OSFConfig(target_modules=list(names), rank_pattern=ranks)
    peft.inject_adapter_in_model(config, model, ADAPTER)


def split_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """OSF's layers in a model, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "osf_svd_params"):
            yield name, module


@torch.no_grad()
def keep_orthogonal(model: nn.Module) -> None:
    """Remove from the trained factors the components in the directions of the high part: `U_low -= U_high U_high^T
    U_low`, and likewise for V. peft projects the gradients, which is not enough if an optimizer scales a step element
    by element, as Adam does."""
    for _, layer in split_layers(model):
        factors = layer.osf_svd_params[ADAPTER]
        high, low = layer._osf_U_high, layer._osf_U_low_init[ADAPTER]
        factors["U_low"].copy_(_without_span(factors["U_low"], high[ADAPTER] if ADAPTER in high else None, low))
        high, low = layer._osf_V_high, layer._osf_V_low_init[ADAPTER]
        columns = _without_span(factors["V_low"].t(), high[ADAPTER].t() if ADAPTER in high else None, low.t())
        factors["V_low"].copy_(columns.t())


def _without_span(x: Tensor, high: Tensor | None, low: Tensor) -> Tensor:
    """Columns without their part in the span of `high`; peft stores `high` only if `low` is not its complement."""
    return low @ (low.t() @ x) if high is None else x - high @ (high.t() @ x)


def merge_weights(model: nn.Module) -> None:
    """Merge what was learned into the weights, and restore the linear layers, which then all require a gradient."""
    for name, layer in list(split_layers(model)):
        layer.merge(safe_merge=False, adapter_names=[ADAPTER])
        base = layer.get_base_layer()
        base.weight.requires_grad_(True)
        model.set_submodule(name, base)
    model.__dict__.pop("peft_config", None)
