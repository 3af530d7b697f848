"""peft's names of LoRA factors (`....q.lora_A.<adapter>.weight`), matched by whole path segments, which avoids
accidental matches."""

from __future__ import annotations

from typing import Any

from torch import nn

PARTNER = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
FACTORS = (*PARTNER, *PARTNER.values())


def factor_in(parts: list[str]) -> int | None:
    """The index of the name segment that marks a LoRA factor, if any."""
    return next((i for i, part in enumerate(parts) if part in FACTORS), None)


def is_factor(name: str) -> bool:
    """Is this a LoRA factor's name?"""
    return factor_in(name.split(".")) is not None


def merged_layer(model: nn.Module) -> str | None:
    """The first layer whose adapter is merged into its base."""
    may = ((n, m) for n, m in model.named_modules() if "merged" in m.__dict__ or hasattr(type(m), "merged"))
    return next((n for n, m in may if m.merged is True), None)


def no_pairs(model: Any) -> str | None:
    """Why the factors of a model are not pairs, for the first layer where they are not; None if all are. For experts in
    one parameter (`target_parameters`) peft stores A expert by expert, `[experts * r, in]`, and B rank by rank, `[out,
    r * experts]`, so that row i of A does not belong to column i of B."""
    for name, m in model.named_modules() if isinstance(model, nn.Module) else ():
        if getattr(m, "num_experts", 1) > 1 and hasattr(m, "lora_A") and hasattr(m, "parameter_name"):
            return (
                f"{name}: its LoRA (target_parameters) covers {m.num_experts} experts in one parameter, where rows "
                "of A and columns of B are not pairs; leave that parameter out of target_parameters"
            )
    return None


def starts_at_zero(name: str) -> bool:
    """Is this the factor that peft initialises to zero, so that a new pair changes nothing?"""
    parts = name.split(".")
    at = factor_in(parts)
    return at is not None and parts[at] in ("lora_B", "lora_embedding_A")
